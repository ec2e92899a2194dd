"""What the evaluations count: pure functions of numbers and strings. No model, no file.

    answers   answer_exact_match, answer_f1     SQuAD v1.1's two numbers
    text      translation_metrics               BLEU and chrF, by sacrebleu
    code      pass_at_k, edit_similarity
    chance    wilson, interval, paired, mcnemar

A number of a whole set is a Metric: what each item adds to a sum, and the score of the sum. Means and BLEU alike, so
there is one bootstrap for all.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

# Question answering


def normalize_answer(text: str) -> str:
    """'The  Eiffel Tower!' -> 'eiffel tower': lower case, no ASCII punctuation, no articles, single spaces.

    In this order, as SQuAD v1.1 has it (arXiv 1606.05250, section 6.1): 'the-end' is one word and keeps its 'the'.
    """
    bare = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return " ".join(re.sub(r"\b(?:an?|the)\b", " ", bare).split())


def answer_exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction equals one of the answers, all normalised."""
    return normalize_answer(prediction) in {normalize_answer(answer) for answer in _some(answers)}


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the bags of words, normalised; the best over the answers. 0 without a shared word, so for two empty texts.

    'big red dog', ['the red dog', 'cat'] -> 0.8: two words shared, of three and of two.
    """
    ours, best = normalize_answer(prediction).split(), 0.0
    for answer in _some(answers):
        theirs = normalize_answer(answer).split()
        shared = (Counter(ours) & Counter(theirs)).total()
        best = max(best, 2 * shared / (len(ours) + len(theirs)) if shared else 0.0)
    return best


def _some(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"a question needs a list of at least one answer, got {answers!r}")
    return answers


# Code


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k draws is right, from n draws of which c are: 1 - C(n - c, k) / C(n, k), without bias.

    Codex (arXiv 2107.03374), equation 1. Python's integers keep it exact at any n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@k wants 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def edit_similarity(one: str, other: str) -> float:
    """1 for equal texts, 0 for texts with no character in common: difflib's ratio, over characters, nothing skipped.

    2 M / T with M the characters in matching blocks and T those of both texts (Python's library, difflib).
    """
    return SequenceMatcher(None, one, other, autojunk=False).ratio()


# Numbers of a whole set


class Metric(NamedTuple):
    """A number of N items: score(the sum of their rows)."""

    rows: np.ndarray  # (N, K) what each item adds
    score: Callable[[np.ndarray], float]  # of a sum (K,)
    unit: str = "%"  # %: a share or mean in [0, 1], shown as percent; "": shown as it is

    @property
    def value(self) -> float:
        return self.score(self.rows.sum(0))

    @property
    def is_share(self) -> bool:
        """Whether it is the mean of nothing but zeros and ones: the binomial case."""
        return self.score is _ratio and bool(np.isin(self.rows[:, 0], (0, 1)).all())


def mean(values: Sequence[float]) -> Metric:
    """The mean of one number an item. Raises ValueError for none."""
    if not len(values):
        raise ValueError("a mean of no items: there is nothing to score")
    return Metric(np.column_stack([np.array(values, dtype=np.float64), np.ones(len(values))]), _ratio)


def _ratio(total: np.ndarray) -> float:
    return float(total[0] / total[1])


def translation_metrics(predictions: list[str], references: list[str]) -> tuple[dict[str, Metric], dict[str, str]]:
    """({"bleu": .., "chrf": ..} in points of 100, the signature of each), both by sacrebleu with its defaults.

    Post 2018 (arXiv 1804.08771), Popović 2015 (chrF2). The rows are sacrebleu's own counts of each sentence, which its
    significance tests sum up as well, under names that it keeps to itself: hence the pinned version.
    """
    if len(predictions) != len(references) or not references:
        raise ValueError(f"as many predictions as references, please, and some: {len(predictions)}, {len(references)}")
    found, signatures = {}, {}
    for name, scorer in sacrebleu_scorers().items():
        rows = np.array(scorer._extract_corpus_statistics(predictions, [references]), dtype=np.float64)
        found[name] = Metric(rows, _points(scorer), "")
        signatures[name] = str(scorer.get_signature())
    return found, signatures


def sacrebleu_scorers() -> dict:
    """sacrebleu's BLEU and chrF with its defaults. Raises ValueError where it is not installed."""
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError:
        raise ValueError("BLEU and chrF need sacrebleu: pip install sacrebleu") from None
    return {"bleu": BLEU(), "chrf": CHRF()}


def _points(scorer) -> Callable[[np.ndarray], float]:
    return lambda total: float(scorer._compute_score_from_stats([int(count) for count in total]).score)


# What chance may have done


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share, in [0, 1]. Wilson 1927; right also near 0 and 1, where the normal one is not."""
    if n == 0:
        return 0.0, 1.0
    p, zz = hits / n, z * z / n
    middle, half = p + zz / 2, z * (p * (1 - p) / n + zz / (4 * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + zz)), min(1.0, (middle + half) / (1 + zz))


def interval(metric: Metric, resamples: int, seed: int) -> tuple[float, float, str]:
    """95% interval and what gave it: 'wilson' for a share, else 'bootstrap' over the items (Koehn 2004).

    A bootstrap of nothing but zeros is the point 0, which is why a share does not get one.
    """
    if metric.is_share:
        return *wilson(int(metric.rows[:, 0].sum()), len(metric.rows)), "wilson"
    scores = [metric.score(counts @ metric.rows) for counts in _resampled(len(metric.rows), resamples, seed)]
    return *_middle(scores), "bootstrap"


def paired(ours: Metric, theirs: Metric, resamples: int, seed: int) -> dict:
    """Two systems on the same items in the same order: difference (ours - theirs), its 95% interval, p, and the test.

    The interval is a paired bootstrap's. p, two-sided: for shares McNemar's exact test, which is the sign test of the
    items that only one has right; else the share of bootstrap differences as far from their mean as the difference is
    from 0 (Riezler and Maxwell 2005; sacrebleu's p as well).
    """
    if len(ours.rows) != len(theirs.rows):
        raise ValueError(f"paired tests want the same items, got {len(ours.rows)} and {len(theirs.rows)}")
    difference = ours.value - theirs.value
    drawn = np.array(
        [
            ours.score(counts @ ours.rows) - theirs.score(counts @ theirs.rows)
            for counts in _resampled(len(ours.rows), resamples, seed)
        ]
    )
    if ours.is_share and theirs.is_share:
        won, lost = (int((a.rows[:, 0] > b.rows[:, 0]).sum()) for a, b in ((ours, theirs), (theirs, ours)))
        p, test = mcnemar(won, lost), "mcnemar"
    else:
        p, test = float((np.abs(drawn - drawn.mean()) >= abs(difference)).sum() + 1) / (resamples + 1), "bootstrap"
    return {"difference": difference, "difference_interval": list(_middle(drawn)), "p": p, "test": test}


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p of a fair coin, from the items that only the one or only the other has right. McNemar 1947."""
    n, ways, tail = won + lost, 1, 0
    for i in range(min(won, lost) + 1):
        tail += ways  # C(n, i)
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


def _resampled(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of n items is drawn (n,), resamples times; the same for every metric of one seed."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.bincount(rng.integers(n, size=n), minlength=n)


def _middle(scores) -> tuple[float, float]:
    low, high = np.percentile(scores, (2.5, 97.5))
    return float(low), float(high)
