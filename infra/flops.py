"""What a run costs, counted and not timed: parameters, floating-point operations, memory.

Multiply-adds count 2, lookups and norms nothing, causal attention as if it saw all keys (PaLM, arXiv 2204.02311,
appendix B). A backward pass costs two forward passes.
"""

from torch import nn

from diffusion import SOFTENED
from encdec import model_without_weights
from model import ModelConfig
from optimizers import muon_takes


def num_params(model: nn.Module) -> int:
    """Trainable numbers; a tied output layer counts once."""
    return sum(p.numel() for p in model.parameters())


def count_params(m: ModelConfig) -> int:
    """The same of a network that is not made: a billion parameters take no memory here."""
    return num_params(model_without_weights(m))


def count_by_muon(m: ModelConfig) -> int:
    """How many of these numbers Muon steps, where the optimizer is muon."""
    return sum(p.numel() for name, p in model_without_weights(m).named_parameters() if muon_takes(name, p))


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


def training_memory(
    m: ModelConfig,
    params: int,
    rows: int,
    prefix: int,
    target: int,
    bytes_per_number: int = 4,
    by_muon: int = 0,
    padded: bool = False,
    gradient_checkpointing: bool = False,
    scores: bool = False,
) -> dict[str, int]:
    """Bytes that a training step holds at its peak, by what they are for. That is where a backward pass begins: later
    passes of the loss come when the graph of the one before is gone, however many there are.

    rows, prefix, target: of one micro-batch. bytes_per_number: of what autocast makes, 4 or 2; the stream between the
    blocks, the loss and all weights are float32. by_muon: how many of the params have Muon's one moment and not
    AdamW's two. padded: whether the prefixes of a batch differ in length, which takes a mask.
    scores: whether attention keeps its scores (attention.py, in bfloat16 on a CPU), which no other kernel does.
    Activations are what autograd keeps of each operation in model.py.
    """
    C, V, b, L = m.n_embd, m.vocab_size, bytes_per_number, m.n_layer
    Q, KV = m.n_head * m.head_size, m.kv_heads * m.head_size
    hidden = m.hidden_size * (4 if m.activation == "swiglu" else 2)  # up, act(gate) and their product; up and act(up)
    qkv = Q + 2 * KV  # in one piece, kept where one of its parts is used as it is: v, unless heads share it
    if KV < Q:
        qkv = 3 * Q if m.position == "rope" else qkv + 2 * Q
    elif m.position == "rope":
        qkv += Q + KV  # q and k as they were turned
    # What the two norms read, float32, and what an RMSNorm makes before its weight; what the four products read.
    token = 4 * C * (4 if m.norm == "rmsnorm" else 2) + b * (2 * C + qkv + Q + hidden)
    cross = b * ((2 * C + 2 * Q) * target + 3 * KV * prefix) + 4 * C * target if m.arch == "encoder_decoder" else 0
    tokens = prefix + target
    block = rows * (token * tokens + cross)
    kept = rows * 4 * C * tokens  # a block's input
    together = m.prefix_attention == "joint" or m.prefix_attention == m.target_attention == "causal"  # in one pass
    if scores:
        pairs = tokens**2 if together else prefix**2 + target * tokens
        block += rows * b * m.n_head * pairs
    # The logits, whose gradient takes their place, and beside them the output layer's own, or a soft answer.
    answer = min(rows * target * V, max(target * V, SOFTENED)) * (4 if b == 4 else 8) if m.self_conditioning else 0
    logits = b * rows * target * V + max(V * C * (4 if b == 4 else 6), answer)
    if gradient_checkpointing:  # a block comes to life again when nothing is left of the loss
        alive = block + 2 * b * rows * tokens * m.hidden_size  # with the gradients inside an MLP
        alive = alive if together else alive * max(prefix, target) // tokens
        activations = L * kept + max(0, alive - logits)
    else:
        activations = L * block
    ends = 4 * C * (2 * tokens + (4 * target if m.self_conditioning or m.lookahead else 0))  # embeddings, last norm
    mask = rows * target * tokens * 5 * L if padded else 0  # a bool and what it adds
    return {
        "weights": 4 * params + (2 * params if b == 2 else 0),  # and autocast's copies
        "gradients": 4 * params,
        "optimizer": 8 * params - 4 * by_muon,
        "activations": activations + rows * ends + mask,
        "logits": logits,
    }
