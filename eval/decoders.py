"""Who decodes: the same weights as AR model and as diffusion models, a checkpoint in their place, and how they write.

Random weights never end a text: AR spends a call a token, diffusion a call a step, whatever the text says.
"""

import statistics
import time
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import autoregressive
import diffusion
from ar2diff import adapt
from checkpoint import load_model
from data.loader import build_if_missing, open_set
from eval.limits import stepped
from eval.timing import GPT2_BLOCK, GPT2_SMALL, SIX, batch_of, clock, model_config
from model import ModelConfig, Transformer

GPT2 = GPT2_BLOCK | dict(bias=True, activation="gelu_tanh")  # exactly the block of its published weights
ADAPTIVE = dict(sampler="entropy_bound", steps=50)  # leaves early where it can; random weights never let it


@dataclass
class Shapes:
    """The sizes that are measured. Tests pass smaller ones."""

    gpt2: dict = field(default_factory=lambda: GPT2_SMALL | GPT2)
    six: dict = field(default_factory=lambda: SIX | GPT2)  # quick
    prompt: int = 64  # tokens before the generated ones
    long_prompt: int = 1024  # of the line prefix
    new: int = 256  # generated tokens of the lines
    lengths: tuple = (256, 64, 1024, 4096, 128, 512, 2048)  # the most telling first
    learned: int = 1024  # tokens up to which positions are learned, GPT-2's own; RoPE beyond


@dataclass(frozen=True)
class System:
    """One decoder under one setting of its sampler."""

    kind: str = "AR"  # AR | frozen | joint: the prefix is read once, or again with every step
    compiled: bool = False
    steps: int = 0  # network calls of a timed run
    tells: tuple = (0,)  # the numbers of steps that the table has rows for
    candidates: int = 1
    conditioned: bool = False
    adaptive: bool = False

    @property
    def name(self) -> str:
        extras = {
            "adaptive": self.adaptive,
            f"{self.candidates} candidates": self.candidates > 1,
            "self-conditioning": self.conditioned,
            "compiled": self.compiled,
        }
        return ", ".join([self.kind, *(text for text, there in extras.items() if there)])

    @property
    def sampler(self):
        """How it is asked to decode."""
        if self.kind == "AR":
            return autoregressive.SamplerConfig()
        chosen = ADAPTIVE if self.adaptive else {}
        return diffusion.SamplerConfig(**chosen | dict(steps=self.steps, candidates=self.candidates))


@dataclass(frozen=True)
class Setting:
    """What all systems of a block share."""

    dtype: str
    batch: int
    length: int


class Networks:
    """The same random weights under the settings of every system, and prompts for them."""

    real = False  # texts end where the length says, not where the model would

    def __init__(self, shape: dict, shapes: Shapes, longest: int, device: torch.device, seed: int):
        self.shape, self.shapes, self.longest, self.device, self.seed = shape, shapes, longest, device, seed
        self.made: dict[tuple, object] = {}

    def position(self, length: int) -> str:
        return self.shape["position"] if length <= self.shapes.learned else "rope"

    def get(self, system: System, setting: Setting, speed_up: Callable | None = None):
        """What system decodes with, for targets of setting.length tokens. It is made once for each dtype."""
        dtype, position = setting.dtype, self.position(setting.length)
        return at_length(
            self._made(dtype, position, system.kind, system.conditioned, system.compiled, speed_up), setting.length
        )

    def _made(self, dtype, position, kind, conditioned, compiled, speed_up):
        key = (dtype, position, kind, conditioned, compiled)
        if key not in self.made:
            if compiled:
                made = speed_up(self._made(dtype, position, kind, conditioned, False, None))
            elif kind == "AR":
                made = self._random(dtype, position)
            else:
                prefix = "joint" if kind == "joint" else "bidirectional"
                what = dict(paradigm="diffusion", prefix_attention=prefix, target_attention="bidirectional", shift=True)
                source = self._made(dtype, position, "AR", False, False, None)
                made = adapt(source, **what, self_conditioning=conditioned).to(getattr(torch, dtype))
            self.made[key] = made
        return self.made[key]

    def forget_compiled(self) -> None:
        """Compile anew from here on."""
        self.made = {key: made for key, made in self.made.items() if not key[-1]}

    def _random(self, dtype: str, position: str) -> Transformer:
        longest = self.longest if position == "rope" else min(self.longest, self.shapes.learned)
        prefix = max(self.shapes.prompt, self.shapes.long_prompt)
        settings = model_config(self.shape, prefix, longest + 1) | dict(position=position)
        torch.manual_seed(self.seed)
        model = Transformer(ModelConfig(**settings)).eval().requires_grad_(False)
        model.tok.weight[-3:] = 0  # pad, separator, mask: logits of 0, never the likeliest of so many
        return model.to(self.device, getattr(torch, dtype))

    def prompts(self, setting: Setting) -> list[Tensor]:
        """Batches (B, P) that are written behind, one after the other, in a run."""
        return [self.prompt(setting.batch, self.shapes.prompt)]

    def prompt(self, rows: int, length: int) -> Tensor:
        return batch_of(self.shape, rows, length, 1, self.seed).prefix.to(self.device)


