"""Counter-based random numbers: each one is a function of its position, not of earlier draws.

In training a number depends on (seed, step, global example index), in sampling on (seed, example,
candidate, step). So batch size, accumulation, world size, early exit and resuming change no number,
and there is no generator state to save. The generator is Philox4x32-10 (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3"), written in torch integers: every device computes
the same numbers.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Streams: what a number is used for. Two streams never share a number.
RATE, CORRUPT, UNROLL, _, CANVAS, SAMPLE, SELECT, RENOISE, EDGES, ACCEPT = range(10)

MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class CounterRNG:
    """The random numbers of one batch. example (B,) and candidate (B,), int64, name each row."""

    seed: int
    example: Tensor
    candidate: Tensor
    step: int = 0

    def uniform(self, stream: int, length: int, index: int = 0) -> tuple[Tensor, Tensor]:
        """Return two independent uniform numbers in [0, 1) per position: 2 x (B, length) float32.

        index: a number below 16 that separates several uses of one stream within a step.
        """
        device = self.example.device
        position = torch.arange(length, device=device)
        step = torch.tensor(self.step, device=device)
        example = self.example[:, None] & MASK_32
        counter = torch.broadcast_tensors(position, example, step, self.candidate[:, None])
        key = (self.seed & MASK_32, (self.seed >> 32) & MASK_32 ^ (stream << 4 | index))
        words = philox(counter, key)  # 4 x (B, length)
        return tuple((word >> 8).float() * 2.0**-24 for word in words[:2])  # exact in float32

    def fold_in(self, step: int) -> "CounterRNG":
        """Return the same rows at another step."""
        return replace(self, step=step)


def make_rng(seed: int, example: Tensor, step: int = 0) -> CounterRNG:
    """Return the RNG of the rows with these global example indices (B,), candidate 0."""
    return CounterRNG(seed, example, torch.zeros_like(example), step)


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return four words of 32 random bits (int64) for four counter words and two key words."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(x0, 0xD2511F53)
        high2, low2 = _multiply(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high2 ^ x1 ^ k0, low2, high0 ^ x3 ^ k1, low0
        k0 = (k0 + 0x9E3779B9) & MASK_32
        k1 = (k1 + 0xBB67AE85) & MASK_32
    return x0, x1, x2, x3


def _multiply(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a product of 32-bit numbers, within 63 bits."""
    bottom = a * (m & 0xFFFF)
    top = a * (m >> 16)
    return (top + (bottom >> 16)) >> 16, (bottom + ((top & 0xFFFF) << 16)) & MASK_32
