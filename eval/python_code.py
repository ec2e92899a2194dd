"""Measure Python: bits per byte of held-out bodies, and how many generated bodies parse.

    python -m eval.python_code --init_from=out/run/ckpt.pt --n=200 --json=out/python.json

Bits per byte: the nats of all target slots / ln 2 / the UTF-8 bytes of the targets. Pads cost bits
but are no bytes. The bits of AR are exact. Those of diffusion are the mean of L(1) at nine
corruption rates: no likelihood, so they compare with other diffusion models only.

Prefix and body are parsed together and never run.
"""

import math
from functools import partial

import numpy as np

from configurator import run
from eval import common
from eval.bound import fitting_pairs, rate_with_error, slot_nats, split_nats
from eval.code import is_python
from eval.common import EvalConfig, PairsConfig
from eval.metrics import wilson

RATES = [k / 10 for k in range(1, 10)]


def held_out_loss(model, pairs: list, n_bytes: list[int], cfg: EvalConfig) -> dict:
    """Return bits per byte and what they measure."""
    exact = model.cfg.paradigm == "ar"
    nats = []
    for rate in [None] if exact else RATES:
        nats_of = partial(slot_nats, seed=cfg.seed, rate=rate)
        nats.append(split_nats(model, pairs, range(len(pairs)), cfg.batch_size, nats_of))
    mean = np.mean(nats, axis=0).tolist()  # (2, N) of the text and of the pads
    found = rate_with_error(*mean, n_bytes, math.log(2))
    measure = "exact negative log-likelihood" if exact else "denoising loss L(1), no likelihood"
    return {"measure": measure, "bits_per_byte": found.pop("value")} | found


def main(argv: list[str]) -> dict:
    cfg, generator, state = common.open_checkpoint(argv, PairsConfig)
    held_out, chosen = fitting_pairs(cfg, generator.model, state)
    pairs = [held_out.pair(i) for i in chosen]
    prefixes, targets = zip(*(held_out.text(i) for i in chosen))
    n_bytes = [len(target.encode()) for target in targets]
    bodies, cost = generator.texts([prefix for prefix, _ in pairs])
    parsed = sum(map(is_python, prefixes, bodies))
    loss = held_out_loss(generator.model, pairs, n_bytes, cfg)
    share = {"parse": parsed / len(bodies), "parse_interval": wilson(parsed, len(bodies))}
    result = {"n": len(chosen), "loss": loss, "generated": share} | cost
    result |= common.origin("python_code", argv, generator.settings(), state)
    text = f"{loss['bits_per_byte']:.3f} bits per byte: {loss['measure']}"
    text += f"\nof {len(chosen)} bodies parse: {share['parse']:.1%}\n{common.cost_line(cost)}"
    return common.finish(cfg.json, result, text)


if __name__ == "__main__":
    run(main, PairsConfig)
