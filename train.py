"""Training: one flat loop for both paradigms and all stages.

    python train.py config/ar2diff_1_ar.py                         # pretrain an AR model
    python ar2diff.py --init_from=out/ar2diff_1_ar/ckpt.pt         # convert it
    python train.py config/ar2diff_2_adapt.py --max_steps=300      # go on as a diffusion model
    python train.py config/ar2diff_2_adapt.py --init_from=resume   # after an interruption: the same run, bit for bit

Every draw is a function of (seed, step, global example index): micro-batches, resuming and evaluation change nothing.
"""

import math
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import autoregressive
import diffusion
from anneal import AnnealConfig, Annealing
from checkpoint import load
from configurator import checked, describe, read_settings, refuse_changes, run
from cost import num_params, train_flops
from data.ahead import ahead
from data.loader import build_if_missing, open_set
from data.objectives import ObjectiveConfig
from data.tokenizer import get_tokenizer
from device import autocast, compile_or_say_why_not, computes_bfloat16, keep_freed_memory, measured_flops
from diffusion import LossConfig
from distributed import ParallelConfig, World, each_term, joined, whole_tensor
from draws import draws_for
from encdec import build_model
from heldout import evaluate, sample_line
from model import ModelConfig, Transformer, model_settings
from optimizers import learning_rate_at, make_optimizers
from plan import print_plan
from recompute import recompute_blocks
from run_folder import MAY_CHANGE, Log, StopSignals, checkpoints, clear, inexact, locked, newest
from trouble import explained, keep_bad_batch, no_number

PARADIGMS = {"ar": autoregressive, "diffusion": diffusion}


