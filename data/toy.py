"""Copy, reverse, sort: strings on which a tiny model reaches 99% in less than a minute.

    python -m data.toy [--out=out/data]

    toy_copy  hello -> hello      toy_reverse  hello -> olleh      toy_sort  hello -> ehllo

Random lower-case strings of 1 to 10 letters, the same on every machine.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from configurator import configure, run
from data.loader import OUT, write_pairs
from data.tokenizer import get_tokenizer

LONGEST = 10  # letters
TARGET_LENGTH = LONGEST + 2  # bytes: separator, string, and a pad that ends even the longest
N_STRINGS = 21_000  # drawn; some 17,000 are different, for there are few short ones
HELD_OUT = 6  # percent of the strings
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TASKS = {"copy": lambda s: s, "reverse": lambda s: s[::-1], "sort": lambda s: "".join(sorted(s))}


@dataclass
class ToyConfig:
    out: str = OUT  # the folder the sets go into


def strings(split: str) -> list[str]:
    """Different strings of 1 to LONGEST letters, lengths about even; no string is in both splits."""
    drawn = dict.fromkeys(_string(i) for i in range(N_STRINGS))
    # Held out by a hash of the string and not by place: the 26 one-letter strings are all among the first drawn.
    return [s for s in drawn if (_number(s) % 100 < HELD_OUT) == (split == "valid")]


def _number(key: str) -> int:
    """256 bits drawn by the key alone, the same on every machine; numpy's generators promise that for one version."""
    return int.from_bytes(hashlib.sha256(f"toy {key}".encode()).digest(), "big")


def _string(i: int) -> str:
    number, length = divmod(_number(str(i)), LONGEST)
    return "".join(LETTERS[number // 26**k % 26] for k in range(length + 1))


def examples(set_name: str, split: str) -> list[dict]:
    """The items of toy_copy, toy_reverse or toy_sort, in file order: dicts with prefix and target."""
    task = set_name.removeprefix("toy_")
    if task not in TASKS or split not in ("train", "valid"):
        raise ValueError(f"want toy_{', toy_'.join(TASKS)} and 'train' or 'valid', got {set_name!r} and {split!r}")
    return [{"prefix": s, "target": TASKS[task](s)} for s in strings(split)]


def score(prediction: str, example: dict) -> bool:
    """Exact match."""
    return prediction == example["target"]


def main(argv: list[str]) -> None:
    cfg = configure(ToyConfig, argv)
    encode = get_tokenizer("bytes").encode
    for name in (f"toy_{task}" for task in TASKS):
        splits = {
            split: [(encode(item["prefix"]), encode(item["target"])) for item in examples(name, split)]
            for split in ("train", "valid")
        }
        write_pairs(
            Path(cfg.out) / name,
            splits,
            tokenizer_name="bytes",
            target_length=TARGET_LENGTH,
            block_size=LONGEST + TARGET_LENGTH,
            command=f"python -m data.toy --out={cfg.out}",
        )
        print(f"{cfg.out}/{name}: {len(splits['train']):,} pairs, {len(splits['valid']):,} held out")


if __name__ == "__main__":
    run(main)
