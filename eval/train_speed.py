"""How fast training is: each line of the table is a ratio of two systems that are timed in turn on this machine.

python -m eval.train_speed --out=results/speed_train.json --nanogpt=PATH    # PATH: a checkout of karpathy/nanoGPT

train   an AR training step against nanoGPT's own model and optimizer, same shape and settings
unroll  a diffusion training step of two passes against an AR step of the same model and tokens
anneal  a diffusion step whose mask is half open, by each form of anneal.py, against one that sees the whole target
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path

import torch
from torch import nn

from anneal import FORMS, Annealing
from configurator import configure, run
from data.objectives import Batch
from device import autocast
from draws import draws_for
from eval.common import environment, write_json
from eval.timing import GPT2_SMALL, SIX, Line, batch_of, header, in_turn, model_config
from model import ModelConfig, Transformer, model_settings
from train import PARADIGMS, TrainConfig, make_optimizers


@dataclass
class TrainSpeedConfig:
    nanogpt: str = ""  # a checkout of github.com/karpathy/nanoGPT; empty: the line train is left out
    out: str = ""  # where the raw times go, as JSON; empty: nowhere
    only: str = "train,unroll,anneal"  # the lines to measure
    runs: int = 7  # timed runs of each system, after one that is not counted
    threads: int = 0  # 0: what torch takes
    seed: int = 1337


JOINT = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
FROZEN = JOINT | dict(prefix_attention="bidirectional")


@dataclass
class Shapes:
    """The sizes that are measured. Tests pass smaller ones."""

    six: dict = field(default_factory=lambda: dict(SIX))
    gpt2: dict = field(default_factory=lambda: dict(GPT2_SMALL))
    small: dict = field(default_factory=lambda: dict(n_layer=4, n_head=4, n_embd=128, vocab_size=288))  # train.py's own
    batch: dict = field(default_factory=lambda: dict(six=(16, 256), gpt2=(2, 256), small=(32, 108)))  # rows, tokens


def main(argv: list[str], shapes: Shapes | None = None) -> list[dict]:
    """Measure, print and write what argv asks for; returns the lines as they are in the JSON file."""
    cfg, shapes = configure(TrainSpeedConfig, argv), shapes or Shapes()
    unknown = set(cfg.only.split(",")) - set(LINES)
    if unknown:
        raise ValueError(f"--only: there are {', '.join(LINES)}; got {', '.join(sorted(unknown))}")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    about = dict(command=" ".join(["python -m eval.train_speed", *argv]), seed=cfg.seed, **environment())
    about["load_before"] = os.getloadavg()[0]
    print(" | ".join(f"{key} {value}" for key, value in environment().items()))
    print(header())
    lines = []
    for name in cfg.only.split(","):
        for line in LINES[name](cfg, shapes):
            print(line, flush=True)
            lines.append(line.record())
    about["load_after"] = os.getloadavg()[0]
    if cfg.out:
        write_json(cfg.out, about | {"lines": lines})
        print(f"raw times: {cfg.out}")
    return lines


def train_lines(cfg: TrainSpeedConfig, shapes: Shapes) -> Iterator[Line]:
    """Ours and nanoGPT's training step: 256 tokens read a row, 255 or 256 scored, gradient clipping, the loss read."""
    if not cfg.nanogpt:
        print("train   left out: needs --nanogpt=PATH, a checkout of github.com/karpathy/nanoGPT")
        return
    for name in ("six", "gpt2"):
        shape, (B, T) = getattr(shapes, name), shapes.batch[name]
        for dtype in ("float32", "bfloat16"):
            systems = dict(
                ours=our_step(cfg, shape, batch_of(shape, B, 0, T, cfg.seed), dtype),
                nanoGPT=nanogpt_step(cfg, shape, B, T, dtype),
            )
            note = dict(tokens_per_step=B * T)
            yield Line("train", f"{name} {dtype}", "ours", "nanoGPT", ">= 1", *in_turn(systems, cfg.runs), True, note)


