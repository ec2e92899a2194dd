"""Training: one loop for both paradigms and all stages.

    python train.py config/ar2diff_1_ar.py                        # pretrain
    python ar2diff.py --init_from=out/ar2diff_1_ar/ckpt.pt        # convert
    python train.py config/ar2diff_2_adapt.py                     # adapt
    python train.py config/ar2diff_2_adapt.py --init_from=resume  # after a stop

Random numbers are functions of (seed, step, example). So the same command plus
--init_from=resume gives the undisturbed run, on one CPU bit for bit.
"""

import collections
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import autoregressive
import configurator
import diffusion
from configurator import flatten, group, needs, require, setting, validate
from data.loader import build_if_missing, open_dataset, prefetch
from data.objectives import ObjectiveConfig
from data.tokenizer import get_tokenizer
from infra import checkpoint, device, flops, optimizers, run_dir
from infra.distributed import DistributedContext, init_distributed
from infra.rng import make_rng
from model import ModelConfig, Transformer, build_model, model_from_state_dict, num_params

PARADIGMS = {"ar": autoregressive, "diffusion": diffusion}
RATES = [0.1, 0.3, 0.5, 0.7, 0.9]  # of corruption, to validate
KEEP_LAST = 2  # ckpt.pt and ckpt.1.pt
RESUME = "--init_from=resume"
variable = partial(setting, may_change=True)


@dataclass
class TrainConfig:
    """A run. The groups hold settings too."""

    model: ModelConfig = group(ModelConfig)
    loss: diffusion.LossConfig = group(diffusion.LossConfig)
    objective: ObjectiveConfig = group(ObjectiveConfig)
    data: str = variable("out/data/mini", "the data set", path=True)
    init_from: str = variable("scratch", "or a checkpoint; as a flag: resume", path=True)
    out_dir: str = variable("out/run", "for checkpoints and log", path=True)
    overwrite: bool = variable(False, "replace the run in out_dir")
    estimate: bool = variable(False, "only print memory and time")
    max_steps: int = variable(1000, "optimizer steps", minimum=1)
    batch_size: int = setting(32, "sequences per step", minimum=1)
    grad_accum_steps: int = variable(1, "micro-batches per step", minimum=1)
    optimizer: str = setting("muon", "muon: for matrices", ("muon", "adamw"))
    learning_rate: float = setting(1.5e-3, "AdamW's; Muon: 5 times")
    warmup_steps: int = setting(20, "steps of rising learning rate")
    schedule: str = setting("linear", "learning rate", ("constant", "linear", "cosine"))
    weight_decay: float = setting(0.1, "of matrices")
    grad_clip: float = setting(1.0, "largest gradient norm; 0: any")
    anneal_steps: int = setting(0, "steps until the mask is open")
    seed: int = setting(1337, "of all random numbers")
    device: str = variable("auto", "auto, cpu, cuda:0, mps")
    dtype: str = variable("float32", "of autocast", ("float32", "bfloat16", "auto"))
    compile: bool = variable(False, "use torch.compile")
    activation_checkpointing: bool = variable(False, "less memory, more time")
    parallel: str = variable("ddp", "under torchrun", ("ddp", "fsdp"))
    log_interval: int = variable(20, "steps per speed report", minimum=1)
    eval_interval: int = variable(200, "steps per evaluation", minimum=1)
    eval_batches: int = variable(8, "batches per evaluation", minimum=1)
    sample_interval: int = variable(200, "steps per sample; 0: none")
    save_interval: int = variable(200, "steps per checkpoint", minimum=1)
    tensorboard: bool = variable(False, "write its event files too")

    def __post_init__(self):
        validate(self)
        flat = flatten(self)
        passes = self.loss.unroll_steps
        enough = passes > 1 or not self.model.self_conditioning
        require(enough, f"self_conditioning needs unroll_steps=2, got {passes}")
        needs(flat, "compile", activation_checkpointing=False)
        needs(flat, "parallel=fsdp", optimizer="adamw")
        needs(flat, "anneal_steps", paradigm="diffusion", target_attention="bidirectional")


