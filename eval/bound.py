"""Measure -log p(target | prefix) of held-out pairs: exact for AR, an upper bound for diffusion.

    python -m eval.bound --init_from=out/run/ckpt.pt --data=out/data/mini_code --noise_steps=10

The bound is that of D3PM's reverse process (arXiv 2107.03006, section 3) with T = noise_steps: the
sum over t of E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)). A slot keeps its token until time t
with probability 1 - t / T. It holds for this process, not for the samplers in diffusion.py. The
prefix is clean and self-conditioning reads zeros. The result is an unbiased estimate from a few
noisy canvases per pair. diffusion.loss, loss_by_rate and the score of a sampler are no bounds.

Under uniform noise a slot holds a token that may be right. The network reads it, so its prediction
is p(x_0 | x_t) with this token included (arXiv 2605.22765). The network does not read t, so finer
steps may loosen the bound. Choose noise_steps on other data than you report.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from configurator import configure, flatten, require, run, setting
from data.loader import Pairs
from data.objectives import Batch, collate
from diffusion import align_logits, corrupt
from eval.common import PairsConfig, Settings, batched, choose, finish, open_pairs, origin
from infra.checkpoint import load_model
from infra.device import autocast, pick_device
from infra.logits import banned_token_ids
from infra.rng import RATE, CounterRNG


@dataclass
class BoundConfig(Settings):
    """The process whose bound is estimated. AR needs none of it."""

    noise_steps: int = setting(20, "diffusion: T, the steps of the process", minimum=1)
    draws: int = setting(20, "diffusion: noisy canvases per pair", minimum=1)


@dataclass
class BoundEvalConfig(PairsConfig, BoundConfig):
    """Settings of this evaluation."""


# Nats of each slot


def slot_nats(model, batch: Batch) -> Tensor:
    """Return -log p of an AR model per slot (B, T - 1)."""
    logits = model(batch.prefix, batch.target)[:, :-1]  # (B, T - 1, V)
    return F.cross_entropy(logits.float().transpose(1, 2), batch.target[:, 1:], reduction="none")


def step_nats(logits: Tensor, clean: Tensor, noisy: Tensor, t: int, cfg, model_cfg) -> Tensor:
    """Return KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each slot, (S,) float64.

    logits (S, V): prediction, clean (S,): x_0, noisy (S,): x_t, t: 1 .. noise_steps.
    """
    all_ids = torch.arange(model_cfg.vocab_size, device=logits.device)
    banned = banned_token_ids(model_cfg, logits.device)
    ids = all_ids[~torch.isin(all_ids, banned)]  # (K,) ascending: the ids that a text may hold
    K, T = len(ids), cfg.noise_steps
    log_p = logits[:, ids].double().log_softmax(-1)  # (S, K)
    clean = torch.searchsorted(ids, clean)  # (S,) places in ids
    if model_cfg.noise == "mask":
        # A mask becomes a token in this step with probability 1 / t. Other slots do not change.
        nats = -log_p.gather(1, clean[:, None])[:, 0]
        return nats * (noisy == model_cfg.mask_id) / t
    before = 1 - (t - 1) / T  # a at t - 1
    now = 1 - t / T  # a at t
    is_clean = F.one_hot(clean, K).double()  # (S, K)
    is_noisy = F.one_hot(torch.searchsorted(ids, noisy), K).double()
    # Remove the information of the slot's own token.
    log_p = (log_p - is_noisy * math.log1p(K * now / (1 - now))).log_softmax(-1)
    # q(x_{t-1} | x_t, .) is proportional to q(x_t | x_{t-1}) times the prior of x_{t-1}.
    forward = now / before * is_noisy + (1 - now / before) / K  # (S, K) q(x_t | x_{t-1} = k)
    truth = forward * (before * is_clean + (1 - before) / K)
    floor = torch.tensor((1 - before) / K, dtype=torch.double, device=log_p.device).log()
    prior = torch.logaddexp(log_p + math.log(before), floor)  # floor is -inf at t = 1
    log_model = (forward.log() + prior).log_softmax(-1)
    truth = truth / truth.sum(-1, keepdim=True)
    return F.kl_div(log_model, truth, reduction="none").sum(-1)


def bound_nats(model, batch: Batch, cfg: BoundConfig, seed: int) -> Tensor:
    """Return an estimate of the bound per slot (B, T - 1), float64.

    Draw d of D takes t from the d-th part of the T steps, so their mean is unbiased. A draw depends
    on seed, example and its number only.
    """
    model_cfg = model.cfg
    prefix, target, example = batch
    T = cfg.noise_steps
    cache = model.encode(prefix, reserve=model_cfg.target_length)
    nats = 0.0
    for draw in range(cfg.draws):
        rng = CounterRNG(seed, example, torch.full_like(example, draw))
        uniform, _ = rng.uniform(RATE, 1)
        place = (draw + uniform.cpu().double()) / cfg.draws  # (B, 1) in [0, 1)
        t = (place * T).long() + 1
        noisy = corrupt(target, (t / T).to(target.device), model_cfg, rng)  # (B, T)
        logits = align_logits(model.decode(cache, noisy), model_cfg.shift)
        if logits.device.type == "mps":  # it has no float64
            logits, noisy = logits.cpu(), noisy.cpu()
        clean = target.to(noisy.device)[:, 1:]
        rows = zip(logits, clean, noisy[:, 1:], t[:, 0].tolist())
        # Row by row, because float64 over a large vocabulary needs much memory.
        nats = nats + torch.stack([step_nats(*row, cfg, model_cfg) for row in rows]).cpu()
    return nats * (T / cfg.draws)


# Nats of each pair


@torch.no_grad()
def split_nats(model, pairs: list, examples: Sequence[int], batch_size: int, nats_of: Callable):
    """Return (nats of the text, nats of the pads) of each pair, in order.

    nats_of(model, batch) -> nats per slot (B, T - 1). The batches change no draw.
    """
    cfg = model.cfg
    sums = torch.zeros(2, len(pairs), dtype=torch.double)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # similar lengths together
    for rows in batched(order, batch_size):
        chosen = ([pairs[i] for i in rows], [examples[i] for i in rows])
        batch = collate(*chosen, cfg.pad_id, cfg.sep_id, cfg.target_length)
        batch = Batch(*(part.to(model.tok.weight.device) for part in batch))
        nats = nats_of(model, batch).cpu().double()
        is_pad = batch.target[:, 1:].cpu() == cfg.pad_id
        sums[:, rows] = torch.stack([(nats * ~is_pad).sum(1), (nats * is_pad).sum(1)])
    return sums.tolist()


def target_nats(model, pairs, examples, cfg: BoundConfig, batch_size: int = 64, seed: int = 0):
    """Return split_nats: exact for AR, an unbiased estimate of the bound for diffusion."""
    exact = model.cfg.paradigm == "ar"
    nats_of = slot_nats if exact else partial(bound_nats, cfg=cfg, seed=seed)
    return split_nats(model, pairs, examples, batch_size, nats_of)


def rate_with_error(text: list[float], pads: list[float], counts: list[int], unit=1.0) -> dict:
    """Return all nats over all counts, its standard error over items, and the part of the pads.

    The error is that of a ratio of two means (Cochran 1977, section 2.11). One item has none.
    """
    n = len(counts)
    counts = unit * np.array(counts)
    nats = np.add(text, pads)
    value = nats.sum() / counts.sum()
    residuals = nats - value * counts
    error = float(residuals.std(ddof=1) * n**0.5 / counts.sum()) if n > 1 else None
    pads = float(np.sum(pads) / counts.sum())
    return {"value": float(value), "standard_error": error, "of_which_pads": pads}


def fitting_pairs(cfg: PairsConfig, model, state: dict) -> tuple[Pairs, list[int]]:
    """Return held-out pairs and the chosen ones. Raises ValueError if they do not fit the model."""
    pairs = open_pairs(cfg.data, state)
    ours = (state["tokenizer"], model.cfg.target_length, model.cfg.block_size)
    theirs = (pairs.tokenizer_name, pairs.target_length, pairs.block_size)
    fits = theirs[:2] == ours[:2] and theirs[2] <= ours[2]
    names = "tokenizer, target_length and block_size"
    require(fits, f"{names} of {pairs.folder} are {theirs}, those of the model {ours}")
    return pairs, choose(range(len(pairs)), cfg.n)


def main(argv: list[str]) -> dict:
    cfg = configure(BoundEvalConfig, argv)
    device = pick_device(cfg.device)
    model, _, state = load_model(cfg.init_from, device)
    held_out, chosen = fitting_pairs(cfg, model, state)
    pairs = [held_out.pair(i) for i in chosen]
    with autocast(device, cfg.dtype):
        nats = target_nats(model, pairs, chosen, cfg, cfg.batch_size, cfg.seed)
    n_slots = model.cfg.target_length - 1
    tokens = [min(len(target) + 1, n_slots) for _, target in pairs]  # the first pad ends the text
    n_bytes = [len(held_out.text(i)[1].encode()) for i in chosen]
    rates = {
        "nats_per_slot": rate_with_error(*nats, [n_slots] * len(pairs)),
        "nats_per_token": rate_with_error(*nats, tokens),
        "bits_per_byte": rate_with_error(*nats, n_bytes, math.log(2)),
    }
    kind = "exact" if model.cfg.paradigm == "ar" else "upper bound on the"
    measure = f"{kind} negative log-likelihood"
    text = f"{held_out.folder.name}: {measure} of {len(chosen)} held-out pairs"
    for name, rate in rates.items():
        value, error, pads = rate.values()
        spread = "" if error is None else f" +- {error:.4f}"
        text += f"\n    {name:15s} {value:.4f}{spread}, of which pads {pads:.4f}"
    result = {"task": held_out.folder.name, "n": len(chosen), "measure": measure}
    result |= {"n_tokens": sum(tokens), "n_bytes": sum(n_bytes)}
    result |= rates | origin("bound", argv, flatten(cfg), state)
    result["dataset"] = {"folder": str(held_out.folder), "fingerprint": held_out.fingerprint}
    return finish(cfg.json, result, text)


if __name__ == "__main__":
    run(main, BoundEvalConfig)