class Checkpoints:
    """A diffusion checkpoint and perhaps an AR one, in the place of Networks, with prompts they know."""

    real = True

    def __init__(self, init_from: str, ar_from: str, n: int, device: torch.device):
        model, _, state = load_model(init_from, device)
        if model.cfg.paradigm != "diffusion":
            raise ValueError(f"{init_from} is an AR model; --init_from wants a diffusion one, --ar_from the AR one")
        self.kind = "joint" if model.cfg.prefix_attention == "joint" else "frozen"
        self.models, self.conditioned = {(self.kind, False): model}, model.cfg.self_conditioning
        self.length = model.cfg.target_length - 1
        if ar_from:
            ar = self.models["AR", False] = load_model(ar_from, device)[0]
            if ar.cfg.target_length != model.cfg.target_length:
                raise ValueError(f"{ar_from} and {init_from} write texts of different lengths")
        held_out = open_set(build_if_missing(state["train_config"]["data"]), "valid")
        prefixes = [held_out.pair(i)[0] for i in range(min(n, len(held_out)))]
        lengths = [len(prefix) for prefix in prefixes]
        common = max(set(lengths), key=lengths.count)
        self.prefixes = torch.tensor([p for p in prefixes if len(p) == common][:8], device=device)  # (8, P) at most

    def position(self, length: int) -> str:
        return self.models[self.kind, False].cfg.position

    def get(self, system: System, setting: Setting, speed_up: Callable | None = None):
        key = (system.kind, system.compiled)
        if key not in self.models:
            self.models[key] = speed_up(self.models[system.kind, False])
        return self.models[key]

    def forget_compiled(self) -> None:
        self.models = {key: model for key, model in self.models.items() if not key[-1]}

    def prompts(self, setting: Setting) -> list[Tensor]:
        return list(self.prefixes.split(setting.batch))


def at_length(model, tokens: int):
    """The same weights, asked for texts of that many tokens."""
    other = copy(model)
    other.cfg = replace(model.cfg, target_length=tokens + 1)
    return other


class Part:
    """A model that writes only so many tokens of a text, in buffers with room for the rest."""

    def __init__(self, model, tokens: int, room: int):
        self.cfg, self.tok, self.decode = replace(model.cfg, target_length=tokens + 1), model.tok, model.decode
        self.model, self.room = model, room

    def encode(self, prefix: Tensor, room: int = 0):
        return self.model.encode(prefix, self.room)


def write(system: System, decoder, prompts: list[Tensor], by_step: bool = False) -> dict:
    """Decode behind each batch of prompts: {calls, tokens: means of a text; step: median seconds of a step or None}.

    by_step: look at the clock after each step, which makes a device that works ahead wait.
    """
    calls, tokens, steps = [], [], []
    for prefix in prompts:
        if system.kind == "AR":
            made = autoregressive.generate(decoder, prefix, system.sampler)
        elif by_step:
            made, seconds = stepped(decoder, prefix, system.sampler, prefix.device)
            steps += seconds
        else:
            made = diffusion.generate(decoder, prefix, system.sampler)
        calls += made.calls.tolist()
        tokens += (made.tokens != decoder.cfg.pad_id).sum(1).tolist()
    step = statistics.median(steps) if steps else None
    return dict(calls=statistics.mean(calls), tokens=statistics.mean(tokens), step=step)


def integrate_ar(decoder, prompts: list[Tensor], tokens: int = 8) -> dict:
    """AR over a long text, from the cost of `tokens` tokens in the middle of each third of it."""
    (prefix,), length = prompts, decoder.cfg.target_length - 1
    read, _ = clock(lambda: decoder.encode(prefix, length + 1), prefix.device)

    def cost(at: int) -> float:
        so_far = torch.cat([prefix, prefix[:, :1].expand(-1, at)], dim=1)  # any text will do
        part, marks = Part(decoder, tokens, length + 1 - at), []
        autoregressive.generate(
            part, so_far, autoregressive.SamplerConfig(), on_step=lambda *_: marks.append(time.perf_counter())
        )
        return statistics.median(b - a for a, b in zip(marks, marks[1:]))

    middles = (length / 6, length / 2, length * 5 / 6)  # of three equal parts: exact for a cost that grows evenly
    mean = statistics.mean(cost(max(0, round(middle - tokens / 2))) for middle in middles)
    return dict(seconds=read + length * mean, calls=length, tokens=length, step=None)
