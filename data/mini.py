"""The paper's three tasks in miniature: translation, extractive question answering, code.

    python -m data.mini [--out=out/data]

    translation   fr nine hundred eighty-one                     -> neuf cent quatre-vingt-un
    qa            qa ann 4821. bob 9035. eva 1177. bob?          -> 9035
    code          py add 7 then double                           -> def f(x): return (x + 7) * 2

All examples are generated. A held-out example tests composition: all its words (or digits) occur
in training, but not together. The set "mini" holds the three tasks in equal shares.
"""

import ast
import re
from collections.abc import Callable
from itertools import cycle, islice, product
from typing import NamedTuple

from configurator import run
from data.sources import OutConfig, hash_number, percent, write_generated
from data.syntax import parse_python

PREFIX_LENGTH = 47  # bytes; the longest prefix has 45
TARGET_LENGTH = 41  # bytes with separator; the longest target has 39, so every text ends with a pad
HELD_OUT = 12  # percent of the questions and programs
MAX_NUMBER = 1999
HELD_OUT_NUMBERS = 29  # percent of the numbers from 100 on
LONG_PROGRAMS = 15  # percent of the programs of three steps; all of them would outnumber the others
N_QUESTIONS = 12_000

# Translation: numbers from English to French. First the words of 0 to 99.
ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
for ten in "twenty thirty forty fifty sixty seventy eighty ninety".split():
    ENGLISH += [ten, *(f"{ten}-{one}" for one in ENGLISH[1:10])]
FRENCH = (
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze "
    "quinze seize dix-sept dix-huit dix-neuf"
).split()
for ten in "vingt trente quarante cinquante soixante".split():  # seventy is sixty and ten
    ones = FRENCH[2:20] if ten == "soixante" else FRENCH[2:10]
    FRENCH += [ten, f"{ten} et un", *(f"{ten}-{one}" for one in ones)]
FRENCH[71] = "soixante et onze"
FRENCH += ["quatre-vingts", *(f"quatre-vingt-{one}" for one in FRENCH[1:20])]


def english(n: int) -> str:
    """Spell 0 to 9999 in American English: 2101 -> "two thousand one hundred one"."""
    if n < 100:
        return ENGLISH[n]
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = f" {english(n % size)}" if n % size else ""
    return f"{ENGLISH[n // size]} {name}{rest}"


def french(n: int) -> str:
    """Spell 0 to 9999 in the French of France, with traditional hyphens.

    "cent" and "quatre-vingt" take an s if multiplied and last: deux cents, deux cent un.
    """
    if n < 100:
        return FRENCH[n]
    size, name = (1000, "mille") if n >= 1000 else (100, "cent")
    times = f"{FRENCH[n // size]} " if n >= 2 * size else ""
    plural = "s" if times and name == "cent" and n % size == 0 else ""
    rest = f" {french(n % size)}" if n % size else ""
    return f"{times}{name}{plural}{rest}"


def translation_examples(split: str) -> list[dict]:
    """Return the numbers 0 to MAX_NUMBER. All below 100 are for training."""
    numbers = [
        n
        for n in range(MAX_NUMBER + 1)
        if (n >= 100 and percent(f"number {n}") < HELD_OUT_NUMBERS) == (split == "valid")
    ]
    return _shuffled([{"prefix": f"fr {english(n)}", "target": french(n)} for n in numbers])


def score_translation(prediction: str, example: dict) -> bool:
    """Exact match, without spaces at the ends."""
    return prediction.strip() == example["target"]


# Question answering: three people, the room of each, and a question about one of them
NAMES = ["ann", "bob", "eva"]  # a fixed order: small networks learn it ten times faster


def qa_examples(split: str) -> list[dict]:
    """Return three facts and a question. The answer is a span of the prefix."""
    targets = {}  # by prefix: no example twice
    for i in range(N_QUESTIONS):
        number = hash_number(f"qa {i}")
        rooms = {}
        for name in NAMES:
            number, digits = divmod(number, 10_000)
            rooms[name] = f"{digits:04}"[::-1]
        asked = NAMES[number % len(NAMES)]
        facts = " ".join(f"{name} {room}." for name, room in rooms.items())
        targets[f"qa {facts} {asked}?"] = rooms[asked]
    return [{"prefix": p, "target": t} for p, t in targets.items() if _is_in(split, p)]


def score_qa(prediction: str, example: dict) -> bool:
    """Exact match after SQuAD's normalisation: no case, punctuation or articles."""
    return _normalized(prediction) == _normalized(example["target"])