def unroll_lines(cfg: TrainSpeedConfig, shapes: Shapes) -> Iterator[Line]:
    """A diffusion step, two passes over joint attention, in AR steps over the same tokens: half prefix, half target."""
    for name in ("small", "six", "gpt2"):
        shape, (B, T) = getattr(shapes, name), shapes.batch[name]
        batch = batch_of(shape, B, T - T // 2, T // 2, cfg.seed)
        systems = dict(
            AR=our_step(cfg, shape, batch),
            diffusion=our_step(cfg, shape | JOINT, batch),
            conditioned=our_step(cfg, shape | JOINT | dict(self_conditioning=True), batch),
        )
        times, warmup = in_turn(systems, cfg.runs)
        note = dict(tokens_per_step=B * T, unroll_steps=TrainConfig.unroll_steps)
        for system in ("diffusion", "conditioned"):
            yield Line("unroll", name, system, "AR", "<= 2.1", times, warmup, note=note)


def anneal_lines(cfg: TrainSpeedConfig, shapes: Shapes) -> Iterator[Line]:
    """The same diffusion step behind a frozen prefix with the mask half open: on a CPU a dense mask serves."""
    for name in ("small", "six"):
        shape, (B, T) = getattr(shapes, name), shapes.batch[name]
        batch = batch_of(shape, B, T - T // 2, T // 2, cfg.seed)
        systems = {"all open": our_step(cfg, shape | FROZEN, batch)}
        with redirect_stdout(StringIO()):  # that a dense mask serves
            for form in FORMS:
                systems[form] = our_step(cfg, shape | FROZEN, batch, anneal_steps=2, anneal_form=form)
        times, warmup = in_turn(systems, cfg.runs)
        for form in FORMS:
            yield Line("anneal", name, form, "all open", "", times, warmup, note=dict(tokens_per_step=B * T))


LINES = {"train": train_lines, "unroll": unroll_lines, "anneal": anneal_lines}


def our_step(
    cfg: TrainSpeedConfig, shape: dict, batch: Batch, dtype: str = "float32", **settings
) -> Callable[[], None]:
    """One optimizer step as train.py makes it."""
    sizes = model_config(shape, batch.prefix.shape[1], batch.target.shape[1])
    settings = TrainConfig(**sizes, dtype=dtype, optimizer="adamw", **settings)
    torch.manual_seed(cfg.seed)
    model = Transformer(ModelConfig(**model_settings(asdict(settings))))
    annealing = Annealing(settings, model)
    optimizers, losses, cpu = make_optimizers(model, settings), PARADIGMS[settings.paradigm].losses, torch.device("cpu")

    def step():
        total = 0.0
        with autocast(cpu, dtype):
            opened = annealing.opened(batch, 0)
            for term in losses(model, batch, settings, draws_for(cfg.seed, batch.example), opened=opened):
                term.backward()
                total += term.detach()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        float(total)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def nanogpt_step(cfg: TrainSpeedConfig, shape: dict, rows: int, tokens: int, dtype: str) -> Callable[[], None]:
    """One optimizer step as nanoGPT's train.py makes it, with the model and the optimizer of its model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(cfg.nanogpt) / "model.py")
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    sizes = {name: shape[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    torch.manual_seed(cfg.seed)
    with redirect_stdout(StringIO()):  # it reports its parameter counts
        model = theirs.GPT(theirs.GPTConfig(block_size=tokens, dropout=0.0, bias=False, **sizes))
        t = TrainConfig
        optimizer = model.configure_optimizers(t.weight_decay, t.learning_rate, (t.beta1, t.beta2), "cpu")
    ids = batch_of(shape, rows, 0, tokens + 1, cfg.seed).target
    read, expected = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def step():
        with autocast(torch.device("cpu"), dtype):
            loss = model(read, expected)[1]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), TrainConfig.grad_clip)
        loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    run(main)
