"""Random numbers that are functions of their place, not of what was drawn before.

In training a draw is a function of (seed, step, global example index), in sampling of (seed, example, candidate,
step). So batch size, accumulation, world size, early exit and resuming change no draw, evaluation cannot disturb
training, and there is no random state to save. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), written in torch integers: the same numbers on every device.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# What a draw is for: the second word of the key, so that no two uses share a number.
RATE, CORRUPT, UNROLL, CONDITION, CANVAS, SAMPLE, SELECT, RENOISE, EDGES = range(9)

_LOW = 0xFFFFFFFF


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four words of 32 random bits (int64 tensors) for four counter words and two key words. Ten rounds."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(x0, 0xD2511F53)
        high2, low2 = _multiply(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high2 ^ x1 ^ k0, low2, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return [x0, x1, x2, x3]


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    # High and low 32 bits of a 32 x 32 bit product, in two halves so that nothing passes 63 bits.
    bottom, top = a * (m & 0xFFFF), a * (m >> 16)
    return (top + (bottom >> 16)) >> 16, (bottom + ((top & 0xFFFF) << 16)) & _LOW


@dataclass(frozen=True)
class Draws:
    """The draws of one batch. example (B,) and candidate (B,), int64, say which row this is, wherever it stands."""

    seed: int
    example: Tensor
    candidate: Tensor
    step: int = 0

    def uniform(self, purpose: int, slots: int, salt: int = 0) -> tuple[Tensor, Tensor]:
        """Two independent uniform numbers in [0, 1) for each row and slot: 2 x (B, slots) float32.

        salt: a small number (under 16) that tells apart several uses of one purpose in a step.
        """
        device = self.example.device
        slot = torch.arange(slots, device=device)
        step = torch.tensor(self.step, device=device)
        counter = [slot, self.example[:, None] & _LOW, step, self.candidate[:, None]]
        counter = torch.broadcast_tensors(*counter)  # 4 x (B, slots)
        seed = self.seed & 0xFFFFFFFFFFFFFFFF
        a, b, _, _ = philox(list(counter), (seed & _LOW, (seed >> 32) ^ (purpose << 4 | salt)))
        return tuple((word >> 8).float() * 2.0**-24 for word in (a, b))  # 24 bits: every value is exact in float32

    def at(self, step: int) -> "Draws":
        return replace(self, step=step)

    def rows(self, index: Tensor) -> "Draws":
        """The draws of the rows that are still there."""
        return replace(self, example=self.example[index], candidate=self.candidate[index])


def draws_for(seed: int, example: Tensor, step: int = 0) -> Draws:
    """Draws of the rows whose global example indices are given, candidate 0."""
    return Draws(seed, example, torch.zeros_like(example), step)


def draw_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Token ids (B, S) from logits (B, S, V): the likeliest at temperature 0, else by inverse CDF.

    uniform (B, S): one number a slot; noise of shape (S, V) would cost more than the network at a large vocabulary.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum(-1)  # (B, S, V)
    drawn = torch.searchsorted(cdf, uniform[..., None] * cdf[..., -1:], right=True)[..., 0]  # (B, S)
    # Rounding may put a number past the last token that can be drawn: take the likeliest there.
    lost = drawn >= cdf.shape[-1]
    return torch.where(lost, logits.argmax(-1), drawn)


def forbidden_ids(m, device) -> Tensor:
    """(V,) to add to logits: -inf at ids no text may hold (separator, mask, sentinels), 0 at ordinary ids and pad."""
    wall = torch.full((m.vocab_size,), float("-inf"), device=device)
    wall[: m.n_ordinary] = 0.0
    wall[m.pad_id] = 0.0
    return wall


class Generated(NamedTuple):
    """tokens (B, T - 1): what follows the separator, pads included. score (B,): mean NLL per slot, lower is better.

    calls (B,): network calls that were spent on each row, all candidates counted.
    """

    tokens: Tensor
    score: Tensor
    calls: Tensor
