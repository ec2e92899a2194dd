"""How fast the code is: each line of the table is a ratio of two systems that are timed in turn on this machine.

    python -m eval.speed --out=results/speed_basics.json --nanogpt=PATH      # PATH: a checkout of karpathy/nanoGPT
    python -m eval.speed --quick --only=decode

    train   an AR training step against nanoGPT's own model and optimizer, same shape and settings
    unroll  a diffusion training step of two passes against an AR step of the same model and tokens
    decode  AR decoding with the cache against transformers' generate, same weights, same tokens out
    prefix  a diffusion decoding step after a long frozen prefix against one after a short prefix

Other work on the machine slows both systems of a pair, so the ratio of neighbours is kept, not the ratio of means.
"""

import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import StringIO
from pathlib import Path

import torch
from torch import nn

import autoregressive
import diffusion
from configurator import configure, run
from cost import forward_flops
from data.objectives import Batch
from device import autocast
from draws import draws_for
from eval.common import environment, write_json
from model import ModelConfig, Transformer, model_settings
from train import PARADIGMS, TrainConfig, make_optimizers


@dataclass
class SpeedConfig:
    nanogpt: str = ""  # a checkout of github.com/karpathy/nanoGPT; empty: the line train is left out
    out: str = ""  # where the raw times go, as JSON; empty: nowhere
    only: str = "train,unroll,decode,prefix"  # the lines to measure
    quick: bool = False  # fewer runs and shorter texts: minutes
    runs: int = 7  # timed runs of each system, after one that is not counted (quick: 3)
    threads: int = 0  # 0: what torch takes
    seed: int = 1337


GPT2_BLOCK = dict(norm="layernorm", activation="gelu", position="learned", qk_norm=False, tie_weights=True)
JOINT = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
FROZEN = JOINT | dict(prefix_attention="bidirectional")


@dataclass
class Shapes:
    """The sizes that are measured. Tests pass smaller ones."""

    six: dict = field(default_factory=lambda: dict(n_layer=6, n_head=6, n_embd=384, vocab_size=256) | GPT2_BLOCK)
    gpt2: dict = field(default_factory=lambda: dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257) | GPT2_BLOCK)
    small: dict = field(default_factory=lambda: dict(n_layer=4, n_head=4, n_embd=128, vocab_size=288))  # train.py's own
    batch: dict = field(default_factory=lambda: dict(six=(16, 256), gpt2=(2, 256), small=(32, 108)))  # rows, tokens
    prompt: int = 64  # tokens before the generated ones
    long_prompt: int = 1024
    new: int = 256  # generated tokens
    decode_batches: tuple = (1, 8)


@dataclass
class Line:
    """One row of the table: the seconds of `system` over those of `base`, or the inverse where a rate is asked for."""

    name: str  # which of the four questions
    case: str  # shape, dtype, batch
    system: str
    base: str
    target: str  # what we want of the ratio
    times: dict[str, list[float]]  # seconds of each run, in the order they were taken
    warmup: dict[str, float]  # seconds of the run before them
    rate: bool = False  # the ratio is of speeds, base seconds / system seconds: above 1 is faster
    note: dict = field(default_factory=dict)  # tokens, network calls and what else belongs to the numbers

    @property
    def ratios(self) -> list[float]:
        pairs = zip(self.times[self.system], self.times[self.base])
        return [b / a if self.rate else a / b for a, b in pairs]

    def record(self) -> dict:
        """Everything, raw and summed up, for the JSON file."""
        summary = {name: dict(median=statistics.median(t), low=min(t), high=max(t)) for name, t in self.times.items()}
        ratio = dict(median=statistics.median(self.ratios), low=min(self.ratios), high=max(self.ratios))
        return asdict(self) | dict(seconds=summary, ratios=self.ratios, ratio=ratio)

    def __str__(self) -> str:
        r, seconds = self.record()["ratio"], {name: statistics.median(t) for name, t in self.times.items()}
        spread = f"{r['median']:6.3f}  ({r['low']:.3f} .. {r['high']:.3f})"
        pair = f"{self.system} {seconds[self.system]:.3f} s, {self.base} {seconds[self.base]:.3f} s"
        return f"{self.name:7s} {self.case:20s} {spread:26s} {self.target:8s} {pair}"


