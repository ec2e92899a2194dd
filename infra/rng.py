"""Random numbers that are functions of their place, not of what was drawn before.

In training a draw is a function of (seed, step, global example index), in sampling of (seed, example, candidate,
step). So batch size, accumulation, world size, early exit and resuming change no draw, evaluation cannot disturb
training, and there is no random state to save. The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), written in torch integers: the same numbers on every device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# What a draw is for: the second word of the key, so that no two uses share a number.
RATE, CORRUPT, UNROLL, CONDITION, CANVAS, SAMPLE, SELECT, RENOISE, EDGES, ACCEPT = range(10)

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


def row_by_row(f: Callable, logits: Tensor, high: Tensor) -> Tensor:
    """f(logits (.., V), high (.., 1)) -> (..) or (.., K), of logits (B, S, V) and high (B, S, 1), for all B x S rows.

    f gets a float32 copy and may write into it. A large vocabulary is read a few slots at a time on a CPU: what fits
    its cache comes from memory once, not in each pass, and no array of the size of all logits is made.
    """
    few = max(1, (1 << 18) // logits.shape[-1])  # a megabyte of float32
    if logits.device.type != "cpu" or logits.shape[-1] <= 4 * BLOCK or few >= logits.shape[:-1].numel():
        return f(logits.to(torch.float32, copy=True), high)
    room = torch.empty(few, logits.shape[-1])  # one for all: memory that is new costs more than what is done in it
    rows = [
        torch.cat([f(room[: len(a)].copy_(a), b) for a, b in zip(one.split(few), other.split(few))])
        for one, other in zip(logits, high)
    ]
    return torch.stack(rows)


def draw_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Token ids (B, S) from logits (B, S, V): the likeliest at temperature 0, else by inverse CDF.

    uniform (B, S): one number a slot; noise of shape (S, V) would cost more than the network at a large vocabulary.
    """
    if temperature == 0:
        return likeliest(logits)
    if logits.shape[-1] <= 4 * BLOCK:
        return _invert((logits.float() / temperature).softmax(-1), uniform)[0]
    # First a block of ids, then one of its ids.
    high = logits.amax(-1, keepdim=True).float()  # (B, S, 1)
    mass = row_by_row(lambda part, high: _blocks(exp_(part, high, temperature), Tensor.sum), logits, high)
    block, within = _invert(mass, uniform)  # 2 x (B, S)
    inside = exp_(_inside(logits, block, -math.inf).float(), high, temperature)
    return block * BLOCK + _invert(inside, within)[0]


def exp_(logits: Tensor, high: Tensor, temperature: float) -> Tensor:
    """exp((logits - high) / temperature), in place: what softmax divides by its sum, where high is the largest."""
    return logits.sub_(high).div_(temperature).exp_()


def likeliest(logits: Tensor) -> Tensor:
    """argmax (B, S) of logits (B, S, V), the first one of equals: also by blocks, for argmax is not vectorised."""
    if logits.device.type != "cpu" or logits.shape[-1] <= 4 * BLOCK:
        return logits.argmax(-1)
    block = _blocks(logits, Tensor.amax).argmax(-1)  # (B, S)
    return block * BLOCK + _inside(logits, block, -math.inf).argmax(-1)


BLOCK = 256  # ids that are taken together: a running sum over all ids costs more than the rest of a step


def _blocks(x: Tensor, reduce: Callable) -> Tensor:
    """x (.., V) reduced over each BLOCK of ids, the rest at the end for one more: (.., V // BLOCK + 1)."""
    whole = x.shape[-1] // BLOCK * BLOCK
    parts = [reduce(x[..., :whole].unflatten(-1, (-1, BLOCK)), -1)]
    if whole < x.shape[-1]:
        parts.append(reduce(x[..., whole:], -1, keepdim=True))
    return torch.cat(parts, dim=-1)


def _inside(x: Tensor, block: Tensor, fill: float) -> Tensor:
    """The ids of one block (..) of each row of x (.., V): (.., BLOCK), filled up past the last id."""
    ids = block[..., None] * BLOCK + torch.arange(BLOCK, device=x.device)
    return x.gather(-1, ids.clamp(max=x.shape[-1] - 1)).masked_fill(ids >= x.shape[-1], fill)


def _invert(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(choice (B, S) with probability in proportion to mass (B, S, K), the uniform number that is left within it)."""
    cdf = mass.cumsum(-1)
    u = uniform[..., None] * cdf[..., -1:]
    drawn = torch.searchsorted(cdf, u, right=True)  # (B, S, 1)
    # Rounding may put a number past the last token that can be drawn: take the likeliest there.
    drawn = torch.where(drawn < mass.shape[-1], drawn, mass.argmax(-1, keepdim=True))
    share = mass.gather(-1, drawn)
    left = (u - cdf.gather(-1, drawn) + share) / share
    return drawn[..., 0], left[..., 0].clamp(0, 1 - 2**-24)


def noise_tokens(uniform: Tensor, m) -> Tensor:
    """Noise for each number in [0, 1): an ordinary token or pad, all equally likely, or always the mask token."""
    if m.noise == "mask":
        return torch.full(uniform.shape, m.mask_id, device=uniform.device)
    some = m.eos_id >= 0  # an ordinary id that no text holds: the ids behind it move up by one
    token = (uniform * (m.n_ordinary + 1 - some)).long()
    token = token + (token >= m.eos_id) if some else token
    return torch.where(token == m.n_ordinary, m.pad_id, token)


def forbidden_ids(m, device) -> Tensor:
    """(F,) ids no text may hold: separator, mask, sentinels, what fills up the vocabulary, and a source's own end."""
    closed = [i for i in range(m.n_ordinary, m.vocab_size) if i != m.pad_id]
    return torch.tensor(closed if m.eos_id < 0 else [m.eos_id, *closed], device=device)


class Generated(NamedTuple):
    """tokens (B, T - 1): what follows the separator, pads included. score (B,): mean NLL per slot, lower is better.

    calls (B,): network calls that were spent on each row, all candidates counted.
    """

    tokens: Tensor
    score: Tensor
    calls: Tensor
