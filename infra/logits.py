"""Everything that is computed from logits (.., V): loss, likelihood, entropy, drawn tokens.

A large vocabulary dominates time and memory. So these functions work on a few positions at a time
and never make a float32 copy of all logits.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LOSS_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # float32 logits at a time, in the loss
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # and elsewhere: what the cache of a CPU holds


class GenerateOutput(NamedTuple):
    """What generate() of both paradigms returns, for B prompts."""

    tokens: Tensor  # (B, T - 1) everything after slot 0, pads included
    score: Tensor  # (B,) mean negative log-likelihood per position; lower is better
    calls: Tensor  # (B,) network calls for the row, summed over its candidates


def banned_token_ids(model_cfg, device) -> Tensor:
    """Return the ids (K,) that no text may hold: all except ordinary tokens and pad; also eos."""
    special = range(model_cfg.n_ordinary, model_cfg.vocab_size)
    banned = {*special, model_cfg.eos_id} - {model_cfg.pad_id, -1}  # -1: there is no eos
    return torch.tensor(sorted(banned), device=device)


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
        weight = (expected >= 0).to(dtype)
        weight = weight / weight.sum()
        count = max(1, LOSS_CHUNK.get(logits.device.type, 1 << 20) // logits.shape[-1])
        total = weight.new_zeros(())
        parts = (rows, expected.clamp(min=0), weight)
        for part, token, w in zip(*(tensor.split(count) for tensor in parts)):
            p = part.to(dtype)
            high = part.amax(-1, keepdim=True).to(dtype)
            true_logit = p.gather(1, token)
            mass = p.sub_(high).exp_().sum(-1, keepdim=True)
            total += ((mass.log() + high - true_logit) * w).sum()
            part.copy_(p.mul_(w / mass).scatter_add_(1, token, -w))  # softmax - one_hot
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
    mass = _in_chunks(lambda x, high: x.sub_(high).exp_().sum(-1), logits, high)
    true_logit = logits.gather(-1, tokens[..., None])[..., 0].float()
    return mass.log() + high[..., 0] - true_logit


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy (B, S), nats, of softmax(logits / temperature) for logits (B, S, V)."""

    def chunk_entropy(x, high):
        x = x.sub_(high).div_(temperature).clamp_(min=-1e4)  # -inf * 0 would be NaN
        p = x.exp()
        total = p.sum(-1)
        return total.log() - p.mul_(x).sum(-1) / total  # log Z - E[x]

    return _in_chunks(chunk_entropy, logits, logits.amax(-1, keepdim=True).float())


def argmax(logits: Tensor) -> Tensor:
    """Return the likeliest tokens (B, S) of logits (B, S, V); the lowest id wins a tie."""
    return logits.max(-1).indices  # in bfloat16 on a CPU four times as fast as argmax()


def draw_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Return tokens (B, S) for logits (B, S, V): the likeliest at temperature 0, else a sample.

    One number per position, uniform (B, S), picks the token by inverse CDF. Gumbel noise (B, S, V)
    would cost more than the network if the vocabulary is large.
    """
    if temperature == 0:
        return argmax(logits)

    def inverse_cdf(x, u):
        p = x.div_(temperature).softmax(-1)  # (b, s, V)
        cdf = p.cumsum(-1)
        drawn = torch.searchsorted(cdf, u * cdf[..., -1:], right=True)  # (b, s, 1)
        # Rounding may go beyond the last token. Take the likeliest then.
        drawn = torch.where(drawn < p.shape[-1], drawn, p.argmax(-1, keepdim=True))
        return drawn[..., 0]

    return _in_chunks(inverse_cdf, logits, uniform[..., None])


def _in_chunks(function: Callable, logits: Tensor, other: Tensor) -> Tensor:
    """Apply function(float32 copy of logits (b, s, V), other (b, s, 1)) to chunks of (B, S, V)."""
    count = max(1, CHUNK.get(logits.device.type, 1 << 18) // logits.shape[-1])  # positions
    rows = max(1, count // logits.shape[1])
    done = []
    for row, row_other in zip(logits.split(rows), other.split(rows)):
        parts = zip(row.split(count, dim=1), row_other.split(count, dim=1))
        done.append(torch.cat([function(x.to(torch.float32, copy=True), o) for x, o in parts], 1))
    return torch.cat(done)
