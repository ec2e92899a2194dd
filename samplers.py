"""How a canvas becomes text: samplers, one step each, with one signature. diffusion.denoise runs them.

A sampler is a function and its name in SAMPLERS; no other file changes. All slots of a canvas are alike: text, then
learned pads, so the length of an answer is the model's to say.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from draws import RENOISE, SAMPLE, SELECT, Draws, draw_tokens, exp_, likeliest, noise_tokens, row_by_row


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
    settle_entropy: float = 0.005  # nats a slot: confidence, entropy_bound stop below it when the answer stands still
    block_length: int = 0  # slots of a canvas; 0: one canvas, as wide as the model's target
    max_new_tokens: int = 0  # with block_length: length of the text, which may pass the model's target; 0: that

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; got {self.sampler!r}")
        if self.steps < 1 or self.candidates < 1:
            raise ValueError(f"steps and candidates must be at least 1, got {self.steps} and {self.candidates}")
        if self.block_length < 0 or self.max_new_tokens < 0 or (self.max_new_tokens and not self.block_length):
            raise ValueError(
                f"block_length and max_new_tokens must be 0 or more, and max_new_tokens needs block_length; "
                f"got {self.block_length} and {self.max_new_tokens}"
            )
        if not 0 < self.update_fraction <= 1:
            raise ValueError(f"update_fraction must be in (0, 1], got {self.update_fraction}")
        for name in ("temperature", "ramp_from", "ramp_to", "entropy_bound", "settle_entropy"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def may_settle(self) -> bool:
        """Whether a row can be done before the last step; the paper's sampler, above temperature 0, never knows."""
        return {"resample": self.temperature == 0, "argmax_unrolled": True}.get(self.sampler, self.settle_entropy > 0)


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
    drawn = likeliest(logits)
    best = -nll(logits, drawn)  # (R, S)
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
    sure = -nll(logits, drawn).masked_fill(~state.free, math.inf)  # (R, S)
    n = (state.free.sum(1, keepdim=True) * (step + 1) / cfg.steps).ceil()
    answer = drawn if cfg.temperature == 0 else likeliest(logits)
    # Pads are sure first: an answer may stand still while the text has not been begun, so wait for half of the slots.
    entropy = _entropy(logits) if cfg.may_settle and step + 1 >= cfg.steps / 2 else None
    return _commit(answer, entropy, _rank(sure) < n, drawn, state, cfg, draws, m)


@torch.no_grad()
def entropy_bound(logits: Tensor, state: State, step: int, cfg: SamplerConfig, draws: Draws, m) -> State:
    """Accept the slots of lowest entropy while the sum before each stays within a bound; the rest become noise again.

    The temperature falls linearly from ramp_from to ramp_to, and the output is the argmax, as DiffusionGemma samples
    (transformers, DiffusionGemma generation, 2026). memory: the last answer.
    """
    share = step / max(cfg.steps - 1, 1)
    temperature = cfg.ramp_from + (cfg.ramp_to - cfg.ramp_from) * share
    drawn = draw_tokens(logits, temperature, draws.uniform(SAMPLE, logits.shape[1])[0])
    entropy = _entropy(logits, max(temperature, 1e-6))  # (R, S)
    ordered, order = entropy.masked_fill(~state.free, math.inf).sort(1)
    accept = torch.zeros_like(state.free).scatter(1, order, ordered.cumsum(1) - ordered <= cfg.entropy_bound)
    return _commit(likeliest(logits), entropy, accept, drawn, state, cfg, draws, m)


SAMPLERS: dict[str, Callable] = {
    "resample": resample,
    "argmax_unrolled": argmax_unrolled,
    "confidence": confidence,
    "entropy_bound": entropy_bound,
}


def _unmasked(tokens, drawn, m) -> Tensor:
    # With mask noise a slot may not have been drawn yet. A mask is no text and has no likelihood: what was drawn has.
    return torch.where(tokens == m.mask_id, drawn, tokens)


def _commit(answer, entropy, keep, drawn, state, cfg, draws, m) -> State:
    # Kept slots hold their drawn token, the others fresh noise. Without entropy a row does not settle.
    noise = noise_tokens(draws.uniform(RENOISE, keep.shape[1])[0], m)
    canvas = torch.where(state.free, torch.where(keep, drawn, noise), state.canvas)
    answer = torch.where(state.free, answer, state.canvas)
    after = state._replace(canvas=canvas, answer=answer, judged=answer, memory=answer.float())
    if entropy is None:
        return after
    doubt = entropy.masked_fill(~state.free, 0.0).sum(1) / state.free.sum(1).clamp(min=1)
    still = (answer == state.memory.long()).all(1)
    return after._replace(settled=still & (doubt < cfg.settle_entropy))


def nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood (R, S) of tokens (R, S) under logits (R, S, V)."""
    high = logits.amax(-1, keepdim=True).float()  # (R, S, 1)
    log_z = row_by_row(lambda part, high: exp_(part, high, 1.0).sum(-1), logits, high).log()
    return log_z + high[..., 0] - logits.gather(-1, tokens[..., None])[..., 0].float()


def _entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    def entropy(part, high):
        x = part.sub_(high).div_(temperature).clamp_(min=-1e4)  # 0 where p is 0: minus infinity times 0 would be NaN
        p = x.exp()
        total = p.sum(-1)
        return total.log() - p.mul_(x).sum(-1) / total  # log Z - E[x]

    return row_by_row(entropy, logits, logits.amax(-1, keepdim=True).float())


def _rank(score: Tensor) -> Tensor:
    """Place of each slot of (R, S) when the highest score comes first."""
    return score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
