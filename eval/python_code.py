"""Measure Python: bits per byte of held-out bodies, and how many generated bodies parse.

    python -m eval.python_code --init_from=out/run/ckpt.pt --n=200 --json=out/python.json

Bits per byte: the nats of all target slots / ln 2 / the UTF-8 bytes of the targets. The pads of a
target cost bits but are no bytes. The nats of AR are exact. Those of diffusion are L(1) at fixed
corruption rates: no likelihood, so they compare with other diffusion models only.

Prefix and body are parsed together and never run. A blank body never parses. A trivial body parses
but does nothing (pass, a constant, return). The held-out bodies have the same shares printed.
"""

import ast
import math
from dataclasses import dataclass

from configurator import flatten, group, run, setting, validate
from data.python_code import parses
from data.syntax import parse_python
from eval import common
from eval.bound import fitting_pairs, item_nats, rate_with_error
from eval.common import EvalConfig
from eval.metrics import wilson

INVALID = "\ufffd"  # the tokenizer decodes an invalid byte to this
RATES = [k / 10 for k in range(1, 10)]
MEASURE = {
    "ar": "exact negative log-likelihood; compares with AR only",
    "diffusion": "denoising loss L(1), no likelihood; compares with the same kind of noise only",
}


@dataclass
class PythonCodeConfig:
    run: EvalConfig = group(EvalConfig)
    data: str = setting("", "set of pairs; default: that of the checkpoint", path=True)
    n: int = setting(200, "held-out functions, evenly spaced over the set", minimum=1)

    def __post_init__(self):
        validate(self)


def held_out_loss(model, pairs: list, n_bytes: list[int], cfg: EvalConfig) -> dict:
    """Return bits per byte: one number for AR, for diffusion one per rate and their mean."""

    def bits(nats):
        found = rate_with_error(*nats, n_bytes, math.log(2))
        return {"bits_per_byte": found.pop("value")} | found

    loss = {"measure": MEASURE[model.cfg.paradigm]}
    if model.cfg.paradigm == "ar":
        return loss | bits(item_nats(model, pairs, cfg.batch_size, cfg.seed))
    by_rate = [item_nats(model, pairs, cfg.batch_size, cfg.seed, rate) for rate in RATES]
    # The mean over rates of the nats of each item: of its text, of its pads.
    mean = [[sum(nats) / len(RATES) for nats in zip(*part)] for part in zip(*by_rate)]
    loss |= bits(mean) | {"noise": model.cfg.noise, "noise_seed": cfg.seed}
    return loss | {"by_rate": {f"{rate:.1f}": bits(nats) for rate, nats in zip(RATES, by_rate)}}


def is_python(prefix: str, body: str) -> bool:
    """Return whether prefix and body are one function with a body."""
    return INVALID not in body and parses(prefix, body)


def is_trivial(prefix: str, body: str) -> bool:
    """Return whether the function parses but does nothing."""
    if not is_python(prefix, body):
        return False
    statements = parse_python(prefix + body + "\n").body[0].body[1:]  # without the docstring
    return all(
        isinstance(s, ast.Pass)
        or (isinstance(s, ast.Expr | ast.Return) and isinstance(s.value, ast.Constant | None))
        for s in statements
    )


def parse_shares(prefixes: list[str], bodies: list[str]) -> dict:
    """Return counts and shares of bodies that parse, are empty, or are trivial."""
    n = len(bodies)
    empty = sum(not body.strip() for body in bodies)
    parsed = sum(map(is_python, prefixes, bodies))
    trivial = sum(map(is_trivial, prefixes, bodies))
    return {
        "n": n,
        "parse": parsed / n,
        "parse_interval": list(wilson(parsed, n)),
        "parse_and_not_trivial": (parsed - trivial) / n,
        "trivial": trivial / n,
        "empty": empty / n,
        "distinct": len(set(bodies)) / n,
        "hits": {"parse": parsed, "empty": empty, "trivial": trivial},
    }


def main(argv: list[str]) -> dict:
    cfg, generator, state = common.open_checkpoint(argv, PythonCodeConfig)
    model_cfg = generator.model.cfg
    held_out = fitting_pairs(cfg.data, generator.model, state)
    chosen = common.choose(range(len(held_out)), cfg.n)
    pairs = [held_out.pair(i) for i in chosen]
    prefixes, targets = zip(*(held_out.text(i) for i in chosen))
    n_bytes = [len(target.encode()) for target in targets]
    result = {"paradigm": model_cfg.paradigm}
    result["loss"] = held_out_loss(generator.model, pairs, n_bytes, cfg.run)
    bodies, cost = generator.texts([prefix for prefix, _ in pairs])
    result["generated"] = parse_shares(prefixes, bodies)
    result["held_out"] = parse_shares(prefixes, targets)
    result |= cost | {"examples": list(zip(prefixes[:3], bodies))}
    result["dataset"] = {"fingerprint": held_out.fingerprint, "items": chosen} | held_out.meta
    result |= common.origin("python_code", argv, flatten(cfg) | generator.settings(), state)
    loss = result["loss"]
    rows = []
    for name in ("parse", "parse_and_not_trivial", "trivial", "empty", "distinct"):
        rows.append([name, *(f"{result[key][name]:.1%}" for key in ("generated", "held_out"))])
    text = f"{loss['bits_per_byte']:.3f} bits per byte: {loss['measure']}\n"
    text += common.markdown([f"bodies, n = {len(chosen)}", "generated", "held out"], rows)
    return common.finish(cfg.run.json, result, f"{text}\n{common.cost_line(cost)}")


if __name__ == "__main__":
    run(main, PythonCodeConfig)
