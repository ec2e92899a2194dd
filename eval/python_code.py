"""How well a model writes Python: bits per byte of held-out bodies, and how many of its own bodies parse.

    python -m eval.python_code --init_from=out/run/ckpt.pt --n=200 --json=out/python.json

Bits per byte: the nats of all target slots / ln 2 / the UTF-8 bytes of the target texts. The pads after a text are paid
for, since they tell its length, but are no bytes: the end of a text is a cost of its bytes. What the nats are depends:

    ar         -log p(target | prefix), exact for this cut into tokens: compares between AR models
    diffusion  L(1) at fixed corruption rates, the same noise for every model: compares between diffusion models of one
               kind of noise. It is no likelihood, so neither it nor its mean compares with an AR row.

Parsing is asked of prefix and body together, and nothing is run. An empty body, which is one of nothing but white
space, never parses; one of nothing but pass, ..., return or a constant does and is counted apart as trivial. The same
numbers of the held-out bodies stand beside as a yardstick.
"""

import ast
import json
import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from configurator import run
from data.loader import Pairs, build_if_missing, open_set
from data.objectives import collate
from data.python_code import parses
from data.syntax import parse_python
from diffusion import corrupt, readout
from draws import draws_for
from eval.common import EvalConfig, environment, generate_texts, load_for_eval, wilson, write_json

BROKEN = "\ufffd"  # what the tokenizer decodes a broken byte to
RATES = [k / 10 for k in range(1, 10)]
COMPARABLE = {
    "ar": "exact negative log-likelihood: compares with AR rows only",
    "diffusion": "denoising loss L(1), no likelihood: compares only with diffusion rows of the same n, rates and noise",
}


@dataclass
class PythonCodeConfig(EvalConfig):
    data: str = ""  # by default the set the checkpoint was trained on
    n: int = 200  # held-out functions, evenly spaced over the set, which is in order of files


@torch.no_grad()
def slot_nats(model, batch, seed: int, rate: float | None = None) -> Tensor:
    """Nats of each slot after the separator, (B, T - 1): of AR, or of one diffusion pass at a corruption rate."""
    m, target = model.cfg, batch.target
    if m.paradigm == "ar":
        logits = model(batch.prefix, target)[:, :-1]  # (B, T - 1, V)
    else:
        rates = torch.full((len(target), 1), rate, device=target.device)
        logits = readout(model(batch.prefix, corrupt(target, rates, m, draws_for(seed, batch.example))), m.shift)
    return F.cross_entropy(logits.float().transpose(1, 2), target[:, 1:], reduction="none")


def item_nats(model, pairs: list, cfg, rate: float | None = None) -> tuple[list[float], list[float]]:
    """(nats of the text, nats of the pads) of each pair, in order. Which pairs share a batch changes no draw."""
    m, order = model.cfg, sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    text, pads = [0.0] * len(pairs), [0.0] * len(pairs)
    for start in range(0, len(order), cfg.batch_size):
        group = order[start : start + cfg.batch_size]
        batch = collate([pairs[i] for i in group], group, m.pad_id, m.sep_id, m.target_length)
        batch = type(batch)(*(part.to(model.tok.weight.device) for part in batch))
        nats, is_pad = slot_nats(model, batch, cfg.seed, rate).cpu().double(), (batch.target[:, 1:] == m.pad_id).cpu()
        for i, of_text, of_pads in zip(group, (nats * ~is_pad).sum(1).tolist(), (nats * is_pad).sum(1).tolist()):
            text[i], pads[i] = of_text, of_pads
    return text, pads