@dataclass
class TrainConfig(ModelConfig, LossConfig, ObjectiveConfig, AnnealConfig, ParallelConfig):
    """A run: the settings of the model, the diffusion loss, the objective, annealing and the processes, and these."""

    data: str = "out/data/mini"  # a folder as data/loader.py writes it; the generated sets are built when missing
    init_from: str = "scratch"  # scratch | resume | a checkpoint whose weights are the start
    resume: bool = False  # go on from out_dir/ckpt.pt if it is there; --init_from=resume says the same
    out_dir: str = "out/run"
    plan: bool = False  # print what the run would cost, in memory and time, and stop
    overwrite: bool = False  # let this run take the place of another in out_dir
    max_steps: int = 1000
    batch_size: int = 32  # sequences per optimizer step, all micro-batches together
    bucket: int = 1  # rows of one prefix length that stand together; whole micro-batches of them need no mask
    grad_accum_steps: int = 1  # micro-batches per step; the result is the same, the memory smaller
    optimizer: str = "muon"  # muon (matrices of the blocks; AdamW for the rest) | adamw
    learning_rate: float = 1.5e-3
    muon_lr_ratio: float = 5.0  # muon's learning rate as a multiple of learning_rate
    min_lr_ratio: float = 0.0  # where the decay ends, as a share of learning_rate
    warmup_steps: int = 20
    schedule: str = "linear"  # after the warm-up: constant | linear | cosine
    weight_decay: float = 0.1  # on matrices; never on norms and biases
    beta1: float = 0.9
    beta2: float = 0.98
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    seed: int = 1337
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16 (autocast; weights stay float32)
    compile: bool = False
    gradient_checkpointing: bool = False  # a third more time for much less memory: recompute.py
    log_interval: int = 20
    eval_interval: int = 200
    eval_batches: int = 8
    sample_interval: int = 200  # print a sample every so many steps; 0: never
    save_interval: int = 200
    keep: int = 2  # checkpoints that stay: ckpt.pt, the newest, ckpt.1.pt, the one before, ..; best.pt beside them

    def __post_init__(self):
        ModelConfig.__post_init__(self)
        LossConfig.__post_init__(self)
        ObjectiveConfig.__post_init__(self)
        AnnealConfig.__post_init__(self)
        ParallelConfig.__post_init__(self)
        for name, allowed in (
            ("schedule", ("constant", "linear", "cosine")),
            ("optimizer", ("muon", "adamw")),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in (
            "max_steps",
            "batch_size",
            "grad_accum_steps",
            "log_interval",
            "eval_interval",
            "eval_batches",
            "save_interval",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.grad_accum_steps:
            raise ValueError(
                f"batch_size must be a multiple of grad_accum_steps, got {self.batch_size} and {self.grad_accum_steps}"
            )
        if self.compile and self.gradient_checkpointing:
            raise ValueError("compile and gradient_checkpointing exclude each other: choose speed or memory")
        if self.self_conditioning and self.unroll_steps < 2:
            raise ValueError("self_conditioning is trained in the unrolled pass: it needs unroll_steps of 2 or more")
        if self.ar_weight and (self.paradigm == "ar" or self.prefix_attention == "joint" or self.lookahead):
            raise ValueError(
                "ar_weight keeps the AR loss in a diffusion model that reads its prefix first and no token ahead; got "
                f"paradigm={self.paradigm}, prefix_attention={self.prefix_attention}, lookahead={self.lookahead}"
            )


OPEN_AT_ZERO = {"block_size", "target_length"}  # 0, also where it is typed: what the data or the checkpoint says


def main(argv: list[str]) -> dict:
    """Train as argv says; returns the last log entry, with --plan what it would cost."""
    given, resume = asked(argv)
    out, plan = Path(given.get("out_dir", TrainConfig.out_dir)), given.get("plan", False)
    device, patience = (given.get(name, getattr(TrainConfig, name)) for name in ("device", "patience"))
    with joined(device, patience) as world, locked(out) if world.leader and not plan else nullcontext():
        if not world.leader:
            world.barrier()  # the leader finds out alone what is wrong, builds the data and puts damaged files aside
        cfg, weights, source, state = settle(given, resume, out, world)
        if world.leader:
            world.barrier()
        if cfg.plan:
            return print_plan(cfg, open_set(cfg.data, "train", cfg))
        return train(world, out, cfg, make_model(cfg, weights, source or cfg.init_from), source, state)


def train(world: World, out: Path, cfg: TrainConfig, model: Transformer, source: Path | None, state: dict | None):
    """The loop. source, state: the checkpoint that is resumed, None for a run that begins."""
    train_set, valid_set = (open_set(cfg.data, split, cfg) for split in ("train", "valid"))
    device, facts = world.device, made_on(world)
    if device.type == "cpu":
        keep_freed_memory()
    whole = world.wrap(model, cfg)
    optimizers = make_optimizers(model, cfg)
    first, best = 0, math.inf
    if state is not None:
        world.restore(source, state, model, optimizers)
        first, best = state["step"], state["best_loss"]
        if line := inexact(state["train_config"] | state.get("made_on", {}), asdict(cfg) | facts):
            print(line)
    world.agree({"first step": first, "data": train_set.fingerprint, "settings": describe(cfg)})
    log = Log(out / "log.jsonl", first, writes=world.leader)
    print(f"{num_params(model):,} parameters | {cfg.data} {len(train_set):,} | {device} {cfg.dtype} | {describe(cfg)}")
    if first >= cfg.max_steps:
        print(f"nothing to do: {source} is at step {first} of max_steps {cfg.max_steps}")
        return log.last
    if cfg.dtype == "bfloat16" and not computes_bfloat16(device):
        print("this processor has no bfloat16 and is many times slower in it: --dtype=float32")
    if cfg.compile:
        compile_or_say_why_not(model)
    if cfg.gradient_checkpointing:
        recompute_blocks(model)

    def checkpoint(name, step, keep=1):
        log.sync()
        world.beat(f"writing {name} of step {step}")
        world.save(
            out / name, model, optimizers, step, train_set.tokenizer_name, keep, train_config=asdict(cfg),
            best_loss=best, fingerprint=train_set.fingerprint, converted_from=state_of_origin(cfg, state),
            made_on=facts,
        )  # fmt: skip

    stop, annealing = StopSignals(patient=world.size > 1), Annealing(cfg, model)
    peak = measured_flops(device, cfg.dtype) * world.size
    loss_fn = PARADIGMS[cfg.paradigm].losses
    n_terms = 1 if cfg.paradigm == "ar" else cfg.unroll_steps + (cfg.ar_weight > 0)
    bar = tqdm(
        total=cfg.max_steps, initial=first, unit="step", dynamic_ncols=True, disable=None if world.leader else True,
        leave=False,
    )  # fmt: skip
    places = (
        (cfg.seed, step, cfg.batch_size, world.rows(cfg.batch_size, cfg.grad_accum_steps, micro), cfg.bucket)
        for step in range(first, cfg.max_steps)
        for micro in range(cfg.grad_accum_steps)
    )
    batches = ahead(train_set.batch, places, device)
    tokens, flops, since = 0, 0, time.perf_counter()
    if first == 0:
        if world.leader and state is None:
            clear(out)
        checkpoint("ckpt.pt", 0)  # from here on a killed run resumes from its own start, whatever it began with
    with bar, stop, explained(asdict(cfg), world.size) as now:
        for step in range(first, cfg.max_steps):
            world.beat(f"in step {step}")
            model.train()
            torch.manual_seed(cfg.seed + step + (world.rank << 40))  # dropout follows the step too
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate_at(step, cfg) * group["lr_ratio"]
            total, ar_loss, passes, flops_before = 0.0, 0.0, [0.0] * n_terms, flops
            for micro in range(cfg.grad_accum_steps):
                batch = next(batches)
                (B, P), T = batch.prefix.shape, batch.target.shape[1]
                now.update(step=step, rows=B, prefix=P, target=T)
                draws = draws_for(cfg.seed, batch.example, step)
                opened = annealing.opened(batch, step)
                world.beat(f"in the forward pass of step {step}")
                terms = loss_fn(model, batch, cfg, draws, opened=opened)
                with autocast(device, cfg.dtype):
                    for k, term in enumerate(each_term(whole, terms, n_terms, micro + 1 == cfg.grad_accum_steps)):
                        term = term / cfg.grad_accum_steps
                        world.beat(f"in the backward pass of step {step}")
                        term.backward()  # each as it comes: its graph is freed before the next is built
                        total += term.detach()
                        passes[k] += term.detach()
                    if cfg.ar_weight:  # it is the last term
                        ar_loss += float(term.detach()) / cfg.ar_weight
                tokens += world.size * B * (P + T)
                flops += world.size * B * train_flops(model.cfg, P, T, cfg.unroll_steps, cfg.ar_weight)
            norm = float(whole_tensor(nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)))
            losses, ar_losses, asked_by, *passes = zip(*world.gather([total, ar_loss, stop.asked, *passes]))
            total, stopping = sum(losses) / world.size, int(max(asked_by))
            if not (math.isfinite(total) and math.isfinite(norm)):
                if world.leader:
                    everything = train_set.batch(cfg.seed, step, cfg.batch_size, bucket=cfg.bucket)
                    keep_bad_batch(out, step, losses, norm, everything, asdict(cfg))
                raise ValueError(no_number(out, step, losses, norm, asdict(cfg)))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.update()
            done, last = step + 1, step + 1 == cfg.max_steps
            entry = {"step": done, "loss": total, "grad_norm": norm, "lr": learning_rate_at(step, cfg)}
            entry |= {"flops": flops - flops_before}
            entry |= {"passes": [sum(term) / world.size for term in passes]} if len(passes) > 1 else {}
            entry |= {"ar_loss": sum(ar_losses) / world.size} if cfg.ar_weight else {}
            if done % cfg.log_interval == 0 or last or stopping:
                seconds = time.perf_counter() - since
                entry |= {
                    "tokens_per_s": round(tokens / seconds),
                    "mfu": round(flops / seconds / peak, 3),
                    "seconds": round(seconds, 3),
                }
                bar.set_postfix_str(f"loss {total:.3f}, {tokens / seconds:,.0f} tokens/s, {entry['mfu']:.0%} MFU")
            if done % cfg.eval_interval == 0 or last:
                world.beat(f"evaluating after step {done}")
                entry |= world.look(whole, lambda: evaluate(model, valid_set, cfg, world))
                tqdm.write(log.line(entry))
                if entry["val_loss"] < best:
                    best = entry["val_loss"]
                    checkpoint("best.pt", done)
            if cfg.sample_interval and (done % cfg.sample_interval == 0 or last):
                paradigm = PARADIGMS[cfg.paradigm]
                entry["sample"] = world.look(whole, lambda: sample_line(model, paradigm, valid_set, done))  # noqa: B023
                tqdm.write(entry["sample"])
            log.write(entry)
            if done % cfg.save_interval == 0 or last or stopping:
                checkpoint("ckpt.pt", done, cfg.keep)
            if tokens and "seconds" in entry:
                tokens, flops, since = 0, 0, time.perf_counter()
            if stopping and not last:
                name = signal.Signals(stopping).name
                print(f"stopped by {name} at step {done}; go on with --init_from=resume", file=sys.stderr)
                sys.exit(128 + stopping)
    print(f"done: {out / 'ckpt.pt'} at step {cfg.max_steps}, best held-out loss {best:.4f} in {out / 'best.pt'}")
    return log.last


def asked(argv: list[str]) -> tuple[dict, bool]:
    """(settings that were given, whether to resume)."""
    resume = "--init_from=resume" in argv
    given, _ = read_settings(TrainConfig, [arg for arg in argv if arg != "--init_from=resume"])
    resume = resume or given.pop("resume", False) or given.get("init_from") == "resume"
    if given.get("init_from") == "resume":
        del given["init_from"]
    return {name: value for name, value in given.items() if value or name not in OPEN_AT_ZERO}, resume


def settle(given: dict, resume: bool, out: Path, world: World):
    """(settings, weights to start from or None, path and fields of the checkpoint that is resumed or None).

    What can be wrong is found here, and nothing is written but a set that is missing.
    """
    source = state = None
    there = checkpoints(out)
    if resume and there:
        source, state = newest(out, lambda path: world.read(path, given.get("parallel"), weights_on(given)))
        check_run(source, state)
        print(f"resuming {source} at step {state['step']}")
    elif resume:
        print(f"no checkpoint in {out} yet: starting at step 0")
    elif there and not given.get("overwrite", False):
        raise ValueError(
            f"{out} already holds a run; go on with --init_from=resume, start over with --overwrite, "
            "or name another --out_dir"
        )
    before = TrainConfig.data if state is None else state["train_config"]["data"]
    data = given["data"] = str(build_if_missing(given.get("data", before)))  # the folder of a bare name
    train_set = open_set(data, "train")
    if state is None:
        cfg, weights = new_run(given, train_set)
    else:
        refuse_changes(given, state["train_config"], f"{source} was trained with", except_for=MAY_CHANGE)
        cfg, weights = TrainConfig(**(state["train_config"] | given)), state.get("model")
        if state["fingerprint"] != train_set.fingerprint:
            raise ValueError(
                f"{data} has changed since {source} was written; use another --out_dir, or bring the data back"
            )
    if cfg.batch_size % (cfg.grad_accum_steps * world.size):
        raise ValueError(
            f"batch_size must be a multiple of grad_accum_steps times processes, got {cfg.batch_size}, "
            f"{cfg.grad_accum_steps} and {world.size}"
        )
    return cfg, weights, source, state


def weights_on(given: dict) -> str:
    """Where a checkpoint is read to: for a plan only the shapes of its tensors count."""
    return "meta" if given.get("plan") else "cpu"


def make_model(cfg: TrainConfig, weights: dict | None, source) -> Transformer:
    """The network on the CPU, with fresh weights or those given. Raises ValueError where they do not fit."""
    try:
        model = build_model(ModelConfig(**model_settings(asdict(cfg))))
        if weights is None:
            torch.manual_seed(cfg.seed)
            model._init_weights()
        else:
            model.load_state_dict(weights)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        fault = "cannot be made" if weights is None else f"does not take the weights of {source}"
        raise ValueError(f"a network of these settings {fault}: {str(error).splitlines()[-1].strip()[:120]}") from None
    return model


def check_run(source: Path, state: dict) -> None:
    """Raise ValueError where a checkpoint is no run that could be resumed, but a model to start from, or broken."""
    kinds = {"train_config": dict, "best_loss": float, "fingerprint": str, "converted_from": str}
    missing = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    missing += [] if isinstance(state.get("optimizer", state.get("param_groups")), list) else ["optimizer"]
    made_on = state.get("made_on", {})  # the first checkpoints had none
    if not isinstance(made_on, dict) or not all(isinstance(fact, int | str) for fact in made_on.values()):
        missing.append("made_on")
    if missing or "data" not in state["train_config"]:
        raise ValueError(
            f"{source} holds no run that could be resumed, no {', '.join(missing) or 'data'} in it; to start from its "
            f"weights: --init_from={source} and another --out_dir"
        )
    checked(TrainConfig, state["train_config"], f"{source}, train_config")


def made_on(world: World) -> dict:
    """What the last bits of a run depend on, beside its settings."""
    return {
        "device": world.device.type,
        "processes": world.size,
        "threads": torch.get_num_threads() if world.device.type == "cpu" else 0,
        "torch": str(torch.__version__),
        "processor": torch.backends.cpu.get_cpu_capability() if world.device.type == "cpu" else "",
    }


def new_run(given: dict, train_set) -> tuple[TrainConfig, dict | None]:
    """(settings, weights or None) of a run that starts at step 0, from scratch or from another checkpoint."""
    tokenizer = get_tokenizer(train_set.tokenizer_name)
    of_data = {name: getattr(tokenizer, name) for name in ("vocab_size", "n_ordinary", "pad_id", "sep_id", "mask_id")}
    of_data |= {"target_length": train_set.target_length}
    refuse_changes(given, of_data, f"{train_set.folder} is made with")
    source = given.get("init_from", TrainConfig.init_from)
    if source == "scratch":
        cfg = TrainConfig(**(given | of_data | {"block_size": given.get("block_size") or train_set.meta["block_size"]}))
        weights = None
    else:
        state = load(source, weights_on(given))
        if state["tokenizer"] != train_set.tokenizer_name:
            raise ValueError(
                f"{source} was trained with tokenizer {state['tokenizer']!r}, {train_set.folder} is made with "
                f"{train_set.tokenizer_name!r}; prepare the data with --tokenizer={state['tokenizer']}"
            )
        hint = "convert it with python ar2diff.py, or drop the setting"
        if given.get("anneal_steps") and state["model_config"]["paradigm"] == "ar":
            raise ValueError(f"{source} is an AR model and anneal_steps opens a diffusion model's mask; {hint}")
        refuse_changes(given, state["model_config"], f"{source} is a model with", hint, except_for={"dropout"})
        kept = state["model_config"] | {"dropout": given.get("dropout", state["model_config"]["dropout"])}
        cfg, weights = TrainConfig(**(given | kept | of_data)), state["model"]
    if cfg.block_size < train_set.meta["block_size"]:
        raise ValueError(
            f"{train_set.folder} needs {train_set.meta['block_size']} tokens for prefix + target, the model's "
            f"block_size is {cfg.block_size}; pretrain with --block_size={train_set.meta['block_size']}"
        )
    return cfg, weights


def state_of_origin(cfg: TrainConfig, state: dict | None) -> str:
    return state["converted_from"] if state is not None else cfg.init_from


if __name__ == "__main__":
    run(main)
