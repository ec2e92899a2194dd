"""data/objectives.py: how texts become batches."""

from collections import Counter

import numpy as np
import pytest
import torch

from data.objectives import collate, prefix_lm, span_corruption, span_counts

PAD = 990
SEP = 991
SENTINELS = [*range(1000, 1010)]


def test_a_batch_is_what_one_writes_by_hand():
    batch = collate([([1, 2, 3], [4]), ([5], [6, 7, 8])], [10, 11], PAD, SEP, target_length=5)
    assert batch.prefix.tolist() == [[1, 2, 3], [5, PAD, PAD]]
    assert batch.target.tolist() == [[SEP, 4, PAD, PAD, PAD], [SEP, 6, 7, 8, PAD]]
    assert batch.example.tolist() == [10, 11]
    assert {tensor.dtype for tensor in batch} == {torch.int64}
    assert collate([([], [1]), ([], [2])], [0, 1], PAD, SEP, 2).prefix.shape == (2, 0)
    given = collate([([1, 2], [3]), ([], [4])], [0, 1], PAD, -1, 3)  # slot 0 is the last token
    assert given.prefix.tolist() == [[1], [PAD]]
    assert given.target.tolist() == [[2, 3, PAD], [PAD, 4, PAD]]


def test_prefix_lm_leaves_room_for_the_separator():
    assert prefix_lm([*range(10)], split=4, target_length=4) == ([0, 1, 2, 3], [4, 5, 6])
    assert prefix_lm([*range(5)], split=4, target_length=4) == ([0, 1, 2, 3], [4])


def corrupted(n: int, seed: int):
    tokens = list(range(n))
    return tokens, *span_corruption(tokens, np.random.default_rng(seed), SENTINELS)


def splice(prefix, target) -> list[int]:
    """Undo span_corruption: put each span of the target in the place of its sentinel."""
    spans = {}
    for token in target:
        if token in SENTINELS:
            span = spans[token] = []
        else:
            span.append(token)
    return [t for token in prefix for t in spans.get(token, [token])]


@pytest.mark.parametrize("n", [2, 3, 7, 20, 60])
def test_splice_undoes_span_corruption(n):
    for seed in range(20):
        tokens, prefix, target = corrupted(n, seed)
        assert splice(prefix, target) == tokens
        assert (prefix, target) == corrupted(n, seed)[1:]


def test_spans_are_counted_as_in_t5():
    """T5, section 3.1.4: of 500 tokens 15% are 75, in 25 spans of 3 on average."""
    assert span_counts(500) == (75, 25)
    tokens, prefix, target = corrupted(40, 0)  # 6 of 40 tokens in 2 spans
    assert [t for t in prefix if t >= 1000] == [t for t in target if t >= 1000] == SENTINELS[:2]
    assert (len(prefix), len(target)) == (40 - 6 + 2, 6 + 2)
    assert prefix[0] == 0 and prefix[-1] == SENTINELS[1]


def test_every_division_into_spans_is_equally_likely():
    """9 hidden tokens in 3 spans: 28 divisions. Chi-square, 27 degrees of freedom, p = 0.001."""
    counts = Counter()
    for seed in range(2800):
        _, _, target = corrupted(60, seed)
        ends = [i for i, t in enumerate(target) if t >= 1000] + [len(target)]
        counts[tuple(np.diff(ends) - 1)] += 1
    assert len(counts) == 28
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 55.5
