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

    adds = stack(prefix, prefix + target if m.one_sequence else prefix)
    if m.arch == "encoder_decoder":
        cross = target * (2 * C * Q + 2 * prefix * Q) + prefix * 2 * C * KV
        adds += stack(target, target) + m.n_layer * cross
    else:
        adds += stack(target, prefix + target)
    if m.self_conditioning:
        adds += target * C * C
    return 2 * (adds + target * m.vocab_size * C)


def train_flops(m: ModelConfig, prefix: int, target: int, unroll_steps: int) -> int:
    """Return the FLOPs of a training step over a row. All terms share a cached prefix."""
    terms = unroll_steps if m.paradigm == "diffusion" else 1
    flops = terms * forward_flops(m, prefix, target)
    if not m.one_sequence:
        flops -= (terms - 1) * forward_flops(m, prefix, 0)
    return 3 * flops


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
    lengths = [dataset.batch(cfg.seed, i, cfg.batch_size).prefix.shape[1] for i in range(8)]
    rows = cfg.batch_size // cfg.grad_accum_steps
    parts = memory(cfg, rows, dataset.block_size - m.target_length, m.target_length)
    prefix = sum(lengths) // 8
    row = train_flops(m, prefix, m.target_length, cfg.loss.unroll_steps)
    flops = row * cfg.batch_size * cfg.max_steps
    rate = measured_flops(device, cfg.dtype)
    minutes = flops / rate / 60
    details = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in parts.items())
    mfu = f"(60% to 25% of {rate / 1e9:,.0f} GFLOP/s, measured on {device})"
    print(f"parameters  {parts['gradients'] // 4:,}")
    print(f"memory      about {sum(parts.values()) / 1e6:,.0f} MB ({details})")
    print(f"FLOPs       {flops / cfg.max_steps:.2e} per step, {flops:.2e} in all")
    print(f"time        {minutes / 0.6:,.1f} to {minutes / 0.25:,.1f} min, no evaluations {mfu}")
    return {"memory": parts, "flops": flops, "minutes": minutes}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the machine ran out of memory."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def out_of_memory_message(cfg, step: int, prefix: int) -> str:
    """Return what a step needs and which settings lower it."""
    rows = cfg.batch_size // cfg.grad_accum_steps
    gigabytes = sum(memory(cfg, rows, prefix, cfg.model.target_length).values()) / 1e9
    flags = "a larger --grad_accum_steps, --activation_checkpointing or --dtype=bfloat16"
    return f"out of memory at step {step}: {rows} rows need about {gigabytes:.2f} GB; use {flags}"
