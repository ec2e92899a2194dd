"""How text becomes a training pair: a prefix that is given and a target that is learned.

An objective is a function from token ids to (prefix, target), two plain lists without reserved ids of their own;
`collate` puts the separator before each target and the padding behind both:

    seq2seq("one two", "un deux")      -> prefix "one two",          target "<sep>un deux<pad><pad>"
    prefix_lm("to be or not", split=5)  -> prefix "to be",            target "<sep> or not<pad><pad>"
    span_corruption("to be or not", ..) -> prefix "to<0>or n<1>",     target "<sep><0> be <1>ot<pad>"
"""

from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass
class ObjectiveConfig:
    """How a text becomes prefix and target. The noise of diffusion comes on top of it, on the target alone."""

    objective: str = "auto"  # auto: pairs as they are, a stream as prefix_lm | prefix_lm | span_corruption
    span_density: float = 0.15  # share of the tokens that go to the target (T5's)
    mean_span: float = 3.0  # tokens of a span, on average (T5's)

    def __post_init__(self):
        allowed = ("auto", "prefix_lm", "span_corruption")
        if self.objective not in allowed:
            raise ValueError(f"objective must be one of {', '.join(allowed)}; got {self.objective!r}")
        if not 0 < self.span_density < 1 or self.mean_span < 1:
            raise ValueError(
                f"span_density must be in (0, 1) and mean_span at least 1, got {self.span_density} and {self.mean_span}"
            )


def prefix_lm(tokens: Tokens, split: int, target_length: int) -> tuple[Tokens, Tokens]:
    """The first `split` tokens as prefix, and as target what fits behind the separator: target_length - 1 tokens."""
    return tokens[:split], tokens[split : split + target_length - 1]


def seq2seq(source: Tokens, target: Tokens) -> tuple[Tokens, Tokens]:
    """A pair whose two sides are given: translation, question and answer, docstring and code."""
    return source, target


def span_counts(length: int, density: float, mean_span: float) -> tuple[int, int]:
    """(tokens to cut out, spans they form) of a text of so many tokens, at least two. T5, section 3.1.4."""
    hidden = min(max(round(length * density), 1), length - 1)
    return hidden, min(max(round(hidden / mean_span), 1), hidden, length - hidden)


def span_corruption(
    tokens: Tokens, rng: np.random.Generator, sentinels: Sequence[int], density: float, mean_span: float
) -> tuple[list[int], list[int]]:
    """Random spans of the text become sentinels in the prefix; the target is each sentinel and what it stands for.

    The text starts with what is kept and ends with a span. T5 closes the target with one sentinel more; here the pads
    do. (T5, arXiv 1910.10683, section 3.1.4.) Raises ValueError for more spans than sentinels.
    """
    tokens = [int(t) for t in tokens]
    if len(tokens) < 2:
        raise ValueError(f"span corruption wants a text of at least 2 tokens, got {len(tokens)}")
    hidden, n = span_counts(len(tokens), density, mean_span)
    if n > len(sentinels):
        raise ValueError(f"{len(tokens)} tokens make {n} spans, there are {len(sentinels)} sentinels: raise mean_span")
    prefix, target, at = [], [], 0
    for sentinel, kept, cut in zip(sentinels, _parts(len(tokens) - hidden, n, rng), _parts(hidden, n, rng)):
        prefix += [*tokens[at : at + kept], sentinel]
        target += [sentinel, *tokens[at + kept : at + kept + cut]]
        at += kept + cut
    return prefix, target


def splice(prefix: Tokens, target: Tokens, sentinels: Sequence[int]) -> list[int]:
    """The text that span_corruption made prefix and target of."""
    spans, known = {}, set(sentinels)
    for token in target:
        if token in known:
            spans[token] = current = []
        else:
            current.append(token)
    return [t for token in prefix for t in (spans[token] if token in known else [token])]


def _parts(total: int, n: int, rng: np.random.Generator) -> list[int]:
    """n whole numbers of at least 1 with that sum, every such list equally likely."""
    cuts = np.sort(rng.choice(total - 1, size=n - 1, replace=False) + 1)
    return np.diff([0, *cuts, total]).tolist()


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
