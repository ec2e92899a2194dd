"""The cost of a run: FLOPs are counted, memory is estimated, time follows from a measured rate.

A multiply-add counts 2; lookups and norms count nothing; causal attention counts as if it saw all
keys (PaLM, arXiv 2204.02311, appendix B). A backward pass costs two forward passes.
"""

from pathlib import Path

import torch

from infra.device import measured_flops, pick_device
from infra.optimizers import uses_muon
from model import ModelConfig, meta_model, num_params

TYPICAL_MFU = (0.25, 0.6)  # small networks on a CPU, large ones on a GPU


def forward_flops(m: ModelConfig, prefix: int, target: int) -> int:
    """Return the FLOPs of one pass over a row. The output layer sees the target only."""
    C = m.n_embd
    Q = m.n_head * m.head_size
    KV = m.kv_heads * m.head_size
    mlp = C * m.hidden_size * (3 if m.activation == "swiglu" else 2)
    block = 2 * C * Q + 2 * C * KV + mlp  # multiply-adds per token

    def stack(tokens: int, context: int) -> int:
        return m.n_layer * tokens * (block + 2 * context * Q)  # scores, weighted sum of values

    adds = stack(prefix, prefix + target if m.single_pass else prefix)
    if m.arch == "encoder_decoder":
        cross = target * (2 * C * Q + 2 * prefix * Q) + prefix * 2 * C * KV
        adds += stack(target, target) + m.n_layer * cross
    else:
        adds += stack(target, prefix + target)
    adds += target * C * C * m.self_conditioning
    return 2 * (adds + target * m.vocab_size * C)


def train_flops(
    m: ModelConfig, prefix: int, target: int, unroll_steps: int = 1, ar_loss_weight: float = 0.0
) -> int:
    """Return the FLOPs of one training step over a row: forward and backward of each loss term."""
    terms = unroll_steps + (ar_loss_weight > 0) if m.paradigm == "diffusion" else 1
    return 3 * forward_flops(m, prefix, target) * terms


def memory(cfg, params: int, muon_params: int, rows: int, prefix: int, target: int) -> dict:
    """Return the bytes a training step holds at its peak, by purpose. Activations are approximate.

    cfg: TrainConfig. rows, prefix, target: of one micro-batch.
    """
    m = cfg.model
    half = cfg.dtype == "bfloat16"
    number = 2 if half else 4
    tokens = rows * (prefix + target)
    heads = (m.n_head + m.kv_heads) * m.head_size
    mlp = (4 if m.activation == "swiglu" else 2) * m.hidden_size
    # Autograd keeps: float32 inputs and outputs of two norms; queries, keys, values, MLP.
    block = tokens * (16 * m.n_embd + number * (2 * m.n_embd + 3 * heads + mlp))
    activations = m.n_layer * block
    if cfg.activation_checkpointing:
        activations = m.n_layer * tokens * 4 * m.n_embd + block
    head_gradient = m.vocab_size * m.n_embd * (6 if half else 4)
    return {
        "weights": params * (6 if half else 4),
        "gradients": params * 4,
        "optimizer": params * 8 - muon_params * 4,
        "activations": activations + 8 * tokens * m.n_embd,
        "logits": number * rows * target * m.vocab_size + head_gradient,
    }


def estimate(cfg, dataset) -> dict:
    """Print and return what the run will cost: parameters, memory, FLOPs, time."""
    m = cfg.model
    device = pick_device(cfg.device)
    batches = [dataset.batch(cfg.seed, step, cfg.batch_size) for step in range(8)]
    prefix = sum(batch.prefix.shape[1] for batch in batches) // len(batches)
    params, muon_params = _count(cfg)
    rows = cfg.batch_size // cfg.grad_accum_steps
    longest = dataset.block_size - m.target_length
    parts = memory(cfg, params, muon_params, rows, longest, m.target_length)
    per_row = train_flops(
        m, prefix, m.target_length, cfg.loss.unroll_steps, cfg.loss.ar_loss_weight
    )
    flops = per_row * cfg.batch_size * cfg.max_steps
    rate = measured_flops(device, cfg.dtype)
    slow, fast = (flops / rate / mfu for mfu in TYPICAL_MFU)
    peak = sum(parts.values())
    free = free_memory(device)
    detail = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    print(f"parameters  {params:,}")
    print(
        f"memory      about {format_bytes(peak)} of {format_bytes(free)} free on {device}: {detail}"
    )
    print(f"FLOPs       {flops:.2e}, {flops / cfg.max_steps:.2e} per step")
    print(
        f"time        {format_duration(fast)} to {format_duration(slow)}, at 60% to 25% of the "
        f"{rate / 1e9:,.0f} GFLOP/s measured here; evaluations not counted"
    )
    return {"params": params, "memory": parts, "flops": flops, "seconds": [fast, slow]}


def _count(cfg) -> tuple[int, int]:
    """Return the number of parameters, and of those that Muon updates."""
    model = meta_model(cfg.model)
    muon = sum(p.numel() for name, p in model.named_parameters() if uses_muon(name, p))
    return num_params(model), muon if cfg.optimizer == "muon" else 0


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated, 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return 0
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine ran out of memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def out_of_memory_message(cfg, step: int, prefix: int) -> str:
    """Return what a step needed and which settings lower it."""
    rows = cfg.batch_size // cfg.grad_accum_steps
    params, muon_params = _count(cfg)
    parts = memory(cfg, params, muon_params, rows, prefix, cfg.model.target_length)
    flags = []
    if rows > 1:
        flags.append(f"--grad_accum_steps={cfg.grad_accum_steps * 2}")
    if not cfg.activation_checkpointing and not cfg.compile:
        flags.append("--activation_checkpointing")
    if cfg.dtype != "bfloat16":
        flags.append("--dtype=bfloat16")
    flags.append("a smaller --n_embd or --n_layer")
    return (
        f"out of memory at step {step}: {rows} rows need about "
        f"{format_bytes(sum(parts.values()))}; try {' or '.join(flags)}, with --init_from=resume"
    )


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.{0 if unit == 'B' else 1}f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def format_duration(seconds: float) -> str:
    """5400 -> '1.5 h'."""
    for unit, length in (("days", 2 * 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / {'days': 86400, 'h': 3600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"
