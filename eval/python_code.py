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

from configurator import flatten, run
from eval import common
from eval.bound import fitting_pairs, rate_with_error, slot_nats, split_nats
from eval.code import is_python
from eval.common import EvalConfig, PairsConfig
from eval.metrics import wilson

RATES = [k / 10 for k in range(1, 10)]


def held_out_loss(model, pairs: list, n_bytes: list[int], cfg: EvalConfig) -> dict:
    """Return bits per byte: one number for AR, for diffusion one per rate and their mean."""

    def nats(rate=None):
        nats_of = partial(slot_nats, seed=cfg.seed, rate=rate)
        return split_nats(model, pairs, range(len(pairs)), cfg.batch_size, nats_of)

    def bits(nats):
        found = rate_with_error(*nats, n_bytes, math.log(2))
        return {"bits_per_byte": found.pop("value")} | found

    if model.cfg.paradigm == "ar":
        return {"measure": "exact negative log-likelihood"} | bits(nats())
    by_rate = {f"{rate:.1f}": nats(rate) for rate in RATES}
    mean = np.mean(list(by_rate.values()), axis=0).tolist()  # (2, N) of the text and of the pads
    loss = {"measure": "denoising loss L(1), no likelihood"} | bits(mean)
    return loss | {"by_rate": {rate: bits(found) for rate, found in by_rate.items()}}


def parse_share(prefixes: list[str], bodies: list[str]) -> dict:
    parsed = sum(map(is_python, prefixes, bodies))
    return {"parse": parsed / len(bodies), "parse_interval": list(wilson(parsed, len(bodies)))}


def main(argv: list[str]) -> dict:
    cfg, generator, state = common.open_checkpoint(argv, PairsConfig)
    held_out = fitting_pairs(cfg.data, generator.model, state)
    chosen = common.choose(range(len(held_out)), cfg.n)
    pairs = [held_out.pair(i) for i in chosen]
    prefixes, targets = zip(*(held_out.text(i) for i in chosen))
    n_bytes = [len(target.encode()) for target in targets]
    bodies, cost = generator.texts([prefix for prefix, _ in pairs])
    result = {"n": len(chosen), "loss": held_out_loss(generator.model, pairs, n_bytes, cfg.run)}
    result |= {"generated": parse_share(prefixes, bodies)}
    result |= {"held_out": parse_share(prefixes, targets)} | cost
    result |= common.origin("python_code", argv, flatten(cfg) | generator.settings(), state)
    loss = result["loss"]
    text = f"{loss['bits_per_byte']:.3f} bits per byte: {loss['measure']}"
    shares = [f"{result[name]['parse']:.1%}" for name in ("generated", "held_out")]
    text += f"\nof {len(chosen)} bodies parse: {shares[0]}; of the held-out ones: {shares[1]}"
    return common.finish(cfg.run.json, result, f"{text}\n{common.cost_line(cost)}")


if __name__ == "__main__":
    run(main, PairsConfig)
