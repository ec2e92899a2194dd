"""The device: which one, its number format, its compiler, its speed."""

import ctypes
import sys
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def pick_device(name: str) -> torch.device:
    """Return the device of that name; auto means cuda, else mps, else cpu."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind in available if available[kind]))
    if not available.get(name.split(":")[0]):
        names = ", ".join(kind for kind in available if available[kind])
        raise ValueError(f"device {name!r} is not available here; use one of: auto, {names}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not a device; write for example cuda:0") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} does not exist; GPUs: {torch.cuda.device_count()}")
    return device


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """Compute in bfloat16 if dtype asks for it; weights, softmax and loss stay float32."""
    if dtype == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 is at least as fast as float32. A CPU needs AVX512 for that."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def disable_malloc_trim() -> bool:
    """Let glibc keep freed memory for later tensors. Return False if this is not Linux with glibc.

    By default glibc returns large arrays to the kernel, which must zero each page again: a quarter
    of a training step on a CPU. From then on the process keeps its peak memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # constants of malloc.h
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def compile_or_explain(model: nn.Module) -> None:
    """Compile the blocks of the model. If no compiler works, print why and run eagerly."""
    eager = model.run_blocks
    try:
        model.compile_blocks()
        tokens = torch.zeros(2, 2, dtype=torch.long, device=model.tok.weight.device)
        with torch.no_grad():
            model(tokens, tokens)
    except Exception as error:  # eager mode computes the same, whatever the compiler lacks
        model.run_blocks = eager
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        print(f"compile=True has no effect, running eagerly: {reason}")


def measured_flops(device: torch.device, dtype: str) -> float:
    """Return the FLOP/s of a square matrix product here and now: the 100% of MFU. Best of five."""
    size = 4096 if device.type == "cuda" else 512  # large enough to keep the device busy
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times[1:])


class AsyncScalar:
    """Read a number from the device without waiting: on CUDA, read() returns the previous number.

    If each step waited for its number, the GPU would be idle while the next step is queued.
    """

    def __init__(self):
        self.previous = None

    def read(self, number: Tensor) -> int | None:
        """Return number () on a CPU. On CUDA return the number of the last call, None at first."""
        if number.device.type != "cuda":
            return int(number)
        copy = torch.empty((), dtype=number.dtype, pin_memory=True)
        copy.copy_(number, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        previous, self.previous = self.previous, (copy, event)
        if previous is None:
            return None
        copy, event = previous
        event.synchronize()  # over already, unless the device lags by a whole step
        return int(copy)
