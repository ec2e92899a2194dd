"""How fast training is: each line of the table is a ratio of two systems that are timed in turn on this machine.

python -m eval.train_speed --out=results/speed_train.json --nanogpt=PATH    # PATH: a checkout of karpathy/nanoGPT

train      an AR step, as train.py sets itself up, against nanoGPT's model and optimizer in its own loop with autocast
kept       the same beside nanoGPT in a process that keeps freed memory as ours does: what is left is the step itself
mfu        the FLOPs of a step at the rate of a matrix product that is timed beside it, against the step
unroll     a diffusion step of two passes against an AR step of the same model and tokens
anneal     a diffusion step whose mask is half open, by each form of anneal.py, against one that sees the whole target
memory     what these two hold at their peak, bytes beside bytes
loader     what a step waits for its batch, against the step
processes  two processes of one thread each against one of two: tokens per second of train.py
loss       training losses of ours and nanoGPT's from one start on one text, their difference in nats

Every system of train runs in a process of its own, for how a process treats memory is a matter of all of it. A file
that is there is gone on with: what it holds is not measured again.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from anneal import FORMS, Annealing
from configurator import configure, run
from cost import train_flops
from data.ahead import ahead
from data.loader import open_set, write_stream
from data.objectives import Batch
from device import autocast, computes_bfloat16, keep_freed_memory
from draws import draws_for
from eval.common import environment, write_json
from eval.timing import CPU, GPT2_SMALL, SIX, Line, batch_of, header, in_turn, model_config, peak_bytes
from model import ModelConfig, Transformer, model_settings
from train import PARADIGMS, TrainConfig, make_optimizers

ROOT = Path(__file__).absolute().parent.parent


@dataclass
class TrainSpeedConfig:
    nanogpt: str = ""  # a checkout of github.com/karpathy/nanoGPT; empty: the lines train and loss are left out
    out: str = ""  # where the raw times go, as JSON; empty: nowhere
    only: str = "train,unroll,anneal,memory,loader,processes,loss"  # the lines to measure
    runs: int = 10  # timed runs of each system, after one that is not counted
    quick: bool = False  # the 6-layer shape in bfloat16, at most three runs and three steps of loss
    loss_steps: int = 200
    loss_rate: float = 1e-3  # learning rate of the line loss, as nanoGPT's config for this shape of six has it ...
    loss_warmup: int = 100  # ... and the steps of its warm-up; without one, rounding grows to 0.03 nats in 200 steps
    threads: int = 0  # 0: what torch takes
    clock: str = "wall"  # wall | cpu: seconds of the processor, which other work leaves alone; with threads=1
    seed: int = 1337


CLOCKS = dict(wall=time.perf_counter, cpu=time.process_time)
JOINT = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
FROZEN = JOINT | dict(prefix_attention="bidirectional")
AIMS = {("six", "float32"): ">= 0.97", ("six", "bfloat16"): ">= 1.2"}  # of train; of a larger network:
AIMS |= {("gpt2", "float32"): ">= 0.97", ("gpt2", "bfloat16"): ">= 1.3"}


@dataclass
class Shapes:
    """The sizes that are measured. Tests pass smaller ones."""

    six: dict = field(default_factory=lambda: dict(SIX))
    gpt2: dict = field(default_factory=lambda: dict(GPT2_SMALL))
    small: dict = field(default_factory=lambda: dict(n_layer=4, n_head=4, n_embd=128, vocab_size=288))  # train.py's own
    batch: dict = field(default_factory=lambda: dict(six=(16, 256), gpt2=(2, 256), small=(32, 108)))  # rows, tokens
    product: int = 1024  # rows and columns of the matrices whose product is the ceiling


def main(argv: list[str], shapes: Shapes | None = None) -> list[dict]:
    """Measure, print and write what argv asks for; returns the lines as they are in the JSON file."""
    cfg, shapes = configure(TrainSpeedConfig, argv), shapes or Shapes()
    asked = cfg.only.split(",")
    if unknown := set(asked) - set(LINES):
        raise ValueError(f"--only: there are {', '.join(LINES)}; got {', '.join(sorted(unknown))}")
    if cfg.clock not in CLOCKS or (cfg.clock == "cpu" and cfg.threads != 1):
        raise ValueError(f"clock must be wall, or cpu with --threads=1; got {cfg.clock} and --threads={cfg.threads}")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    keep_freed_memory()
    about = dict(command=" ".join(["python -m eval.train_speed", *argv]), seed=cfg.seed, **environment())
    about["load_before"] = os.getloadavg()[0]
    path = Path(cfg.out) if cfg.out else None
    lines = json.loads(path.read_text())["lines"] if path and path.exists() else []
    print(" | ".join(f"{key} {value}" for key, value in environment().items()))
    print(header())
    jobs = [(name, case) for name in asked for case in CASES[name][: 1 if cfg.quick else None]]
    for name, case in jobs:
        job = " ".join([name, *case])
        if any(line.get("job") == job for line in lines):
            print(f"{job}: in {path} already")
            continue
        if case[1] == "bfloat16" and not computes_bfloat16(CPU):
            print(f"{job}: left out, this processor has no bfloat16")
            continue
        if name in ("train", "loss") and not cfg.nanogpt:
            print(f"{job}: left out, it needs --nanogpt=PATH, a checkout of github.com/karpathy/nanoGPT")
            continue
        for line in LINES[name](cfg, shapes, *case):
            print(line, flush=True)
            lines.append(line.record() | dict(job=job, load=os.getloadavg()[0]))
        if path:
            write_json(path, about | {"load_after": os.getloadavg()[0], "lines": lines})
    if path:
        print(f"raw times: {path}")
    return lines


def runs_of(cfg: TrainSpeedConfig) -> int:
    return min(cfg.runs, 3) if cfg.quick else cfg.runs


def train_lines(cfg: TrainSpeedConfig, shapes: Shapes, name: str, dtype: str) -> list[Line]:
    """Ours and nanoGPT's training step: as many tokens read and scored, gradient clipping, the loss read."""
    shape, (B, T) = getattr(shapes, name), shapes.batch[name]
    flops = B * train_flops(ModelConfig(**model_config(shape, 0, T)), 0, T)
    systems = dict(
        ours=Apart(cfg, True, our_step, cfg, shape, batch_of(shape, B, 0, T, cfg.seed), dtype),
        nanoGPT=Apart(cfg, False, nanogpt_step, cfg, shape, B, T, dtype),
        kept=Apart(cfg, True, nanogpt_step, cfg, shape, B, T, dtype),
        product=Apart(cfg, True, product_step, cfg, flops, dtype, shapes.product),
    )
    times, warmup = in_turn(systems, runs_of(cfg))
    for system in systems.values():
        system.end()
    case, note = f"{name} {dtype}", dict(clock=cfg.clock, tokens_per_step=B * T, flops_per_token=flops / B / T)
    counted = f"{case}, {flops / B / T / 1e6:.3g} MFLOP/token"
    return [
        Line("train", case, "ours", "nanoGPT", AIMS[name, dtype], times, warmup, True, note),
        Line("kept", case, "ours", "kept", "", times, warmup, True, note),
        Line("mfu", counted, "ours", "product", "", times, warmup, True, note),
    ]