def _normalized(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [word for word in words if word not in ("a", "an", "the")]


# Code: a sentence that names steps, and the function that performs them.
# Step -> (template, precedence of the result, precedence that its operand needs). Higher binds
# tighter: 1 is + and -, 2 is *, 3 is the unary minus, 4 is **, 5 is a name.
STEPS = {f"add {n}": (f"{{}} + {n}", 1, 1) for n in range(1, 10)}
STEPS |= {f"subtract {n}": (f"{{}} - {n}", 1, 1) for n in range(1, 10)}
STEPS |= {f"times {n}": (f"{{}} * {n}", 2, 2) for n in range(2, 10)}
STEPS |= {"double": ("{} * 2", 2, 2), "triple": ("{} * 3", 2, 2)}
STEPS |= {"square": ("{} ** 2", 4, 5), "negate": ("-{}", 3, 5)}
OUTERS = {"each": "[{} for x in a]", "sum": "sum({} for x in a)", "max": "max({} for x in a)"}


def code_examples(split: str) -> list[dict]:
    """Return programs: 1 to 3 steps on a number, or 1 or 2 steps on every number of a list.

    Split by program and not by sentence: "double" and "times 2" ask for the same program.
    """
    programs = {}  # by sentence
    for steps in [s for n in (1, 2, 3) for s in product(STEPS, repeat=n)]:
        sentence = " then ".join(steps)
        value = _expression(steps)
        if len(steps) < 3 or percent(f"long {sentence}") < LONG_PROGRAMS:
            programs[sentence] = f"def f(x): return {value}"
        for outer in OUTERS if len(steps) < 3 else ():
            programs[f"{outer}: {sentence}"] = f"def f(a): return {OUTERS[outer].format(value)}"
    fitting = {s: c for s, c in programs.items() if len(c) < TARGET_LENGTH - 1 and _is_in(split, c)}
    return _shuffled([{"prefix": f"py {s}", "target": code} for s, code in fitting.items()])


def _expression(steps: tuple[str, ...]) -> str:
    """("add 7", "double") -> "(x + 7) * 2"."""
    text = "x"
    precedence = 5
    for step in steps:
        template, result, operand = STEPS[step]
        text = template.format(text if precedence >= operand else f"({text})")
        precedence = result
    return text


FUNCTIONS = {
    "add": lambda x, n: x + n,
    "subtract": lambda x, n: x - n,
    "times": lambda x, n: x * n,
    "double": lambda x: x * 2,
    "triple": lambda x: x * 3,
    "square": lambda x: x * x,
    "negate": lambda x: -x,
}
INPUTS = range(-3, 12)  # more than the degree of any program


def code_tests(example: dict) -> str:
    """Return Python that raises if f is wrong. It is made from the sentence, not from a program."""
    outer, colon, steps = example["prefix"].removeprefix("py ").rpartition(": ")
    if not colon:
        return f"for x, y in {[(x, _apply(steps, x)) for x in INPUTS]}:\n    assert f(x) == y\n"
    collect = {"each": list, "sum": sum, "max": max}[outer]
    inputs = [*([x] for x in INPUTS), [*INPUTS][::-1]]
    cases = [(numbers, collect([_apply(steps, x) for x in numbers])) for numbers in inputs]
    return f"for a, y in {cases}:\n    assert f(a) == y\n"


def _apply(steps: str, x: int) -> int:
    """("add 7 then double", 1) -> 16."""
    for verb, *numbers in map(str.split, steps.split(" then ")):
        x = FUNCTIONS[verb](x, *map(int, numbers))
    return x


def score_code(prediction: str, example: dict) -> bool:
    """Equal syntax trees: spaces, comments and redundant brackets do not count. Nothing is run."""
    trees = [parse_python(text) for text in (prediction, example["target"])]
    try:
        return None not in trees and ast.dump(trees[0]) == ast.dump(trees[1])
    except RecursionError:
        return False


class Task(NamedTuple):
    examples: Callable[[str], list[dict]]  # "train" or "valid" -> [{"prefix": .., "target": ..}]
    score: Callable[[str, dict], bool]  # (prediction, example) -> whether it is right


TASKS = {
    "translation": Task(translation_examples, score_translation),
    "qa": Task(qa_examples, score_qa),
    "code": Task(code_examples, score_code),
}
TAGS = {"fr": "translation", "qa": "qa", "py": "code"}  # the first word of a prefix


def examples(set_name: str, split: str) -> list[dict]:
    """Return the examples of a data set in file order.

    In "mini" the three tasks alternate. The shorter lists repeat until the longest ends.
    """
    if set_name != "mini":
        return TASKS[set_name.removeprefix("mini_")].examples(split)
    lists = [task.examples(split) for task in TASKS.values()]
    longest = max(map(len, lists))
    return [item for turn in zip(*(islice(cycle(x), longest) for x in lists)) for item in turn]


def _is_in(split: str, key: str) -> bool:
    return (percent(key) < HELD_OUT) == (split == "valid")


def _shuffled(items: list[dict]) -> list[dict]:
    """Sort by a hash, so that the first few hundred are a fair sample."""
    return sorted(items, key=lambda item: hash_number(item["prefix"]))


def main(argv: list[str]) -> None:
    names = ["mini", *(f"mini_{task}" for task in TASKS)]
    write_generated(argv, names, examples, TARGET_LENGTH, PREFIX_LENGTH)


if __name__ == "__main__":
    run(main, OutConfig)
