"""Exercise 1, solved."""

import math

import torch

from diffusion import sample_noise
from infra.rng import RENOISE


def margin(logits, state, step, cfg, rng, model_cfg):
    best = logits.softmax(-1).topk(2).values  # (R, S, 2)
    margins = (best[..., 0] - best[..., 1]).masked_fill(~state.editable, -math.inf)
    n = (state.editable.sum(1, keepdim=True) * (step + 1) / cfg.steps).ceil()
    rank = margins.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    likeliest = logits.argmax(-1)
    noise = sample_noise(rng.uniform(RENOISE, logits.shape[1])[0], model_cfg)
    canvas = torch.where(rank < n, likeliest, noise)
    canvas = torch.where(state.editable, canvas, state.canvas)
    output = torch.where(state.editable, likeliest, state.canvas)
    return state._replace(canvas=canvas, output=output, scored=output)
