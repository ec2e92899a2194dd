"""Where a run takes place: the device, its number format, its compiler and its speed."""

import ctypes
import sys
import time
from contextlib import nullcontext

import torch
from torch import Tensor, nn


def pick_device(name: str) -> torch.device:
    """The device of that name; auto: cuda, else mps, else cpu. Raises ValueError where it is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if there[kind]))
    if not there.get(name.split(":")[0]):
        raise ValueError(f"device {name!r} is not there; available: {', '.join(k for k in there if there[k])}")
    return torch.device(name)


def autocast(device: torch.device, dtype: str):
    """bfloat16 where it is asked for; weights, softmax and loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is no slower there than float32. Processors without AVX512 compute it a hundred times slower."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


class Late:
    """Reads a number off the device without stopping it: on CUDA each read gets the number of the read before.

    To wait for a number at every step would leave the GPU idle while the next step is being queued.
    """

    def __init__(self):
        self.before = None

    def read(self, number: Tensor) -> int | None:
        """number () of this read on a CPU, of the last one on CUDA; None where there was none."""
        if number.device.type != "cuda":
            return int(number)
        copy = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
        event, before = torch.cuda.Event(), self.before
        event.record()
        self.before = copy, event
        if before is None:
            return None
        before[1].synchronize()  # it is over already, but for a device that lags by a whole step
        return int(before[0])

    @staticmethod
    def sees_none(flags: Tensor) -> bool:
        """Whether none of flags (bool) is set, where it costs nothing to look: elsewhere False."""
        return flags.device.type == "cpu" and not flags.any()


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed on a CPU for what comes next; whether it is one that can (Linux, glibc).

    It gives arrays of megabytes back to the kernel otherwise, which hands them out again page by page, each filled with
    zeros first: a quarter of a bfloat16 step of GPT-2 small. The process holds its peak from then on.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def compile_or_say_why_not(model: nn.Module) -> None:
    """torch.compile the model; where no compiler works, go on eagerly and say so."""
    try:
        plain = model._run_blocks
        model.compile_()
        prefix = torch.full((2, 2), 0, device=model.tok.weight.device)
        with torch.no_grad():
            model(prefix, prefix)
    except Exception as error:  # whatever the compiler lacks, eager mode computes the same
        model._run_blocks = plain
        print(f"compile=True has no effect here, running eagerly: {str(error).splitlines()[0][:100]}")


def measured_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of a square matmul here and now: the ceiling of MFU. Best of five."""
    size = 4096 if device.type == "cuda" else 512  # large enough to keep the device busy
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])
