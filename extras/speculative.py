"""Speculative decoding: the text of an AR model in fewer network calls.

Each call holds the last token, the drafted ones after it, and masks after each of them. The frozen
network verifies the drafts: they are accepted from the left as long as they are what it would
generate, and it supplies the token after them. The masks after that point are the next drafts. At a
temperature the text has the model's own distribution (arXiv 2211.17192, section 2.3).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as remember

import torch
from torch import Tensor
from torch.nn import functional as F

import autoregressive
from configurator import require, setting
from extras.adapter import DraftModel, check_model, load_adapter
from infra.logits import GenerateOutput, argmax, banned_token_ids, draw_tokens, token_nll
from infra.rng import ACCEPT, SAMPLE, CounterRNG, make_rng
from model import Transformer, split_prompt


@dataclass
class SamplerConfig(autoregressive.SamplerConfig):
    """AR with --draft: whose drafts are verified, and how many."""

    draft: str = setting("", "folder of extras.draft: same text, fewer calls", path=True)
    draft_tokens: int = setting(0, "drafted in one call; 0: one a mask", maximum=15)


@torch.no_grad()
def generate(
    model: DraftModel,
    prefix: Tensor,
    cfg: SamplerConfig,
    seed: int = 0,
    example: Tensor | None = None,
    on_step: Callable | None = None,
) -> GenerateOutput:
    """Return autoregressive.generate's text for each prefix (B, P), in fewer network calls.

    A greedy text may differ if two tokens are equally likely up to rounding. score: see there.
    on_step: called with (step, tokens and drafts (B, T - 1), logits (B, T - 1, V), rows).
    """
    pad = model.cfg.pad_id
    K = cfg.draft_tokens or model.adapter.masks
    S = model.cfg.target_length - 1
    rows = torch.arange(len(prefix), device=prefix.device)
    index = torch.arange(K + 1, device=prefix.device)
    rng = make_rng(seed, rows if example is None else example)
    banned = banned_token_ids(model.cfg, prefix.device)
    prefix, chain = split_prompt(prefix, model.cfg)  # (B, 1) the last token
    cache = model.encode(prefix, room=S + (K + 1) ** 2)
    chain = F.pad(chain, (0, K), value=pad)  # the first drafts are pads
    q = F.one_hot(chain[:, 1:], model.cfg.vocab_size).float()  # (B, K, V) drawn from this
    tokens = prefix.new_full((len(prefix), S + K + 1), pad)
    length = torch.zeros_like(rows)
    calls = torch.zeros_like(rows)
    loss = torch.zeros(len(rows), device=rows.device)
    active = torch.ones_like(rows, dtype=torch.bool)
    for turn in range(S):
        every = read_round(model, cache, chain, K)  # (B, C + C K, V), C = K + 1
        logits = every[:, : K + 1].float().index_fill(-1, banned, -math.inf)
        verified, n = verify(chain[:, 1:], q, logits, cfg, rng.fold_in(turn))  # (B, C), (B,)
        place = length[:, None] + index  # (B, C) their slots
        is_pad = (verified == pad).long()
        accepted = (index < n[:, None]) & (is_pad.cumsum(1) == is_pad)  # up to the first pad
        accepted &= (place < S) & active[:, None]
        verified = torch.where(accepted, verified, pad)
        tokens = tokens.scatter(1, place, verified)
        loss += (token_nll(logits, verified) * accepted).sum(1)
        n = accepted.sum(1)
        length = length + n
        cache.lengths = cache.lengths + n
        calls += active
        last = (n - 1).clamp(min=0)[:, None]  # (B, 1)
        token = verified.gather(1, last)
        masks = every[rows[:, None], K + 1 + last * K + index[:K]].float()  # (B, K, V) after it
        masks = masks.index_fill(-1, banned, -math.inf)
        drafts, q = draw(masks, cfg, rng.fold_in(turn))
        ended = (token[:, 0] == pad) | (length == S)
        if on_step is not None:
            shown = drafts.masked_fill(ended[:, None], pad)
            canvas = tokens.scatter(1, length[:, None] + index[:K], shown)
            known = logits.masked_fill(~accepted[..., None], 0.0)
            seen = known.new_zeros(*tokens.shape, known.shape[-1])
            seen.scatter_(1, place[..., None].expand_as(known), known)
            on_step(turn + 1, canvas[:, :S], seen[:, :S], torch.where(active, rows, -1))
        chain = torch.cat([token, drafts], dim=1)
        active = active & ~ended
        if not active.any():
            break
    return GenerateOutput(tokens[:, :S], loss / length, calls)


def open_draft(model: Transformer, cfg: SamplerConfig, path: str) -> DraftModel:
    """Return the model of a checkpoint with the adapter in cfg.draft, for generate()."""
    check_model(model, path)
    drafter = load_adapter(cfg.draft, model)
    most = drafter.adapter.masks
    n = cfg.draft_tokens
    require(n <= most, f"draft_tokens must be at most {most}, the masks of {cfg.draft}, got {n}")
    return drafter


@remember
def round_layout(C: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return number (W,), offset (W,) and edges (W, W) of a call: C tokens, then C K masks.

    A chain of two tokens, two masks after each; offset is the position after the first token:

        number  0 0 1 2 1 2      token 0   x . . . . .
        offset  0 1 1 2 2 3      token 1   x x . . . .
                                 mask 0.1  x . x . . .
                                 mask 0.2  x . x x . .
                                 mask 1.1  x x . . x .
                                 mask 1.2  x x . . x x
    """
    after = torch.cat([torch.arange(C), torch.arange(C).repeat_interleave(K)])  # (W,) its token
    number = torch.cat([torch.zeros(C, dtype=torch.long), torch.arange(1, K + 1).repeat(C)])
    to_tokens = (number == 0) & (after <= after[:, None])
    to_masks = (number > 0) & (after == after[:, None]) & (number <= number[:, None])
    return number, after + number, to_tokens | to_masks