def main(argv: list[str], shapes: Shapes | None = None) -> list[dict]:
    """Measure, print and write what argv asks for; returns the lines as they are in the JSON file."""
    cfg, shapes = configure(SpeedConfig, argv), shapes or Shapes()
    unknown = set(cfg.only.split(",")) - set(LINES)
    if unknown:
        raise ValueError(f"--only: there are {', '.join(LINES)}; got {', '.join(sorted(unknown))}")
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.quick:
        cfg.runs, shapes = min(cfg.runs, 3), replace(shapes, new=min(shapes.new, 32))
    about = dict(command=" ".join(["python -m eval.speed", *argv]), seed=cfg.seed, **environment())
    about["load_before"] = os.getloadavg()[0]
    print(" | ".join(f"{key} {value}" for key, value in environment().items()))
    print(f"{'line':7s} {'case':20s} {'ratio, median (range)':26s} {'target':8s} median seconds")
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


def in_turn(systems: dict[str, Callable], runs: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of each run, seconds of the warm-up) of each system, A B C, C B A, A B C ...

    A system is called without arguments. Where it returns a float, that is its time; else the clock is read around it.
    """

    def timed(system):
        start = time.perf_counter()
        said = system()
        return said if isinstance(said, float) else time.perf_counter() - start

    warmup = {name: timed(system) for name, system in systems.items()}
    times = {name: [] for name in systems}
    for k in range(runs):
        for name in list(systems)[:: -1 if k % 2 else 1]:
            times[name].append(timed(systems[name]))
    return times, warmup


def train_lines(cfg: SpeedConfig, shapes: Shapes) -> Iterator[Line]:
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


def unroll_lines(cfg: SpeedConfig, shapes: Shapes) -> Iterator[Line]:
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


def decode_lines(cfg: SpeedConfig, shapes: Shapes) -> Iterator[Line]:
    """Greedy decoding of a fixed number of tokens with the key-value cache, the same weights on both sides."""
    try:
        theirs = gpt2_of_transformers(shapes.gpt2, shapes.prompt + shapes.new + 1, cfg.seed)
    except ImportError:
        print("decode  left out: needs transformers (pip install transformers)")
        return
    settings = model_config(shapes.gpt2 | dict(bias=True, activation="gelu_tanh"), shapes.prompt, shapes.new + 1)
    ours = copy_weights(theirs, Transformer(ModelConfig(**settings)).eval())
    options = dict(max_new_tokens=shapes.new, do_sample=False, pad_token_id=0)
    for B in shapes.decode_batches:
        prefix = batch_of(shapes.gpt2, B, shapes.prompt, 1, cfg.seed).prefix
        prompt = torch.cat([prefix, torch.full((B, 1), ours.cfg.sep_id)], dim=1)  # ours reads the separator itself
        real = torch.ones_like(prompt)
        calls = dict(
            ours=partial(autoregressive.generate, ours, prefix, autoregressive.SamplerConfig()),
            transformers=partial(theirs.generate, prompt, attention_mask=real, **options),
        )
        said = {name: call() for name, call in calls.items()}
        same = (said["ours"].tokens == said["transformers"][:, -shapes.new :]).float().mean().item()
        note = dict(new_tokens=shapes.new, network_calls=int(said["ours"].calls[0]), share_of_equal_tokens=same)
        times, warmup = in_turn(calls, cfg.runs)
        yield Line("decode", f"gpt2 batch {B}", "ours", "transformers", "<= 1.1", times, warmup, note=note)


def prefix_lines(cfg: SpeedConfig, shapes: Shapes) -> Iterator[Line]:
    """One step of a sampler that rewrites all slots: what a longer frozen prefix adds to it."""
    steps, systems, flops = 3, {}, {}
    settings = model_config(shapes.gpt2 | FROZEN, shapes.long_prompt, shapes.new)
    model = Transformer(ModelConfig(**settings)).eval()
    sampler = diffusion.SamplerConfig(steps=steps, candidates=1)
    for length in (shapes.long_prompt, shapes.prompt):
        prefix = batch_of(shapes.gpt2, 1, length, 1, cfg.seed).prefix

        systems[f"prefix {length}"] = partial(one_step, model, prefix, sampler)
        flops[length] = forward_flops(model.cfg, length, shapes.new) - forward_flops(model.cfg, length, 0)
    ratio = flops[shapes.long_prompt] / flops[shapes.prompt]
    note = dict(network_calls=steps, target_tokens=shapes.new, flops_ratio=ratio)
    yield Line("prefix", "gpt2 frozen", *systems, "<= 1.35", *in_turn(systems, cfg.runs), note=note)


def one_step(model, prefix, sampler: diffusion.SamplerConfig) -> float:
    """Median seconds of a sampling step, reading the prefix not counted."""
    at = []  # the hook's first call comes after the prefix was read, the others after each step
    diffusion.generate(model, prefix, sampler, on_step=lambda *_: at.append(time.perf_counter()))
    return statistics.median(b - a for a, b in zip(at, at[1:]))


LINES = {"train": train_lines, "unroll": unroll_lines, "decode": decode_lines, "prefix": prefix_lines}


def model_config(shape: dict, prefix: int, target: int) -> dict:
    """All settings of a model of that shape. Its last three ids are pad, separator and mask."""
    V = shape["vocab_size"]
    special = dict(n_ordinary=V - 3, pad_id=V - 3, sep_id=V - 2, mask_id=V - 1)
    return special | dict(block_size=max(2, prefix + target), target_length=target) | shape


def batch_of(shape: dict, rows: int, prefix: int, target: int, seed: int) -> Batch:
    """Random ordinary tokens: speed does not depend on what they say."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape["vocab_size"] - 3, (rows, prefix + target), generator=generator)
    return Batch(ids[:, :prefix], ids[:, prefix:], torch.arange(rows))


