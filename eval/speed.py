"""Measure the speed of decoding and of training, and print the tables of results/speed.jsonl.

    python -m eval.speed --quick                        # a small shape, every measurement
    python -m eval.speed --json=results/speed.jsonl     # GPT-2 small's shape
    python -m eval.speed --what=train --shape=six       # one measurement

decode  seconds per batch of texts by length: AR, and 10-step diffusion with the same weights, plain
        and compiled, next to transformers' generate. Baseline: our fastest AR decoder.
train   an optimizer step of our AR model. Baseline: the same step of torch's own Transformer.
unroll  a diffusion step of two passes. Baseline: an AR step over the same tokens.
loop    the sampling loop without its network calls. Baseline: the whole loop.

The systems of a case run in turn, A B C, C B A, A B C, ..., after a warm-up call each. A ratio
compares runs of one round, so other work on the machine slows both. Decoders have random weights,
and every text has its full length. The roofline is the shortest time that the machine allows: AR
reads all weights for each token, training multiplies matrices.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import timer

import autoregressive
import diffusion
from ar2diff import convert
from configurator import configure, flatten, run, setting
from data.objectives import Batch
from eval.common import Settings, environment, markdown, origin, read_lines, write_lines
from extras.fast_decode import speed_up
from infra import device as devices
from infra.flops import train_flops
from infra.optimizers import BETAS, make_optimizers
from infra.rng import make_rng
from model import ModelConfig, Transformer
from train import PARADIGMS, TrainConfig

BLOCK = {"norm": "layernorm", "activation": "gelu_tanh", "position": "learned", "bias": True}
SHAPES = {
    "six": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 256},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
}
DIFFUSION = {"cached prefix": "bidirectional", "full attention": "joint"}  # prefix_attention
SEED = 1337
PROMPT = 64  # tokens before the generated ones
LONGEST = 4096  # tokens of a text
STEPS = 10
TRAIN_LENGTH = 256  # tokens of a training row
TRAIN_ROWS = {"six": 16, "gpt2": 2}
ROUND_LIMIT = 60.0  # seconds after which a case starts no new round


@dataclass
class SpeedConfig(Settings):
    what: str = setting("all", "measurement", ("all", "decode", "train", "unroll", "loop"))
    quick: bool = setting(False, "6 layers, float32, small batches, two lengths")
    json: str = setting("", "add the results to this file, skip the cases it has", path=True)
    shape: str = setting("", "default: gpt2, with --quick six", ("", *SHAPES))
    dtype: str = setting("", "default: both, if bfloat16 is fast", ("", "float32", "bfloat16"))
    batches: str = setting("", "texts at a time, of decode and loop; default: 1,8")
    lengths: str = setting("", "tokens, of decode; default: 64,128,256,512,1024")
    runs: int = setting(5, "timed runs of each system", minimum=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")


# Clocks


def timed(call: Callable) -> float:
    """Return the seconds of a call."""
    start = timer()  # waits for the device
    call()
    return timer() - start


def time_in_turn(systems: dict[str, Callable], runs: int, device: torch.device) -> dict:
    """Return the seconds of each run of each system, after a warm-up call."""
    seconds = {}
    for name, call in systems.items():
        for _ in range(3 if device.type == "cuda" else 1):  # a CUDA graph needs three calls
            call()
        seconds[name] = []
    start = timer()
    for k in range(runs):
        if k and timer() - start > ROUND_LIMIT:
            break
        for name in list(systems)[:: -1 if k % 2 else 1]:
            seconds[name].append(timed(systems[name]))
    return seconds


def make_line(what: str, case: dict, seconds: dict, baseline: str, kind="speed", **more) -> dict:
    """Return a line of the results file. kind of ratio: "speed" (above 1 is faster) or "time"."""
    systems = {}
    for name, own in seconds.items():
        pairs = zip(own, seconds[baseline])
        ratio = [b / a if kind == "speed" else a / b for a, b in pairs]
        systems[name] = {"seconds": own, "ratio": ratio}
    line = {"what": what, "case": case, "baseline": baseline, "kind": kind}
    return line | more | {"systems": systems}


def measured_bandwidth(device: torch.device) -> float:
    """Return the bytes/s of reading 512 MiB, more than any cache holds."""
    x = torch.ones(2**27, device=device)
    return x.nbytes / min(timed(x.sum) for _ in range(5))


# Networks


def model_config(shape: dict, prefix: int, target: int, **settings) -> ModelConfig:
    """Return the config of a shape. The last three token ids are pad, separator and mask."""
    V = shape["vocab_size"]
    ids = {"n_ordinary": V - 3, "pad_id": V - 3, "sep_id": V - 2, "mask_id": V - 1}
    sizes = {"block_size": prefix + target, "target_length": target}
    return ModelConfig(**BLOCK | shape | ids | sizes | settings)


def random_batch(cfg: ModelConfig, rows: int, prefix: int, target: int, device) -> Batch:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(cfg.n_ordinary, (rows, prefix + target), generator=generator).to(device)
    return Batch(ids[:, :prefix], ids[:, prefix:], torch.arange(rows, device=device))


@functools.lru_cache(maxsize=1)
def random_networks(shape: str, dtype: str, device: torch.device) -> dict[str, Transformer]:
    """Return AR and diffusion networks that share random weights. They never end a text."""
    torch.manual_seed(SEED)
    ar = Transformer(model_config(SHAPES[shape], PROMPT, LONGEST + 1)).eval().requires_grad_(False)
    ar.tok.weight[-3:] = 0  # a logit of 0 is never the largest of thousands
    networks = {"AR": ar.to(device, getattr(torch, dtype))}
    settings = {"paradigm": "diffusion", "target_attention": "bidirectional", "shift": True}
    for name, kind in DIFFUSION.items():
        networks[name] = convert(ar, copy=False, prefix_attention=kind, **settings).eval()
    return networks


compiled = functools.lru_cache(maxsize=8)(speed_up)


def at_length(network, length: int):
    """Return the same network, asked for texts of `length` tokens."""
    other = copy.copy(network)
    other.cfg = replace(network.cfg, target_length=length + 1)
    return other


@torch.no_grad()
def recorded(network, prefix: Tensor) -> SimpleNamespace:
    """Return a decoder that repeats the logits of one call: what remains is the loop."""
    cache = network.encode(prefix)
    size = (len(prefix), network.cfg.target_length)
    logits = network.decode(cache, torch.full(size, network.cfg.sep_id, device=prefix.device))
    methods = {"encode": lambda *_, **__: cache, "decode": lambda *_, **__: logits}
    return SimpleNamespace(cfg=network.cfg, tok=network.tok, **methods)


class BaselineGPT(nn.Module):
    """The GPT of `train`, made of torch's own modules."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, vocab_size: int, length: int):
        super().__init__()
        self.tok = nn.Embedding(vocab_size, n_embd)
        self.pos = nn.Embedding(length, n_embd)
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        gelu = partial(F.gelu, approximate="tanh")
        layer = nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, activation=gelu, **options)
        norm = nn.LayerNorm(n_embd)
        self.blocks = nn.TransformerEncoder(layer, n_layer, norm, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def terms(self, batch: Batch) -> Iterator[Tensor]:
        """Yield the loss of the target (B, T): each token predicts the next one."""
        x = self.tok(batch.target) + self.pos.weight  # (B, T, C)
        x = self.blocks(x, mask=self.mask, is_causal=True)
        logits = F.linear(x, self.tok.weight)  # (B, T, V)
        expected = F.pad(batch.target[:, 1:], (0, 1), value=-100)
        yield F.cross_entropy(logits.flatten(0, 1), expected.flatten())


def transformers_generate(model: Transformer, prompt: Tensor, length: int) -> Callable:
    """Return a call of transformers' generate with a GPT-2 of the same shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    cfg = model.cfg
    sizes = {name: getattr(cfg, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    sizes |= {"n_positions": cfg.block_size, "activation_function": "gelu_pytorch_tanh"}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    network = GPT2LMHeadModel(config).eval().to(prompt.device, model.tok.weight.dtype)
    ids = F.pad(prompt, (0, 1))  # our models read a separator after the prompt
    return partial(transformers_text, network, ids, length)


def transformers_text(network, ids: Tensor, length: int, **options) -> Tensor:
    """Return ids (B, P) and `length` greedy tokens of a network of transformers."""
    options |= {"max_new_tokens": length, "do_sample": False, "eos_token_id": None}
    return network.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)


# Measurements: each takes a case and returns one line of the results file


def decode_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    if device.type == "cuda":  # compile for the shapes of this case
        compiled.cache_clear()
        torch.compiler.reset()
    networks = random_networks(case["shape"], case["dtype"], device)
    prompt = random_batch(networks["AR"].cfg, case["batch"], PROMPT, 1, device).prefix
    length = case["length"]
    calls = {}
    for name, network in networks.items():
        generate = partial(autoregressive.generate, cfg=autoregressive.SamplerConfig())
        if name != "AR":
            generate = partial(diffusion.generate, cfg=diffusion.SamplerConfig(steps=STEPS))
            name += f", {STEPS} steps"
        calls[name] = partial(generate, at_length(network, length), prompt)
        fast = at_length(compiled(network), length)
        calls[f"{name}, compiled"] = partial(generate, fast, prompt)
    with suppress(ImportError):  # transformers is optional
        calls["transformers"] = transformers_generate(networks["AR"], prompt, length)
    weights = sum(p.nbytes for p in networks["AR"].parameters())
    weights -= networks["AR"].pos.weight.nbytes  # few of its rows are read
    floor = length * weights / measured_bandwidth(device)
    seconds = time_in_turn(calls, cfg.runs, device)
    ar = ("AR", "AR, compiled")
    line = make_line("decode", case, seconds, min(ar, key=lambda name: median(seconds[name])))
    for name in ar:
        line["systems"][name]["roofline"] = floor
    return line


def loop_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    network = random_networks(case["shape"], case["dtype"], device)["cached prefix"]
    network = at_length(network, case["length"])
    prompt = random_batch(network.cfg, case["batch"], PROMPT, 1, device).prefix
    sampler = diffusion.SamplerConfig(steps=3)
    calls = {
        "loop": partial(diffusion.generate, recorded(network, prompt), prompt, sampler),
        "whole": partial(diffusion.generate, network, prompt, sampler),
    }
    seconds = time_in_turn(calls, cfg.runs, device)
    return make_line("loop", case, seconds, "whole", "time", aim="<= 0.10")


def train_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    shape = SHAPES[case["shape"]]
    length = case["length"]
    model_cfg = model_config(shape, 0, length)
    batch = random_batch(model_cfg, case["batch"], 0, length, device)
    model = BaselineGPT(**shape, length=length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS, fused=True)
    dtype = case["dtype"]
    calls = {
        "ours": our_step(model_cfg, batch, dtype),
        "torch": optimizer_step(model, [optimizer], partial(model.terms, batch), device, dtype),
    }
    line = make_line("train", case, time_in_turn(calls, cfg.runs, device), "torch", aim=">= 0.97")
    flops = case["batch"] * train_flops(model_cfg, 0, length)
    line["systems"]["ours"]["roofline"] = flops / devices.measured_flops(device, dtype)
    return line


def unroll_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    half = case["length"] // 2
    models = {"AR": model_config(SHAPES[case["shape"]], half, half)}
    batch = random_batch(models["AR"], case["batch"], half, half, device)
    settings = {"paradigm": "diffusion", "target_attention": "bidirectional"}
    for name, kind in DIFFUSION.items():
        models[name] = replace(models["AR"], prefix_attention=kind, **settings)
    full = models["full attention"]
    models["full attention, self-conditioning"] = replace(full, self_conditioning=True)
    calls = {name: our_step(m, batch, case["dtype"]) for name, m in models.items()}
    seconds = time_in_turn(calls, cfg.runs, device)
    return make_line("unroll", case, seconds, "AR", "time", aim="<= 2.0")


def our_step(model_cfg: ModelConfig, batch: Batch, dtype: str) -> Callable[[], float]:
    """Return an optimizer step on our loss, as train.py makes it."""
    cfg = TrainConfig(model=model_cfg, dtype=dtype, optimizer="adamw")
    torch.manual_seed(SEED)
    device = batch.target.device
    model = Transformer(model_cfg).to(device)
    rng = make_rng(SEED, batch.example)
    terms = partial(PARADIGMS[model_cfg.paradigm].losses, model, batch, cfg.loss, rng)
    return optimizer_step(model, make_optimizers(model, cfg), terms, device, dtype)


def optimizer_step(model, optimizers, terms, device, dtype: str) -> Callable[[], float]:
    """Return a function that makes one optimizer step and returns the loss."""

    def step() -> float:
        loss = 0.0
        with devices.autocast(device, dtype):
            for term in terms():
                term.backward()
                loss += term.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        loss = float(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    return step


# The command

CASES = {"train": train_case, "unroll": unroll_case, "loop": loop_case, "decode": decode_case}


def plan(cfg: SpeedConfig, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Yield (measurement, case)."""
    shape = cfg.shape or ("six" if cfg.quick else "gpt2")
    batches = cfg.batches or ("1" if cfg.quick else "1,8")
    lengths = cfg.lengths or ("64,256" if cfg.quick else "64,128,256,512,1024")
    rows = 2 if cfg.quick else TRAIN_ROWS[shape]
    both = devices.has_fast_bf16(device) and not cfg.quick
    for dtype in [cfg.dtype] if cfg.dtype else ["float32", "bfloat16"][: 1 + both]:
        for what in CASES if cfg.what == "all" else [cfg.what]:
            is_training = what in ("train", "unroll")
            for batch in [rows] if is_training else map(int, batches.split(",")):
                for length in map(int, lengths.split(",")) if what == "decode" else [TRAIN_LENGTH]:
                    case = {"shape": shape, "dtype": dtype, "batch": batch, "length": length}
                    yield what, case


def main(argv: list[str]) -> list[dict]:
    """Measure what argv asks for. Return the new lines of the results file."""
    cfg = configure(SpeedConfig, argv)
    device = devices.pick_device(cfg.device)
    devices.disable_malloc_trim()  # as train.py does
    machine = environment()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    old = [o for o in read_lines(cfg.json) if o["origin"]["hardware"] == machine["hardware"]]
    done = [(line["what"], line["case"]) for line in old]
    todo = [wanted for wanted in plan(cfg, device) if wanted not in done]
    measurements = (partial(CASES[what], cfg, case, device) for what, case in todo)
    return add_lines("speed", argv, cfg, measurements)


def add_lines(name, argv, cfg, measurements: Iterable, seed=SEED, table=None) -> list[dict]:
    """Make the measurements. Print each, by default with lines_table. Add it to cfg.json.

    Returns the new lines. seed: that of the measurements.
    """
    settings = origin(name, argv, flatten(cfg) | {"seed": seed})
    old = read_lines(cfg.json)
    new = []
    for measure in measurements:
        new.append(measure() | {"origin": settings})
        if cfg.json:
            write_lines(cfg.json, old + new)
        print(f"\n{(table or lines_table)(new[-1:])}", flush=True)
    return new


# Tables


def lines_table(lines: list[dict]) -> str:
    """Return a row for each system that was compared with a baseline."""
    rows = []
    for line in lines:
        parts = [v if isinstance(v, str) else f"{k} {v}" for k, v in line["case"].items()]
        case = ", ".join([line["what"], *parts])
        unit = "GiB" if line["what"] == "memory" else "s"
        baseline = line["systems"][line["baseline"]]
        against = f"{line['baseline']}: {median(baseline['seconds']):.3g} {unit}"
        for name, entry in line["systems"].items():
            if entry is baseline:
                continue
            seconds = median(entry["seconds"])
            low, middle, high = (f(entry["ratio"]) for f in (min, median, max))
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f}) {line['kind']}"
            share = f"{entry['roofline'] / seconds:.0%}" if "roofline" in entry else ""
            rows.append(
                [case, name, f"{seconds:.3g} {unit}", against, ratio, line.get("aim", ""), share]
            )
    header = ["case", "system", "median", "baseline", "ratio: median (range)", "aim", "roofline"]
    return markdown(header, rows)


