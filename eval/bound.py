"""How likely a model finds held-out targets: -log p(target | prefix), exact for AR, an upper bound for diffusion.

    python -m eval.bound --init_from=out/run/ckpt.pt --data=out/data/python_pairs --json=out/bound.json
    python -m eval.bound --init_from=out/run/ckpt.pt --noise_steps=10 --draws=10 --reading=leave_one_out

A diffusion model is given the reverse process of D3PM (arXiv 2107.03006, section 3): T = noise_steps, each slot keeps
its token until time t with probability 1 - t / T, whatever the others do. At T all is noise: KL(q(x_T | x_0) || p(x_T))
is 0, and the bound is the sum over t = 1 .. T of E KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), of which t = 1 is
-log p(x_0 | x_1). It is the bound of that process, not of the samplers in diffusion.py. The prefix is clean, and
self-conditioning is given no estimate. What is printed estimates the bound without bias, from a few noisy canvases a
pair. The AR number is of the softmax over all ids, as it is trained.

Of our losses and scores, a bound is

    autoregressive.loss                exact: the mean over slots of -log p
    the number of this file            for either noise, any T and reading: these choose which process is meant

and no bound, neither from above nor from below, is

    diffusion.loss, L(1)               all rates weigh the same and visible slots are scored. The bound of mask noise
                                       scores masked slots only and weighs them by 1 / rate; that of uniform noise
                                       compares steps back, not guesses of x_0
    diffusion.loss, L(2), .. (SUNDAE)  reads the model's answer to corrupted data; a bound would start at pure noise
    loss_by_rate, eval.python_code     for diffusion L(1) at fixed rates
    the score of a sampler             how sure the last pass was of its canvas, not how likely the text is

A mask says that its slot is to be guessed. Under uniform noise a slot holds a token that may be right, and what the
network says of the slot can mean two things (arXiv 2605.22765). a: keep probability at t, K: tokens.

    mixture        p(x_0 | x_t), the slot's own token weighed in. Cross-entropy at noisy x_t trains this: right for all
                   our losses. p(x_{t-1} | x_t) is the exact mixture of q(x_{t-1} | x_t, x_0) over it.
    leave_one_out  p(x_0 | the other slots of x_t); with log(1 + K a / (1 - a)) added to the logit of the token that
                   stands there it is the one above. Putting it into q(x_{t-1} | x_t, .) in the place of x_0 gives the
                   same. Right for a network that is trained on this bound in that plugged-in form, or that cannot see
                   the slot's own token (shift without lookahead, causal target attention).

Read as leave_one_out, a network of the first kind counts that token twice: raw, plugged in, the bound is loose.

Our network is not told t. It learns p(x_0 | x_t) over all rates that may have made its canvas, and the mixture takes it
for the one at t. Where a canvas does not tell its rate this costs something, and the more the finer the steps: uniform
noise may have a best noise_steps, of ten or so, to be found by trying, and with very many the mixture may even be the
looser reading, while mask noise as a rule gains from more. All are bounds, the lowest is the tightest; what chooses it
should be other data than what is reported.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoint import load_model
from configurator import configure, nearest, run
from data.objectives import collate
from device import pick_device
from diffusion import corrupt, readout
from draws import RATE, Draws, forbidden_ids
from eval.common import EvalConfig, environment, write_json
from eval.python_code import bits_per_byte, item_nats, open_pairs

READINGS = ("mixture", "leave_one_out")


@dataclass
class BoundConfig(EvalConfig):
    data: str = ""  # by default the set the checkpoint was trained on
    n: int = 200  # held-out pairs, evenly spaced over the set
    noise_steps: int = 20  # diffusion: T, the steps of the process
    draws: int = 20  # diffusion: noisy canvases per pair; draws = noise_steps sums all steps, each t comes once
    reading: str = "mixture"  # uniform noise: mixture | leave_one_out

    def __post_init__(self):
        for name in ("n", "batch_size", "noise_steps", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.reading not in READINGS:
            raise ValueError(f"reading {self.reading!r} is not known{nearest(self.reading, READINGS)}")


def step_nats(logits: Tensor, clean: Tensor, noisy: Tensor, t: int, cfg: BoundConfig, m) -> Tensor:
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each slot, nats, (S,) float64.

    logits (S, V): what the network says of each slot; clean (S,) is x_0 and noisy (S,) is x_t. t from 1 to noise_steps.
    Probability is spread over the K ids that a text may hold, the ordinary ones and pad.
    """
    every = torch.arange(m.vocab_size, device=logits.device)
    ids = every[~torch.isin(every, forbidden_ids(m, logits.device))]  # (K,) ascending
    K, T = len(ids), cfg.noise_steps
    said = logits[:, ids].double().log_softmax(-1)  # (S, K)
    at_clean = torch.searchsorted(ids, clean)  # (S,)
    if m.noise == "mask":
        # A mask is lifted in this step with probability 1 / t and then shows a token; other slots stay as they are.
        nats = -said.gather(1, at_clean[:, None])[:, 0]
        return nats * (noisy == m.mask_id) / t
    before, now = 1 - (t - 1) / T, 1 - t / T  # a at t - 1 and t
    is_clean = F.one_hot(at_clean, K).double()  # (S, K)
    is_noisy = F.one_hot(torch.searchsorted(ids, noisy), K).double()  # (S, K)
    if cfg.reading == "mixture":  # take out what the slot's own token says
        said = (said - is_noisy * math.log1p(K * now / (1 - now))).log_softmax(-1)
    # q(x_{t-1} | x_t, .) is, up to a factor, q(x_t | x_{t-1}) times what is known of x_{t-1} but for x_t.
    step = now / before * is_noisy + (1 - now / before) / K  # (S, K) q(x_t | x_{t-1} = k)
    truth = step * (before * is_clean + (1 - before) / K)
    floor = torch.tensor((1 - before) / K, dtype=torch.double, device=said.device).log()  # -inf at t = 1
    model = (step.log() + torch.logaddexp(said + math.log(before), floor)).log_softmax(-1)
    return F.kl_div(model, truth / truth.sum(-1, keepdim=True), reduction="none").sum(-1)


