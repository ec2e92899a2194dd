"""Clocks, memory, ceilings and random batches: what every table of speeds is measured with.

Other work on the machine slows all systems alike, so systems are timed in turn and the ratio of neighbours is kept,
not the ratio of means.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from data.objectives import Batch

CPU = torch.device("cpu")
GPT2_BLOCK = dict(norm="layernorm", activation="gelu", position="learned", qk_norm=False, tie_weights=True)
SIX = dict(n_layer=6, n_head=6, n_embd=384, vocab_size=256) | GPT2_BLOCK
GPT2_SMALL = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257) | GPT2_BLOCK


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


def clock(call: Callable, device: torch.device = CPU) -> tuple[float, object]:
    """(seconds of a call, what it returned); what the device still does is waited for, before and after."""
    synchronize(device)
    start = time.perf_counter()
    said = call()
    synchronize(device)
    return time.perf_counter() - start, said


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def alternate(
    systems: dict[str, Callable], runs: int, patience: float = float("inf"), device: torch.device = CPU
) -> Iterator[tuple[str, float, object, int]]:
    """(name, seconds, what the call returned, its runs in all) of each call as it ends: A B C, C B A, A B C ...

    patience: seconds of all runs of one system. A slow one takes part in the first rounds only, at least in one.
    """
    wanted = dict.fromkeys(systems, runs)
    for k in range(runs):
        for name in list(systems)[:: -1 if k % 2 else 1]:
            if k < wanted[name]:
                seconds, said = clock(systems[name], device)
                if k == 0:
                    wanted[name] = max(1, int(min(runs, patience / seconds)))
                yield name, seconds, said, wanted[name]


def in_turn(
    systems: dict[str, Callable], runs: int, device: torch.device = CPU
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds of each run, seconds of the warm-up) of each system.

    A system is called without arguments. Where it returns a float, that is its time; else the clock is read around it.
    """

    def own(seconds, said):
        return said if isinstance(said, float) else seconds

    warmup = {name: own(*clock(system, device)) for name, system in systems.items()}
    times = {name: [] for name in systems}
    for name, seconds, said, _ in alternate(systems, runs, device=device):
        times[name].append(own(seconds, said))
    return times, warmup


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return dict(median=statistics.median(values), low=min(values), high=max(values))


@dataclass
class Line:
    """One row of a table: the seconds of `system` over those of `base`, or the inverse where a rate is asked for."""

    name: str  # which question
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
        seconds = {name: summary(times) for name, times in self.times.items()}
        return asdict(self) | dict(seconds=seconds, ratios=self.ratios, ratio=summary(self.ratios))

    def __str__(self) -> str:
        r, seconds = summary(self.ratios), {name: statistics.median(t) for name, t in self.times.items()}
        spread = f"{r['median']:6.3f}  ({r['low']:.3f} .. {r['high']:.3f})"
        unit = self.note.get("unit", "s")
        pair = f"{self.system} {seconds[self.system]:.3f} {unit}, {self.base} {seconds[self.base]:.3f} {unit}"
        return f"{self.name:7s} {self.case:20s} {spread:26s} {self.target:8s} {pair}"


def header() -> str:
    """What stands over printed lines."""
    return f"{'line':7s} {'case':20s} {'ratio, median (range)':26s} {'target':8s} median seconds"


@torch.no_grad()
def ceilings(device: torch.device, dtype: str) -> dict[str, float]:
    """FLOP/s of the best square matmul and bytes/s of the best large read or copy, here and now."""
    cuda = device.type == "cuda"
    flops = 0.0
    for size in (4096, 8192) if cuda else (1024, 2048):
        a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
        flops = max(flops, 2 * size**3 / _best(partial(torch.mm, a, a), device))
    x = torch.ones(2**27, device=device)
    y = torch.empty_like(x)  # 512 MiB each, more than any cache
    copied = 2 * x.nbytes / _best(lambda: y.copy_(x), device)
    return dict(flops=flops, bandwidth=max(copied, x.nbytes / _best(lambda: x.sum(), device)))


def _best(call: Callable, device: torch.device) -> float:
    call()
    return min(clock(call, device)[0] for _ in range(5))


def peak_bytes(call: Callable, device: torch.device) -> int:
    """The most bytes that were allocated at once during a call, beyond what was there before it.

    On a CPU the profiler's record of allocations is added up: what the libraries below torch allocate is not in it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        clock(call, device)
        return torch.cuda.max_memory_allocated(device) - before
    with _mute(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@contextmanager
def _mute() -> Iterator[None]:
    # The profiler's library tells when it starts and stops, on a stream that Python cannot redirect.
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