def decode_table(lines: list[dict]) -> str:
    """Return the speed relative to the fastest AR decoder, by length. ~: estimated.

    Each cell is the faster one of the plain and the compiled form.
    """
    lengths = sorted({line["case"]["length"] for line in lines})
    rows: dict[tuple, dict[int, str]] = {}
    for line in lines:
        case = line["case"]
        for name in ("AR", f"cached prefix, {STEPS} steps"):
            forms = [line["systems"][name], line["systems"][f"{name}, compiled"]]
            faster = min(forms, key=lambda form: median(form["seconds"]))
            text = f"{median(faster['ratio']):.2f}"
            if name == "AR":
                seconds = median(faster["seconds"])
                text = f"{seconds:.3g} s ({faster['roofline'] / seconds:.0%} of roofline)"
            row = rows.setdefault((case["dtype"], f"{case['batch']}", name), {})
            row[case["length"]] = "~" * faster.get("scaled", False) + text
    cells = [[*key, *(row.get(n, "") for n in lengths)] for key, row in sorted(rows.items())]
    return markdown(["dtype", "batch", "system", *(f"{n:,}" for n in lengths)], cells)


def origins(lines: list[dict]) -> str:
    """Return the commands and machines of some lines, each once."""
    commits: dict[str, set] = {}
    for line in lines:
        o = line["origin"]
        machine = f"{o['hardware']}, {o['threads']} threads, torch {o['torch']}"
        text = f"`{o['command']}`, seed {o['seed']}; {machine}"
        commits.setdefault(text, set()).update(o["commit"].split(", "))
    return "\n\n".join(f"{k}, commit {', '.join(sorted(v))}." for k, v in commits.items())


if __name__ == "__main__":
    run(main, SpeedConfig)
