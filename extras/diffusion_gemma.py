"""DiffusionGemma's sampler (Google, 2026). A test compares each step with that of transformers.

It accepts slots as entropy_bound in diffusion.py does. What is different:

    temperature        falls with the steps that remain, so it never reaches temperature_end
    self-conditioning  reads the prediction at this temperature, which is sharper
    noise              any id of the vocabulary, also those that no text contains
    stop               the likeliest text did not change for `stability` calls; entropy is low
"""

from dataclasses import dataclass

import torch

from configurator import needs, setting, validate
from diffusion import SamplerState, align_logits, expected_embedding, freeze
from infra.logits import GenerateOutput, argmax, banned_token_ids, draw_tokens, entropy, token_nll
from infra.rng import CANVAS, RENOISE, SAMPLE, make_rng
from model import split_prompt


@dataclass
class SamplerConfig:
    """DiffusionGemma's settings and their defaults."""

    steps: int = setting(48, "network calls at most", minimum=1)
    temperature_start: float = setting(0.8, "of the first step", minimum=1e-3)
    temperature_end: float = setting(0.4, "after the last step")
    entropy_bound: float = setting(0.1, "nats accepted per step")
    stability: int = setting(1, "calls without a change to stop")
    stop_entropy: float = setting(0.005, "nats per slot to stop; 0: never")

    def __post_init__(self):
        validate(self)

    def temperature_at(self, step: int) -> float:
        remaining = (self.steps - step) / self.steps
        return self.temperature_end + (self.temperature_start - self.temperature_end) * remaining


@torch.no_grad()
def generate(model, prefix, cfg, seed=0, example=None, on_step=None) -> GenerateOutput:
    """Denoise one canvas per prefix (B, P). See diffusion.generate and diffusion.denoise."""
    model_cfg = model.cfg
    used = vars(model_cfg) | {"sampler": "diffusion_gemma"}
    needs(used, "sampler=diffusion_gemma", paradigm="diffusion", noise="uniform")
    rows = torch.arange(len(prefix), device=prefix.device)  # (B,)
    rng = make_rng(seed, rows if example is None else example)
    prefix, start = split_prompt(prefix, model_cfg)
    cache = model.encode(prefix, reserve=model_cfg.target_length)
    banned = banned_token_ids(model_cfg, prefix.device)  # DiffusionGemma draws them too
    uniform, _ = rng.uniform(CANVAS, model_cfg.target_length - 1)
    canvas = (uniform * model_cfg.vocab_size).long()  # (B, S)
    unknown = torch.full_like(canvas, -1)
    state = SamplerState(canvas, unknown, unknown, unknown.float(), rows < 0, canvas >= 0)
    score = torch.zeros_like(uniform[:, 0])
    calls = torch.zeros_like(rows)
    self_cond = None
    report = on_step or (lambda *_: None)
    report(0, canvas, None, rows)
    for step in range(cfg.steps):
        active = ~state.converged  # (B,)
        logits = model.decode(cache, torch.cat([start, state.canvas], 1), self_cond=self_cond)
        logits = align_logits(logits, model_cfg.shift).index_fill(-1, banned, -torch.inf)
        if model_cfg.self_conditioning:
            self_cond = expected_embedding(model, logits / cfg.temperature_at(step))
        new = accept_or_renoise(logits, state, step, cfg, rng.fold_in(step), model_cfg)
        state = freeze(state, new, active)
        score = torch.where(active, token_nll(logits, state.output).mean(1), score)
        calls += active
        report(step + 1, state.canvas, logits, torch.where(active, rows, -1))
        if state.converged.all():
            break
    return GenerateOutput(state.output, score, calls)


def accept_or_renoise(logits, state, step, cfg, rng, model_cfg) -> SamplerState:
    """Take one step, like a sampler in diffusion.py. aux: calls since the argmax changed."""
    _, S, V = logits.shape
    temperature = cfg.temperature_at(step)
    drawn = draw_tokens(logits, temperature, rng.uniform(SAMPLE, S)[0])
    entropies = entropy(logits, temperature)  # (B, S)
    ordered, order = entropies.sort(1)
    within = ordered.cumsum(1) - ordered <= cfg.entropy_bound
    accepted = torch.zeros_like(within).scatter(1, order, within)
    canvas = torch.where(accepted, drawn, (rng.uniform(RENOISE, S)[0] * V).long())
    output = argmax(logits)
    unchanged = torch.where(output == state.output, state.aux + 1, 0.0)
    converged = (unchanged >= cfg.stability).all(1) & (entropies.mean(1) < cfg.stop_entropy)
    return SamplerState(canvas, output, output, unchanged, converged, state.editable)
