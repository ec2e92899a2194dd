"""The cost of a run: FLOPs are counted, memory is estimated, time follows from a measured rate.

A multiply-add counts 2; lookups and norms count nothing; causal attention counts as if it saw all
keys (PaLM, arXiv 2204.02311, appendix B). A backward pass costs two forward passes.
"""

from infra.device import measured_flops, pick_device
from infra.optimizers import uses_muon
from model import ModelConfig, meta_model, num_params


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
    if m.self_conditioning:
        adds += target * C * C
    return 2 * (adds + target * m.vocab_size * C)


def train_flops(
    m: ModelConfig, prefix: int, target: int, unroll_steps=1, ar_loss_weight=0.0
) -> int:
    """Return the FLOPs of one training step over a row: forward and backward of each loss term."""
    terms = unroll_steps + (ar_loss_weight > 0) if m.paradigm == "diffusion" else 1
    return 3 * forward_flops(m, prefix, target) * terms


def memory(cfg, rows: int, prefix: int, target: int) -> dict[str, int]:
    """Return the bytes at the peak of a training step, by purpose. Activations are approximate.

    cfg: TrainConfig. rows, prefix, target: of one micro-batch.
    """
    m = cfg.model
    model = meta_model(m)
    params = num_params(model)
    muon = sum(p.numel() for name, p in model.named_parameters() if uses_muon(name, p))
    muon = muon if cfg.optimizer == "muon" else 0
    number = 2 if cfg.dtype == "bfloat16" else 4
    tokens = rows * (prefix + target)
    heads = (m.n_head + m.kv_heads) * m.head_size
    mlp = (4 if m.activation == "swiglu" else 2) * m.hidden_size
    # Autograd keeps: float32 inputs and outputs of two norms; queries, keys, values, MLP.
    block = tokens * (16 * m.n_embd + number * (2 * m.n_embd + 3 * heads + mlp))
    blocks = m.n_layer * block
    if cfg.activation_checkpointing:
        blocks = m.n_layer * tokens * 4 * m.n_embd + block
    return {
        "weights": params * (4 if number == 4 else 6),
        "gradients": params * 4,
        "optimizer": params * 8 - muon * 4,
        "activations": blocks + tokens * 8 * m.n_embd,
        "logits": number * rows * target * m.vocab_size + m.vocab_size * m.n_embd * 4,
    }


def estimate(cfg, dataset) -> dict:
    """Print and return what the run will cost: parameters, memory, FLOPs, time."""
    m = cfg.model
    device = pick_device(cfg.device)
    batches = [dataset.batch(cfg.seed, step, cfg.batch_size) for step in range(8)]
    prefix = sum(batch.prefix.shape[1] for batch in batches) // len(batches)
    target = m.target_length
    rows = cfg.batch_size // cfg.grad_accum_steps
    parts = memory(cfg, rows, dataset.block_size - target, target)
    peak = sum(parts.values())
    step = cfg.batch_size * train_flops(
        m, prefix, target, cfg.loss.unroll_steps, cfg.loss.ar_loss_weight
    )
    rate = measured_flops(device, cfg.dtype)
    seconds = step * cfg.max_steps / rate
    details = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    times = f"{format_duration(seconds / 0.6)} to {format_duration(seconds / 0.25)}"
    print(f"parameters  {parts['gradients'] // 4:,}")
    print(f"memory      about {format_bytes(peak)} ({details})")
    print(f"FLOPs       {step:.2e} per step, {step * cfg.max_steps:.2e} in all")
    print(f"time        {times}, at 60% to 25% of {rate / 1e9:,.0f} GFLOP/s, measured on {device}")
    return {"memory": parts, "flops": step * cfg.max_steps, "seconds": seconds}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine ran out of memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def out_of_memory_message(cfg, step: int, prefix: int) -> str:
    """Return what a step needed and which settings lower it."""
    rows = cfg.batch_size // cfg.grad_accum_steps
    peak = sum(memory(cfg, rows, prefix, cfg.model.target_length).values())
    return (
        f"out of memory at step {step}: {rows} rows need about {format_bytes(peak)}; try a larger "
        "--grad_accum_steps, --activation_checkpointing, --dtype=bfloat16 or a smaller --n_embd, "
        "with --init_from=resume"
    )


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def format_duration(seconds: float) -> str:
    """5400 -> '1.5 h'."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
