"""Exercise 1, solved."""

import math

import torch

from draws import RENOISE, noise_tokens


def margin(logits, state, step, cfg, draws, m):
    best = logits.softmax(-1).topk(2).values  # (R, S, 2)
    sure = (best[..., 0] - best[..., 1]).masked_fill(~state.free, -math.inf)
    kept = (state.free.sum(1, keepdim=True) * (step + 1) / cfg.steps).ceil()
    rank = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    likeliest, noise = logits.argmax(-1), noise_tokens(draws.uniform(RENOISE, logits.shape[1])[0], m)
    canvas = torch.where(state.free, torch.where(rank < kept, likeliest, noise), state.canvas)
    answer = torch.where(state.free, likeliest, state.canvas)
    return state._replace(canvas=canvas, answer=answer, judged=answer)
