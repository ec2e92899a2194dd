"""Copy, reverse, sort: a tiny model reaches 99% on these strings in less than a minute.

    python -m data.toy [--out=out/data]

    toy_copy  hello -> hello      toy_reverse  hello -> olleh      toy_sort  hello -> ehllo

Random strings of 1 to 10 lower-case letters, the same on every machine.
"""

from configurator import run
from data.sources import OutConfig, hash_number, write_generated

LONGEST = 10  # letters
TARGET_LENGTH = LONGEST + 2  # bytes: separator, string, and a pad after the longest string
N_STRINGS = 21_000  # drawn; about 17,000 are different
HELD_OUT = 6  # percent of the strings
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASKS = {"copy": str, "reverse": lambda s: s[::-1], "sort": lambda s: "".join(sorted(s))}


def strings(split: str) -> list[str]:
    """Return different strings of 1 to LONGEST letters. No string is in both splits."""
    drawn = {}
    for i in range(N_STRINGS):
        number, length = divmod(hash_number(f"toy {i}"), LONGEST)
        drawn["".join(LETTERS[number // 26**k % 26] for k in range(length + 1))] = None
    # By a hash and not by place, because the 26 one-letter strings are all drawn early.
    return [s for s in drawn if (hash_number(f"toy {s}") % 100 < HELD_OUT) == (split == "valid")]


def examples(set_name: str, split: str) -> list[dict]:
    """Return the examples of toy_copy, toy_reverse or toy_sort in file order."""
    derive = TASKS[set_name.removeprefix("toy_")]
    return [{"prefix": s, "target": derive(s)} for s in strings(split)]


def main(argv: list[str]) -> None:
    write_generated(argv, [f"toy_{task}" for task in TASKS], examples, TARGET_LENGTH, LONGEST)


if __name__ == "__main__":
    run(main, OutConfig)
