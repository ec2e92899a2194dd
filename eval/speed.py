"""Measure the speed of decoding and of training, and print the tables of results/speed.jsonl.

    python -m eval.speed --quick                        # a small shape, every measurement
    python -m eval.speed --json=results/speed.jsonl     # GPT-2 small's shape
    python -m eval.speed --what=train --shape=six       # one measurement

decode  seconds per batch of texts by length: AR, and diffusion with the same weights, plain and
        compiled, next to transformers' generate. Baseline: our fastest AR decoder.
train   an optimizer step of our AR model. Baseline: the same step of torch's own Transformer.
unroll  a diffusion step of two passes. Baseline: an AR step over the same tokens.
loop    the sampling loop without its network calls. Baseline: the whole loop.

The systems of a case run in turn, A B C, C B A, A B C, ..., after a warm-up call each. A ratio
compares runs of one round, so other work on the machine slows both. Decoders have random weights,
and every text has its full length. ~ marks 20 and 50 steps that were estimated from 10 steps.
"""

import copy
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoregressive
import diffusion
from ar2diff import convert
from configurator import configure, run, setting, validate
from data.objectives import Batch
from eval.common import environment, markdown, write_text
from infra import device as devices
from infra.flops import forward_flops, train_flops
from infra.optimizers import BETAS, make_optimizers
from infra.rng import make_rng
from model import ModelConfig, Transformer
from train import PARADIGMS, TrainConfig

BLOCK = {"norm": "layernorm", "activation": "gelu_tanh", "position": "learned", "bias": True}
SHAPES = {
    "six": {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 256},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
}
TRAIN_BATCH = {"six": (16, 256), "gpt2": (2, 256)}  # rows, tokens
DIFFUSION = {"cached prefix": "bidirectional", "full attention": "joint"}  # prefix_attention
PROMPT = 64  # tokens before the generated ones
STEPS = (10, 20, 50)
ROUND_LIMIT = 60.0  # seconds after which a case starts no new round


