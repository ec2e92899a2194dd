"""How text becomes a training pair: a prefix that is given and a target that is learned.

An objective is a function from token ids to (prefix, target), two plain lists without reserved ids of their own;
`collate` puts the separator before each target and the padding behind both:

    seq2seq("one two", "un deux")     -> prefix "one two",  target "<sep>un deux<pad><pad>"
    prefix_lm("to be or not", split=5) -> prefix "to be",    target "<sep> or not<pad><pad>"
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import LongTensor

Tokens = Sequence[int]  # a list or a 1-d array of token ids


class Batch(NamedTuple):
    """B training pairs. A pad in the prefix is never a key; a pad in the target is learned: that is how a text ends."""

    prefix: LongTensor  # (B, P) right-padded to the longest prefix of the batch
    target: LongTensor  # (B, T) target[:, 0] is the separator, given and never predicted; T is the same in every batch
    example: LongTensor  # (B,) global example index, which keys the noise


def prefix_lm(tokens: Tokens, split: int, target_length: int) -> tuple[Tokens, Tokens]:
    """The first `split` tokens as prefix, and as target what fits behind the separator: target_length - 1 tokens."""
    return tokens[:split], tokens[split : split + target_length - 1]


def seq2seq(source: Tokens, target: Tokens) -> tuple[Tokens, Tokens]:
    """A pair whose two sides are given: translation, question and answer, docstring and code."""
    return source, target


def collate(
    pairs: Sequence[tuple[Tokens, Tokens]],
    examples: Sequence[int],
    pad_id: int,
    sep_id: int,
    target_length: int,
) -> Batch:
    """Pairs as one Batch: prefix (B, P), P the longest prefix here; target (B, target_length), always.

    target_length counts the separator slot, so a target has at most target_length - 1 tokens. A fixed width gives the
    diffusion model no hint of the length of the answer.

    Raises:
        ValueError: a target too long, named by its example index; or as many examples as pairs are not given.
    """
    if len(pairs) != len(examples):
        raise ValueError(f"collate got {len(pairs)} pairs but {len(examples)} example indices")
    prefix = np.full((len(pairs), max((len(p) for p, _ in pairs), default=0)), pad_id, dtype=np.int64)  # (B, P)
    target = np.full((len(pairs), target_length), pad_id, dtype=np.int64)  # (B, T)
    target[:, 0] = sep_id
    for row, ((given, wanted), example) in enumerate(zip(pairs, examples)):
        if len(wanted) > target_length - 1:
            raise ValueError(
                f"example {int(example)}: its target has {len(wanted)} tokens, but target_length={target_length} "
                f"leaves room for {target_length - 1} after the separator"
            )
        prefix[row, : len(given)] = given
        target[row, 1 : 1 + len(wanted)] = wanted
    index = np.array(examples, dtype=np.int64)  # a copy: from_numpy would share memory with the caller's array
    return Batch(torch.from_numpy(prefix), torch.from_numpy(target), torch.from_numpy(index))