def unroll_lines(cfg: TrainSpeedConfig, shapes: Shapes, name: str, dtype: str) -> list[Line]:
    """A diffusion step, two passes over joint attention, in AR steps over the same tokens: half prefix, half target."""
    shape, (B, T) = getattr(shapes, name), shapes.batch[name]
    batch, (P, T) = batch_of(shape, B, T - T // 2, T // 2, cfg.seed), (T - T // 2, T // 2)
    flops = B * train_flops(ModelConfig(**model_config(shape, P, T) | JOINT), P, T, TrainConfig.unroll_steps)
    systems = dict(
        AR=timed(cfg, our_step(cfg, shape, batch, dtype)),
        diffusion=timed(cfg, our_step(cfg, shape | JOINT, batch, dtype)),
        conditioned=timed(cfg, our_step(cfg, shape | JOINT | dict(self_conditioning=True), batch, dtype)),
        product=product_step(cfg, flops, dtype, shapes.product),
    )
    times, warmup = in_turn(systems, runs_of(cfg))
    tokens, case = B * (P + T), f"{name} {dtype}"
    note = dict(
        clock=cfg.clock, tokens_per_step=tokens, unroll_steps=TrainConfig.unroll_steps, flops_per_token=flops / tokens
    )
    lines = [
        Line("unroll", case, system, "AR", "<= 2.0", times, warmup, note=note)
        for system in ("diffusion", "conditioned")
    ]
    case = f"{case}, {flops / tokens / 1e6:.3g} MFLOP/token"
    return [*lines, Line("mfu", case, "diffusion", "product", "", times, warmup, True, note)]


def anneal_lines(cfg: TrainSpeedConfig, shapes: Shapes, name: str, dtype: str) -> list[Line]:
    """The same diffusion step behind a frozen prefix with the mask half open: on a CPU a dense mask serves."""
    shape, (B, T) = getattr(shapes, name), shapes.batch[name]
    batch = batch_of(shape, B, T - T // 2, T // 2, cfg.seed)
    systems = {"all open": timed(cfg, our_step(cfg, shape | FROZEN, batch, dtype))}
    with redirect_stdout(StringIO()):  # that a dense mask serves
        for form in FORMS:
            systems[form] = timed(cfg, our_step(cfg, shape | FROZEN, batch, dtype, anneal_steps=2, anneal_form=form))
    times, warmup = in_turn(systems, runs_of(cfg))
    note = dict(clock=cfg.clock, tokens_per_step=B * T)
    return [Line("anneal", f"{name} {dtype}", form, "all open", "", times, warmup, note=note) for form in FORMS]


def memory_lines(cfg: TrainSpeedConfig, shapes: Shapes, name: str, dtype: str) -> list[Line]:
    """Bytes that one step allocates at its peak beside weights and optimizer, in the place of seconds."""
    shape, (B, T) = getattr(shapes, name), shapes.batch[name]
    batch, held = batch_of(shape, B, T - T // 2, T // 2, cfg.seed), {}
    for system, added in dict(AR={}, diffusion=JOINT, conditioned=JOINT | dict(self_conditioning=True)).items():
        step = our_step(cfg, shape | added, batch, dtype)
        step()  # the optimizer's state is there
        held[system] = [float(peak_bytes(step, CPU))]
    note = dict(unit="bytes")
    return [
        Line("memory", f"{name} {dtype}", system, "AR", "<= 1.35", held, {}, note=note)
        for system in ("diffusion", "conditioned")
    ]


def loader_lines(cfg: TrainSpeedConfig, shapes: Shapes, name: str, dtype: str) -> list[Line]:
    """Steps over batches from a set on disk: seconds of a step that pass until its batch is there."""
    shape, (B, T) = getattr(shapes, name), shapes.batch[name]
    with tempfile.TemporaryDirectory() as folder:
        train_set = stream(Path(folder) / "set", T, cfg.seed)
        places = [(cfg.seed, step, B) for step in range(runs_of(cfg) + 1)]
        batches, shape = ahead(train_set.batch, places, CPU), shape | dict(vocab_size=288)
        step, times = our_step(cfg, shape, batch_of(shape, B, T // 2, T // 2, 0), dtype), dict(wait=[], step=[])
        for _ in places:
            start = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter()
            step(batch)
            times["wait"].append(waited - start)
            times["step"].append(time.perf_counter() - start)
    warmup = {system: taken.pop(0) for system, taken in times.items()}
    return [Line("loader", f"{name} {dtype}", "wait", "step", "<= 0.01", times, warmup)]


def process_lines(cfg: TrainSpeedConfig, shapes: Shapes, name: str, dtype: str) -> list[Line]:
    """train.py as a whole: seconds of its last steps, by its own log, as one process of two threads and as two of one.

    The same data and the same global batch: half the rows each.
    """
    shape, (B, T) = getattr(shapes, name), shapes.batch[name]
    with tempfile.TemporaryDirectory() as folder:
        stream(Path(folder) / "set", T, cfg.seed)
        flags = [f"--{key}={shape[key]}" for key in ("n_layer", "n_head", "n_embd")]
        flags += [f"--data={folder}/set", f"--batch_size={B}", f"--dtype={dtype}", "--optimizer=adamw", "--device=cpu"]
        flags += ["--max_steps=8", "--log_interval=4", "--eval_interval=100", "--eval_batches=1", "--sample_interval=0"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        starts = dict(one=[sys.executable], two=torchrun)

        def seconds(system: str) -> float:
            out = Path(folder) / f"run_{system}"
            command = [*starts[system], "train.py", *flags, f"--out_dir={out}", "--overwrite"]
            threads = {"OMP_NUM_THREADS": "2" if system == "one" else "1"}
            subprocess.run(command, check=True, cwd=ROOT, env=os.environ | threads, capture_output=True)
            entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            return next(entry["seconds"] for entry in entries if entry["step"] == 8)

        systems = {system: lambda system=system: seconds(system) for system in ("two", "one")}
        times, warmup = in_turn(systems, runs_of(cfg))
    return [Line("processes", f"{name} {dtype}", "two", "one", ">= 0.9", times, warmup, True, dict(steps=4))]


def loss_lines(cfg: TrainSpeedConfig, shapes: Shapes, name: str, dtype: str) -> list[Line]:
    """From the same weights over the same bytes of this repository's code: |ours - nanoGPT's| in nats, the last ten."""
    shape, (B, T) = getattr(shapes, name), shapes.batch[name]
    text = b"".join(path.read_bytes() for path in sorted(ROOT.glob("*.py")))
    ids = torch.tensor(list(text)) % min(128, shape["vocab_size"] - 3)
    generator, steps = torch.Generator().manual_seed(cfg.seed), min(cfg.loss_steps, 3) if cfg.quick else cfg.loss_steps
    some = batch_of(shape, B, 0, T, cfg.seed)
    theirs = nanogpt_step(cfg, shape, B, T, dtype)
    ours = our_step(cfg, shape, some, dtype, as_ours(theirs.model.state_dict()))
    losses = dict(ours=[], nanoGPT=[])
    for step in range(steps):
        for group in (g for taking in (ours, theirs) for o in taking.optimizers for g in o.param_groups):
            group["lr"] = cfg.loss_rate * min(1.0, (step + 1) / max(1, cfg.loss_warmup))
        starts = torch.randint(len(ids) - T, (B, 1), generator=generator)
        batch = some._replace(target=ids[starts + torch.arange(T)])
        losses["ours"].append(float(ours(batch)))
        losses["nanoGPT"].append(float(theirs(batch.target)))
    apart = [abs(a - b) for a, b in zip(*losses.values())][-10:]
    note = dict(unit="nats", steps=steps, losses=losses)
    times = dict(difference=apart, unit=[1.0] * len(apart))
    return [Line("loss", f"{name} {dtype}, {steps} steps", "difference", "unit", "<= 0.01", times, {}, note=note)]


LINES = dict(train=train_lines, unroll=unroll_lines, memory=memory_lines, loader=loader_lines)
LINES |= dict(anneal=anneal_lines, processes=process_lines, loss=loss_lines)
# Shape and number format of each measurement; a quick run takes the first.
ALL = [(name, dtype) for name in ("six", "gpt2") for dtype in ("bfloat16", "float32")]
CASES = dict(train=ALL, unroll=[*ALL, ("small", "float32")], memory=ALL[:2], loader=ALL[:2], processes=ALL[:2])
CASES |= dict(anneal=[("six", "float32"), ("small", "float32")], loss=ALL[:2])


class Apart:
    """A step in a process of its own, which waits until it is asked for one and tells its seconds."""

    def __init__(self, cfg: TrainSpeedConfig, keep: bool, make: Callable, *args):
        spawn = get_context("spawn")  # a fork would inherit how memory is treated
        self.ours, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=_serve, args=(theirs, cfg, torch.get_num_threads(), keep, make, args), daemon=True
        )
        self.process.start()
        theirs.close()

    def __call__(self) -> float:
        self.ours.send("step")
        return self.ours.recv()

    def end(self) -> None:
        self.ours.close()
        self.process.join()


def _serve(pipe, cfg: TrainSpeedConfig, threads: int, keep: bool, make: Callable, args: tuple) -> None:
    torch.set_num_threads(threads)
    if keep:
        keep_freed_memory()
    step = make(*args) if make is product_step else timed(cfg, make(*args))
    try:
        while pipe.recv():
            pipe.send(step())
    except EOFError:
        pass


def timed(cfg: TrainSpeedConfig, step: Callable) -> Callable[[], float]:
    """The step, returning its seconds."""

    def call() -> float:
        start = CLOCKS[cfg.clock]()
        step()
        return CLOCKS[cfg.clock]() - start

    return call


def our_step(
    cfg: TrainSpeedConfig, shape: dict, batch: Batch, dtype: str = "float32", weights: dict | None = None, **settings
) -> Callable[..., torch.Tensor]:
    """One optimizer step as train.py makes it, over batch or the one it is called with; returns the loss."""
    sizes = model_config(shape, batch.prefix.shape[1], batch.target.shape[1])
    settings = TrainConfig(**sizes, dtype=dtype, optimizer="adamw", **settings)
    torch.manual_seed(cfg.seed)
    model = Transformer(ModelConfig(**model_settings(asdict(settings))))
    if weights is not None:
        model.load_state_dict(weights)
    optimizers, losses = make_optimizers(model, settings), PARADIGMS[settings.paradigm].losses
    annealing = Annealing(settings, model)

    def step(batch: Batch = batch) -> torch.Tensor:
        total = 0.0
        with autocast(CPU, dtype):
            opened = annealing.opened(batch, 0)
            for term in losses(model, batch, settings, draws_for(cfg.seed, batch.example), opened=opened):
                term.backward()
                total += term.detach()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        float(total)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    step.optimizers = optimizers
    return step


def nanogpt_step(cfg: TrainSpeedConfig, shape: dict, rows: int, tokens: int, dtype: str) -> Callable[..., torch.Tensor]:
    """One optimizer step as nanoGPT's train.py makes it, with the model and the optimizer of its model.py.

    It reads as many tokens as ours and scores as many: the last one has no next.
    """
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(cfg.nanogpt) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    sizes = {name: shape[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    torch.manual_seed(cfg.seed)
    with redirect_stdout(StringIO()):  # it reports its parameter counts
        model = theirs.GPT(theirs.GPTConfig(block_size=tokens, dropout=0.0, bias=False, **sizes))
        t = TrainConfig
        optimizer = model.configure_optimizers(t.weight_decay, t.learning_rate, (t.beta1, t.beta2), "cpu")

    def step(ids: torch.Tensor = batch_of(shape, rows, 0, tokens, cfg.seed).target) -> torch.Tensor:  # noqa: B008
        expected = nn.functional.pad(ids[:, 1:], (0, 1), value=-1)
        with autocast(CPU, dtype):
            loss = model(ids, expected)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), TrainConfig.grad_clip)
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step.model, step.optimizers = model, [optimizer]
    return step


def as_ours(state: dict) -> dict:
    """nanoGPT's weights by our names."""
    names = dict(wte="tok", wpe="pos", ln_f="norm", h="blocks", ln_1="norm1", ln_2="norm2", lm_head="head")
    names |= dict(c_attn="qkv", c_fc="up")
    found = {}
    for name, value in state.items():
        parts = name.removeprefix("transformer.").split(".")
        out = "proj" if "attn" in parts else "down"
        found[".".join(out if part == "c_proj" else names.get(part, part) for part in parts)] = value.clone()
    return found


def product_step(cfg: TrainSpeedConfig, flops: float, dtype: str, size: int) -> Callable[[], float]:
    """Measures a square matrix product, the best of five, and returns the seconds that flops would take at its rate."""
    a = torch.randn(size, size, dtype=getattr(torch, dtype))

    def step() -> float:
        times = []
        for _ in range(5):
            start = CLOCKS[cfg.clock]()
            torch.mm(a, a)
            times.append(CLOCKS[cfg.clock]() - start)
        return flops / (2 * size**3 / min(times))

    return step


def stream(folder: Path, tokens: int, seed: int):
    """A set of random bytes on disk whose rows have up to so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(97, 123, (100_000,), generator=generator).tolist()
    write_stream(folder, {"train": [text], "valid": [text[:10_000]]}, "bytes", tokens // 2, tokens)
    return open_set(folder, "train")


if __name__ == "__main__":
    run(main)