class Run:
    """A training: settings, model, data, optimizers, folder."""

    def __init__(self, ctx: DistributedContext, cfg: TrainConfig, model):
        self.ctx = ctx
        self.cfg = cfg
        self.model = model
        self.out = Path(cfg.out_dir)
        self.paradigm = PARADIGMS[cfg.model.paradigm]
        self.train_set = open_dataset(cfg.data, "train", cfg.objective)
        self.valid_set = open_dataset(cfg.data, "valid", cfg.objective)
        ctx.wrap(model, cfg.parallel)
        self.optimizers = optimizers.make_optimizers(model, cfg)
        self.first_step = 0
        self.best_loss = math.inf

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint. Print what makes the run differ."""
        self.ctx.load_full_state(self.model, self.optimizers, state)
        self.first_step = state["step"]
        old = state["train_config"]
        new = flatten(self.cfg)
        if old.get("eval_batches") == new["eval_batches"]:
            self.best_loss = state["best_loss"]  # else it cannot be compared
        steps = old.get("max_steps")
        if steps != new["max_steps"] and new["schedule"] != "constant":
            print(f"max_steps {steps} -> {new['max_steps']}", end=" ")
            print(f"also changes the {new['schedule']} decay of the learning rate")

    def checkpoint(self, name: str, step: int, keep_last: int = 1) -> None:
        """Save to out_dir/name. All processes must call it."""
        state = self.ctx.full_state(self.model, self.optimizers)
        state["train_config"] = flatten(self.cfg)
        state["fingerprint"] = self.train_set.fingerprint
        state["best_loss"] = self.best_loss
        if self.ctx.is_main:
            tokenizer = self.train_set.tokenizer_name
            path = self.out / name
            checkpoint.save(path, self.model, step, tokenizer, keep_last, **state)
        self.ctx.barrier()


def train(run: Run) -> dict:
    """Train to max_steps. Returns the last log entry."""
    from view.samples import sample_line

    cfg = run.cfg
    ctx = run.ctx
    log = run_dir.Log(run.out / "log.jsonl", run.first_step, ctx.is_main, cfg.tensorboard)
    peak_flops = device.measured_flops(ctx.device, cfg.dtype) * ctx.world_size
    batches = prefetch(run.train_set.batch, batch_places(run), ctx.device)
    if run.first_step == 0:
        if ctx.is_main:
            run_dir.clear(run.out)
        run.checkpoint("ckpt.pt", 0)
    quiet = None if ctx.is_main else True
    bar = tqdm(total=cfg.max_steps, initial=run.first_step, disable=quiet, leave=False)
    work = collections.Counter()
    since = time.perf_counter()
    with bar, closing(batches), run_dir.StopSignals() as stop:
        for step in range(run.first_step, cfg.max_steps):
            entry = train_step(run, batches, step)
            done = step + 1
            stopping = ctx.any(stop.requested)
            is_last = done == cfg.max_steps
            bar.update()
            work.update(tokens=entry["tokens"], flops=entry["flops"])
            if done % cfg.log_interval == 0 or is_last or stopping:
                seconds = time.perf_counter() - since
                entry["seconds"] = round(seconds, 3)
                entry["tokens_per_s"] = round(work["tokens"] / seconds)
                entry["mfu"] = round(work["flops"] / seconds / peak_flops, 3)
                speed = f"{entry['tokens_per_s']:,} tokens/s"
                bar.set_postfix_str(f"loss {entry['loss']:.3f}, {speed}")
            if done % cfg.eval_interval == 0 or is_last:
                entry |= evaluate(run)
                tqdm.write(log.line(entry))
            if cfg.sample_interval and (done % cfg.sample_interval == 0 or is_last):
                entry["sample"] = sample_line(run, done)
                tqdm.write(entry["sample"])
            log.write(entry)
            if entry.get("val_loss", math.inf) < run.best_loss:
                run.best_loss = entry["val_loss"]
                run.checkpoint("best.pt", done)
            if done % cfg.save_interval == 0 or is_last or stopping:
                log.sync()
                run.checkpoint("ckpt.pt", done, KEEP_LAST)
            if "seconds" in entry:
                work.clear()
                since = time.perf_counter()
            if stopping and not is_last:
                text = f"stopped by {signal.Signals(stopping).name} at step {done}"
                tqdm.write(f"{text}; use {RESUME}", sys.stderr)
                sys.exit(128 + stopping)
    return log.last


def batch_places(run: Run) -> Iterator[tuple]:
    """Yield the arguments of dataset.batch for each micro-batch."""
    cfg = run.cfg
    for step in range(run.first_step, cfg.max_steps):
        for micro in range(cfg.grad_accum_steps):
            rows = run.ctx.local_rows(cfg.batch_size, cfg.grad_accum_steps, micro)
            yield cfg.seed, step, cfg.batch_size, rows


def train_step(run: Run, batches, step: int) -> dict:
    """Take an optimizer step. Returns its log entry. Raises on NaN."""
    cfg = run.cfg
    ctx = run.ctx
    run.model.train()
    torch.manual_seed(cfg.seed + step + (ctx.rank << 40))  # dropout
    learning_rate = optimizers.learning_rate_at(step, cfg)
    optimizers.set_learning_rate(run.optimizers, learning_rate)
    n_passes = 1 if cfg.model.paradigm == "ar" else cfg.loss.unroll_steps
    terms = [0.0] * n_passes
    counts = collections.Counter()
    for micro in range(cfg.grad_accum_steps):
        batch = next(batches)
        P = batch.prefix.shape[1]
        B, T = batch.target.shape
        backward(run, batch, step, terms, micro + 1 == cfg.grad_accum_steps)
        cost = flops.train_flops(cfg.model, P, T, n_passes)
        counts.update(tokens=B * (P + T), flops=B * cost)
    ctx.average_gradients(run.model)
    norm = ctx.clip_gradients(run.model, cfg.grad_clip)
    means = ctx.mean(dict(enumerate(terms)) | counts)
    terms = [means[k] for k in range(n_passes)]
    counts = {name: round(means[name] * ctx.world_size) for name in counts}
    loss = sum(terms)
    problem = f"loss {loss}, gradient norm {norm} at step {step + 1}"
    remedy = "start over with --overwrite and a lower --learning_rate"
    saved = "ckpt.pt holds the last saved step"
    require(math.isfinite(loss + norm), f"{problem}; {remedy}; {saved}")
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    entry = {"step": step + 1, "loss": loss, "grad_norm": norm}
    return entry | {"lr": learning_rate, "terms": terms} | counts


def backward(run: Run, batch, step: int, terms: list, is_last: bool) -> None:
    """Add the gradients of a micro-batch, and its loss terms to `terms`."""
    cfg = run.cfg
    rng = make_rng(cfg.seed, batch.example, step)
    edges = extra_edges(batch, step, cfg)
    options = {"extra_edges": edges, "scale": 1 / cfg.grad_accum_steps}
    try:
        with device.autocast(run.ctx.device, cfg.dtype):
            losses = run.paradigm.losses(run.model, batch, cfg.loss, rng, **options)
            for k, term in enumerate(losses):
                run.ctx.set_gradient_sync(run.model, is_last and k + 1 >= len(terms))
                term.backward()  # frees the graph
                if k < len(terms):  # the last one has value 0 (diffusion.losses)
                    terms[k] += term.detach()
                    device.return_freed_memory(cfg.model.n_embd)
    except (RuntimeError, MemoryError) as error:
        if not flops.is_out_of_memory(error):
            raise
        message = flops.out_of_memory_message(cfg, step + 1, batch.prefix.shape[1])
        raise ValueError(message) from None


def extra_edges(batch, step: int, cfg: TrainConfig) -> Tensor | None:
    """Return the open edges (T, T) of this step, or None: all."""
    if step >= cfg.anneal_steps:
        return None
    from ar2diff import open_edges

    joint = cfg.model.prefix_attention == "joint"
    return open_edges(batch, step, cfg.seed, cfg.anneal_steps, joint)


@torch.no_grad()
def evaluate(run: Run) -> dict:
    """Return the validation loss, nats per slot; L(1) over RATES."""
    cfg = run.cfg
    ctx = run.ctx
    model = run.model
    model.eval()
    sums = collections.Counter()
    rows = ctx.local_rows(cfg.batch_size)
    places = [(0, i, cfg.batch_size, rows) for i in range(cfg.eval_batches)]
    batches = prefetch(run.valid_set.batch, places, ctx.device)
    with device.autocast(ctx.device, cfg.dtype):
        for i, batch in enumerate(batches):
            rng = make_rng(0, batch.example, i)
            if cfg.model.paradigm == "ar":
                sums["val_loss"] += autoregressive.loss(model, batch, cfg.loss, rng).item()
            else:
                sums.update(diffusion.loss_by_rate(model, batch, rng, RATES))
    means = {name: total / cfg.eval_batches for name, total in sums.items()}
    means = ctx.mean(means)
    if cfg.model.paradigm == "ar":
        return means
    return {"val_loss": sum(means.values()) / len(means), "val_loss_by_rate": means}


def main(argv: list[str]) -> dict:
    """Train. Returns the last log entry, or the estimate."""
    resume = RESUME in argv
    # Removed, so that a file's init_from remains the source.
    argv = [arg for arg in argv if arg != RESUME]
    given = configurator.read_settings((TrainConfig,), argv)
    in_file = given.get("init_from") == "resume"
    require(not in_file, f"init_from='resume' in a file; use the flag {RESUME}")
    out = Path(given.get("out_dir", "out/run")).expanduser()
    estimate_only = given.get("estimate", False)
    with init_distributed(given.get("device", "auto")) as ctx:
        with run_dir.lock_dir(out) if ctx.is_main and not estimate_only else nullcontext():
            if not ctx.is_main:
                ctx.barrier()  # rank 0 builds missing data first
            cfg, weights, state = prepare(given, out, resume, ctx.world_size)
            if ctx.is_main:
                ctx.barrier()
            if estimate_only:
                train_set = open_dataset(cfg.data, "train", cfg.objective)
                return flops.estimate(cfg, train_set)
            return start(ctx, cfg, weights, state)


def start(ctx: DistributedContext, cfg: TrainConfig, weights, state) -> dict:
    """Build or restore the run and train it."""
    from view.help import describe

    device.keep_freed_memory()
    fast_bf16 = device.has_fast_bf16(ctx.device)
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16" if fast_bf16 else "float32"
    elif cfg.dtype == "bfloat16" and not fast_bf16:
        print("bfloat16 is slow on this processor; use --dtype=float32")
    run = Run(ctx, cfg, init_model(cfg, weights))
    if state is not None:
        run.restore(state)
    if run.first_step >= cfg.max_steps:
        print(f"nothing to do: step {run.first_step} of {cfg.max_steps} is reached")
        return run_dir.Log(run.out / "log.jsonl", run.first_step, ctx.is_main).last
    print(f"{num_params(run.model):,} parameters | {ctx.device} {cfg.dtype}", end=" | ")
    print(f"{cfg.data} {len(run.train_set):,} | {describe(cfg)}")
    run.model.activation_checkpointing = cfg.activation_checkpointing
    if cfg.compile:
        run.model.run_blocks = device.compile_or_explain(run.model.run_blocks, ctx.device)
    last = train(run)
    best = f"best validation loss {run.best_loss:.4f} in {run.out / 'best.pt'}"
    print(f"done: {run.out / 'ckpt.pt'} at step {cfg.max_steps}, {best}")
    return last


def prepare(given: dict, out: Path, resume: bool, world_size: int):
    """Return (settings, weights, checkpoint); build missing data."""
    from_data = ("block_size", "target_length")  # 0 means: not given
    given = {name: v for name, v in given.items() if v or name not in from_data}
    found = run_dir.checkpoints(out)
    wanted = resume or given.get("overwrite") or given.get("estimate")
    free = wanted or not found
    ways = "--init_from=resume, --overwrite or another --out_dir"
    require(free, f"{out} already holds a run; use {ways}")
    state = None
    data = TrainConfig.data
    if resume and found:
        path, state = run_dir.latest_checkpoint(out)
        names = {"train_config", "optimizer", "best_loss", "fingerprint"}
        missing = ", ".join(sorted(names - state.keys()))
        remedy = f"use --init_from={path} and another --out_dir"
        require(not missing, f"{path} cannot be resumed, it has no {missing}; {remedy}")
        data = state["train_config"].get("data", data)
        print(f"resuming {path} at step {state['step']}")
    elif resume:
        print(f"no checkpoint in {out} yet: starting at step 0")
    given["data"] = str(build_if_missing(given.get("data", data)))
    train_set = open_dataset(given["data"], "train")
    if state is None:
        cfg, weights = new_config(given, train_set)
    else:
        cfg = resumed_config(given, state, train_set, path)
        weights = state["model"]
    B = cfg.batch_size
    n = cfg.grad_accum_steps * world_size
    multiple = f"must be a multiple of grad_accum_steps x processes {n}"
    require(B % n == 0, f"batch_size {B} {multiple}")
    return cfg, weights, state


def resumed_config(given: dict, state: dict, train_set, path: Path) -> TrainConfig:
    """Return the stored settings, with changes that are allowed."""
    stored = state["train_config"]
    fields = configurator.all_fields(TrainConfig)
    allowed = [k for k, field in fields.items() if field.metadata.get("may_change")]
    reason = f"{path} was trained with"
    configurator.refuse_changes(given, stored, reason, allowed=allowed)
    remedy = "name the right one with --data"
    same = state["fingerprint"] == train_set.fingerprint
    require(same, f"{train_set.folder} differs from the data of {path}; {remedy}")
    return configurator.from_stored(TrainConfig, stored | given, str(path))


def new_config(given: dict, train_set) -> tuple[TrainConfig, dict | None]:
    """Return the settings of a new run, and its first weights."""
    tokenizer = get_tokenizer(train_set.tokenizer_name)
    ids = ("vocab_size", "n_ordinary", "pad_id", "sep_id", "mask_id")
    fixed = {name: getattr(tokenizer, name) for name in ids}
    fixed["target_length"] = train_set.target_length
    configurator.refuse_changes(given, fixed, f"{train_set.folder} has")
    source = given.get("init_from", "scratch")
    need = train_set.block_size
    weights = None
    if source == "scratch":
        fixed["block_size"] = given.get("block_size", need)
    else:
        weights, stored = model_of_checkpoint(given, source, train_set)
        fixed = stored | {"target_length": train_set.target_length}
    cfg = configurator.build(TrainConfig, given | fixed)
    most = cfg.model.block_size
    limit = f"the model's block_size is {most}"
    remedy = f"pretrain with --block_size={need}"
    require(most >= need, f"{train_set.folder} needs {need} tokens, {limit}; {remedy}")
    return cfg, weights


def model_of_checkpoint(given: dict, source: str, train_set) -> tuple:
    """Return weights and model settings of a checkpoint."""
    state = checkpoint.load(source)
    stored = state["model_config"]
    theirs = state["tokenizer"]
    ours = train_set.tokenizer_name
    problem = f"{source} was trained with tokenizer {theirs!r}, the data have {ours!r}"
    require(theirs == ours, f"{problem}; build the data with --tokenizer={theirs}")
    hint = "convert it with python ar2diff.py, or drop the setting"
    configurator.refuse_changes(given, stored, f"{source} has", hint, allowed=["dropout"])
    dropout = given.get("dropout", stored["dropout"])
    return state["model"], stored | {"dropout": dropout}


def init_model(cfg: TrainConfig, weights: dict | None) -> Transformer:
    """Return the network with these weights, or with random ones."""
    if weights is not None:
        return model_from_state_dict(cfg.model, weights).float()
    try:
        model = build_model(cfg.model)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"the model cannot be built: {error}") from None
    torch.manual_seed(cfg.seed)
    model.init_weights()
    return model


if __name__ == "__main__":
    configurator.run(main, TrainConfig)
