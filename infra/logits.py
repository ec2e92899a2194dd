"""Everything that is computed from logits (.., V): loss, likelihood, entropy, drawn tokens.

A large vocabulary dominates time and memory, so these functions work on a few positions at a time
and never make a float32 copy of all logits.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOSS_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # float32 logits at a time, in the loss
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # and elsewhere: on a CPU, what its cache holds
BLOCK = 256  # token ids that are drawn together, in a large vocabulary
SMALL_VOCAB = 4 * BLOCK


class GenerateOutput(NamedTuple):
    """What generate() of both paradigms returns, for B prompts."""

    tokens: Tensor  # (B, T - 1) everything after the separator, pads included
    score: Tensor  # (B,) mean negative log-likelihood per position; lower is better
    calls: Tensor  # (B,) network calls for the row, summed over its candidates


def banned_token_ids(model_cfg, device) -> Tensor:
    """Return the ids (K,) that no text may hold: separator, mask, sentinels, unused ids, and eos.

    Pad is an ordinary token. eos_id is the end-of-text token of imported weights, else -1.
    """
    first, last = model_cfg.n_ordinary, model_cfg.vocab_size
    banned = [i for i in range(first, last) if i != model_cfg.pad_id]
    if model_cfg.eos_id >= 0:
        banned.insert(0, model_cfg.eos_id)
    return torch.tensor(banned, device=device)


def cross_entropy_in_place(logits: Tensor, expected: Tensor) -> Tensor:
    """Return the mean cross-entropy (), nats, of expected (B, T) under logits (B, T, V).

    Positions with expected -100 are not scored. If the logits require a gradient, the forward pass
    overwrites them with it, so that no further (B, T, V) tensor is allocated. Read them before.
    """
    if not logits.requires_grad:
        return F.cross_entropy(logits.flatten(0, 1), expected.flatten())
    return _CrossEntropyInPlace.apply(logits, expected)


class _CrossEntropyInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, expected):
        rows = logits.detach().reshape(-1, logits.shape[-1])  # (N, V)
        expected = expected.reshape(-1, 1)  # (N, 1)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        scored = (expected >= 0).to(dtype)
        weight = scored / scored.sum()
        expected = expected.clamp(min=0)
        count = max(1, LOSS_CHUNK.get(logits.device.type, 1 << 20) // logits.shape[-1])
        total = scored.new_zeros(())
        parts = zip(rows.split(count), expected.split(count), weight.split(count))
        for part, token, w in parts:
            p = part.to(dtype)
            high = part.amax(-1, keepdim=True).to(dtype)
            true_logit = p.gather(1, token)
            mass = p.sub_(high).exp_().sum(-1, keepdim=True)
            total += ((mass.log() + high - true_logit) * w).sum()
            # d loss / d logits = softmax - one_hot
            part.copy_(p.mul_(w / mass).scatter_add_(1, token, -w))
        ctx.gradient = rows.view_as(logits)
        return total

    @staticmethod
    def backward(ctx, loss_gradient):
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "cross_entropy_in_place allows one backward pass"
        return gradient.mul_(loss_gradient), None


def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the negative log-likelihood (B, S) of tokens (B, S) under logits (B, S, V)."""
    high = logits.amax(-1, keepdim=True).float()  # (B, S, 1)
    mass = _in_chunks(lambda part, high: _exp(part, high, 1.0).sum(-1), logits, high)
    true_logit = logits.gather(-1, tokens[..., None])[..., 0].float()
    return mass.log() + high[..., 0] - true_logit


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy (B, S), nats, of softmax(logits / temperature) for logits (B, S, V)."""

    def chunk_entropy(part, high):
        # The clamp avoids -inf * 0 = NaN for banned tokens.
        x = part.sub_(high).div_(temperature).clamp_(min=-1e4)
        p = x.exp()
        total = p.sum(-1)
        return total.log() - p.mul_(x).sum(-1) / total  # log Z - E[x]

    return _in_chunks(chunk_entropy, logits, logits.amax(-1, keepdim=True).float())


def argmax(logits: Tensor) -> Tensor:
    """Return the likeliest tokens (B, S) of logits (B, S, V); the lowest id wins a tie."""
    if logits.device.type != "cpu" or logits.shape[-1] <= SMALL_VOCAB:
        return logits.argmax(-1)
    block = _reduce_blocks(logits, Tensor.amax).argmax(-1)  # (B, S); amax is vectorised on a CPU
    return block * BLOCK + _read_block(logits, block).argmax(-1)


def draw_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Return tokens (B, S) for logits (B, S, V): the likeliest at temperature 0, else a sample.

    uniform (B, S): one number per position picks the token by inverse CDF. Gumbel noise of shape
    (B, S, V) would cost more than the network if the vocabulary is large.
    """
    if temperature == 0:
        return argmax(logits)
    if logits.shape[-1] <= SMALL_VOCAB:
        return _inverse_cdf((logits.float() / temperature).softmax(-1), uniform)[0]
    # Draw a block of ids first, then an id within it: two short running sums instead of a long one.
    high = logits.amax(-1, keepdim=True).float()  # (B, S, 1)
    mass = _in_chunks(
        lambda part, high: _reduce_blocks(_exp(part, high, temperature), Tensor.sum), logits, high
    )  # (B, S, blocks)
    block, rest = _inverse_cdf(mass, uniform)  # 2 x (B, S)
    within = _exp(_read_block(logits, block).float(), high, temperature)  # (B, S, BLOCK)
    return block * BLOCK + _inverse_cdf(within, rest)[0]