def bits_per_byte(text: list[float], pads: list[float], n_bytes: list[int]) -> dict:
    """All bits over all bytes, the part of it that the pads cost, and the standard error over items.

    The error is that of a ratio of two means (Cochran 1977, section 2.11): long items weigh more. None for one item.
    """
    n, total = len(n_bytes), sum(n_bytes)
    bits = [(a + b) / math.log(2) for a, b in zip(text, pads)]
    value, error = sum(bits) / total, None
    if n > 1:
        error = math.sqrt(sum((b - value * size) ** 2 for b, size in zip(bits, n_bytes)) * n / (n - 1)) / total
    return {"bits_per_byte": value, "standard_error": error, "of_which_pads": sum(pads) / math.log(2) / total}


def held_out_loss(model, pairs: list, n_bytes: list[int], cfg) -> dict:
    """Bits per byte of the pairs' targets: for AR one number, for diffusion one per corruption rate and their mean."""
    paradigm = model.cfg.paradigm
    found = {"measure": COMPARABLE[paradigm]}
    if paradigm == "ar":
        return found | bits_per_byte(*item_nats(model, pairs, cfg), n_bytes)
    by_rate = [item_nats(model, pairs, cfg, rate) for rate in RATES]
    mean = [[sum(values) / len(RATES) for values in zip(*part)] for part in zip(*by_rate)]  # text, pads: per item
    found |= bits_per_byte(*mean, n_bytes) | {"noise": model.cfg.noise, "noise_seed": cfg.seed}
    return found | {"by_rate": {f"{rate:.1f}": bits_per_byte(*nats, n_bytes) for rate, nats in zip(RATES, by_rate)}}


def is_python(prefix: str, body: str) -> bool:
    """Whether prefix and body are one function with a body. Bytes that were no UTF-8, U+FFFD here, are no Python."""
    return BROKEN not in body and parses(prefix, body)


def is_trivial(prefix: str, body: str) -> bool:
    """Whether the function parses but its body does nothing: pass, ..., constants, and return of nothing or one."""
    if not is_python(prefix, body):
        return False
    statements = parse_python(prefix + body + "\n").body[0].body[1:]  # the docstring is the first
    return all(
        isinstance(s, ast.Pass) or isinstance(s, ast.Expr | ast.Return) and isinstance(s.value, ast.Constant | None)
        for s in statements
    )


def parse_shares(prefixes: list[str], bodies: list[str]) -> dict:
    """What bodies are made of, as counts and shares; the same numbers for what is generated and what is held out."""
    n, empty = len(bodies), sum(not body.strip() for body in bodies)
    parsed = sum(is_python(prefix, body) for prefix, body in zip(prefixes, bodies))
    trivial = sum(is_trivial(prefix, body) for prefix, body in zip(prefixes, bodies))
    return {
        "n": n,
        "parse": parsed / n,
        "parse_interval": list(wilson(parsed, n)),
        "empty": empty / n,
        "parse_of_non_empty": parsed / (n - empty) if n > empty else None,
        "parse_of_non_empty_interval": list(wilson(parsed, n - empty)),
        "trivial": trivial / n,
        "parse_and_not_trivial": (parsed - trivial) / n,
        "distinct": len(set(bodies)) / n,
        "not_utf8": sum(BROKEN in body for body in bodies) / n,
        "mean_bytes": sum(len(body.replace(BROKEN, "?").encode()) for body in bodies) / n,
        "hits": {"parse": parsed, "empty": empty, "trivial": trivial},
    }


def open_pairs(cfg, model, state: dict) -> Pairs:
    """The held-out pairs of cfg.data. Raises ValueError where the checkpoint was not made for them."""
    held_out, m = open_set(build_if_missing(cfg.data), "valid"), model.cfg
    if not isinstance(held_out, Pairs):
        raise ValueError(f"{cfg.data} is a stream of text; this needs pairs, such as python_pairs")
    if held_out.tokenizer_name != state["tokenizer"]:
        names = f"{held_out.tokenizer_name!r}, the model with {state['tokenizer']!r}"
        raise ValueError(f"{cfg.data} is made with tokenizer {names}")
    if held_out.target_length != m.target_length or held_out.block_size > m.block_size:
        raise ValueError(
            f"{cfg.data} has target_length={held_out.target_length} and block_size={held_out.block_size}, the model "
            f"{m.target_length} and {m.block_size}: train it on such pairs first"
        )
    return held_out