def our_step(cfg: SpeedConfig, shape: dict, batch: Batch, dtype: str = "float32") -> Callable[[], None]:
    """One optimizer step as train.py makes it."""
    sizes = model_config(shape, batch.prefix.shape[1], batch.target.shape[1])
    settings = TrainConfig(**sizes, dtype=dtype, optimizer="adamw")
    torch.manual_seed(cfg.seed)
    model = Transformer(ModelConfig(**model_settings(asdict(settings))))
    optimizers, losses, cpu = make_optimizers(model, settings), PARADIGMS[settings.paradigm].losses, torch.device("cpu")

    def step():
        total = 0.0
        with autocast(cpu, dtype):
            for term in losses(model, batch, settings, draws_for(cfg.seed, batch.example)):
                term.backward()
                total += term.detach()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        float(total)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def nanogpt_step(cfg: SpeedConfig, shape: dict, rows: int, tokens: int, dtype: str) -> Callable[[], None]:
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


def gpt2_of_transformers(shape: dict, positions: int, seed: int) -> nn.Module:
    """A random GPT-2 that never ends a text: our three special ids have zero embeddings, never the likeliest."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: shape[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=positions, eos_token_id=None, bos_token_id=None)).eval()
    with torch.no_grad():
        model.transformer.wte.weight[-3:] = 0
    return model


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: Transformer) -> Transformer:
    """ours with the weights of a GPT2LMHeadModel, whose matrices are stored (in, out)."""
    stack = theirs.transformer
    pairs = [(ours.tok, stack.wte), (ours.pos, stack.wpe), (ours.norm, stack.ln_f)]
    turned = []
    for block, other in zip(ours.blocks, stack.h):
        pairs += [(block.norm1, other.ln_1), (block.norm2, other.ln_2)]
        turned += [(block.attn.qkv, other.attn.c_attn), (block.attn.proj, other.attn.c_proj)]
        turned += [(block.mlp.up, other.mlp.c_fc), (block.mlp.down, other.mlp.c_proj)]
    for mine, other in pairs + turned:
        mine.weight.copy_(other.weight.T if (mine, other) in turned else other.weight)
        if getattr(mine, "bias", None) is not None:
            mine.bias.copy_(other.bias)
    return ours


if __name__ == "__main__":
    run(main)
