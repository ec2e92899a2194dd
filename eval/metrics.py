"""The metrics of all evaluations: pure functions of numbers and strings.

The score of a whole set is a Metric: one row of numbers per item, and the score of their sum.
Means and BLEU both have this form, so one bootstrap serves all.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# Question answering


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces: 'The  Tower!' -> 'tower'.

    The order is that of SQuAD v1.1 (arXiv 1606.05250, section 6.1): 'the-end' keeps its 'the'.
    """
    bare = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(re.sub(r"\b(?:an?|the)\b", " ", bare).split())


def answer_exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Return whether the prediction equals one of the answers, all normalised."""
    return normalize_answer(prediction) in map(normalize_answer, answers)


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of the bags of normalised words, the best over the answers.

    'big red dog', ['the red dog', 'cat'] -> 0.8: two words shared, of three and of two. Two empty
    texts share no word: 0.
    """
    ours = normalize_answer(prediction).split()
    best = 0.0
    for answer in answers:
        theirs = normalize_answer(answer).split()
        shared = (Counter(ours) & Counter(theirs)).total()
        if shared:
            best = max(best, 2 * shared / (len(ours) + len(theirs)))
    return best


# Code


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate 1 - C(n - c, k) / C(n, k) from n samples of which c pass.

    Codex (arXiv 2107.03374), equation 1. Python's integers are exact for any n.
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


# Scores of a set


class Metric(NamedTuple):
    """A score of N items: score(sum of their rows)."""

    rows: np.ndarray  # (N, K)
    score: Callable[[np.ndarray], float]  # of a sum (K,)
    percent: bool = True  # a number in [0, 1] that is shown as percent
    signature: str = ""  # of sacrebleu

    @property
    def value(self) -> float:
        return self.score(self.rows.sum(0))

    def show(self, *values: float) -> str:
        """Return a value, or an interval: 91.2% to 95.0%."""
        return " to ".join(f"{value:.1%}" if self.percent else f"{value:.2f}" for value in values)


def mean(values: Sequence[float]) -> Metric:
    """Return the mean of one number per item."""
    rows = np.column_stack([np.array(values, dtype=np.float64), np.ones(len(values))])
    return Metric(rows, _ratio)


def _ratio(total: np.ndarray) -> float:
    return float(total[0] / total[1])


def translation_metrics(predictions: list[str], references: list[str]) -> dict[str, Metric]:
    """Return sacrebleu's BLEU and chrF, in points of 100.

    Post 2018 (arXiv 1804.08771), Popović 2015 (chrF2). The rows are sacrebleu's private counts per
    sentence, so requirements-dev.txt pins its version.
    """
    from sacrebleu.metrics import BLEU, CHRF

    metrics = {}
    for name, scorer in (("bleu", BLEU()), ("chrf", CHRF())):
        counts = scorer._extract_corpus_statistics(predictions, [references])
        rows = np.array(counts, dtype=np.float64)
        metrics[name] = Metric(rows, _points(scorer), False, str(scorer.get_signature()))
    return metrics


def _points(scorer) -> Callable[[np.ndarray], float]:
    return lambda total: float(scorer._compute_score_from_stats([int(n) for n in total]).score)


# Chance


def wilson(hits: int, n: int) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson 1927). It holds near 0 and 1 too."""
    z = 1.96
    p = hits / n
    zz = z * z / n
    middle = p + zz / 2
    half = z * (p * (1 - p) / n + zz / (4 * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + zz)), min(1.0, (middle + half) / (1 + zz))


def interval(metric: Metric, resamples: int, seed: int) -> tuple[float, float, str]:
    """Return the 95% interval and its method.

    A share has Wilson's interval, because a bootstrap of zeros only has no width. Other metrics
    have a bootstrap over the items (Koehn 2004); seed and N choose the draws.
    """
    rows = metric.rows
    n = len(rows)
    if metric.score is _ratio and np.isin(rows[:, 0], (0, 1)).all():  # a mean of zeros and ones
        return *wilson(int(rows[:, 0].sum()), n), "wilson"
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    scores = list(map(metric.score, counts @ rows))
    low, high = np.percentile(scores, (2.5, 97.5))
    return float(low), float(high), "bootstrap"
