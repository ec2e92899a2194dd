"""Text diffusion: noise, loss, samplers, generate. Lay it beside autoregressive.py: same verbs.

Training corrupts the target at a random rate and asks for the clean text, then feeds the model's own answer back and
asks again: the loss of AR2Diff (arXiv 2401.17181, section 3) after SUNDAE (arXiv 2112.06749). Generation starts from
noise and lets the model rewrite the whole canvas a few times. All slots are alike: text, then learned pads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from draws import (
    CANVAS,
    CONDITION,
    CORRUPT,
    RATE,
    RENOISE,
    SAMPLE,
    SELECT,
    UNROLL,
    Draws,
    Generated,
    draw_tokens,
    forbidden_ids,
)  # fmt: skip


@dataclass
class LossConfig:
    """How the diffusion loss is made. What the noise is stands with the model's settings."""

    unroll_steps: int = 2  # passes: 1 is plain denoising, 2 is the paper's L(1) + L(2)
    unroll_temperature: float = 0.0  # 0: the next pass reads the argmax (the paper); 1: a sample (SUNDAE)
    self_conditioning_prob: float = 1.0  # share of rows that see the soft answer in the unrolled passes

    def __post_init__(self):
        if not 1 <= self.unroll_steps <= 16 or self.unroll_temperature < 0 or not 0 <= self.self_conditioning_prob <= 1:
            raise ValueError(
                "unroll_steps must be 1 to 16, unroll_temperature 0 or more, self_conditioning_prob in [0, 1]; got "
                f"{self.unroll_steps}, {self.unroll_temperature}, {self.self_conditioning_prob}"
            )


