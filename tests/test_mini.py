"""data/mini.py: the languages are right, the splits are clean, the scorers are exact."""

import re
from collections import Counter

import numpy as np
import pytest

from data import mini
from data.loader import bucketed_epoch, open_set
from data.mini import TASKS, english, examples, french, score_code, score_qa, score_translation, task_of

NUMBERS = {
    0: ("zero", "zéro"),
    1: ("one", "un"),
    16: ("sixteen", "seize"),
    17: ("seventeen", "dix-sept"),
    20: ("twenty", "vingt"),
    21: ("twenty-one", "vingt et un"),
    22: ("twenty-two", "vingt-deux"),
    61: ("sixty-one", "soixante et un"),
    70: ("seventy", "soixante-dix"),
    71: ("seventy-one", "soixante et onze"),
    72: ("seventy-two", "soixante-douze"),
    77: ("seventy-seven", "soixante-dix-sept"),
    80: ("eighty", "quatre-vingts"),
    81: ("eighty-one", "quatre-vingt-un"),
    90: ("ninety", "quatre-vingt-dix"),
    91: ("ninety-one", "quatre-vingt-onze"),
    99: ("ninety-nine", "quatre-vingt-dix-neuf"),
    100: ("one hundred", "cent"),
    101: ("one hundred one", "cent un"),
    180: ("one hundred eighty", "cent quatre-vingts"),
    200: ("two hundred", "deux cents"),
    201: ("two hundred one", "deux cent un"),
    221: ("two hundred twenty-one", "deux cent vingt et un"),
    271: ("two hundred seventy-one", "deux cent soixante et onze"),
    280: ("two hundred eighty", "deux cent quatre-vingts"),
    999: ("nine hundred ninety-nine", "neuf cent quatre-vingt-dix-neuf"),
    1000: ("one thousand", "mille"),
    1001: ("one thousand one", "mille un"),
    1100: ("one thousand one hundred", "mille cent"),
    1200: ("one thousand two hundred", "mille deux cents"),
    2000: ("two thousand", "deux mille"),
    2080: ("two thousand eighty", "deux mille quatre-vingts"),
    4444: ("four thousand four hundred forty-four", "quatre mille quatre cent quarante-quatre"),
    9999: ("nine thousand nine hundred ninety-nine", "neuf mille neuf cent quatre-vingt-dix-neuf"),
}


@pytest.mark.parametrize("n", NUMBERS)
def test_numbers_are_spelled_as_in_a_grammar(n):
    assert (english(n), french(n)) == NUMBERS[n]


def test_no_two_numbers_share_a_spelling():
    """Also above MAX_NUMBER, where the data ends: the two functions are right on their own."""
    assert len({english(n) for n in range(10_000)}) == len({french(n) for n in range(10_000)}) == 10_000


@pytest.fixture(scope="module")
def items():
    return {(task, split): examples(f"mini_{task}", split) for task in TASKS for split in ("train", "valid")}


@pytest.mark.parametrize("task", TASKS)
def test_held_out_items_are_new_but_made_of_known_words(items, task):
    """Of a number in digits, such as a room, the digits are what is known."""
    train, valid = items[task, "train"], items[task, "valid"]
    assert len(valid) >= 500
    prefixes = [item["prefix"] for item in train + valid]
    assert len(set(prefixes)) == len(prefixes)
    for side in ("prefix", "target"):
        words = [{word for item in part for word in re.findall(r"\d|[^\s\d]+", item[side])} for part in (train, valid)]
        assert words[1] <= words[0]


def test_held_out_programs_are_new_under_any_wording(items):
    """ "double" and "times 2" ask for the same function, so the split is by the function."""
    assert not {i["target"] for i in items["code", "train"]} & {i["target"] for i in items["code", "valid"]}


@pytest.mark.parametrize("task", TASKS)
def test_items_fit_the_one_length_of_all_four_sets(items, task):
    both = items[task, "train"] + items[task, "valid"]
    assert max(len(item["prefix"].encode()) for item in both) <= mini.PREFIX_LENGTH
    assert max(len(item["target"].encode()) for item in both) <= mini.TARGET_LENGTH - 2  # separator, closing pad


@pytest.mark.parametrize("task", TASKS)
def test_scorers_accept_the_answer_and_refuse_another(items, task):
    valid = items[task, "valid"]
    for item in valid[:50]:
        other = next(o for o in valid if o["target"] != item["target"])
        assert TASKS[task].score(item["target"], item)
        assert not TASKS[task].score(other["target"], item)
        assert not TASKS[task].score("", item)


