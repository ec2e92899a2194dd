"""Autoregressive models: loss and generate. Compare it with diffusion.py."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from configurator import setting, validate
from infra.logits import (
    GenerateOutput,
    argmax,
    banned_token_ids,
    cross_entropy_in_place,
    draw_tokens,
)
from infra.rng import SAMPLE, CounterRNG, make_rng
from model import split_prompt


@dataclass
class SamplerConfig:
    """AR: how the next token is drawn."""

    temperature: float = setting(0.0, "0: greedy", minimum=1e-3, zero_ok=True)
    top_k: int = setting(0, "keep the k most likely; 0: all")
    top_p: float = setting(1.0, "keep this probability", above=0, maximum=1)

    __post_init__ = validate


def losses(model, batch, cfg, rng, extra_edges=None, scale=1.0):
    """Yield the one term, times scale: nats per slot, pads included."""
    logits = model(batch.prefix, batch.target)  # (B, T, V)
    # Position i predicts slot i + 1; -100 is not scored.
    expected = F.pad(batch.target[:, 1:], (0, 1), value=-100)
    yield cross_entropy_in_place(logits, expected) * scale


def loss(model, batch, cfg, rng) -> Tensor:
    """Return the mean cross-entropy, nats per target slot."""
    return sum(losses(model, batch, cfg, rng))


@torch.no_grad()
def generate(model, prefix, cfg, seed=0, example=None, on_step=None):
    """Continue each prefix (B, P) until a pad. example (B,): keys of the draws.

    on_step: called with (step, tokens (B, T - 1), logits (B, 1, V), rows).
    """
    model_cfg = model.cfg
    B = len(prefix)
    T = model_cfg.target_length
    device = prefix.device
    rows = torch.arange(B, device=device)
    rng = make_rng(seed, rows if example is None else example)
    prefix, token = split_prompt(prefix, model_cfg)
    cache = model.encode(prefix, reserve=T)
    tokens = torch.full((B, T - 1), model_cfg.pad_id, device=device)
    score = torch.zeros(B, device=device)
    calls = torch.zeros_like(rows)
    active = torch.ones_like(rows, dtype=torch.bool)
    banned = banned_token_ids(model_cfg, device)
    for step in range(T - 1):
        logits = model.decode(cache, token, append=True)[:, -1].float()
        logits = logits.index_fill(-1, banned, -math.inf)  # (B, V)
        drawn = draw_next(logits, cfg, rng.fold_in(step))  # (B,)
        drawn = torch.where(active, drawn, model_cfg.pad_id)
        tokens[:, step] = drawn
        score += F.cross_entropy(logits, drawn, reduction="none") * active
        calls += active
        active = active & (drawn != model_cfg.pad_id)
        token = drawn[:, None]
        if on_step is not None:
            on_step(step + 1, tokens, logits[:, None], rows)
        if not active.any():
            break
    return GenerateOutput(tokens, score / calls, calls)


def draw_next(logits: Tensor, cfg, rng: CounterRNG) -> Tensor:
    """Draw a token (B,) from logits (B, V)."""
    if cfg.temperature == 0:
        return argmax(logits)
    logits = truncate(logits, cfg)[:, None]
    uniform, _ = rng.uniform(SAMPLE, 1)  # (B, 1)
    return draw_tokens(logits, cfg.temperature, uniform)[:, 0]


def truncate(logits: Tensor, cfg) -> Tensor:
    """Return logits (.., V), -inf beyond top-k and top-p (arXiv 1904.09751)."""
    if not cfg.top_k and cfg.top_p == 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probs = (ordered / cfg.temperature).softmax(-1)
    keep = probs.cumsum(-1) - probs < cfg.top_p
    if cfg.top_k:
        keep[..., cfg.top_k :] = False
    keep = torch.zeros_like(keep).scatter(-1, order, keep)
    return logits.masked_fill(~keep, -math.inf)