@dataclass
class SamplerConfig:
    """How a canvas becomes text."""

    sampler: str = "resample"  # resample (the paper) | argmax_unrolled | confidence | entropy_bound
    steps: int = 10  # network calls, each over all slots
    temperature: float = 0.2  # resample and confidence
    update_fraction: float = 1.0  # share of the slots redrawn per step: resample, argmax_unrolled
    candidates: int = 8  # random canvases per prompt; the one with the lowest model score is kept
    ramp_from: float = 0.8  # entropy_bound: temperature at the first step ...
    ramp_to: float = 0.4  # ... and at the last
    entropy_bound: float = 0.1  # nats accepted per step
    settle_entropy: float = 0.005  # nats a slot: adaptive samplers stop below it once the answer stands still

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {self.sampler!r}")
        if self.steps < 1 or self.candidates < 1:
            raise ValueError(f"steps and candidates must be at least 1, got {self.steps} and {self.candidates}")
        if not 0 < self.update_fraction <= 1:
            raise ValueError(f"update_fraction must be in (0, 1], got {self.update_fraction}")
        for name in ("temperature", "ramp_from", "ramp_to", "entropy_bound", "settle_entropy"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


def noise_tokens(uniform: Tensor, m) -> Tensor:
    """Noise for each number in [0, 1): an ordinary token or pad, all equally likely, or always the mask token."""
    if m.noise == "mask":
        return torch.full(uniform.shape, m.mask_id, device=uniform.device)
    token = (uniform * (m.n_ordinary + 1)).long()
    return torch.where(token == m.n_ordinary, m.pad_id, token)


def corrupt(target: Tensor, rate: Tensor, m, draws: Draws) -> Tensor:
    """Replace each token of target (B, T) with probability rate (B, 1); slot 0, the separator, is kept.

    uniform: a random token, perhaps the same one (SUNDAE). mask: m.mask_id (absorbing state, D3PM, arXiv 2107.03006).
    """
    chance, value = draws.uniform(CORRUPT, target.shape[1])
    hit = chance < rate  # (B, T)
    hit[:, 0] = False
    return torch.where(hit, noise_tokens(value, m), target)


def readout(logits: Tensor, shift: bool) -> Tensor:
    """Logits (B, T - 1, V) of the slots after the separator: slot i is read at position i, or at i - 1 with shift."""
    return logits[:, :-1] if shift else logits[:, 1:]


def losses(model, batch, cfg, draws: Draws, rate: Tensor | None = None, opened: Tensor | None = None):
    """The terms L(1), L(2), ... one by one, nats per slot over every slot, clean, corrupted or pad.

    L(k + 1) reads the model's own answer of pass k, as tokens and, with self-conditioning, as soft embedding beside
    them. No gradient crosses that, so each term may be backpropagated before the next is computed. The prefix stays
    clean. rate (B, 1): corruption, drawn from U(0, 1) per row where it is not given. opened: see model.attention_mask.
    """
    m, target = model.cfg, batch.target
    rate = draws.uniform(RATE, 1)[0] if rate is None else rate  # (B, 1)
    canvas, estimate = corrupt(target, rate, m, draws), None
    # As readout pairs them; -100 is not scored. Slicing the logits instead would copy them, forth and back.
    expected = F.pad(target[:, 1:], (0, 1) if m.shift else (1, 0), value=-100)  # (B, T)
    for k in range(cfg.unroll_steps):
        logits = model(batch.prefix, canvas, estimate=estimate, opened=opened)  # (B, T, V)
        yield F.cross_entropy(logits.flatten(0, 1), expected.flatten())
        logits = readout(logits, m.shift)  # (B, T - 1, V)
        if k + 1 < cfg.unroll_steps:
            with torch.no_grad():
                answer = draw_tokens(
                    logits.float(), cfg.unroll_temperature, draws.uniform(UNROLL, logits.shape[1], k)[0]
                )
                canvas = torch.cat([target[:, :1], answer], dim=1)
                if m.self_conditioning:
                    told = draws.uniform(CONDITION, 1, k)[0] < cfg.self_conditioning_prob  # (B, 1)
                    estimate = soft_estimate(model, logits) * told[..., None]


def loss(model, batch, cfg, draws: Draws) -> Tensor:
    """L(1) + L(2) of AR2Diff: a plain sum, nats per target slot."""
    return sum(losses(model, batch, cfg, draws))


@torch.no_grad()
def loss_by_rate(model, batch, cfg, draws: Draws, rates: list[float]) -> dict[str, float]:
    """L(1) at fixed corruption rates, nats per slot. Comparable between diffusion models, not with an AR loss."""
    fixed = {f"{rate:.1f}": torch.full((len(batch.target), 1), rate, device=batch.target.device) for rate in rates}
    return {name: next(losses(model, batch, cfg, draws, rate)).item() for name, rate in fixed.items()}


def soft_estimate(model, logits: Tensor) -> Tensor:
    """Soft embedding (B, T, C) of a prediction (B, T - 1, V). The separator's slot gets zeros, by mask: zero logits
    would give the mean embedding instead."""
    return F.pad(model.soft_embedding(logits), (0, 0, 1, 0))


class State(NamedTuple):
    """Where a sampler stands. R rows: candidates of all prompts that are still moving."""

    canvas: Tensor  # (R, S) slots after the separator: what the network reads next
    answer: Tensor  # (R, S) what the row would say if it stopped now
    judged: Tensor  # (R, S) the tokens whose mean NLL under the last logits is the row's score
    memory: Tensor  # (R, S) float, the sampler's own
    settled: Tensor  # (R,) bool: the row stands still and leaves (with self-conditioning its estimate might still move)
    free: Tensor  # (R, S) bool, False where the token is given (infilling)


@torch.no_grad()
def resample(logits: Tensor, state: State, step: int, cfg: SamplerConfig, draws: Draws, m) -> State:
    """Redraw a random share of the slots at low temperature. The paper's sampler at update_fraction = 1 (section 4.2).

    Samplers share this signature: one step from logits (R, S, V) and the state before to the state after.
    """
    drawn = draw_tokens(logits, cfg.temperature, draws.uniform(SAMPLE, logits.shape[1])[0])
    chosen = draws.uniform(SELECT, logits.shape[1])[0] < cfg.update_fraction
    canvas = torch.where(chosen & state.free, drawn, state.canvas)
    still = ((drawn == state.canvas) | ~state.free).all(1)  # a fixed point, whichever slots are chosen
    settled = still & (cfg.temperature == 0)
    answer, judged = _unmasked(canvas, drawn, m), _unmasked(state.canvas, drawn, m)
    return state._replace(canvas=canvas, answer=answer, judged=judged, settled=settled)


@torch.no_grad()
def argmax_unrolled(logits: Tensor, state: State, step: int, cfg: SamplerConfig, draws: Draws, m) -> State:
    """Argmax everywhere once, then rewrite only the share that was least sure in the pass before (SUNDAE, section 2.4).

    memory: how sure the last pass was of each slot.
    """
    best, drawn = logits.log_softmax(-1).max(-1)  # 2 x (R, S)
    if step == 0:
        chosen = state.free
    else:
        n = (state.free.sum(1, keepdim=True) * cfg.update_fraction - 1e-3).ceil()  # 50 x 0.3 is 15.000001 in float32
        chosen = _rank(-state.memory.masked_fill(~state.free, math.inf)) < n
    canvas = torch.where(chosen & state.free, drawn, state.canvas)
    still = ((drawn == state.canvas) | ~state.free).all(1)
    judged = _unmasked(state.canvas, drawn, m)
    return state._replace(canvas=canvas, answer=canvas, judged=judged, memory=best, settled=still)


@torch.no_grad()
def confidence(logits: Tensor, state: State, step: int, cfg: SamplerConfig, draws: Draws, m) -> State:
    """Commit the surest slots, a share that grows to all of them at the last step; the rest become noise again.

    Slots are ranked anew each step, so what was committed may be taken back. memory: the last answer.
    """
    drawn = draw_tokens(logits, cfg.temperature, draws.uniform(SAMPLE, logits.shape[1])[0])
    log_p = logits.log_softmax(-1)
    sure = log_p.gather(-1, drawn[..., None])[..., 0].masked_fill(~state.free, -math.inf)  # (R, S)
    n = (state.free.sum(1, keepdim=True) * (step + 1) / cfg.steps).ceil()
    after = _commit(logits, log_p, _rank(sure) < n, drawn, state, cfg, draws, m)
    # Pads are sure first: an answer may stand still while the text has not been begun, so wait for half of the slots.
    return after._replace(settled=after.settled & (step + 1 >= cfg.steps / 2))


@torch.no_grad()
def entropy_bound(logits: Tensor, state: State, step: int, cfg: SamplerConfig, draws: Draws, m) -> State:
    """Accept the slots of lowest entropy while the sum before each stays within a bound; the rest become noise again.

    The temperature falls linearly from ramp_from to ramp_to, and the output is the argmax, as DiffusionGemma samples
    (transformers, DiffusionGemma generation, 2026). memory: the last answer.
    """
    share = step / max(cfg.steps - 1, 1)
    temperature = cfg.ramp_from + (cfg.ramp_to - cfg.ramp_from) * share
    drawn = draw_tokens(logits, temperature, draws.uniform(SAMPLE, logits.shape[1])[0])
    log_p = (logits / max(temperature, 1e-6)).log_softmax(-1)
    entropy = _entropy(log_p).masked_fill(~state.free, math.inf)  # (R, S)
    ordered, order = entropy.sort(1)
    accept = torch.zeros_like(state.free).scatter(1, order, ordered.cumsum(1) - ordered <= cfg.entropy_bound)
    return _commit(logits, log_p, accept, drawn, state, cfg, draws, m)


SAMPLERS: dict[str, Callable] = {
    "resample": resample,
    "argmax_unrolled": argmax_unrolled,
    "confidence": confidence,
    "entropy_bound": entropy_bound,
}


def _unmasked(tokens, drawn, m) -> Tensor:
    # With mask noise a slot may not have been drawn yet. A mask is no text and has no likelihood: what was drawn has.
    return torch.where(tokens == m.mask_id, drawn, tokens)


def _commit(logits, log_p, keep, drawn, state, cfg, draws, m) -> State:
    # Kept slots hold their drawn token, the others fresh noise; the answer is the argmax of every slot.
    noise = noise_tokens(draws.uniform(RENOISE, keep.shape[1])[0], m)
    canvas = torch.where(state.free, torch.where(keep, drawn, noise), state.canvas)
    answer = torch.where(state.free, logits.argmax(-1), state.canvas)
    entropy = _entropy(log_p).masked_fill(~state.free, 0.0).sum(1) / state.free.sum(1).clamp(min=1)
    settled = (answer == state.memory.long()).all(1) & (entropy < cfg.settle_entropy)
    return state._replace(canvas=canvas, answer=answer, judged=answer, memory=answer.float(), settled=settled)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(-1)  # 0 log 0 = 0 at tokens that are walled off


def _rank(score: Tensor) -> Tensor:
    """Place of each slot of (R, S) when the highest score comes first."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


@torch.no_grad()
def generate(
    model,
    prefix: Tensor,
    cfg: SamplerConfig,
    seed: int = 0,
    example: Tensor | None = None,
    on_step: Callable | None = None,
    given: Tensor | None = None,
) -> Generated:
    """Denoise cfg.candidates random canvases per prefix (B, P), keep the one the model scores best (section 4.2).

    example (B,): names of the rows, which key their draws with the seed; 0 .. B - 1 by default.
    given (B, T - 1): token ids that stay as they are, -1 where the slot is free (infilling).
    on_step: called with (step, canvas (R, S), logits (R, S, V), rows (R,)) after each network call, and once before
        the first with step 0 and logits None; row r is candidate r % N of prompt r // N. Rows that settle leave.
    """
    m, N, S = model.cfg, cfg.candidates, model.cfg.target_length - 1
    example = torch.arange(len(prefix), device=prefix.device) if example is None else example
    prompt = torch.arange(len(prefix), device=prefix.device).repeat_interleave(N)  # (R,)
    candidate = torch.arange(N, device=prefix.device).repeat(len(prefix))
    draws = Draws(seed, example[prompt], candidate)
    cache = model.encode(prefix, room=m.target_length)
    cache = cache.rows(prompt) if N > 1 else cache
    wall, sampler = forbidden_ids(m, prefix.device), SAMPLERS[cfg.sampler]

    canvas = noise_tokens(draws.uniform(CANVAS, S)[0], m)  # (R, S)
    free = torch.ones_like(canvas, dtype=torch.bool)
    if given is not None:
        free = (given < 0)[prompt]
        canvas = torch.where(free, canvas, given[prompt])
    R = len(canvas)
    rows = torch.arange(R, device=prefix.device)
    state = State(canvas, canvas, canvas, torch.full(canvas.shape, -1.0, device=canvas.device), rows < 0, free)
    answers, scores, calls = canvas.clone(), torch.zeros(R, device=canvas.device), torch.zeros_like(rows)
    estimate = None
    # At a temperature above 0 the plain resampler never knows that it is done (the paper's always runs all steps).
    may_settle = cfg.sampler != "resample" or cfg.temperature == 0
    if on_step is not None:
        on_step(0, state.canvas, None, rows)
    for step in range(cfg.steps):
        separator = torch.full((len(rows), 1), m.sep_id, device=canvas.device)
        raw = model.decode(cache, torch.cat([separator, state.canvas], dim=1), estimate=estimate)
        raw = readout(raw, m.shift)
        logits = raw.float() + wall  # (R, S, V)
        state = sampler(logits, state, step, cfg, draws.at(step), m)
        calls[rows] += 1
        if on_step is not None:
            on_step(step + 1, state.canvas, logits, rows)
        last = step + 1 == cfg.steps
        leaving = torch.ones_like(state.settled) if last else state.settled
        if last or (may_settle and bool(leaving.any())):
            nll = F.cross_entropy(logits[leaving].transpose(1, 2), state.judged[leaving], reduction="none")
            scores[rows[leaving]], answers[rows[leaving]] = nll.mean(1), state.answer[leaving]
            stay = (~leaving).nonzero()[:, 0]
            if not len(stay):
                break
            state, draws, cache = State(*(part[stay] for part in state)), draws.rows(stay), cache.rows(stay)
            rows, raw = rows[stay], raw[stay]
        if m.self_conditioning:
            estimate = soft_estimate(model, raw)
    best = scores.view(-1, N).argmin(1) + torch.arange(len(prefix), device=canvas.device) * N  # (B,)
    return Generated(answers[best], scores[best], calls.view(-1, N).sum(1))
