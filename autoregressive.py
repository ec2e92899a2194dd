"""Autoregressive language modelling: loss and generate, left to right. Lay it beside diffusion.py: same verbs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cross_entropy import cross_entropy_
from device import Late
from draws import SAMPLE, Draws, Generated, draw_tokens, draws_for, forbidden_ids


@dataclass
class SamplerConfig:
    """How the next token is drawn."""

    temperature: float = 0.0  # 0: greedy, as the paper decodes translation and QA
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens that holds this probability (arXiv 1904.09751)

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k must be 0 or more and top_p in (0, 1], got {self.top_k} and {self.top_p}")


def losses(model, batch, cfg, draws: Draws, opened: Tensor | None = None) -> Iterator[Tensor]:
    """The one term of the loss: next-token cross-entropy over the target, nats per slot, pads included."""
    logits = model(batch.prefix, batch.target)  # (B, T, V): position i predicts slot i + 1, the last one nothing
    expected = F.pad(batch.target[:, 1:], (0, 1), value=-100)  # -100 is not scored; slicing the logits would copy them
    yield cross_entropy_(logits, expected)


def loss(model, batch, cfg, draws: Draws) -> Tensor:
    """Mean cross-entropy, nats per target slot."""
    return sum(losses(model, batch, cfg, draws))


@torch.no_grad()
def generate(
    model,
    prefix: Tensor,
    cfg: SamplerConfig,
    seed: int = 0,
    example: Tensor | None = None,
    on_step: Callable | None = None,
) -> Generated:
    """Continue each prefix (B, P) until it ends with pad or the target is full, one token a network call.

    example (B,): names of the rows, which key their draws with the seed; 0 .. B - 1 by default.
    on_step: called with (step, tokens (B, T - 1), logits (B, 1, V), rows (B,)) after each call.
    """
    B, m = len(prefix), model.cfg
    example = torch.arange(B, device=prefix.device) if example is None else example
    draws, length = draws_for(seed, example), m.target_length - 1
    cache = model.encode(prefix, room=m.target_length)
    tokens = torch.full((B, length), m.pad_id, device=prefix.device)
    score, calls = torch.zeros(B, device=prefix.device), torch.zeros(B, dtype=torch.long, device=prefix.device)
    last, open_rows = torch.full((B, 1), m.sep_id, device=prefix.device), torch.ones_like(calls, dtype=torch.bool)
    closed, left = forbidden_ids(m, prefix.device), Late()
    for step in range(length):
        logits = model.decode(cache, last, append=True)[:, -1].float().index_fill_(-1, closed, -math.inf)  # (B, V)
        drawn = draw_next(logits, cfg, draws.at(step))  # (B,)
        drawn = torch.where(open_rows, drawn, m.pad_id)
        nll = F.cross_entropy(logits, drawn, reduction="none")
        tokens[:, step], score, calls = drawn, score + nll * open_rows, calls + open_rows
        open_rows = open_rows & (drawn != m.pad_id)
        last = drawn[:, None]
        if on_step is not None:
            on_step(step + 1, tokens, logits[:, None], torch.arange(B, device=prefix.device))
        if left.read(open_rows.sum()) == 0:  # on CUDA a call late, which changes no text
            break
    return Generated(tokens, score / calls, calls)


def draw_next(logits: Tensor, cfg: SamplerConfig, draws: Draws) -> Tensor:
    """One token id (B,) from logits (B, V) under temperature, top-k and top-p."""
    if cfg.temperature == 0:
        return logits.argmax(-1)
    if not cfg.top_k and cfg.top_p == 1:
        return draw_tokens(logits[:, None], cfg.temperature, draws.uniform(SAMPLE, 1)[0])[:, 0]
    probs, order = (logits / cfg.temperature).softmax(-1).sort(-1, descending=True)  # (B, V)
    before = probs.cumsum(-1) - probs  # mass of the likelier tokens
    keep = before < cfg.top_p
    if cfg.top_k:
        keep[:, cfg.top_k :] = False
    cdf = (probs * keep).cumsum(-1)
    u = draws.uniform(SAMPLE, 1)[0] * cdf[:, -1:]  # (B, 1)
    pick = torch.searchsorted(cdf, u, right=True).clamp(max=keep.shape[1] - 1)
    pick = torch.minimum(pick, keep.sum(-1, keepdim=True) - 1)  # rounding may leave u at the very end
    return order.gather(1, pick)[:, 0]
