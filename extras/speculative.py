"""Self-speculative decoding: one set of weights drafts the whole target at once and verifies it.

With bidirectional attention the network rewrites a canvas, as in diffusion.generate. With causal
attention one call predicts what AR decoding would write at each slot. Tokens are accepted from the
left as long as both agree, and the first other one is replaced by AR's. So each round adds at least
one token, and the text is AR's. At a temperature it is drawn exactly from AR's distribution
(speculative sampling, Leviathan et al., arXiv 2211.17192, section 2.3). Train for both masks with
ar_loss_weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from configurator import setting, validate
from diffusion import align_logits, expected_embedding, sample_noise
from infra.logits import GenerateOutput, banned_token_ids, draw_tokens, token_nll
from infra.rng import ACCEPT, CANVAS, SAMPLE, CounterRNG, make_rng
from model import split_prompt


@dataclass
class SamplerConfig:
    """How a draft is written and which distribution it is verified against."""

    temperature: float = setting(0.0, "of draft and check", minimum=1e-3, zero_ok=True)
    draft_steps: int = setting(2, "diffusion calls before the first check", minimum=1, maximum=16)

    def __post_init__(self):
        validate(self)


@torch.no_grad()
def generate(
    model,
    prefix: Tensor,
    cfg: SamplerConfig,
    seed: int = 0,
    example: Tensor | None = None,
    on_step: Callable | None = None,
) -> GenerateOutput:
    """Return autoregressive.generate's text for each prefix (B, P), in fewer network calls.

    The text may differ if two tokens are equally likely up to rounding. score: of the AR model.
    calls: drafts and checks of the row. example: see autoregressive.generate.
    on_step: see diffusion.denoise; called after each draft and each check.
    """
    model_cfg = model.cfg
    _check_model(model_cfg)
    S = model_cfg.target_length - 1
    rows = torch.arange(len(prefix), device=prefix.device)  # (B,)
    slot = torch.arange(S, device=prefix.device)
    rng = make_rng(seed, rows if example is None else example)
    prefix, start = split_prompt(prefix, model_cfg)
    cache = model.encode(prefix, reserve=model_cfg.target_length)
    drafter = Drafter(model, cache, start, cfg.temperature)
    canvas = sample_noise(rng.uniform(CANVAS, S)[0], model_cfg)  # (B, S)
    length = torch.zeros_like(rows)  # slots that are verified
    active = torch.ones_like(rows, dtype=torch.bool)
    calls = torch.zeros_like(rows)
    loss = torch.zeros(len(rows), device=rows.device)
    report = on_step or (lambda *_: None)
    report(0, canvas, None, rows)
    step = 0
    for turn in range(S):
        turn_rng = rng.fold_in(turn)
        is_open = active[:, None] & (slot >= length[:, None])  # (B, S); a finished row is frozen
        drafts = 1 if turn else cfg.draft_steps
        for k in range(drafts):
            drawn = drafter.draft(canvas, turn_rng.uniform(SAMPLE, S, k)[0])
            canvas = torch.where(is_open, drawn, canvas)
            step += 1
            report(step, canvas, drafter.logits, torch.where(active, rows, -1))
        logits = drafter.causal_logits(canvas)  # (B, S, V)
        verified, end = verify_draft(
            canvas, length, drafter.logits, logits, cfg.temperature, turn_rng
        )
        canvas = torch.where(active[:, None], verified, canvas)
        length = torch.where(active, end, length)
        calls += (drafts + 1) * active
        step += 1
        report(step, canvas, logits, torch.where(active, rows, -1))

        is_pad = (canvas == model_cfg.pad_id) & (slot < length[:, None])
        pads_before = is_pad.cumsum(1) - is_pad.long()
        is_text = (slot < length[:, None]) & (pads_before == 0)  # including the first pad
        loss += token_nll(logits, canvas).masked_fill(~(is_text & is_open), 0.0).sum(1)
        active = active & ~is_pad.any(1) & (length < S)
        if not active.any():
            break
    tokens = torch.where(is_text, canvas, model_cfg.pad_id)
    return GenerateOutput(tokens, loss / is_text.sum(1), calls)


class Drafter:
    """The two ways to read a canvas after one cached prefix. logits: those of the last draft."""

    def __init__(self, model, cache, start: Tensor, temperature: float):
        self.model = model
        self.cache = cache
        self.start = start  # (B, 1) slot 0 of the target
        self.temperature = temperature
        self.banned = banned_token_ids(model.cfg, start.device)
        self.self_cond: Tensor | None = None
        self.logits: Tensor | None = None

    def draft(self, canvas: Tensor, uniform: Tensor) -> Tensor:
        """Return a new token for each slot (B, S), drawn from the diffusion model."""
        model_cfg = self.model.cfg
        target = torch.cat([self.start, canvas], dim=1)
        logits = self.model.decode(self.cache, target, self_cond=self.self_cond)
        logits = align_logits(logits, model_cfg.shift)
        if model_cfg.self_conditioning:
            self.self_cond = expected_embedding(self.model, logits)
        self.logits = logits.float().index_fill(-1, self.banned, -math.inf)
        return draw_tokens(self.logits, self.temperature, uniform)

    def causal_logits(self, canvas: Tensor) -> Tensor:
        """Return AR's logits (B, S, V) of each slot, given the canvas before it."""
        target = torch.cat([self.start, canvas], dim=1)
        logits = self.model.decode(self.cache, target, attention="causal")[:, :-1]
        return logits.float().index_fill(-1, self.banned, -math.inf)


