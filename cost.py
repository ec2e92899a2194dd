"""What a run costs, counted and not timed: parameters, floating-point operations, memory.

Multiply-adds count 2, lookups and norms nothing, causal attention as if it saw all keys (PaLM, arXiv 2204.02311,
appendix B). A backward pass costs two forward passes.
"""

import torch
from torch import nn

from encdec import build_model
from model import ModelConfig


def num_params(model: nn.Module) -> int:
    """Trainable numbers; a tied output layer counts once."""
    return sum(p.numel() for p in model.parameters())


def count_params(m: ModelConfig) -> int:
    """The same of a network that is not made: a billion parameters take no memory here."""
    with torch.device("meta"):
        return num_params(build_model(m))


def forward_flops(m: ModelConfig, prefix: int, target: int) -> int:
    """FLOPs of one forward pass over one row of `prefix` + `target` tokens; the output layer sees the target only."""
    C, Q, KV = m.n_embd, m.n_head * m.head_size, m.kv_heads * m.head_size
    mlp = C * m.hidden_size * (3 if m.activation == "swiglu" else 2)
    block = 2 * C * Q + 2 * C * KV + mlp  # queries and projection, keys and values, MLP: multiply-adds a token

    def stack(tokens: int, context: int) -> int:
        return m.n_layer * tokens * (block + 2 * context * Q)  # scores and their sum over values

    if m.arch == "encoder_decoder":
        cross = m.n_layer * (target * (2 * C * Q + 2 * prefix * Q) + prefix * 2 * C * KV)
        adds = stack(prefix, prefix) + stack(target, target) + cross
    else:
        together = m.prefix_attention == "joint" or m.prefix_attention == m.target_attention == "causal"  # in one pass
        adds = stack(prefix, prefix + target if together else prefix) + stack(target, prefix + target)
    added = target * C * C * (m.self_conditioning + m.lookahead)
    return 2 * (adds + added + target * m.vocab_size * C)


def train_flops(m: ModelConfig, prefix: int, target: int, unroll_steps: int = 1, ar_weight: float = 0.0) -> int:
    """FLOPs of one training step over one row: forward and backward, once for each pass of the diffusion loss and once
    for the AR loss where it is kept."""
    passes = unroll_steps + (ar_weight > 0) if m.paradigm == "diffusion" else 1
    return 3 * forward_flops(m, prefix, target) * passes


def training_memory(m: ModelConfig, params: int, rows: int, length: int, bytes_per_number: int = 4) -> dict[str, int]:
    """Bytes of a training step, roughly: weights, gradients, AdamW's two moments (float32), activations, logits.

    rows, length: of one micro-batch. Activations as Korthikanti et al. (arXiv 2205.05198, section 4.1) count them
    where attention keeps no scores: 34 bytes a number of the stream and layer in 16 bits. Logits: as they are, in
    float32 and their gradient.
    """
    tokens = rows * length
    return {
        "weights": 4 * params,
        "gradients": 4 * params,
        "optimizer": 8 * params,
        "activations": 17 * bytes_per_number * tokens * m.n_embd * m.n_layer,
        "logits": (bytes_per_number + 8) * tokens * m.vocab_size,
    }
