"""Text diffusion: noise, loss, samplers. Compare it with autoregressive.py.

Training corrupts the target and predicts the clean text. The model
then reads its own prediction and predicts again. This is the loss of
AR2Diff (arXiv 2401.17181, section 3), after SUNDAE (arXiv 2112.06749).
Generation starts from a canvas of noise and rewrites it a few times.
Pads are tokens like others, so the model decides the length.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from configurator import require, setting, validate
from infra.logits import (
    GenerateOutput,
    argmax,
    banned_token_ids,
    cross_entropy_in_place,
    draw_tokens,
    entropy,
    token_nll,
)
from infra.rng import CANVAS, CORRUPT, RATE, RENOISE, SAMPLE, SELECT, UNROLL, CounterRNG
from model import split_prompt


# Noise
def sample_noise(uniform: Tensor, model_cfg) -> Tensor:
    """Map numbers in [0, 1) to tokens of the same shape.

    noise=uniform: an ordinary token or pad (arXiv 2112.06749).
    noise=mask: mask_id (arXiv 2107.03006).
    """
    if model_cfg.noise == "mask":
        return torch.full(uniform.shape, model_cfg.mask_id, device=uniform.device)
    skip_eos = model_cfg.eos_id >= 0  # no text contains it
    token = (uniform * (model_cfg.n_ordinary + 1 - skip_eos)).long()
    if skip_eos:
        token = token + (token >= model_cfg.eos_id)
    return torch.where(token == model_cfg.n_ordinary, model_cfg.pad_id, token)


def corrupt(target: Tensor, rate: Tensor, model_cfg, rng) -> Tensor:
    """Replace tokens (B, T) by noise with probability rate (B, 1)."""
    chance, value = rng.uniform(CORRUPT, target.shape[1])
    hit = chance < rate  # (B, T)
    hit[:, 0] = False  # slot 0 is given
    return torch.where(hit, sample_noise(value, model_cfg), target)


# Loss
@dataclass
class LossConfig:
    """The diffusion loss. The kind of noise is a setting of the model."""

    unroll_steps: int = setting(2, "passes; paper: 2", minimum=1, maximum=16)
    unroll_temperature: float = setting(0.0, "0: the next pass reads the argmax")
    full_noise_prob: float = setting(0.0, "share of rows of only noise", maximum=1)

    __post_init__ = validate


def draw_rate(cfg: LossConfig, rng: CounterRNG) -> Tensor:
    """Draw a corruption rate (B, 1) per row, uniform in [0, 1)."""
    rate, chance = rng.uniform(RATE, 1)  # (B, 1)
    return torch.where(chance < cfg.full_noise_prob, 1.0, rate)


def align_logits(logits: Tensor, shift: bool) -> Tensor:
    """Return logits (B, T - 1, V) of slots 1 .. T - 1, out of (B, T, V).

    Position i - 1 predicts slot i, as in AR models, or i without shift.
    """
    return logits[:, :-1] if shift else logits[:, 1:]


def losses(model, batch, cfg, rng, extra_edges=None, scale=1.0):
    """Yield L(1), L(2), .., times scale, nats per slot.

    Call backward() on each term before asking for the next. The prefix
    is read once. So a last term, of value 0, carries the gradients of
    all terms into it (docs/method.md).
    """
    cache = model.encode(batch.prefix, reserve=batch.target.shape[1])
    detached, pairs = cache.detach()
    for term in loss_terms(model, detached, batch, cfg, rng, extra_edges=extra_edges):
        yield term * scale
    pairs = [pair for pair in pairs if pair[1].grad is not None]
    if pairs:
        carried = sum((read * leaf.grad).sum() for read, leaf in pairs)
        yield carried - carried.detach()


def loss_terms(model, cache, batch, cfg, rng, rate=None, extra_edges=None):
    """Yield the terms. L(k + 1) reads the prediction of pass k.

    rate (B, 1): of corruption; by default drawn.
    """
    model_cfg = model.cfg
    target = batch.target  # (B, T)
    rate = draw_rate(cfg, rng) if rate is None else rate
    canvas = corrupt(target, rate, model_cfg, rng)
    self_cond = None
    # -100 is not scored. Slicing the logits instead would copy them.
    unscored = (0, 1) if model_cfg.shift else (1, 0)
    expected = F.pad(target[:, 1:], unscored, value=-100)
    for k in range(cfg.unroll_steps):
        hints = {"self_cond": self_cond, "extra_edges": extra_edges}
        logits = model.decode(cache.fork(), canvas, **hints)  # (B, T, V)
        if k + 1 < cfg.unroll_steps:  # before the loss overwrites the logits
            with torch.no_grad():
                aligned = align_logits(logits, model_cfg.shift)  # (B, T - 1, V)
                uniform, _ = rng.uniform(UNROLL, aligned.shape[1], k)
                answer = draw_tokens(aligned, cfg.unroll_temperature, uniform)
                canvas = torch.cat([target[:, :1], answer], dim=1)
                if model_cfg.self_conditioning:
                    self_cond = expected_embedding(model, aligned)
                del aligned
        term = cross_entropy_in_place(logits, expected)
        del logits  # the next pass allocates as many
        yield term


def loss(model, batch, cfg, rng: CounterRNG) -> Tensor:
    """Return L(1) + L(2), nats per slot, with one graph."""
    cache = model.encode(batch.prefix)
    return sum(loss_terms(model, cache, batch, cfg, rng))


@torch.no_grad()
def loss_by_rate(model, batch, rng: CounterRNG, rates) -> dict[str, float]:
    """Return {rate: L(1)}, nats per slot, at fixed corruption rates."""
    cfg = LossConfig(unroll_steps=1)
    cache = model.encode(batch.prefix, reserve=batch.target.shape[1])
    found = {}
    for rate in rates:
        fixed = torch.full_like(batch.target[:, :1], rate, dtype=torch.float32)
        terms = loss_terms(model, cache, batch, cfg, rng, fixed)
        found[f"{rate:.1f}"] = next(terms).item()
    return found


def expected_embedding(model, logits: Tensor) -> Tensor:
    """Return the mean embedding (B, T, C) of logits (B, T - 1, V)."""
    rows = max(1, 2**24 // logits[0].numel())  # bounds the memory
    parts = [model.expected_embedding(part) for part in logits.split(rows)]
    return F.pad(torch.cat(parts), (0, 0, 1, 0))  # slot 0: zeros


# Samplers. Each is one step: it reads logits (R, S, V) of the slots, the state and
# the number of the step, and returns the next state. denoise() runs them.


class SamplerState(NamedTuple):
    """R canvases of S slots between two steps."""

    canvas: Tensor  # (R, S) what the network reads next
    output: Tensor  # (R, S) the text, if the row stopped now
    scored: Tensor  # (R, S) tokens whose mean NLL is the score
    aux: Tensor  # (R, S) float, for the next step of this sampler
    converged: Tensor  # (R,) bool: no step would change it
    editable: Tensor  # (R, S) bool; False: given (infilling)


def resample(logits, state, step, cfg, rng, model_cfg):
    """Redraw a random share of the slots; the paper (section 4.2): all."""
    S = logits.shape[1]
    drawn = draw_tokens(logits, cfg.temperature, rng.uniform(SAMPLE, S)[0])
    chosen = rng.uniform(SELECT, S)[0] < cfg.update_fraction
    canvas = torch.where(chosen & state.editable, drawn, state.canvas)
    return state._replace(
        canvas=canvas,
        output=_replace_masks(canvas, drawn, model_cfg),
        scored=_replace_masks(state.canvas, drawn, model_cfg),
        converged=_unchanged(drawn, state) & (cfg.temperature == 0),
    )


def argmax_unrolled(logits, state, step, cfg, rng, model_cfg):
    """Rewrite the least confident slots of the previous pass (SUNDAE, 2.4)."""
    drawn = argmax(logits)
    confidences = -token_nll(logits, drawn)  # (R, S)
    chosen = state.editable
    if step > 0:
        # 50 x 0.3 is 15.000001 in float32, so 1e-3 is subtracted before rounding up.
        n = (state.editable.sum(1, keepdim=True) * cfg.update_fraction - 1e-3).ceil()
        before = state.aux.masked_fill(~chosen, math.inf)
        chosen = chosen & (_rank(-before) < n)
    canvas = torch.where(chosen, drawn, state.canvas)
    return state._replace(
        canvas=canvas,
        output=canvas,
        scored=_replace_masks(state.canvas, drawn, model_cfg),
        aux=confidences,
        converged=_unchanged(drawn, state),
    )


def confidence(logits, state, step, cfg, rng, model_cfg):
    """Keep the most confident slots, more each step (arXiv 2202.04200)."""
    uniform, _ = rng.uniform(SAMPLE, logits.shape[1])
    drawn = draw_tokens(logits, cfg.temperature, uniform)
    nll = token_nll(logits, drawn).masked_fill(~state.editable, math.inf)  # (R, S)
    n = (state.editable.sum(1, keepdim=True) * (step + 1) / cfg.steps).ceil()
    kept = _rank(-nll) < n
    # The model is sure of pads first, so an early answer may be stable but empty.
    late = step + 1 >= cfg.steps / 2
    stop = entropy(logits) if late and cfg.stop_entropy > 0 else None
    return _keep_or_renoise(logits, state, kept, drawn, stop, cfg, rng, model_cfg)


def entropy_bound(logits, state, step, cfg, rng, model_cfg):
    """Keep slots of low entropy, up to a bound of its sum (DiffusionGemma)."""
    progress = step / max(cfg.steps - 1, 1)
    change = cfg.temperature_end - cfg.temperature_start
    temperature = cfg.temperature_start + change * progress
    uniform, _ = rng.uniform(SAMPLE, logits.shape[1])
    drawn = draw_tokens(logits, temperature, uniform)
    entropies = entropy(logits, temperature)  # (R, S)
    ordered, order = entropies.masked_fill(~state.editable, math.inf).sort(1)
    within = ordered.cumsum(1) - ordered <= cfg.entropy_bound
    kept = torch.zeros_like(state.editable).scatter(1, order, within)
    stop = entropies if cfg.stop_entropy > 0 else None
    return _keep_or_renoise(logits, state, kept, drawn, stop, cfg, rng, model_cfg)


SAMPLERS = {
    "resample": resample,
    "argmax_unrolled": argmax_unrolled,
    "confidence": confidence,
    "entropy_bound": entropy_bound,
}


@dataclass
class SamplerConfig:
    """Diffusion: how a canvas becomes text."""

    sampler: str = setting("resample", "paper: resample", tuple(SAMPLERS))
    steps: int = setting(10, "most network calls", minimum=1)
    temperature: float = setting(0.2, "of draws; 0: argmax", minimum=1e-3, zero_ok=True)
    update_fraction: float = setting(1.0, "of resample, argmax_unrolled", above=0, maximum=1)
    candidates: int = setting(1, "canvases per prompt", minimum=1)
    entropy_bound: float = setting(0.1, "nats accepted per step")
    temperature_start: float = setting(0.8, "of entropy_bound, first step", minimum=1e-3)
    temperature_end: float = setting(0.4, "of entropy_bound, last step", minimum=1e-3)
    stop_entropy: float = setting(0.005, "nats per slot to stop; 0: never")

    def __post_init__(self):
        validate(self)
        used = self.update_fraction == 1 or self.sampler in ("resample", "argmax_unrolled")
        require(used, f"sampler={self.sampler} does not use update_fraction")


def _unchanged(drawn: Tensor, state: SamplerState) -> Tensor:
    return ((drawn == state.canvas) | ~state.editable).all(1)


def _replace_masks(tokens: Tensor, drawn: Tensor, model_cfg) -> Tensor:
    # The mask token is no text and has no likelihood.
    return torch.where(tokens == model_cfg.mask_id, drawn, tokens)


def _keep_or_renoise(logits, state, kept, drawn, entropies, cfg, rng, model_cfg):
    """Kept slots (R, S) get their drawn token, the others noise."""
    noise = sample_noise(rng.uniform(RENOISE, kept.shape[1])[0], model_cfg)
    canvas = torch.where(kept, drawn, noise)
    canvas = torch.where(state.editable, canvas, state.canvas)
    output = torch.where(state.editable, argmax(logits), state.canvas)
    converged = state.converged
    if entropies is not None:  # stop if the output repeats
        n = state.editable.sum(1).clamp(min=1)
        mean_entropy = entropies.masked_fill(~state.editable, 0.0).sum(1) / n
        repeats = (output == state.aux.long()).all(1)
        converged = repeats & (mean_entropy < cfg.stop_entropy)
    return state._replace(
        canvas=canvas,
        output=output,
        scored=output,
        aux=output.float(),
        converged=converged,
    )


def _rank(score: Tensor) -> Tensor:
    # 0: the highest of (R, S).
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


# Generation
@torch.no_grad()
def generate(model, prefix, cfg, seed=0, example=None, on_step=None, given=None):
    """Generate a target for each prompt (B, P): a GenerateOutput.

    The best of cfg.candidates canvases is kept (section 4.2).
    example (B,): the rows' keys of random numbers. on_step: see denoise.
    given (B, T - 1): fixed tokens, -1 for free slots.
    """
    model_cfg = model.cfg
    B = len(prefix)
    N = cfg.candidates
    prefix, start = split_prompt(prefix, model_cfg)
    cache = model.encode(prefix, reserve=model_cfg.target_length)
    prompt = torch.arange(B, device=prefix.device).repeat_interleave(N)  # (R,)
    candidate = torch.arange(N, device=prefix.device).repeat(B)
    if N > 1:
        cache = cache.select(prompt)
        given = None if given is None else given[prompt]
    example = prompt if example is None else example[prompt]
    rng = CounterRNG(seed, example, candidate)
    length = model_cfg.target_length - 1
    out = denoise(model, cache, start[prompt], length, cfg, rng, on_step, given)
    best = out.score.view(B, N).argmin(1) + prompt[::N] * N
    calls = out.calls.view(B, N).sum(1)
    return GenerateOutput(out.tokens[best], out.score[best], calls)


@torch.no_grad()
def denoise(model, cache, start, length, cfg, rng, on_step=None, given=None):
    """Rewrite R canvases in up to cfg.steps calls. Freeze converged rows.

    start (R, 1): slot 0. on_step: called with (step, canvas (R, S),
    logits (R, S, V), rows (R,): -1 if frozen), at first with step 0
    and no logits.
    """
    model_cfg = model.cfg
    step_fn = SAMPLERS[cfg.sampler]
    state = initial_state(length, rng, model_cfg, given)
    rows = torch.arange(len(state.canvas), device=state.canvas.device)
    active = ~state.converged  # (R,)
    calls = torch.zeros_like(rows)
    score = torch.zeros(len(rows), device=rows.device)
    banned = banned_token_ids(model_cfg, rows.device)
    self_cond = None
    if on_step is not None:
        on_step(0, state.canvas, None, rows)
    for step in range(cfg.steps):
        is_last = step + 1 == cfg.steps
        canvas = torch.cat([start, state.canvas], dim=1)  # (R, 1 + S)
        logits = model.decode(cache, canvas, self_cond=self_cond)  # (R, 1 + S, V)
        logits = align_logits(logits, model_cfg.shift)  # (R, S, V)
        if model_cfg.self_conditioning and not is_last:
            self_cond = expected_embedding(model, logits)  # (R, 1 + S, C)
        logits = logits.index_fill(-1, banned, -math.inf)
        new = step_fn(logits, state, step, cfg, rng.fold_in(step), model_cfg)
        state = freeze(state, new, active)
        calls += active
        if on_step is not None:
            running = torch.where(active, rows, -1)
            on_step(step + 1, state.canvas, logits, running)
        finished = active & (state.converged | is_last)
        if finished.any():
            nll = token_nll(logits, state.scored).mean(1)
            score = torch.where(finished, nll, score)
            active = active & ~finished
            if not active.any():
                break
    return GenerateOutput(state.output, score, calls)


def initial_state(length: int, rng, model_cfg, given) -> SamplerState:
    """Return canvases of noise and given tokens."""
    canvas = sample_noise(rng.uniform(CANVAS, length)[0], model_cfg)  # (R, S)
    editable = torch.ones_like(canvas, dtype=torch.bool)
    if given is not None:
        editable = given < 0
        canvas = torch.where(editable, canvas, given)
    aux = torch.full(canvas.shape, -1.0, device=canvas.device)
    converged = torch.zeros_like(editable[:, 0])
    return SamplerState(canvas, canvas, canvas, aux, converged, editable)


def freeze(old, new, active: Tensor) -> SamplerState:
    """Return the new state of active rows, else the old one."""
    masks = [active if part.dim() == 1 else active[:, None] for part in old]
    return SamplerState(*map(torch.where, masks, new, old))