def main(argv: list[str]) -> dict:
    """Evaluate as argv says; returns what the JSON line holds."""
    cfg, model, tokenizer, state = load_for_eval(argv, PythonCodeConfig)
    if cfg.n < 1 or cfg.batch_size < 1:
        raise ValueError(f"n and batch_size must be at least 1, got {cfg.n} and {cfg.batch_size}")
    trained = {"step": state["step"], "data": state.get("train_config", {}).get("data")}
    trained["fingerprint"] = state.get("fingerprint")
    cfg.data = cfg.data or trained["data"] or ""
    if not cfg.data:
        raise ValueError(f"{cfg.init_from} does not say what it was trained on; name a set of pairs with --data=FOLDER")
    held_out = open_pairs(cfg, model, state)
    n = min(cfg.n, len(held_out))
    chosen = [i * len(held_out) // n for i in range(n)]
    pairs, texts = [held_out.pair(i) for i in chosen], [held_out.text(i) for i in chosen]
    prefixes, targets = [prefix for prefix, _ in texts], [target for _, target in texts]
    loss = held_out_loss(model, pairs, [len(target.encode()) for target in targets], cfg)
    bodies, cost = generate_texts(model, tokenizer, [prefix for prefix, _ in pairs], cfg)
    shares, yardstick = parse_shares(prefixes, bodies), parse_shares(prefixes, targets)
    dataset = {"folder": str(held_out.folder), "fingerprint": held_out.fingerprint, "items": chosen} | held_out.meta
    result = {"paradigm": model.cfg.paradigm, "loss": loss, "generated": shares, "held_out": yardstick, **cost}
    result |= {"examples": [{"prefix": a, "body": b} for a, b in zip(prefixes[:3], bodies)]}
    result |= {"settings": asdict(cfg), "seed": cfg.seed, "command": f"python -m eval.python_code {' '.join(argv)}"}
    result |= {"trained": trained, "model": asdict(model.cfg), "dataset": dataset} | environment()
    print_summary(result)
    print(json.dumps(result))
    if cfg.json:
        write_json(cfg.json, result)
    return result


def print_summary(result: dict) -> None:
    loss, ours, theirs = result["loss"], result["generated"], result["held_out"]
    error = "" if loss["standard_error"] is None else f" +- {loss['standard_error']:.3f}"
    kind = "mean over rates" if "by_rate" in loss else "exact"
    print(f"{loss['bits_per_byte']:.3f}{error} bits per byte ({kind}; pads cost {loss['of_which_pads']:.3f} of it)")
    if "by_rate" in loss:
        print("by rate: " + " ".join(f"{rate}:{row['bits_per_byte']:.3f}" for rate, row in loss["by_rate"].items()))
    print(f"    {loss['measure']}")
    low, high = ours["parse_interval"]
    of_non_empty = "none" if ours["parse_of_non_empty"] is None else f"{ours['parse_of_non_empty']:.1%}"
    print(
        f"{ours['parse']:.1%} parse [{low:.1%}, {high:.1%}] of {ours['n']} generated bodies; "
        f"{of_non_empty} of the non-empty; {ours['parse_and_not_trivial']:.1%} parse and do something\n"
        f"    empty or blank {ours['empty']:.1%}, trivial {ours['trivial']:.1%} (held out: {theirs['trivial']:.1%}), "
        f"no UTF-8 {ours['not_utf8']:.1%}, distinct {ours['distinct']:.1%}, mean length {ours['mean_bytes']:.0f} bytes "
        f"(held out: {theirs['mean_bytes']:.0f})\n"
        f"    {result['calls_per_sample']:.1f} network calls, {result['seconds_per_sample']:.4f} s per sample"
    )


if __name__ == "__main__":
    run(main)
