"""What a training will cost, before anything is allocated: python train.py config/ar2diff_2_adapt.py --plan

Counted and not tried: memory and FLOPs come from cost.py, the lengths of the batches from the data set, and of the
device the free memory and the rate of a square matrix product. A run that cannot fit is refused with what to lower.
"""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from attention import MOST
from configurator import describe
from cost import count_by_muon, count_params, train_flops, training_memory
from device import measured_flops, pick_device
from model import ModelConfig, model_settings

MFU = (
    0.25,
    0.6,
)  # share of the matrix product's rate that trainings reach: small networks on a CPU, large ones on a GPU
SAMPLED = 20  # steps whose batches are read to know their lengths
ATTEMPTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # micro-batches a step that are tried where memory is short


def print_plan(cfg, train_set) -> dict:
    """Print what the run would cost and return it. cfg: TrainConfig. Raises ValueError where its device has not the
    memory, with what to lower."""
    device = pick_device(cfg.device)
    found, free = plan(cfg, train_set), free_memory(device)
    peak, rows = sum(found["memory"].values()), cfg.batch_size // cfg.grad_accum_steps
    parts = ", ".join(f"{name} {size(part)}" for name, part in found["memory"].items())
    print(f"plan         {cfg.max_steps:,} steps of {cfg.batch_size} sequences | {describe(replace(cfg, plan=False))}")
    print(f"parameters   {found['params']:,}, of which Muon steps {found['by_muon']:,}")
    print(f"memory       {size(peak)} at the peak, in micro-batches of {rows} x {found['longest']} tokens: {parts}")
    print(f"free         {size(free) if free else 'not known'} on {device}")
    if free and peak > free:
        raise ValueError(f"this needs {size(peak)} and {device} has {size(free)} free; {remedy(cfg, train_set, free)}")
    rate = measured_flops(device, cfg.dtype)
    least = found["flops"] * (4 / 3 if cfg.gradient_checkpointing else 1) / rate  # one more forward pass
    found |= {"seconds": [least / share for share in (1.0, *MFU[::-1])], "free": free, "matmul_flops": rate}
    print(f"FLOPs        {found['flops'] / cfg.max_steps:.2e} a step, {found['flops']:.2e} in all")
    print(
        f"time         {span(least)} at the least, at {rate / 1e9:,.0f} GFLOP/s of a matrix product here; at "
        f"{MFU[1]:.0%} to {MFU[0]:.0%} of it {span(least / MFU[1])} to {span(least / MFU[0])}; evaluations not counted"
    )
    return found


def plan(cfg, train_set) -> dict:
    """params, by_muon, longest (tokens of a row at most), memory (bytes by part), flops (of the whole run).

    Memory is that of the longest rows of the set; FLOPs are those of its first batches, on average.
    """
    m, T = ModelConfig(**model_settings(asdict(cfg))), train_set.target_length
    longest, rows = train_set.meta["block_size"], cfg.batch_size // cfg.grad_accum_steps
    flops, padded, steps = 0, cfg.anneal_steps > 0, min(SAMPLED, cfg.max_steps)
    for step in range(steps):
        for micro in range(cfg.grad_accum_steps):
            part = slice(micro * rows, (micro + 1) * rows)
            prefix = train_set.batch(cfg.seed, step, cfg.batch_size, part, cfg.bucket).prefix
            flops += rows * train_flops(m, prefix.shape[1], T, cfg.unroll_steps, cfg.ar_weight)
            padded |= bool((prefix == m.pad_id).any())
    params, by_muon = count_params(m), count_by_muon(m) if cfg.optimizer == "muon" else 0
    memory = training_memory(
        m,
        params,
        rows,
        longest - T,
        T,
        2 if cfg.dtype == "bfloat16" else 4,
        by_muon,
        padded,
        cfg.gradient_checkpointing,
        cfg.dtype == "bfloat16" and pick_device(cfg.device).type == "cpu" and longest <= MOST,
    )
    found = {"params": params, "by_muon": by_muon, "longest": longest, "memory": memory}
    return found | {"flops": flops // steps * cfg.max_steps}


def remedy(cfg, train_set, free: int) -> str:
    """The smallest change of settings that fits, as flags to add; what is too large where none does."""
    for checkpointing in (False, True) if not cfg.compile else (False,):
        for count in ATTEMPTS:
            changes = {"grad_accum_steps": count, "gradient_checkpointing": checkpointing or cfg.gradient_checkpointing}
            if cfg.batch_size % count or count < cfg.grad_accum_steps:
                continue
            other = replace(cfg, **changes)
            peak = sum(plan(replace(other, max_steps=1), train_set)["memory"].values())
            if peak <= free:
                flags = " ".join(
                    f"--{k}" if v is True else f"--{k}={v}" for k, v in changes.items() if v != getattr(cfg, k)
                )
                return f"{flags} needs {size(peak)}"
    fixed = sum(part for name, part in plan(cfg, train_set)["memory"].items() if name not in ("activations", "logits"))
    lower = "--n_layer or --n_embd" if cfg.init_from == "scratch" else "the model (another checkpoint)"
    return f"no micro-batch is small enough: weights, gradients and optimizer take {size(fixed)}; lower {lower}"


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))  # of a container
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        found.append(max(0, int(limit.read_text()) - int(used.read_text())))
    return min(found, default=None)


def size(count: float) -> str:
    """1536 -> '1.50 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.{0 if unit == 'B' else 2}f} {unit}"
        count /= 1024
    raise AssertionError(count)


def span(seconds: float) -> str:
    """5400 -> '1.5 h'."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit != "days" and seconds >= length):
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
