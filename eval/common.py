"""What every evaluation shares: a checkpoint with sampler settings, generation over many prefixes, intervals, JSON."""

import json
import platform
import subprocess
import time
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path

import torch

import autoregressive
import diffusion
from checkpoint import load_model, write_atomically
from configurator import configure, read_settings
from data.objectives import collate
from device import pick_device

PARADIGMS = {"ar": autoregressive, "diffusion": diffusion}


@dataclass
class EvalConfig:
    """Settings of every evaluation; the sampler's settings come beside them, those of the checkpoint's paradigm."""

    init_from: str = "out/run/ckpt.pt"
    n: int = 500  # held-out items
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | mps
    json: str = ""  # also write the result to this file


def load_for_eval(argv: list[str], base: type = EvalConfig):
    """(settings, model, tokenizer, checkpoint fields): argv read with the sampler settings the checkpoint calls for."""
    anything = make_dataclass("Anything", [], bases=(base, autoregressive.SamplerConfig, diffusion.SamplerConfig))
    given, _ = read_settings(anything, argv)
    device = pick_device(given.get("device", base.device))
    model, tokenizer, state = load_model(given.get("init_from", base.init_from), device)
    sampler = PARADIGMS[model.cfg.paradigm].SamplerConfig
    known = {f.name for f in fields(base)} | {f.name for f in fields(sampler)}
    kind = "an AR" if model.cfg.paradigm == "ar" else "a diffusion"
    for name in given:
        if name not in known:
            raise ValueError(f"{name!r} is no setting for {kind} checkpoint; there are: {', '.join(sorted(known))}")
    both = make_dataclass("Settings", [], bases=(base, sampler), namespace={"__post_init__": sampler.__post_init__})
    return configure(both, argv), model, tokenizer, state


def generate_texts(model, tokenizer, prefixes: list[list[int]], cfg) -> tuple[list[str], dict]:
    """The text of each prefix (token ids) in order, and what it cost.

    Prefixes of one length are read together, so that no batch needs a mask; each row keeps its own draws, so batching
    changes no text. Cost: network calls per sample (all candidates counted), seconds per sample, encode included.
    """
    m, paradigm = model.cfg, PARADIGMS[model.cfg.paradigm]
    texts, calls = [""] * len(prefixes), 0
    order = sorted(range(len(prefixes)), key=lambda i: len(prefixes[i]))
    groups: list[list[int]] = []
    for i in order:
        same = groups and len(prefixes[groups[-1][0]]) == len(prefixes[i]) and len(groups[-1]) < cfg.batch_size
        groups[-1].append(i) if same else groups.append([i])
    start = time.perf_counter()
    for group in groups:
        pairs = [(prefixes[i], []) for i in group]
        batch = collate(pairs, group, m.pad_id, m.sep_id, m.target_length)
        device = model.tok.weight.device
        made = paradigm.generate(model, batch.prefix.to(device), cfg, cfg.seed, batch.example.to(device))
        calls += int(made.calls.sum())
        for i, row in zip(group, made.tokens.tolist()):
            texts[i] = tokenizer.decode(row[: row.index(m.pad_id)] if m.pad_id in row else row)
    seconds = time.perf_counter() - start
    return texts, {"calls_per_sample": calls / len(prefixes), "seconds_per_sample": seconds / len(prefixes)}


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share, in [0, 1]. Wilson 1927; right also near 0 and 1, where the normal one is not."""
    if n == 0:
        return 0.0, 1.0
    p, zz = hits / n, z * z / n
    middle, half = p + zz / 2, z * (p * (1 - p) / n + zz / (4 * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + zz)), min(1.0, (middle + half) / (1 + zz))


def environment() -> dict:
    """What a number was measured on: to be kept with it."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{names[0]} x {len(names)}" if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": device,
        "threads": torch.get_num_threads(),
    }


def write_json(path: str, result: dict) -> None:
    """One JSON file, whole or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write((json.dumps(result, indent=1) + "\n").encode()))
