"""The device: which one, its number format, its compiler, its speed."""

import ctypes
import sys
import timeit
from collections.abc import Callable
from contextlib import nullcontext

import torch


def pick_device(name: str) -> torch.device:
    """Return the device of that name; auto means cuda, else mps, else cpu."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available = ["cuda"] if gpus else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    available += ["cpu"]
    name = available[0] if name == "auto" else name
    if name not in available + gpus:
        names = ", ".join(["auto", *available, *gpus])
        raise ValueError(f"device must be one of {names}; got {name!r}")
    return torch.device(name)


def autocast(device: torch.device, dtype: str):
    """Return a context that computes in dtype; weights, softmax and loss stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 is at least as fast as float32. A CPU needs AVX512 for that."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for later tensors; nothing happens on other systems.

    By default glibc returns large arrays to the kernel, which zeroes each page when they come back:
    a quarter of a training step on a CPU. Only the largest, such as logits, are still returned,
    because in the heap they leave gaps.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # constants of malloc.h
    _glibc("mallopt")(M_MMAP_THRESHOLD, 2**25)  # the most that glibc allows
    _glibc("mallopt")(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory(width: int) -> None:
    """Return freed memory to the kernel, after a backward pass of a network of this width.

    In pieces it would not fit the next pass: the peak of SmolLM2 was 9% higher in float32. But new
    pages take time, relatively more in a narrow network, whose memory is no problem.
    """
    if width >= 512:
        _glibc("malloc_trim")(0)


def _glibc(name: str) -> Callable:
    found = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    return found or (lambda *_: None)


def compile_or_explain(function: Callable, device: torch.device, **options) -> Callable:
    """Return the compiled function. If no compiler works, print why and return it as it is."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        print(f"not compiled, running eagerly: {reason}")
        return function
    return torch.compile(function, **options)


def measured_flops(device: torch.device, dtype: str) -> float:
    """Return the FLOP/s of a square matrix product here and now: the 100% of MFU. Best of six."""
    size = 4096 if device.type == "cuda" else 512  # large enough to keep the device busy
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    # Reading a number waits for the device.
    seconds = min(timeit.repeat(lambda: float((a @ a)[0, 0]), number=1, repeat=6))
    return 2 * size**3 / seconds