def verify_draft(
    draft: Tensor,
    length: Tensor,
    draft_logits: Tensor,
    logits: Tensor,
    temperature: float,
    rng: CounterRNG,
) -> tuple[Tensor, Tensor]:
    """Return the draft (B, S) with its first rejected token replaced, and the new lengths (B,).

    The first `length` slots are verified already. The others were drawn from q, the softmax of
    draft_logits (B, S, V); AR's p is that of logits (B, S, V). A token is accepted with probability
    min(1, p / q). The first rejected one is drawn again from max(p - q, 0), normalised, so that its
    distribution is p. At temperature 0, tokens that equal AR's argmax are accepted.
    """
    S = draft.shape[1]
    slot = torch.arange(S, device=draft.device)
    row = torch.arange(len(draft), device=draft.device)
    p = _probabilities(logits, temperature)  # (B, S, V)
    q = _probabilities(draft_logits, temperature)
    chance, value = rng.uniform(ACCEPT, S)  # 2 x (B, S)
    p_draft = p.gather(-1, draft[..., None])[..., 0]  # (B, S)
    q_draft = q.gather(-1, draft[..., None])[..., 0]
    accepted = (chance * q_draft < p_draft) | (slot < length[:, None])
    end = accepted.long().cumprod(1).sum(1)  # (B,) the first rejected slot; S: none
    at = end.clamp(max=S - 1)
    residual = (p[row, at] - q[row, at]).clamp(min=0)  # (B, V)
    # By rounding, p may exceed q nowhere.
    residual = torch.where(residual.sum(1, keepdim=True) > 0, residual, p[row, at])
    redrawn = draw_tokens(residual.log()[:, None], 1.0, value[row, at, None])  # (B, 1)
    return torch.where(slot == end[:, None], redrawn, draft), (end + 1).clamp(max=S)


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits / temperature).softmax(-1)


def _check_model(model_cfg) -> None:
    bidirectional = model_cfg.target_attention == "bidirectional"
    if model_cfg.prefix_attention == "joint" or not bidirectional:
        raise ValueError(
            "speculative decoding needs a cached prefix and a bidirectional target, got "
            f"prefix_attention={model_cfg.prefix_attention!r} and "
            f"target_attention={model_cfg.target_attention!r}; see config/speculative_1_adapt.py"
        )