def _in_chunks(function: Callable, logits: Tensor, high: Tensor) -> Tensor:
    """Apply function(float32 copy of logits (b, s, V), high (b, s, 1)) to chunks of (B, S, V)."""
    count = max(1, CHUNK.get(logits.device.type, 1 << 18) // logits.shape[-1])  # positions
    rows = max(1, count // logits.shape[1])
    done = []
    for row_logits, row_high in zip(logits.split(rows), high.split(rows)):
        parts = zip(row_logits.split(count, dim=1), row_high.split(count, dim=1))
        values = [function(a.to(torch.float32, copy=True), b) for a, b in parts]
        done.append(torch.cat(values, dim=1))
    return torch.cat(done)


def _exp(logits: Tensor, high: Tensor, temperature: float) -> Tensor:
    """Compute exp((logits - high) / temperature) in place: a softmax without its denominator."""
    return logits.sub_(high).div_(temperature).exp_()


def _inverse_cdf(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw indices (B, S) in proportion to mass (B, S, K).

    Also return the position (B, S) of the uniform number within the drawn interval: a uniform
    number again.
    """
    cdf = mass.cumsum(-1)
    u = uniform[..., None] * cdf[..., -1:]
    drawn = torch.searchsorted(cdf, u, right=True)  # (B, S, 1)
    # Rounding may go beyond the last index. Take the likeliest then.
    drawn = torch.where(drawn < mass.shape[-1], drawn, mass.argmax(-1, keepdim=True))
    share = mass.gather(-1, drawn)
    rest = (u - cdf.gather(-1, drawn) + share) / share
    return drawn[..., 0], rest[..., 0].clamp(0, 1 - 2**-24)


def _reduce_blocks(x: Tensor, reduce: Callable) -> Tensor:
    """Reduce each BLOCK of ids of x (.., V); the remainder is one more block."""
    end = x.shape[-1] // BLOCK * BLOCK
    parts = [reduce(x[..., :end].unflatten(-1, (-1, BLOCK)), -1)]
    if end < x.shape[-1]:
        parts.append(reduce(x[..., end:], -1, keepdim=True))
    return torch.cat(parts, dim=-1)


def _read_block(x: Tensor, block: Tensor) -> Tensor:
    """Return one block (..) of each row of x (.., V): (.., BLOCK), -inf after the last id."""
    ids = block[..., None] * BLOCK + torch.arange(BLOCK, device=x.device)
    last = x.shape[-1] - 1
    return x.gather(-1, ids.clamp(max=last)).masked_fill(ids > last, -math.inf)
