"""What a decoder cannot beat, and what it loses: counted work, the same matmuls alone, the loop alone.

    AR         each token reads all weights and the cache: bytes over the measured bandwidth
    diffusion  each step multiplies all slots by all weights: FLOPs over the measured matmul rate

Both times are counted for both, and the longer one is the floor (the roofline of Williams et al. 2009).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import diffusion
from cost import forward_flops
from draws import Generated
from eval.timing import CPU, Line, in_turn, synchronize


@dataclass(frozen=True)
class Work:
    """What must be computed and moved at the least."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flops * times, self.bytes * times)

    def floor(self, ceilings: dict[str, float]) -> tuple[float, str]:
        """(seconds below which it cannot be done, which ceiling says so). ceilings: see timing.ceilings."""
        by = {"FLOPs": self.flops / ceilings["flops"], "bytes": self.bytes / ceilings["bandwidth"]}
        binding = max(by, key=by.get)
        return by[binding], binding


def ar_work(model, prefix: int, tokens: float, rows: int) -> Work:
    """Of reading a prefix and writing `tokens` tokens behind it with a cache, one call each."""
    m, weights = model.cfg, weight_bytes(model)
    keys = tokens * (prefix + (tokens + 1) / 2)  # that are looked at, over all tokens
    token = forward_flops(m, 0, 1) - 4 * m.n_layer * m.n_embd  # without attention: forward_flops has its one key in it
    flops = forward_flops(m, prefix, 0) + tokens * token + keys * 4 * m.n_layer * m.n_embd
    return Work(rows * flops, weights * (tokens + 1) + rows * keys * key_bytes(model))


def diffusion_work(model, prefix: int, slots: int, batch: int, candidates: int = 1) -> tuple[Work, Work, Work]:
    """(of reading the prefix, of one network call, of what self-conditioning adds between two calls)."""
    m, rows, weights = model.cfg, batch * candidates, weight_bytes(model)
    call = Work(rows * forward_flops(m, prefix, slots + 1), weights)
    soft = Work(rows * 2 * slots * m.vocab_size * m.n_embd if m.self_conditioning else 0)  # softmax times embedding
    if m.prefix_attention == "joint":
        return Work(), call, soft
    read = Work(forward_flops(m, prefix, 0), weights / batch) * batch
    return read, call + Work(-rows * forward_flops(m, prefix, 0), rows * prefix * key_bytes(model)), soft


def weight_bytes(model) -> int:
    """Bytes of the weights that every network call reads: of a table of embeddings it needs a few rows only."""
    tables = {"pos.weight"} if model.cfg.tie_weights else {"pos.weight", "tok.weight"}
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters() if name not in tables)


def key_bytes(model) -> int:
    """Bytes of the keys and values of one token."""
    m = model.cfg
    return 2 * m.n_layer * m.kv_heads * m.head_size * model.tok.weight.element_size()


def gemm_replay(model, prefix: int, slots: int, rows: int) -> Callable[[], None]:
    """The matmuls and attentions of one diffusion step and nothing else, on the model's own weights."""
    m, weight = model.cfg, model.tok.weight
    T, S = slots + 1 + (prefix if m.prefix_attention == "joint" else 0), prefix + slots + 1
    new = partial(torch.randn, device=weight.device, dtype=weight.dtype)
    x, hidden = new(rows * T, m.n_embd), new(rows * T, m.hidden_size)
    q, k = new(rows, m.n_head, T, m.head_size), new(rows, m.n_head, S, m.head_size)

    @torch.no_grad()
    def replay():
        for block in model.blocks:
            F.linear(x, block.attn.qkv.weight)
            F.scaled_dot_product_attention(q, k, k)
            F.linear(x, block.attn.proj.weight)
            F.linear(x, block.mlp.up.weight)
            F.linear(hidden, block.mlp.down.weight)
        F.linear(x[: rows * (slots + 1)], model.head.weight)

    return replay


