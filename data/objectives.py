"""How a text becomes a training pair: a prefix that is given and a target that is learned.

An objective returns (prefix, target) token ids. `collate` adds the separator and the padding:

    seq2seq          "one two" | "un deux"  -> "one two",        "<sep>un deux<pad><pad>"
    prefix_lm        "to be or not"         -> "to be",          "<sep> or not<pad><pad>"
    span_corruption  "to be or not"         -> "to<0>or n<1>",   "<sep><0> be <1>ot<pad>"
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import LongTensor

from configurator import setting, validate

Tokens = Sequence[int]  # a list or a 1-d array of token ids

SPAN_DENSITY = 0.15  # share of the tokens that go to the target (T5)
MEAN_SPAN = 3.0  # mean length of a span (T5)


class Batch(NamedTuple):
    """B training pairs. Pads in a prefix are masked; pads in a target are learned: they end it."""

    prefix: LongTensor  # (B, P) right-padded to the longest prefix of the batch
    target: LongTensor  # (B, T) target[:, 0] is the separator; T is the same in every batch
    example: LongTensor  # (B,)  global example index, the key of the noise


@dataclass
class ObjectiveConfig:
    """How a text is cut. Diffusion adds its noise later, to the target only."""

    objective: str = setting(
        "auto", "auto: given pairs, or text as prefix_lm", ("auto", "prefix_lm", "span_corruption")
    )

    def __post_init__(self):
        validate(self)


def prefix_lm(tokens: Tokens, split: int, target_length: int) -> tuple[Tokens, Tokens]:
    """Return the first `split` tokens, and the next ones that fit after the separator."""
    return tokens[:split], tokens[split : split + target_length - 1]


def span_counts(length: int) -> tuple[int, int]:
    """Return (hidden tokens, spans) for a text of at least 2 tokens (T5, 1910.10683, 3.1.4)."""
    hidden = min(max(round(length * SPAN_DENSITY), 1), length - 1)
    spans = min(max(round(hidden / MEAN_SPAN), 1), hidden, length - hidden)
    return hidden, spans


def span_corruption(
    tokens: Tokens, rng: np.random.Generator, sentinels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Replace random spans by sentinels. The target holds each sentinel and its span.

    A text starts with kept tokens and ends with a span. T5 ends the target with one more sentinel;
    here the pads end it.
    """
    hidden, n = span_counts(len(tokens))
    kept = _partition(len(tokens) - hidden, n, rng)
    cut = _partition(hidden, n, rng)
    ends = np.column_stack([kept, cut]).cumsum()
    parts = [part.tolist() for part in np.split(np.asarray(tokens, dtype=np.int64), ends[:-1])]
    prefix = [i for part, sentinel in zip(parts[::2], sentinels) for i in (*part, sentinel)]
    target = [i for sentinel, part in zip(sentinels, parts[1::2]) for i in (sentinel, *part)]
    return prefix, target


def _partition(total: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n whole numbers of at least 1 with this sum. All such lists are equally likely."""
    cuts = np.sort(rng.choice(total - 1, size=n - 1, replace=False) + 1)
    return np.diff([0, *cuts, total])


def collate(
    pairs: Sequence[tuple[Tokens, Tokens]],
    examples: Sequence[int],
    pad_id: int,
    sep_id: int,
    target_length: int,
) -> Batch:
    """Pad the pairs and return one Batch.

    Targets always have target_length tokens, slot 0 included. So the width of the canvas is no hint
    about the length of the answer. Slot 0 is sep_id; if that is -1, the last token of the prefix,
    or a pad if there is none.
    """
    longest = max((len(prefix) for prefix, _ in pairs), default=0)
    longest = max(longest - (sep_id < 0), 0)
    prefixes = np.full((len(pairs), longest), pad_id, dtype=np.int64)  # (B, P)
    targets = np.full((len(pairs), target_length), pad_id, dtype=np.int64)  # (B, T)
    targets[:, 0] = sep_id
    for row, (prefix, target) in enumerate(pairs):
        if sep_id < 0:
            targets[row, 0] = prefix[-1] if len(prefix) else pad_id
            prefix = prefix[:-1]
        prefixes[row, : len(prefix)] = prefix
        targets[row, 1 : 1 + len(target)] = target
    index = np.array(examples, dtype=np.int64)  # a copy: from_numpy shares memory
    return Batch(torch.from_numpy(prefixes), torch.from_numpy(targets), torch.from_numpy(index))
