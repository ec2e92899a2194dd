"""data/objectives.py: what stands where in a batch."""

from collections import Counter

import numpy as np
import pytest
import torch

from data.objectives import ObjectiveConfig, collate, prefix_lm, seq2seq, span_corruption, span_counts, splice

PAD, SEP = 90, 91


def test_a_batch_is_what_one_would_write_by_hand():
    batch = collate([([1, 2, 3], [4]), ([5], [6, 7, 8])], [10, 11], PAD, SEP, target_length=5)
    assert batch.prefix.tolist() == [[1, 2, 3], [5, PAD, PAD]]
    assert batch.target.tolist() == [[SEP, 4, PAD, PAD, PAD], [SEP, 6, 7, 8, PAD]]
    assert batch.example.tolist() == [10, 11]
    assert {tensor.dtype for tensor in batch} == {torch.int64}


def test_the_target_width_is_fixed_whatever_the_texts():
    assert collate([([1], [])], [0], PAD, SEP, target_length=4).target.tolist() == [[SEP, PAD, PAD, PAD]]
    assert collate([([1], [2, 3, 4])], [0], PAD, SEP, target_length=4).target.tolist() == [[SEP, 2, 3, 4]]


def test_a_text_too_long_is_refused_by_name():
    with pytest.raises(ValueError, match="example 12: its target has 4 tokens, but target_length=4 leaves room for 3"):
        collate([([1], [2]), ([1], [2, 3, 4, 5])], [11, 12], PAD, SEP, target_length=4)
    with pytest.raises(ValueError, match="1 pairs but 2 example"):
        collate([([1], [2])], [0, 1], PAD, SEP, target_length=4)


def test_empty_prefixes_make_a_prefix_of_width_zero():
    assert collate([([], [1]), ([], [2])], [0, 1], PAD, SEP, target_length=2).prefix.shape == (2, 0)


def test_arrays_and_lists_give_one_batch():
    lists = collate([([1, 2], [3])], [0], PAD, SEP, target_length=3)
    arrays = collate([(np.uint16([1, 2]), np.uint16([3]))], np.arange(1), PAD, SEP, target_length=3)
    assert all(torch.equal(a, b) for a, b in zip(lists, arrays))


def test_prefix_lm_cuts_a_text_and_fills_the_target_to_the_separator():
    prefix, target = prefix_lm(list(range(10)), split=4, target_length=4)
    assert (prefix, target) == ([0, 1, 2, 3], [4, 5, 6])  # 3 tokens and the separator are 4
    assert prefix_lm(list(range(5)), split=4, target_length=4) == ([0, 1, 2, 3], [4])
    assert seq2seq([1], [2, 3]) == ([1], [2, 3])


SENTINELS = [100, 101, 102, 103, 104, 105]


def corrupted(n: int, seed: int, density: float = 0.3, mean_span: float = 2.0):
    tokens = list(range(n))
    return tokens, *span_corruption(tokens, np.random.default_rng(seed), SENTINELS, density, mean_span)


@pytest.mark.parametrize("n", [2, 3, 7, 20])
def test_splicing_the_target_back_gives_the_text(n):
    for seed in range(20):
        tokens, prefix, target = corrupted(n, seed)
        assert splice(prefix, target, SENTINELS) == tokens


def test_spans_are_counted_as_t5_counts_them():
    """T5, section 3.1.4: of 500 tokens 15% are 75, in 25 spans of 3 on average."""
    assert span_counts(500, 0.15, 3.0) == (75, 25)
    tokens, prefix, target = corrupted(20, 0)  # 6 of 20 tokens in 3 spans
    assert [t for t in prefix if t >= 100] == [t for t in target if t >= 100] == SENTINELS[:3]
    assert (len(prefix), len(target)) == (20 - 6 + 3, 6 + 3)
    assert prefix[0] == 0 and prefix[-1] == SENTINELS[2]  # starts with what is kept, ends with a span


def test_every_division_into_spans_is_equally_likely():
    """6 hidden tokens in 3 spans of at least 1: 10 divisions. Chi-square with 9 degrees of freedom, p = 0.001: 27.9."""
    counts = Counter()
    for seed in range(2000):
        _, _, target = corrupted(20, seed)
        ends = [i for i, t in enumerate(target) if t >= 100] + [len(target)]
        counts[tuple(np.diff(ends) - 1)] += 1
    assert len(counts) == 10
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 27.9


def test_the_same_generator_state_cuts_the_same_spans():
    assert corrupted(20, 3) == corrupted(20, 3) != corrupted(20, 4)


def test_too_many_spans_for_the_sentinels_are_refused():
    with pytest.raises(ValueError, match="there are 6 sentinels: raise mean_span"):
        corrupted(100, 0, density=0.5, mean_span=1.0)


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(objective="span"), "objective must be one of auto, prefix_lm, span_corruption; got 'span'"),
        (dict(span_density=0.0), "span_density must be in"),
        (dict(mean_span=0.5), "mean_span at least 1"),
    ],
)
def test_a_bad_objective_is_refused(bad, says):
    with pytest.raises(ValueError, match=says):
        ObjectiveConfig(**bad)
