"""Training: one flat loop for both paradigms and all stages.

    python train.py config/ar2diff_1_ar.py                         # pretrain an AR model
    python ar2diff.py --init_from=out/ar2diff_1_ar/ckpt.pt         # convert it
    python train.py config/ar2diff_2_adapt.py --max_steps=300      # go on as a diffusion model
    python train.py config/ar2diff_2_adapt.py --init_from=resume   # after an interruption: the same run, bit for bit

Every draw is a function of (seed, step, global example index): micro-batches, resuming and evaluation change nothing.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import autoregressive
import diffusion
from anneal import AnnealConfig, Annealing
from checkpoint import load, save
from configurator import describe, read_settings, refuse_changes, run
from cost import num_params, train_flops
from data.loader import build_if_missing, open_set
from data.objectives import ObjectiveConfig
from data.tokenizer import get_tokenizer
from device import autocast, compile_or_say_why_not, measured_flops, pick_device
from diffusion import LossConfig
from draws import draws_for
from encdec import build_model
from heldout import evaluate, sample_line
from model import ModelConfig, Transformer, model_settings
from optimizers import learning_rate_at, make_optimizers
from plan import print_plan
from recompute import recompute_blocks
from run_folder import MAY_CHANGE, Log, StopSignals

PARADIGMS = {"ar": autoregressive, "diffusion": diffusion}


@dataclass
class TrainConfig(ModelConfig, LossConfig, ObjectiveConfig, AnnealConfig):
    """A run: the settings of the model, of the diffusion loss, of the objective and of annealing, and these."""

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

    def __post_init__(self):
        ModelConfig.__post_init__(self)
        LossConfig.__post_init__(self)
        ObjectiveConfig.__post_init__(self)
        AnnealConfig.__post_init__(self)
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
    cfg, weights, state = settle(argv)
    if cfg.plan:
        return print_plan(cfg, open_set(cfg.data, "train", cfg))
    model = start(cfg, weights)
    train_set, valid_set = (open_set(cfg.data, split, cfg) for split in ("train", "valid"))
    device = model.tok.weight.device
    optimizers = make_optimizers(model, cfg)
    first, best = 0, math.inf
    if state is not None:
        for optimizer, kept in zip(optimizers, state["optimizer"]):
            optimizer.load_state_dict(kept)
        first, best = state["step"], state["best_loss"]
    out = Path(cfg.out_dir)
    log = Log(out / "log.jsonl", first)
    print(f"{num_params(model):,} parameters | {cfg.data} {len(train_set):,} | {device} {cfg.dtype} | {describe(cfg)}")
    if first >= cfg.max_steps:
        print(f"nothing to do: {out / 'ckpt.pt'} is at step {first} of max_steps {cfg.max_steps}")
        return log.last
    if cfg.compile:
        compile_or_say_why_not(model)
    if cfg.gradient_checkpointing:
        recompute_blocks(model)

    def checkpoint(name, step):
        save(
            out / name, model, step, train_set.tokenizer_name, train_config=asdict(cfg),
            optimizer=[o.state_dict() for o in optimizers], best_loss=best, fingerprint=train_set.fingerprint,
            converted_from=state_of_origin(cfg, state),
        )  # fmt: skip

    stop, annealing = StopSignals(), Annealing(cfg, model)
    peak = measured_flops(device, cfg.dtype)
    loss_fn = PARADIGMS[cfg.paradigm].losses
    bar = tqdm(total=cfg.max_steps, initial=first, unit="step", dynamic_ncols=True, disable=None, leave=False)
    tokens, flops, since = 0, 0, time.perf_counter()
    if first == 0:
        checkpoint("ckpt.pt", 0)  # from here on a killed run resumes from its own start, whatever it began with
    with stop:
        for step in range(first, cfg.max_steps):
            model.train()
            torch.manual_seed(cfg.seed + step)  # dropout follows the step too
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = learning_rate_at(step, cfg) * group["lr_ratio"]
            total, ar_loss, passes, flops_before = 0.0, 0.0, {}, flops
            for micro in range(cfg.grad_accum_steps):
                size = cfg.batch_size // cfg.grad_accum_steps
                batch = train_set.batch(
                    cfg.seed, step, cfg.batch_size, slice(micro * size, (micro + 1) * size), cfg.bucket
                )
                batch = type(batch)(*(part.to(device) for part in batch))
                draws = draws_for(cfg.seed, batch.example, step)
                opened = annealing.opened(batch, step)
                with autocast(device, cfg.dtype):
                    for k, term in enumerate(loss_fn(model, batch, cfg, draws, opened=opened)):
                        term = term / cfg.grad_accum_steps
                        term.backward()  # each as it comes: its graph is freed before the next is built
                        total += term.detach()
                        passes[k] = passes.get(k, 0.0) + term.detach()
                    if cfg.ar_weight:  # it is the last term
                        ar_loss += float(term.detach()) / cfg.ar_weight
                (B, P), T = batch.prefix.shape, batch.target.shape[1]
                tokens += B * (P + T)
                flops += B * train_flops(model.cfg, P, T, cfg.unroll_steps, cfg.ar_weight)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            total, norm = float(total), float(norm)
            if not (math.isfinite(total) and math.isfinite(norm)):
                bar.close()
                rows = f"{step * cfg.batch_size}..{(step + 1) * cfg.batch_size - 1}"
                raise ValueError(
                    f"loss {total}, gradient norm {norm} at step {step} (examples {rows} of {cfg.data}, "
                    f"seed {cfg.seed}); {out / 'ckpt.pt'} holds the last good step. Try a lower --learning_rate or "
                    "--dtype=float32."
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            bar.update()
            done, last = step + 1, step + 1 == cfg.max_steps
            entry = {"step": done, "loss": total, "grad_norm": norm, "lr": learning_rate_at(step, cfg)}
            entry |= {"flops": flops - flops_before}
            entry |= {"passes": [float(term) for term in passes.values()]} if len(passes) > 1 else {}
            entry |= {"ar_loss": ar_loss} if cfg.ar_weight else {}
            if done % cfg.log_interval == 0 or last or stop.asked:
                seconds = time.perf_counter() - since
                entry |= {
                    "tokens_per_s": round(tokens / seconds),
                    "mfu": round(flops / seconds / peak, 3),
                    "seconds": round(seconds, 3),
                }
                bar.set_postfix_str(f"loss {total:.3f}, {tokens / seconds:,.0f} tokens/s, {entry['mfu']:.0%} MFU")
            if done % cfg.eval_interval == 0 or last:
                entry |= evaluate(model, valid_set, cfg)
                tqdm.write(log.line(entry))
                if entry["val_loss"] < best:
                    best = entry["val_loss"]
                    checkpoint("best.pt", done)
            if cfg.sample_interval and (done % cfg.sample_interval == 0 or last):
                entry["sample"] = sample_line(model, PARADIGMS[cfg.paradigm], valid_set, done)
                tqdm.write(entry["sample"])
            log.write(entry)
            stopping = stop.asked  # read once: a signal that comes now waits for the next step, which will be saved
            if done % cfg.save_interval == 0 or last or stopping:
                checkpoint("ckpt.pt", done)
            if tokens and "seconds" in entry:
                tokens, flops, since = 0, 0, time.perf_counter()
            if stopping and not last:
                bar.close()
                print(f"stopped by {stop.name} at step {done}; go on with --init_from=resume", file=sys.stderr)
                sys.exit(128 + stopping)
    bar.close()
    print(f"done: {out / 'ckpt.pt'} at step {cfg.max_steps}, best held-out loss {best:.4f} in {out / 'best.pt'}")
    return log.last


def settle(argv: list[str]) -> tuple[TrainConfig, dict | None, dict | None]:
    """(settings, weights to start from or None, the checkpoint that is resumed or None). What can be wrong is found
    here, and nothing is written but a set that is missing."""
    resume = "--init_from=resume" in argv
    given, _ = read_settings(TrainConfig, [arg for arg in argv if arg != "--init_from=resume"])
    resume = resume or given.pop("resume", False) or given.get("init_from") == "resume"
    if given.get("init_from") == "resume":
        del given["init_from"]
    given = {name: value for name, value in given.items() if value or name not in OPEN_AT_ZERO}
    out = Path(given.get("out_dir", TrainConfig.out_dir))
    last = out / "ckpt.pt"
    state = None
    if resume and last.exists():
        state = load(last, weights_on(given))
        print(f"resuming {last} at step {state['step']}")
    elif resume:
        print(f"no checkpoint in {out} yet: starting at step 0")
    elif last.exists() and not given.get("overwrite", False):
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
        refuse_changes(given, state["train_config"], f"{last} was trained with", except_for=MAY_CHANGE)
        cfg, weights = TrainConfig(**(state["train_config"] | given)), state["model"]
        if state["fingerprint"] != train_set.fingerprint:
            raise ValueError(
                f"{data} has changed since {last} was written; use another --out_dir, or bring the data back"
            )
    return cfg, weights, state


def weights_on(given: dict) -> str:
    """Where a checkpoint is read to: for a plan only the shapes of its tensors count."""
    return "meta" if given.get("plan") else "cpu"


def start(cfg: TrainConfig, weights: dict | None) -> Transformer:
    """The model on its device, and a folder for the run."""
    model = build_model(ModelConfig(**model_settings(asdict(cfg))))
    if weights is None:
        torch.manual_seed(cfg.seed)
        model._init_weights()
    else:
        model.load_state_dict(weights)
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    return model.to(pick_device(cfg.device))


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
