"""The paper's three tasks in miniature: translation, extractive question answering, code synthesis.

    python -m data.mini [--out=out/data]

    translation   fr nine hundred eighty-one                     -> neuf cent quatre-vingt-un
    qa            qa ann 4821. bob 9035. eva 1177. bob?          -> 9035
    code          py add 7 then double                           -> def f(x): return (x + 7) * 2

Everything is generated, is the same on every machine, and has an exact scorer. A held-out item tests composition: its
words (of a room number: the digits) all occur in training, the item itself does not. Writes mini (the three in equal
shares), mini_translation, mini_qa and mini_code; all four have one target_length and one block_size, so a model of one
fits the others.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import NamedTuple

from configurator import configure, run
from data.loader import OUT, write_pairs
from data.syntax import same_code
from data.tokenizer import get_tokenizer

PREFIX_LENGTH = 47  # bytes; room for the longest prefix, which has 45
TARGET_LENGTH = 41  # bytes, separator included; the longest target has 41 - 2, so every text ends with a pad
HELD_OUT = 12  # percent of the items
MAX_NUMBER = 1999  # more digits add length, not ideas, and length is what a laptop pays for
LONG_PROGRAMS = 15  # percent of the three-step programs that are used; all would drown the shorter ones
HELD_OUT_NUMBERS = 29  # percent of those from 100 on: more than 500
N_QUESTIONS = 12_000


@dataclass
class MiniConfig:
    out: str = OUT  # the folder the sets go into


# Translation: numbers, English to French

ENGLISH = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
ENGLISH_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
FRENCH = [
    "zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf", "dix", "onze", "douze",
    "treize", "quatorze", "quinze", "seize", "dix-sept", "dix-huit", "dix-neuf",
]  # fmt: skip
FRENCH_TENS = [
    "-", "-", "vingt", "trente", "quarante", "cinquante", "soixante", "soixante", "quatre-vingt", "quatre-vingt",
]  # fmt: skip


def english(n: int) -> str:
    """0 to 9999 in American English, without "and": 2101 -> "two thousand one hundred one"."""
    if n >= 1000:
        return _join(f"{ENGLISH[n // 1000]} thousand", english(n % 1000) if n % 1000 else "")
    if n >= 100:
        return _join(f"{ENGLISH[n // 100]} hundred", english(n % 100) if n % 100 else "")
    if n < 20:
        return ENGLISH[n]
    return ENGLISH_TENS[n // 10] + (f"-{ENGLISH[n % 10]}" if n % 10 else "")


def french(n: int) -> str:
    """0 to 9999 in the French of France, traditional spelling (hyphens below one hundred only, none beside "et").

    "cent" and "quatre-vingt" take an s when multiplied and last: deux cents, deux cent un. "mille" never changes.
    """
    if n >= 1000:
        return _join("mille" if n < 2000 else f"{FRENCH[n // 1000]} mille", french(n % 1000) if n % 1000 else "")
    if n >= 100:
        hundreds = "cent" if n < 200 else f"{FRENCH[n // 100]} cent"
        if n >= 200 and n % 100 == 0:
            return hundreds + "s"
        return _join(hundreds, french(n % 100) if n % 100 else "")
    if n < 20:
        return FRENCH[n]
    tens, ones = divmod(n, 10)
    if tens in (7, 9):  # seventy is sixty and ten, ninety is four twenties and ten
        ones += 10
    if n == 80:
        return "quatre-vingts"
    if ones == 0:
        return FRENCH_TENS[tens]
    if ones in (1, 11) and tens < 8:
        return f"{FRENCH_TENS[tens]} et {FRENCH[ones]}"
    return f"{FRENCH_TENS[tens]}-{FRENCH[ones]}"


def _join(head: str, tail: str) -> str:
    return f"{head} {tail}" if tail else head


def translation_examples(split: str) -> list[dict]:
    """Numbers 0 to MAX_NUMBER. Below 100 all are for training: they are the words that the others are made of."""
    held_out = {n for n in range(100, MAX_NUMBER + 1) if _percent(f"number {n}") < HELD_OUT_NUMBERS}
    numbers = [n for n in range(MAX_NUMBER + 1) if (n in held_out) == (split == "valid")]
    return _shuffled([{"prefix": f"fr {english(n)}", "target": french(n)} for n in numbers])


def score_translation(prediction: str, example: dict) -> bool:
    """Exact match, spaces at the ends aside."""
    return prediction.strip() == example["target"]


# Question answering: three people, the room of each, and a question about one of them

NAMES = ["ann", "bob", "eva"]  # always in this order: any order takes a small network ten times as long to learn


def qa_examples(split: str) -> list[dict]:
    """Three facts, a question about one of them; the answer is a span of the prefix and cannot be known otherwise."""
    items = {}  # by prefix: no item twice
    for i in range(N_QUESTIONS):
        pick = _Picker(f"qa {i}")
        facts = [(name, "".join(pick.one(list("0123456789")) for _ in range(4))) for name in NAMES]
        name, room = pick.one(facts)
        prefix = " ".join(["qa", *(f"{n} {r}." for n, r in facts), f"{name}?"])
        items[prefix] = {"prefix": prefix, "target": room}
    return [item for prefix, item in items.items() if _split_of(prefix) == split]


def score_qa(prediction: str, example: dict) -> bool:
    """Exact match after lower-casing and dropping punctuation, articles and double spaces (as SQuAD does)."""
    return _normal(prediction) == _normal(example["target"])


def _normal(text: str) -> list[str]:
    return [word for word in re.sub(r"[^\w\s]", " ", text.lower()).split() if word not in ("a", "an", "the")]


# Code: a sentence that names steps, and the function that does them

# Verb -> (template, how tightly it binds, how tightly its operand must): brackets stand where Python needs them.
# The higher the number the tighter: 1 is + and -, 2 is *, 3 is the minus sign, 4 is **, 5 is a name.
STEPS = (
    {f"add {n}": (f"{{}} + {n}", 1, 1) for n in range(1, 10)}
    | {f"subtract {n}": (f"{{}} - {n}", 1, 1) for n in range(1, 10)}
    | {f"times {n}": (f"{{}} * {n}", 2, 2) for n in range(2, 10)}
    | {"double": ("{} * 2", 2, 2), "triple": ("{} * 3", 2, 2), "square": ("{} ** 2", 4, 5), "negate": ("-{}", 3, 5)}
)
OUTERS = {"each": "[{} for x in a]", "sum": "sum({} for x in a)", "max": "max({} for x in a)"}


def code_examples(split: str) -> list[dict]:
    """One to three steps on a number, or one or two on every number of a list.

    Split by the program and not by the sentence: "double" and "times 2" ask for the same one.
    """
    programs = []
    for steps in [s for n in (1, 2, 3) for s in product(STEPS, repeat=n)]:
        sentence = " then ".join(steps)
        if len(steps) < 3 or _percent(f"long {sentence}") < LONG_PROGRAMS:
            programs.append((sentence, f"def f(x): return {_expression(steps)}"))
    for outer, steps in product(OUTERS, [s for n in (1, 2) for s in product(STEPS, repeat=n)]):
        body = OUTERS[outer].format(_expression(steps))
        programs.append((f"{outer}: {' then '.join(steps)}", f"def f(a): return {body}"))
    return _shuffled(
        [
            {"prefix": f"py {sentence}", "target": code}
            for sentence, code in programs
            if len(code) < TARGET_LENGTH - 1 and _split_of(code) == split
        ]
    )


def _expression(steps: tuple[str, ...]) -> str:
    """("add 7", "double") -> "(x + 7) * 2"."""
    text, binds = "x", 5
    for step in steps:
        template, step_binds, wants = STEPS[step]
        text, binds = template.format(text if binds >= wants else f"({text})"), step_binds
    return text


DOES = {
    "add": lambda x, n: x + n,
    "subtract": lambda x, n: x - n,
    "times": lambda x, n: x * n,
    "double": lambda x: x * 2,
    "triple": lambda x: x * 3,
    "square": lambda x: x * x,
    "negate": lambda x: -x,
}  # what a step does to a number
INPUTS = range(-3, 12)  # more than the degree of any program


def code_tests(example: dict) -> str:
    """Unit tests of a program: Python that raises where f is wrong. From the sentence, never from a program.

    Of a list each number alone, and all together.
    """
    outer, colon, steps = example["prefix"].removeprefix("py ").rpartition(": ")
    if not colon:
        return f"for x, y in {[(x, _apply(steps, x)) for x in INPUTS]}:\n    assert f(x) == y\n"
    cases = []
    for numbers in [*([x] for x in INPUTS), [*INPUTS][::-1]]:
        answers = [_apply(steps, x) for x in numbers]
        cases.append((numbers, {"each": list, "sum": sum, "max": max}[outer](answers)))
    return f"for a, y in {cases}:\n    assert f(a) == y\n"


def _apply(steps: str, x: int) -> int:
    """("add 7 then double", 1) -> 16."""
    for verb, *numbers in map(str.split, steps.split(" then ")):
        x = DOES[verb](x, *map(int, numbers))
    return x


def score_code(prediction: str, example: dict) -> bool:
    """Equal syntax trees: spaces, comments and redundant brackets do not count. Nothing is run."""
    return same_code(prediction, example["target"])


# The three together


class Task(NamedTuple):
    examples: Callable[[str], list[dict]]  # "train" or "valid" -> [{"prefix": text, "target": text}, ..]
    score: Callable[[str, dict], bool]  # (prediction, example) -> right or wrong


TASKS = {
    "translation": Task(translation_examples, score_translation),
    "qa": Task(qa_examples, score_qa),
    "code": Task(code_examples, score_code),
}
TAGS = {"fr": "translation", "qa": "qa", "py": "code"}  # how a prefix begins


def task_of(set_name: str, prefix: str = "") -> str:
    """The task of a set, "mini_qa" -> "qa"; in the mixed set "mini" the prefix says it. ValueError if neither does."""
    task = TAGS.get(prefix[:2]) if set_name == "mini" else set_name.removeprefix("mini_")
    if task not in TASKS:
        raise ValueError(
            f"no mini task for set {set_name!r}, prefix {prefix!r}; sets: mini, mini_{', mini_'.join(TASKS)}"
        )
    return task


def examples(set_name: str, split: str) -> list[dict]:
    """The items of a set, in file order: dicts with prefix and target.

    In "mini" the three tasks take turns; the shorter lists start over until the longest is through.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"split must be 'train' or 'valid', got {split!r}")
    if set_name == "mini":
        lists = [task.examples(split) for task in TASKS.values()]
        longest = max(len(items) for items in lists)
        return [item for turn in zip(*(islice(cycle(items), longest) for items in lists)) for item in turn]
    return TASKS[task_of(set_name)].examples(split)