def test_answers_are_spans_of_the_facts_that_the_question_selects(items):
    for item in items["qa", "valid"]:
        facts, question = item["prefix"].removeprefix("qa ").rsplit(". ", 1)
        rooms = dict(fact.split() for fact in facts.split(". "))
        assert list(rooms) == mini.NAMES
        assert item["target"] == rooms[question.removesuffix("?")]


def test_programs_do_what_their_sentence_says(items):
    """An oracle of its own: the steps applied one by one to numbers, against the generated source."""
    numbers = list(range(-3, 12))
    step = {
        "add": lambda x, n: x + n,
        "subtract": lambda x, n: x - n,
        "times": lambda x, n: x * n,
        "double": lambda x: x * 2,
        "triple": lambda x: x * 3,
        "square": lambda x: x * x,
        "negate": lambda x: -x,
    }

    def apply(sentence, x):
        for words in map(str.split, sentence.split(" then ")):
            x = step[words[0]](x, *map(int, words[1:]))
        return x

    for item in items["code", "valid"][:400]:
        sentence, scope = item["prefix"].removeprefix("py "), {}
        exec(item["target"], scope)  # noqa: S102  our own generated text, not a model's
        outer, colon, steps = sentence.partition(": ")
        if not colon:
            assert [scope["f"](x) for x in numbers] == [apply(sentence, x) for x in numbers]
            continue
        answer = [apply(steps, x) for x in numbers]
        assert scope["f"](numbers) == {"each": list, "sum": sum, "max": max}[outer](answer)


def test_code_is_compared_by_syntax_and_not_by_spelling():
    item = {"target": "def f(x): return (x + 7) * 2"}
    for same in ("def f(x):\n    return (x+7)*2\n", "def f(x): return ((x + 7)) * 2  # twice"):
        assert score_code(same, item)
    for other in (
        "def f(x): return x + 7 * 2",
        "def f(y): return (y + 7) * 2",
        "return (x + 7) * 2",
        "((" * 5000,
    ):
        assert not score_code(other, item)
    assert not score_code("def f(x): return (x + 7) * 2\0", item)


def test_spaces_are_forgiven_where_they_mean_nothing():
    assert score_translation(" deux cents \n", {"target": "deux cents"})
    assert not score_translation("deux  cents", {"target": "deux cents"})
    assert score_qa("The  Red hat.", {"target": "red hat"})
    assert not score_qa("hat", {"target": "red hat"})


def test_the_mix_is_in_equal_shares_and_names_its_tasks(items):
    """The shorter lists are repeated, whole and evenly, so that the mix holds every item of each task."""
    for split in ("train", "valid"):
        prefixes = {task: Counter() for task in TASKS}
        for item in examples("mini", split):
            prefixes[task_of("mini", item["prefix"])][item["prefix"]] += 1
        longest = max(len(items[task, split]) for task in TASKS)
        for task, seen in prefixes.items():
            assert seen.total() == longest
            assert set(seen) == {item["prefix"] for item in items[task, split]}
            assert max(seen.values()) - min(seen.values()) <= 1
    assert task_of("mini_qa") == "qa"
    for name, prefix in (("mini", "who?"), ("toy_copy", "qa x")):
        with pytest.raises(ValueError, match="no mini task"):
            task_of(name, prefix)
    with pytest.raises(ValueError, match="'test'"):
        examples("mini", "test")


@pytest.mark.parametrize("bucket", [8, 32])
def test_most_bucketed_runs_of_the_mix_need_no_padding(bucket):
    lengths = np.array([len(item["prefix"]) for item in examples("mini", "train")])
    plan = bucketed_epoch(lengths, 32, bucket, np.random.default_rng(0)).reshape(-1, bucket)
    assert np.mean([len(set(lengths[run])) == 1 for run in plan]) > 0.9


@pytest.mark.slow  # builds every set, 4 s
def test_the_sets_are_the_same_on_every_machine(tmp_path, capsys):
    mini.main([f"--out={tmp_path}"])
    sets = {name: open_set(tmp_path / name, "valid") for name in ("mini", "mini_translation", "mini_qa", "mini_code")}
    assert {(s.target_length, s.block_size) for s in sets.values()} == {(41, 88)}
    assert sets["mini_qa"].text(0) == tuple(examples("mini_qa", "valid")[0].values())
    assert {name: s.fingerprint for name, s in sets.items()} == FINGERPRINTS
    assert capsys.readouterr().out.count("\n") == 4


FINGERPRINTS = {
    "mini": "6a780fe9309bbf66",
    "mini_translation": "33afc98c4369fef2",
    "mini_qa": "f315b8b36f3b2070",
    "mini_code": "76317bf98b6745e6",
}