@torch.no_grad()
def target_nats(model, pairs: list, examples: list[int], cfg: BoundConfig) -> tuple[list[float], list[float]]:
    """(nats of the text, nats of the pads) of each pair, in order: exact for AR, a draw of the bound for diffusion.

    A draw depends on seed, example and its number alone. It is unbiased: the draws of a pair share out the T steps
    between them, draw d of D taking t from the d-th part, and their mean stands for the mean over t.
    """
    m = model.cfg
    if m.paradigm == "ar":
        return item_nats(model, pairs, cfg)
    T, device = cfg.noise_steps, model.tok.weight.device
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    text, pads = [0.0] * len(pairs), [0.0] * len(pairs)
    for start in range(0, len(order), cfg.batch_size):
        group = order[start : start + cfg.batch_size]
        batch = collate([pairs[i] for i in group], [examples[i] for i in group], m.pad_id, m.sep_id, m.target_length)
        prefix, target, example = (part.to(device) for part in batch)
        cache, nats = model.encode(prefix, room=m.target_length), 0.0
        for draw in range(cfg.draws):
            draws = Draws(cfg.seed, example, torch.full_like(example, draw))
            place = (draw + draws.uniform(RATE, 1)[0].cpu().double()) / cfg.draws  # (B, 1) in [0, 1)
            t = (place * T).long() + 1  # (B, 1)
            noisy = corrupt(target, (t / T).to(device), m, draws)  # (B, T)
            logits = readout(model.decode(cache, noisy), m.shift)  # (B, S, V)
            if device.type == "mps":  # has no float64
                logits, noisy = logits.cpu(), noisy.cpu()
            rows = zip(logits, target.to(noisy.device)[:, 1:], noisy[:, 1:], t[:, 0].tolist())
            # Row by row: a batch of float64 over a large vocabulary would need more room than the network.
            nats = nats + torch.stack([step_nats(*row, cfg, m) for row in rows]).cpu()
        nats, is_pad = nats * (T / cfg.draws), batch.target[:, 1:] == m.pad_id  # (B, S)
        for i, of_text, of_pads in zip(group, (nats * ~is_pad).sum(1).tolist(), (nats * is_pad).sum(1).tolist()):
            text[i], pads[i] = of_text, of_pads
    return text, pads


