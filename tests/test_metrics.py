"""eval/metrics.py against values worked by hand, published formulas and other implementations."""

import gzip
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from eval.metrics import (
    answer_exact_match,
    answer_f1,
    interval,
    mean,
    normalize_answer,
    pass_at_k,
    translation_metrics,
    wilson,
)

SQUAD = Path(__file__).parent.parent.parent / "shared" / "data" / "squad" / "dev-v1.1.json.gz"


# Question answering


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple, a pear", "apple pear"),
        ("the-end", "theend"),  # punctuation goes first and leaves no space
        ("A.", ""),
        ("Theory of a\tthing\n", "theory of thing"),
        ("“quoted” – caf\u00e9", "“quoted” – caf\u00e9"),  # only ASCII punctuation goes
        ("1,000,000$", "1000000"),
    ],
)
def test_answers_are_normalised_as_squad_does(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    "prediction, answers, exact, f1",
    [
        ("Denver Broncos", ["The Denver Broncos", "Broncos"], True, 1.0),
        ("big red dog", ["the red dog", "cat"], False, 0.8),  # 2 shared of 3 and of 2: 2 * 2 / 5
        ("dog dog cat", ["dog"], False, 0.5),  # a bag: the second dog is not shared
        ("dog dog cat", ["dog dog"], False, 0.8),
        ("in the year 1066", ["1066", "year 1066"], False, 0.8),  # the best answer, not the first
        ("", ["cat"], False, 0.0),
        ("the", ["cat"], False, 0.0),
        ("the", ["a"], True, 0.0),  # both normalise to nothing: v1.1 shares no word (v2 says 1)
        ("1,066", ["1066"], True, 1.0),
    ],
)
def test_exact_match_and_f1_of_answers_worked_by_hand(prediction, answers, exact, f1):
    assert answer_exact_match(prediction, answers) is exact
    assert answer_f1(prediction, answers) == pytest.approx(f1)


@pytest.mark.skipif(not SQUAD.exists(), reason="needs ../shared/data/squad")
def test_a_thousand_noised_real_answers_score_as_in_squads_own_script():
    """evaluate-v1.1.py gave 43.0 and 56.19093342931582 percent for these very predictions."""
    with gzip.open(SQUAD, "rt", encoding="utf-8") as file:
        paragraphs = [p for article in json.load(file)["data"] for p in article["paragraphs"]]
    asked = []
    for p in paragraphs:
        asked += [(p["context"], [a["text"] for a in qa["answers"]]) for qa in p["qas"]]
    rng = random.Random(0)
    exact = f1 = 0
    for context, answers in rng.sample(asked, 1000):
        prediction = noised(rng.choice(answers), context, rng)
        exact += answer_exact_match(prediction, answers)
        f1 += answer_f1(prediction, answers)
    assert exact == 430 and f1 == pytest.approx(561.9093342931582, abs=1e-9)


def noised(answer: str, context: str, rng: random.Random) -> str:
    """What a model might answer: nothing, another case, one word more or less, another span."""
    words = answer.split()
    start = rng.randrange(len(context))
    choices = [answer, answer.upper(), f"The {answer}.", " ".join(words[1:])]
    choices += [" ".join([*words, *context[start:].split()[:2]])]
    choices += ["".join(rng.sample(answer, len(answer))), context[start : start + 30]]
    return rng.choice([*choices, "", f"“{answer}”", f"  {answer}\n"])


# Code


def test_pass_at_k_is_the_share_of_subsets_with_a_right_draw():
    """The definition, counted out: the share of all k draws of n that hold one of c right ones."""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            share = sum(map(any, subsets)) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share)


# Translation

REFERENCES = [
    "Un chien court dans l'herbe.",
    "Deux hommes parlent.",
    "Une femme en rouge lit un livre.",
    "Il pleut.",
] * 5
PREDICTIONS = [REFERENCES[0], "Deux hommes rient.", "Une femme lit un gros livre.", ""] * 5


def test_the_bootstrap_of_bleu_is_close_to_sacrebleus():
    """Other draws of the same size, so to within the noise of 2,000 of them."""
    pytest.importorskip("sacrebleu")
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    systems = [("base", REFERENCES), ("ours", PREDICTIONS)]
    _, results = PairedTest(systems, {"bleu": BLEU(references=[REFERENCES])}, None, "bs", 2000)()
    ours = translation_metrics(PREDICTIONS, REFERENCES)["bleu"]
    low, high, how = interval(ours, 2000, 1)
    assert how == "bootstrap" and low < ours.value < high
    assert (high - low) / 2 == pytest.approx(results["BLEU"][1].ci, rel=0.15)


# Chance


@pytest.mark.parametrize(
    "hits, n, low, high",
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
    ],
)
def test_wilson_equals_published_values(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_a_share_has_wilsons_interval_and_a_mean_the_normal_one_in_the_limit():
    assert interval(mean([1] * 81 + [0] * 182), 100, 0) == (*wilson(81, 263), "wilson")
    values = np.random.default_rng(0).normal(5, 2, size=400)
    low, high, how = interval(mean(values), 4000, 0)
    half = 1.96 * values.std() / 20
    expected = (values.mean() - half, values.mean() + half)
    assert how == "bootstrap" and (low, high) == pytest.approx(expected, abs=0.02)