class Recorded:
    """A network that answers every call with the logits of one real call: what is left of decoding is the loop."""

    @torch.no_grad()
    def __init__(self, model, prefix: Tensor):
        self.cfg, self.tok, self.soft_embedding = model.cfg, model.tok, model.soft_embedding
        self.cache = model.encode(prefix, room=model.cfg.target_length)
        canvas = torch.full((len(prefix), model.cfg.target_length), model.cfg.sep_id, device=prefix.device)
        self.logits = model.decode(self.cache, canvas).clone()

    def encode(self, prefix: Tensor, room: int = 0):
        return self.cache

    def decode(self, cache, target: Tensor, append: bool = False, estimate=None, opened=None) -> Tensor:
        return self.logits[: len(target)]


def loop_line(model, prefix: Tensor, steps: int, runs: int, case: str, device: torch.device = CPU) -> Line:
    """The share of decoding that is the loop around the network: drawing, judging, bookkeeping."""
    sampler = diffusion.SamplerConfig(steps=steps, candidates=1)
    systems = dict(
        loop=partial(diffusion.generate, Recorded(model, prefix), prefix, sampler),
        all=partial(diffusion.generate, model, prefix, sampler),
    )
    note = dict(network_calls=steps, target_tokens=model.cfg.target_length - 1)
    aim = "<= 0.10" if len(prefix) == 1 else "<= 0.05"
    return Line("loop", case, "loop", "all", aim, *in_turn(systems, runs, device), note=note)


def gemm_line(model, decoder, prefix: Tensor, runs: int, case: str, peak: float, device: torch.device = CPU) -> Line:
    """The share of a network call that its own matmuls take. decoder: the model or its compiled form; peak: FLOP/s."""
    (B, P), S = prefix.shape, model.cfg.target_length - 1
    canvas = torch.full((B, S + 1), model.cfg.sep_id, device=prefix.device)
    with torch.no_grad():
        cache = decoder.encode(prefix, room=S + 1)

    @torch.no_grad()
    def call():
        decoder.decode(cache, canvas)

    times, warmup = in_turn({"call": call, "matmuls": gemm_replay(model, P, S, B)}, runs, device)
    rate = diffusion_work(model, P, S, B)[1].flops / statistics.median(times["matmuls"])
    note = dict(matmul_flops_per_second=rate, share_of_square_matmul=rate / peak)
    return Line("gemm", case, "call", "matmuls", ">= 0.90", times, warmup, True, note)


def prefix_line(model, prefixes: list[Tensor], runs: int, case: str, device: torch.device = CPU) -> Line:
    """One step of a sampler that rewrites all slots: what the first, longer frozen prefix adds to it."""
    steps, slots = 3, model.cfg.target_length - 1
    sampler = diffusion.SamplerConfig(steps=steps, candidates=1)
    systems = {f"prefix {p.shape[1]}": partial(one_step, model, p, sampler, device) for p in prefixes}
    long, short = (diffusion_work(model, p.shape[1], slots, len(p))[1].flops for p in prefixes)
    note = dict(network_calls=steps, target_tokens=slots, flops_ratio=long / short)
    return Line("prefix", case, *systems, "<= 1.35", *in_turn(systems, runs, device), note=note)


def one_step(model, prefix: Tensor, sampler: diffusion.SamplerConfig, device: torch.device = CPU) -> float:
    """Median seconds of a sampling step, reading the prefix not counted."""
    return statistics.median(stepped(model, prefix, sampler, device)[1])


def stepped(model, prefix: Tensor, sampler, device: torch.device = CPU) -> tuple[Generated, list[float]]:
    """(what diffusion.generate makes, seconds of each of its steps)."""
    at = []  # the hook's first call comes after the prefix was read, the others after each step

    def mark(*_):
        synchronize(device)
        at.append(time.perf_counter())

    made = diffusion.generate(model, prefix, sampler, on_step=mark)
    return made, [b - a for a, b in zip(at, at[1:])]