def main(argv: list[str]) -> dict:
    """Evaluate as argv says; returns what the JSON line holds."""
    cfg = configure(BoundConfig, argv)
    model, _, state = load_model(cfg.init_from, pick_device(cfg.device))
    data, m = cfg.data or (state.get("train_config") or {}).get("data"), model.cfg
    if not data:
        raise ValueError(f"{cfg.init_from} does not say what it was trained on; name a set with --data=FOLDER")
    held_out = open_pairs(replace(cfg, data=data), model, state)
    n = min(cfg.n, len(held_out))
    chosen = [i * len(held_out) // n for i in range(n)]
    pairs, texts = [held_out.pair(i) for i in chosen], [held_out.text(i)[1] for i in chosen]
    text, pads = target_nats(model, pairs, chosen, cfg)
    result = {"task": Path(data).name, "n": n, "seed": cfg.seed} | process(cfg, m)
    result |= summary(text, pads, pairs, texts, m.target_length)
    result |= {"settings": asdict(cfg), "command": f"python -m eval.bound {' '.join(argv)}"}
    result |= {"trained": {"step": state["step"], "fingerprint": state.get("fingerprint")}, "model": asdict(m)}
    result |= {"dataset": {"folder": str(held_out.folder), "fingerprint": held_out.fingerprint}} | environment()
    print_summary(result)
    print(json.dumps(result))
    if cfg.json:
        write_json(cfg.json, result)
    return result


def process(cfg: BoundConfig, m) -> dict:
    """What kind of number it is. Only settings that have an effect: AR needs no draws, mask noise has one reading."""
    if m.paradigm == "ar":
        return {"measure": "exact negative log-likelihood"}
    about = {"measure": "upper bound on the negative log-likelihood", "noise": m.noise, "noise_steps": cfg.noise_steps}
    return about | {"draws": cfg.draws} | ({"reading": cfg.reading} if m.noise == "uniform" else {})


def summary(text: list[float], pads: list[float], pairs: list, texts: list[str], target_length: int) -> dict:
    """Nats per slot and token and bits per byte, with standard errors over pairs, which contain the noise of the draws.

    All slots are paid for. A slot is a token up to the first pad, which ends the text, that included; see bits_per_byte
    for the error and the share of the pads. Raises ValueError where no target holds a byte.
    """
    slots, n_bytes = target_length - 1, [len(target.encode()) for target in texts]
    if not sum(n_bytes):
        raise ValueError("all targets are empty: there is no byte to count bits for")
    counts = {
        "nats_per_slot": [slots] * len(pairs),
        "nats_per_token": [min(len(target) + 1, slots) for _, target in pairs],
        "bits_per_byte": n_bytes,
    }
    found = {"n_tokens": sum(counts["nats_per_token"]), "n_bytes": sum(n_bytes)}
    for name, count in counts.items():
        per, unit = bits_per_byte(text, pads, count), 1.0 if name == "bits_per_byte" else math.log(2)
        per = {"value": per.pop("bits_per_byte")} | per  # per whatever is counted
        found[name] = {part: None if bits is None else bits * unit for part, bits in per.items()}
    return found


def print_summary(result: dict) -> None:
    how = ""
    if "draws" in result:
        reading = f" read as {result['reading']}" if "reading" in result else ""
        how = f" | {result['noise']} noise{reading}, {result['noise_steps']} steps, {result['draws']} draws a pair"
    print(f"{result['task']}: {result['measure']}, {result['n']} held-out pairs{how} | seed {result['seed']}")
    for name in ("nats_per_slot", "nats_per_token", "bits_per_byte"):
        value, error, pads = result[name].values()
        spread = "" if error is None else f" +- {error:.4f}"
        print(f"    {name.replace('_', ' '):15s} {value:.4f}{spread}, of which pads {pads:.4f}")


if __name__ == "__main__":
    run(main)
