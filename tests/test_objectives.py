"""data/objectives.py: what stands where in a batch."""

import numpy as np
import pytest
import torch

from data.objectives import collate, prefix_lm, seq2seq

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