def _percent(key: str) -> int:
    """0 to 99, drawn by the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100


def _split_of(key: str) -> str:
    return "valid" if _percent(key) < HELD_OUT else "train"


def _shuffled(items: list[dict]) -> list[dict]:
    """In an order that means nothing, so that the first few hundred are a fair sample."""
    return sorted(items, key=lambda item: hashlib.sha256(item["prefix"].encode()).digest())


class _Picker:
    """Draws that depend on the key alone; Python and numpy promise their generators' streams for one version only."""

    def __init__(self, key: str):
        self.number = int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")  # 256 bits, some 40 are used

    def one(self, options: list):
        self.number, i = divmod(self.number, len(options))
        return options[i]


def main(argv: list[str]) -> None:
    cfg = configure(MiniConfig, argv)
    encode = get_tokenizer("bytes").encode
    for name in ["mini", *(f"mini_{task}" for task in TASKS)]:
        splits = {
            split: [(encode(item["prefix"]), encode(item["target"])) for item in examples(name, split)]
            for split in ("train", "valid")
        }
        write_pairs(
            Path(cfg.out) / name,
            splits,
            tokenizer_name="bytes",
            target_length=TARGET_LENGTH,
            block_size=PREFIX_LENGTH + TARGET_LENGTH,
            command=f"python -m data.mini --out={cfg.out}",
        )
        both = [pair for pairs in splits.values() for pair in pairs]
        print(
            f"{cfg.out}/{name}: {len(splits['train']):,} pairs, {len(splits['valid']):,} held out; "
            f"prefix up to {max(len(p) for p, _ in both)} bytes, target up to {max(len(t) for _, t in both)}"
        )


if __name__ == "__main__":
    run(main)