@dataclass
class SpeedConfig:
    what: str = setting("all", "measurement", ("all", "decode", "train", "unroll", "loop"))
    quick: bool = setting(False, "6 layers, float32, small batches, two lengths")
    json: str = setting("", "add the results to this file, skip the cases it has", path=True)
    shape: str = setting("", "default: gpt2, with --quick six", ("", *SHAPES))
    dtype: str = setting("", "default: both, if bfloat16 is fast", ("", "float32", "bfloat16"))
    batches: str = setting("", "texts at a time, of decode; default: 1,8")
    lengths: str = setting("", "tokens, of decode; default: 64 to 1024, on a GPU to 4096")
    runs: int = setting(5, "timed runs of each system", minimum=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    seed: int = setting(1337, "of weights and prompts", minimum=0)

    def __post_init__(self):
        validate(self)


# Clocks


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def timed(call: Callable, device: torch.device) -> tuple[float, object]:
    """Return (seconds, result) of a call. Wait for the device before and after."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def time_in_turn(systems: dict[str, Callable], runs: int, device, limit=ROUND_LIMIT) -> dict:
    """Return the runs [(seconds, result), ...] of each system, after a warm-up call."""
    results = {}
    for name, call in systems.items():
        for _ in range(3 if device.type == "cuda" else 1):  # a CUDA graph needs three calls
            call()
        results[name] = []
    start = time.perf_counter()
    for k in range(runs):
        if k and time.perf_counter() - start > limit:
            break
        for name in list(results)[:: -1 if k % 2 else 1]:
            results[name].append(timed(systems[name], device))
    return results


def make_line(what: str, case: dict, results: dict, baseline: str, kind="speed", **more) -> dict:
    """Return a line of the results file. kind of ratio: "speed" (above 1 is faster) or "time"."""
    seconds = {name: [run[0] for run in runs] for name, runs in results.items()}
    systems = {}
    for name, own in seconds.items():
        pairs = zip(own, seconds[baseline])
        ratio = [b / a if kind == "speed" else a / b for a, b in pairs]
        systems[name] = {"seconds": own, "ratio": ratio}
    line = {"what": what, "case": case, "baseline": baseline, "kind": kind}
    return line | more | {"systems": systems}


# Roofline (Williams et al. 2009): the shortest time that the machine allows


@torch.no_grad()
def measured_bandwidth(device: torch.device) -> float:
    """Return the bytes/s of reading or copying 512 MiB, more than any cache holds."""
    x = torch.ones(2**27, device=device)
    y = torch.empty_like(x)
    read = min(timed(x.sum, device)[0] for _ in range(5))
    copy = min(timed(lambda: y.copy_(x), device)[0] for _ in range(5))
    return max(x.nbytes / read, 2 * x.nbytes / copy)


def decoding_work(model, prefix: int, length: int, calls: int, batch: int) -> tuple[float, float]:
    """Return (FLOPs, bytes) that generating a batch of texts needs at least.

    AR reads all weights and its cache for each token. Diffusion multiplies all positions by all
    weights in each call.
    """
    cfg = model.cfg
    size = model.tok.weight.element_size()
    skip = {"pos.weight"} if cfg.tie_weights else {"pos.weight", "tok.weight"}  # few rows are read
    weights = size * sum(p.numel() for name, p in model.named_parameters() if name not in skip)
    key = 2 * cfg.n_layer * cfg.kv_heads * cfg.head_size * size  # a token's keys and values
    joint = cfg.prefix_attention == "joint"
    encode = 0 if joint else forward_flops(cfg, prefix, 0)
    if cfg.paradigm == "ar":
        past = prefix + (length - 1) / 2  # tokens before a generated one, on average
        alone = replace(cfg, prefix_attention="bidirectional")  # counts only the new token
        step = forward_flops(alone, past, 1) - forward_flops(alone, past, 0)
        keys = past + 1
    else:
        step = forward_flops(cfg, prefix, length + 1) - encode
        keys = 0 if joint else prefix
    flops = batch * (encode + calls * step)
    return flops, weights * (calls + (not joint)) + batch * calls * keys * key


def roofline(flops: float, nbytes: float, peak: float, bandwidth: float) -> dict:
    bounds = {"FLOPs": flops / peak, "bytes": nbytes / bandwidth}
    bound = max(bounds, key=bounds.get)
    return {"roofline": bounds[bound], "bound": bound}


# Networks


def model_config(shape: dict, prefix: int, target: int, **settings) -> ModelConfig:
    """Return the config of a shape. The last three token ids are pad, separator and mask."""
    V = shape["vocab_size"]
    ids = {"n_ordinary": V - 3, "pad_id": V - 3, "sep_id": V - 2, "mask_id": V - 1}
    sizes = {"block_size": prefix + target, "target_length": target}
    return ModelConfig(**BLOCK | shape | ids | sizes | settings)


def random_batch(case: dict, prefix: int, target: int, seed: int, device) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    high = SHAPES[case["shape"]]["vocab_size"] - 3
    ids = torch.randint(high, (case["batch"], prefix + target), generator=generator).to(device)
    return Batch(ids[:, :prefix], ids[:, prefix:], torch.arange(len(ids), device=device))


@functools.lru_cache(maxsize=1)
def random_networks(shape: str, dtype: str, longest: int, device, seed: int) -> dict:
    """Return AR and diffusion networks that share random weights. They never end a text."""
    torch.manual_seed(seed)
    ar = Transformer(model_config(SHAPES[shape], PROMPT, longest + 1)).eval().requires_grad_(False)
    ar.tok.weight[-3:] = 0  # logits of 0 are never the largest of so many
    networks = {"AR": ar.to(device, getattr(torch, dtype))}
    settings = {"paradigm": "diffusion", "target_attention": "bidirectional", "shift": True}
    for name, kind in DIFFUSION.items():
        networks[name] = convert(ar, copy=False, prefix_attention=kind, **settings).eval()
    return networks


@functools.lru_cache(maxsize=8)
def compiled(network: Transformer):
    from extras.fast_decode import speed_up

    return speed_up(network)


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
        gelu = partial(F.gelu, approximate="tanh")
        options = {"dropout": 0.0, "activation": gelu, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, **options)
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
    options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    return partial(network.generate, ids, attention_mask=torch.ones_like(ids), **options)


# Measurements: each takes a case and returns one line of the results file


def decode_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    networks = networks_of(cfg, case, device)
    prompt = random_batch(case, PROMPT, 1, cfg.seed, device).prefix
    L = case["length"]
    calls = {}
    for kind, network in networks.items():
        generate = generate_diffusion
        if kind == "AR":
            generate = partial(autoregressive.generate, cfg=autoregressive.SamplerConfig())
        calls[kind, False] = partial(generate, at_length(network, L), prompt)
        calls[kind, True] = partial(generate, at_length(compiled(network), L), prompt)
    try:
        calls["transformers", False] = transformers_generate(networks["AR"], prompt, L)
    except ImportError:
        print("transformers is not installed: its generate is left out")
    peak = devices.measured_flops(device, case["dtype"])
    bandwidth = measured_bandwidth(device)
    results = {}
    more = {}
    for (kind, fast), runs in time_in_turn(calls, cfg.runs, device).items():
        for n in STEPS if kind in DIFFUSION else [L]:
            name = kind + (f", {n} steps" if kind in DIFFUSION else "") + ", compiled" * fast
            results[name] = runs
            more[name] = {"calls": n}
            if kind in DIFFUSION:  # the other steps take as long as the median one
                results[name] = [(total + (n - STEPS[0]) * step, step) for total, step in runs]
                more[name]["scaled"] = n != STEPS[0]
            if kind in networks:
                work = decoding_work(networks[kind], PROMPT, L, n, case["batch"])
                more[name] |= roofline(*work, peak, bandwidth)
    ar = [name for name in ("AR", "AR, compiled") if name in results]
    baseline = min(ar, key=lambda name: median([run[0] for run in results[name]]))
    line = make_line("decode", case, results, baseline, peak=peak, bandwidth=bandwidth)
    for name, entry in line["systems"].items():
        entry |= more[name]
    return line


def networks_of(cfg: SpeedConfig, case: dict, device: torch.device) -> dict[str, Transformer]:
    if device.type == "cuda":  # compile for the shapes of this case
        compiled.cache_clear()
        torch.compiler.reset()
    longest = max(1024, case["length"])
    return random_networks(case["shape"], case["dtype"], longest, device, cfg.seed)


def generate_diffusion(decoder, prompt: Tensor) -> float:
    """Generate in STEPS[0] steps. Return the median seconds of a step."""
    times = []

    def mark(*_):
        synchronize(prompt.device)
        times.append(time.perf_counter())

    diffusion.generate(decoder, prompt, diffusion.SamplerConfig(steps=STEPS[0]), on_step=mark)
    return median([after - before for before, after in zip(times, times[1:])])


def loop_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    prompt = random_batch(case, PROMPT, 1, cfg.seed, device).prefix
    network = at_length(networks_of(cfg, case, device)["cached prefix"], case["length"])
    sampler = diffusion.SamplerConfig(steps=3)
    calls = {
        "loop": partial(diffusion.generate, recorded(network, prompt), prompt, sampler),
        "whole": partial(diffusion.generate, network, prompt, sampler),
    }
    results = time_in_turn(calls, cfg.runs, device)
    return make_line("loop", case, results, "whole", "time", aim="<= 0.10")


def train_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    shape = SHAPES[case["shape"]]
    T = case["length"]
    batch = random_batch(case, 0, T, cfg.seed, device)
    model_cfg = model_config(shape, 0, T)
    model = BaselineGPT(**shape, length=T).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=BETAS, fused=True)
    dtype = case["dtype"]
    calls = {
        "ours": our_step(model_cfg, batch, dtype, cfg.seed),
        "torch": optimizer_step(model, [optimizer], partial(model.terms, batch), device, dtype),
    }
    line = make_line("train", case, time_in_turn(calls, cfg.runs, device), "torch", aim=">= 0.97")
    flops = case["batch"] * train_flops(model_cfg, 0, T)  # its share of the peak is the MFU
    peak = devices.measured_flops(device, dtype)
    line["systems"]["ours"] |= roofline(flops, 0, peak, math.inf)
    return line


def unroll_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    shape = SHAPES[case["shape"]]
    half = case["length"] // 2
    batch = random_batch(case, half, half, cfg.seed, device)
    models = {"AR": model_config(shape, half, half)}
    settings = {"paradigm": "diffusion", "target_attention": "bidirectional"}
    for name, kind in DIFFUSION.items():
        models[name] = replace(models["AR"], prefix_attention=kind, **settings)
    self_cond = replace(models["full attention"], self_conditioning=True)
    models["full attention, self-conditioning"] = self_cond
    calls = {
        name: our_step(model_cfg, batch, case["dtype"], cfg.seed)
        for name, model_cfg in models.items()
    }
    results = time_in_turn(calls, cfg.runs, device)
    return make_line("unroll", case, results, "AR", "time", aim="<= 2.0")


def our_step(model_cfg: ModelConfig, batch: Batch, dtype: str, seed: int) -> Callable[[], float]:
    """Return an optimizer step on our loss, as train.py makes it."""
    cfg = TrainConfig(model=model_cfg, dtype=dtype, optimizer="adamw", seed=seed)
    torch.manual_seed(seed)
    device = batch.target.device
    model = Transformer(model_cfg).to(device)
    rng = make_rng(seed, batch.example)
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

MEASUREMENTS = {
    "train": train_case,
    "unroll": unroll_case,
    "loop": loop_case,
    "decode": decode_case,
}


def plan(cfg: SpeedConfig, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Yield (measurement, case)."""
    shape = cfg.shape or ("six" if cfg.quick else "gpt2")
    lengths = "64,256" if cfg.quick else "64,128,256,512,1024"
    if device.type != "cpu" and not cfg.quick:
        lengths += ",2048,4096"
    lengths = [int(length) for length in (cfg.lengths or lengths).split(",")]
    batches = [int(batch) for batch in (cfg.batches or ("1" if cfg.quick else "1,8")).split(",")]
    rows, tokens = (2, 256) if cfg.quick else TRAIN_BATCH[shape]
    both = devices.has_fast_bf16(device) and not cfg.quick
    for dtype in [cfg.dtype] if cfg.dtype else ["float32", "bfloat16"][: 1 + both]:
        for what in MEASUREMENTS if cfg.what == "all" else [cfg.what]:
            is_training = what in ("train", "unroll")
            for batch in [rows] if is_training else batches:
                for length in lengths if what == "decode" else [tokens]:
                    case = {"shape": shape, "dtype": dtype, "batch": batch, "length": length}
                    yield what, case


def main(argv: list[str]) -> list[dict]:
    """Measure what argv asks for. Return the new lines of the results file."""
    cfg = configure(SpeedConfig, argv)
    device = devices.pick_device(cfg.device)
    devices.disable_malloc_trim()  # as train.py does
    machine = environment()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    origin = {"command": " ".join(["python -m eval.speed", *argv]), "seed": cfg.seed} | machine
    old = read_lines(Path(cfg.json)) if cfg.json else []
    done = [(o["what"], o["case"]) for o in old if o["origin"]["hardware"] == machine["hardware"]]
    new = []
    for what, case in plan(cfg, device):
        if (what, case) in done:
            print(f"{what} {case}: {cfg.json} has it already")
            continue
        new.append(MEASUREMENTS[what](cfg, case, device) | {"origin": origin})
        if cfg.json:
            write_text(cfg.json, "".join(json.dumps(one) + "\n" for one in old + new))
        print(f"\n{lines_table(new[-1:])}", flush=True)
    return new


# Tables


def read_lines(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def spread(values: list[float], digits: str) -> str:
    """Return "median (low to high)"."""
    low, middle, high = (f"{f(values):{digits}}" for f in (min, median, max))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def lines_table(lines: list[dict]) -> str:
    """Return a row for each system that was compared with a baseline, without empty columns."""
    rows = []
    for line in lines:
        parts = [v if isinstance(v, str) else f"{k} {v}" for k, v in line["case"].items()]
        case = ", ".join([line["what"], *parts])
        unit = line.get("unit", "s")
        baseline = line["systems"][line["baseline"]]
        against = f"{line['baseline']}: {median(baseline['seconds']):.3g} {unit}"
        for name, entry in line["systems"].items():
            if entry is baseline:
                continue
            mark = "~" * entry.get("scaled", False)
            seconds = f"{mark}{median(entry['seconds']):.3g} {unit}"
            ratio = f"{mark}{spread(entry['ratio'], '.2f')} {line['kind']}"
            share = ""
            if "roofline" in entry:
                share = f"{entry['roofline'] / median(entry['seconds']):.0%} of {entry['bound']}"
            rows.append([case, name, seconds, against, ratio, line.get("aim", ""), share])
    header = ["case", "system", "median", "baseline", "ratio: median (range)", "aim", "roofline"]
    filled = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return markdown([header[i] for i in filled], [[row[i] for i in filled] for row in rows])


def decode_table(lines: list[dict], short: bool = False) -> str:
    """Return the speed relative to the fastest AR decoder, by length.

    Each cell is the faster one of the plain and the compiled form. short: 10 steps, cached prefix.
    """
    lines = [line for line in lines if line["what"] == "decode"]
    lengths = sorted({line["case"]["length"] for line in lines})
    cells: dict[tuple, dict[int, str]] = {}
    for line in lines:
        case = line["case"]
        for name, entry in faster_forms(line["systems"]).items():
            if short and name not in ("AR", f"cached prefix, {STEPS[0]} steps"):
                continue
            mark = "~" * entry.get("scaled", False)
            text = f"{mark}{median(entry['ratio']):.2f}"
            if name == "AR":
                seconds = median(entry["seconds"])
                text = f"{mark}{seconds:.3g} s ({entry['roofline'] / seconds:.0%} of roofline)"
            row = cells.setdefault((case["dtype"], f"{case['batch']}", name), {})
            row[case["length"]] = text
    rows = [[*key, *(row.get(n, "") for n in lengths)] for key, row in sorted(cells.items())]
    return markdown(["dtype", "batch", "system", *(f"{n:,}" for n in lengths)], rows)


def faster_forms(systems: dict[str, dict]) -> dict[str, dict]:
    """Return the faster one of each system and its compiled form, under the system's name."""
    faster = {}
    for name, entry in systems.items():
        name = name.removesuffix(", compiled")
        other = faster.get(name, entry)
        faster[name] = min(other, entry, key=lambda e: median(e["seconds"]))
    return faster


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