def read_round(model: DraftModel, cache, chain: Tensor, K: int) -> Tensor:
    """Return logits (B, C + C K, V) for a chain (B, C), with K masks after each of its tokens."""
    C = chain.shape[1]
    number, offset, edges = (part.to(chain.device) for part in round_layout(C, K))
    tokens = F.pad(chain, (0, C * K))
    return model.network.head(model.read(tokens, number, offset, edges, cache))


def draw(logits: Tensor, cfg: SamplerConfig, rng: CounterRNG) -> tuple[Tensor, Tensor | None]:
    """Return drafts (B, K) and their probabilities (B, K, V), None if greedy."""
    if cfg.temperature == 0:
        return argmax(logits), None
    q = probabilities(logits, cfg)
    return draw_tokens(q.log(), 1.0, rng.uniform(SAMPLE, logits.shape[1])[0]), q


def verify(
    drafts: Tensor, q: Tensor | None, logits: Tensor, cfg: SamplerConfig, rng: CounterRNG
) -> tuple[Tensor, Tensor]:
    """Return tokens (B, C) and how many of them, (B,), the model generates: 1 to C.

    drafts (B, C - 1) were drawn from q (B, C - 1, V), and p is what logits (B, C, V) say. A draft
    is accepted with probability min(1, p / q). The first other token is drawn from max(p - q, 0),
    normalised, so that its distribution is p. After the last draft it is drawn from p.
    """
    if cfg.temperature == 0:
        tokens = argmax(logits)
        return tokens, (tokens[:, :-1] == drafts).long().cumprod(1).sum(1) + 1
    p = probabilities(logits, cfg)
    q = F.pad(q, (0, 0, 0, 1))  # (B, C, V)
    drafts = F.pad(drafts, (0, 1))  # (B, C)
    chance, value = rng.uniform(ACCEPT, drafts.shape[1])
    ratio = [each.gather(-1, drafts[..., None])[..., 0] for each in (p, q)]  # 2 x (B, C)
    accepted = chance * ratio[1] < ratio[0]
    n = accepted[:, :-1].long().cumprod(1).sum(1)[:, None]  # (B, 1)
    at = n[..., None].expand(-1, -1, p.shape[-1])
    p = p.gather(1, at)  # (B, 1, V)
    rest = (p - q.gather(1, at)).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # by rounding p = q
    drawn = draw_tokens(rest.log(), 1.0, value.gather(1, n))  # (B, 1)
    return drafts.scatter(1, n, drawn), n[:, 0] + 1


def probabilities(logits: Tensor, cfg: SamplerConfig) -> Tensor:
    """Return what autoregressive.draw_next draws from, (B, T, V)."""
    return (autoregressive.truncate(logits, cfg) / cfg.temperature).softmax(-1)
