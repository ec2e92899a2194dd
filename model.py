"""The network: a Transformer, its attention masks, its KV cache.

AR and diffusion models differ in two settings, `prefix_attention`
and `target_attention`. `encode` reads the prefix, `decode` a
target, `forward` both.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from configurator import needs, require, setting, validate

# Layers that a diffusion model adds to its AR source. They start at zero.
NEW_MODULES = ("self_cond_proj",)
PREFIXES = ("causal", "bidirectional", "joint")
internal = partial(setting, hidden=True)


@dataclass
class ModelConfig:
    """All that fixes what the network computes. In each checkpoint."""

    paradigm: str = setting("ar", "how a target is generated", ("ar", "diffusion"))
    arch: str = setting("decoder_only", "see extras/", ("decoder_only", "encoder_decoder"))
    n_layer: int = setting(4, "blocks, in each stack", minimum=1, maximum=1000)
    n_head: int = setting(4, "attention heads per block", minimum=1)
    n_embd: int = setting(128, "width of the hidden states", minimum=1)
    n_hidden: int = setting(0, "width of the MLP; 0: 8/3 or 4 n_embd")
    block_size: int = setting(0, "most tokens; 0: from the data")
    target_length: int = setting(0, "with slot 0; 0: from the data")
    dropout: float = setting(0.0, "share set to 0", maximum=0.99)
    tie_weights: bool = setting(True, "output layer = embedding")
    prefix_attention: str = setting("causal", "joint: reads the target", PREFIXES)
    target_attention: str = setting("causal", "inside the target", ("causal", "bidirectional"))
    noise: str = setting("uniform", "uniform: any token", ("uniform", "mask"))
    shift: bool = setting(False, "position i - 1 predicts slot i")
    self_conditioning: bool = setting(False, "read the last prediction")

    # Set by the tokenizer.
    vocab_size: int = internal(288, "rows of the embedding", minimum=1)
    n_ordinary: int = internal(256, "ids below it are text", minimum=1)
    pad_id: int = internal(256, "ends a text")
    sep_id: int = internal(257, "slot 0; -1: of the prompt", minimum=-1)
    mask_id: int = internal(258, "for noise=mask")
    eos_id: int = internal(-1, "of imports; -1: none", minimum=-1)

    # Set by hf/ for imported weights.
    n_kv_head: int = internal(0, "0: n_head")
    head_dim: int = internal(0, "0: n_embd / n_head")
    norm: str = internal("rmsnorm", "kind", ("rmsnorm", "layernorm"))
    norm_eps: float = internal(1e-5, "of every norm", above=0)
    activation: str = internal("swiglu", "of the MLP", ("swiglu", "gelu", "gelu_tanh"))
    position: str = internal("rope", "encoding", ("rope", "learned"))
    qk_norm: bool = internal(False, "arXiv 2302.05442")
    bias: bool = internal(False, "in all layers")
    qkv_bias: bool = internal(False, "in q, k, v only: Qwen 2")
    rope_base: float = internal(10000.0, "of the frequencies", above=0)
    rope_factor: float = internal(1.0, "slow pairs turn slower", above=0)
    rope_slow_turns: float = internal(1.0, "fewer are slow")
    rope_fast_turns: float = internal(4.0, "more are fast", above=0)
    rope_trained_length: int = internal(8192, "before scaling", minimum=1)

    def __post_init__(self):
        validate(self)
        H = self.n_head
        G = self.kv_heads
        V = self.vocab_size
        eos = self.eos_id
        top = max(self.pad_id, self.sep_id, self.mask_id, self.n_ordinary - 1)
        even = self.position != "rope" or self.head_size % 2 == 0
        whole = self.head_dim or self.n_embd % H == 0
        require(whole, f"n_embd {self.n_embd} must be a multiple of n_head {H}")
        require(even, f"n_embd / n_head must be even, got {self.head_size}")
        require(H % G == 0, f"n_head {H} must be a multiple of n_kv_head {G}")
        require(top < V, f"token id {top} must be below vocab_size {V}")
        require(eos < self.n_ordinary, f"eos_id {eos} must be an ordinary id")
        flat = vars(self)
        needs(flat, "prefix_attention=joint", target_attention="bidirectional")
        needs(flat, "arch=encoder_decoder", prefix_attention="bidirectional")
        needs(flat, "paradigm=ar", target_attention="causal")
        needs(flat, "shift", paradigm="diffusion")
        needs(flat, "self_conditioning", paradigm="diffusion")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden_size(self) -> int:
        gated = self.activation == "swiglu"
        default = 32 * math.ceil(self.n_embd / 12) if gated else 4 * self.n_embd
        return self.n_hidden or default

    @property
    def one_sequence(self) -> bool:
        """Whether prefix and target are one sequence."""
        causal = self.prefix_attention == self.target_attention == "causal"
        one = causal or self.prefix_attention == "joint"
        return one and self.arch == "decoder_only"


def rope_table(cfg: ModelConfig) -> Tensor:
    """Return cos and sin (2, block_size, D) of RoPE (arXiv 2104.09864)."""
    D = cfg.head_size
    # Never on the meta device: its arithmetic takes seconds to load.
    pair = torch.arange(0, D, 2, device="cpu").float()
    frequency = cfg.rope_base ** (-pair / D)
    if cfg.rope_factor != 1:  # as in Llama 3's published code
        turns = cfg.rope_trained_length * frequency / (2 * math.pi)
        width = cfg.rope_fast_turns - cfg.rope_slow_turns
        kept = ((turns - cfg.rope_slow_turns) / width).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / cfg.rope_factor)
    position = torch.arange(cfg.block_size, device="cpu").float()
    angle = torch.outer(position, frequency).repeat(1, 2)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by its positions. Pairs are (i, i + D/2)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def attention_mask(kind, past: Tensor, new: Tensor, extra_edges=None):
    """Return which keys T new tokens attend to: (B, 1, T, S + T) bool.

    kind: of the attention among new tokens. They see all S past ones.
    past (B, S) and new (B, T) are False for padding, which attends to
    itself only. extra_edges (T, T) bool: open besides the causal ones.

    The two settings give five patterns. Rows attend to columns.
    p: prefix, t: target, bidir.: bidirectional.

    prefix   causal   bidir.   joint    bidir.   causal
    target   causal   causal   bidir.   bidir.   bidir.
             ppttt    ppttt    ppttt    ppttt    ppttt
    p        x....    xx...    xxxxx    xx...    x....
    p        xx...    xx...    xxxxx    xx...    xx...
    t        xxx..    xxx..    xxxxx    xxxxx    xxxxx
    t        xxxx.    xxxx.    xxxxx    xxxxx    xxxxx
    t        xxxxx    xxxxx    xxxxx    xxxxx    xxxxx
             GPT      prefix   AR2Diff  cached   AR-
                      LM                prefix   readable
    """
    B, S = past.shape
    T = new.shape[1]
    square = torch.ones(T, T, dtype=torch.bool, device=new.device)
    if extra_edges is not None:
        square = square.tril() | extra_edges
    elif kind == "causal":
        square = square.tril()
    diagonal = torch.eye(T, dtype=torch.bool, device=new.device)
    among_new = (square & new[:, None]) | diagonal  # softmax over an empty row is NaN
    before = past[:, None].expand(B, T, S)
    return torch.cat([before, among_new], dim=2)[:, None]


def split_prompt(prompt: Tensor, cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """Split a prompt (B, P): prefix, and sep_id or the last token (B, 1)."""
    if cfg.sep_id >= 0 or not prompt.shape[1]:
        first = cfg.sep_id if cfg.sep_id >= 0 else cfg.pad_id
        return prompt, torch.full((len(prompt), 1), first, device=prompt.device)
    index = torch.arange(prompt.shape[1], device=prompt.device)
    last = (index * (prompt != cfg.pad_id)).amax(1, keepdim=True)  # (B, 1)
    prefix = prompt.scatter(1, last, cfg.pad_id)
    return prefix[:, : int(last.max())], prompt.gather(1, last)


class KVCache:
    """Keys and values k[l], v[l] (B, H, capacity, D) of `length` tokens."""

    def __init__(self, n_layer: int, reserve: int = 0):
        self.k: list[Tensor | None] = [None] * n_layer
        self.v: list[Tensor | None] = [None] * n_layer
        # What lies beyond `length` is overwritten by the next decode.
        self.length = 0
        self.reserve = reserve
        self.valid: Tensor | None = None  # (B, length), False: padding
        self.prefix: Tensor | None = None  # (B, P) ids, if joint

    def extend(self, layer: int, k: Tensor, v: Tensor):
        """Append k, v (B, H, T, D). Return all of them."""
        self.k[layer], k = self._write(self.k[layer], k)
        self.v[layer], v = self._write(self.v[layer], v)
        return k, v

    def _write(self, buffer: Tensor | None, new: Tensor):
        B, H, T, D = new.shape
        start = self.length
        end = start + T
        if torch.is_grad_enabled():  # autograd may need the old buffer
            new = torch.cat([buffer[:, :, :start], new], dim=2) if start else new
            return new, new
        if buffer is None or buffer.shape[2] < end or buffer.dtype != new.dtype:
            larger = new.new_empty(B, H, max(end, self.reserve), D)
            if start:
                larger[:, :, :start] = buffer[:, :, :start]
            buffer = larger
        buffer[:, :, start:end] = new
        return buffer, buffer[:, :, :end]

    def map(self, change: Callable) -> "KVCache":
        """Return a cache of change(tensor) of all tensors."""
        other = copy.copy(self)
        other.k = [None if k is None else change(k) for k in self.k]
        other.v = [None if v is None else change(v) for v in self.v]
        return other

    def fork(self) -> "KVCache":
        """Return a cache that shares the past, but no later tokens."""
        return self.map(lambda tensor: tensor)

    def select(self, index: Tensor) -> "KVCache":
        """Return the cache of these rows."""
        other = self.map(lambda tensor: tensor[index])
        other.valid = None if self.valid is None else self.valid[index]
        other.prefix = None if self.prefix is None else self.prefix[index]
        return other

    def detach(self) -> tuple["KVCache", list]:
        """Return a fork without a graph, and pairs (original, leaf)."""
        other = self.map(lambda tensor: tensor.detach().requires_grad_())
        pairs = zip(self.k + self.v, other.k + other.v)
        return other, [pair for pair in pairs if pair[0] is not None]

    def append_valid(self, tokens: Tensor) -> None:
        """Let later tokens attend to tokens (B, T), except pads."""
        self.length += tokens.shape[1]
        if self.valid is not None:
            self.valid = F.pad(self.valid, (0, tokens.shape[1]), value=True)


def attend(q, k, v, mask, dropout, causal) -> Tensor:
    """Attention (B, H, T, D). k and v may have fewer heads."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not q.is_cpu:  # CUDA's kernel with a mask needs equal heads
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=q.is_cpu)


class RMSNorm(nn.RMSNorm):
    """torch's, but with the weight in the dtype of x, for autocast."""

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


def make_norm(cfg: ModelConfig) -> nn.Module:
    """Return a new norm of the kind that cfg names."""
    if cfg.norm == "layernorm":
        return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)
    return RMSNorm(cfg.n_embd, eps=cfg.norm_eps)


class Attention(nn.Module):
    """Attention of T tokens to themselves and to a cache."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.attend = attend  # extras/fast_decode.py has another one
        self.sizes = (cfg.n_head, cfg.kv_heads, cfg.head_size)
        width = cfg.n_head * cfg.head_size
        kv_width = cfg.kv_heads * cfg.head_size
        self.qkv = nn.Linear(cfg.n_embd, width + 2 * kv_width, bias=cfg.bias or cfg.qkv_bias)
        self.proj = nn.Linear(width, cfg.n_embd, bias=cfg.bias)
        norm = RMSNorm if cfg.qk_norm else nn.Identity
        self.q_norm = norm(cfg.head_size, eps=cfg.norm_eps)
        self.k_norm = norm(cfg.head_size, eps=cfg.norm_eps)

    # fmt: off
    def forward(self, x, rope, mask, causal, cache, layer):
        B, T, _ = x.shape
        H, G, D = self.sizes
        q, k, v = self.qkv(x).split((H * D, G * D, G * D), dim=2)
        q = self.q_norm(q.view(B, T, H, D)).transpose(1, 2)      # (B, H, T, D)
        k = self.k_norm(k.view(B, T, G, D)).transpose(1, 2)      # (B, G, T, D)
        v = v.view(B, T, G, D).transpose(1, 2)                   # (B, G, T, D)
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                     # (B, G, S + T, D)
        dropout = self.cfg.dropout if self.training else 0.0
        y = self.attend(q, k, v, mask, dropout, causal)          # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D)) # (B, T, C)
    # fmt: on


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202) or GELU."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gated = cfg.activation == "swiglu"
        self.gelu_form = "tanh" if cfg.activation == "gelu_tanh" else "none"
        up_width = cfg.hidden_size * (2 if self.gated else 1)
        self.up = nn.Linear(cfg.n_embd, up_width, bias=cfg.bias)
        self.down = nn.Linear(cfg.hidden_size, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(x), approximate=self.gelu_form))


class Block(nn.Module):
    """A pre-norm layer: attention, then MLP."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm1 = make_norm(cfg)
        self.attn = Attention(cfg)
        self.norm2 = make_norm(cfg)
        self.mlp = MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, rope, mask, causal, cache, layer):
        y = self.attn(self.norm1(x), rope, mask, causal, cache, layer)
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Maps (prefix, target) to logits. Slot 0 is given, not predicted."""

    block = Block

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        most = cfg.block_size
        require(most > 1, f"block_size must be at least 2, got {most}")
        self.cfg = cfg
        self.activation_checkpointing = False
        self.tok = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.position == "learned":
            self.pos = nn.Embedding(cfg.block_size, cfg.n_embd)
        else:
            self.register_buffer("rope", rope_table(cfg), persistent=False)
        self.drop = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(self.block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)
        if cfg.tie_weights:
            self.head.weight = self.tok.weight
        if cfg.self_conditioning:
            self.self_cond_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self.init_weights()

    def encode(self, prefix: Tensor, reserve: int = 0) -> KVCache:
        """Read the prefix (B, P). reserve: room for later tokens.

        If joint, it attends to the target. So it is stored, and decode
        reads it.
        """
        P = prefix.shape[1]
        cache = KVCache(len(self.blocks), P + reserve)
        if self.cfg.prefix_attention == "joint":
            cache.prefix = prefix
        elif P:
            kind = self.cfg.prefix_attention
            valid = find_padding(prefix, self.cfg)
            self._read(self.tok(prefix), cache, kind, valid)
            cache.length = P
            cache.valid = valid
        return cache

    def decode(
        self,
        cache: KVCache,
        target: Tensor,
        append: bool = False,
        self_cond: Tensor | None = None,
        extra_edges: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of the target (B, T) after a prefix.

        append: keep the target in the cache, to decode token by token.
        self_cond (B, T, C): expected embedding of the last prediction.
        extra_edges: see attention_mask.
        """
        kind = self.cfg.target_attention
        prefix = cache.prefix
        if prefix is None:
            x = self.embed(target, 0, self_cond)  # (B, T, C)
            x = self._read(x, cache, kind, None, extra_edges)
            if append:
                cache.append_valid(target)
            return self.head(x)
        require(not append, "prefix_attention=joint has no cache to append to")
        P = prefix.shape[1]
        valid = find_padding(prefix, self.cfg)
        if valid is not None:
            valid = F.pad(valid, (0, target.shape[1]), value=True)
        tokens = torch.cat([prefix, target], dim=1)
        x = self.embed(tokens, P, self_cond)  # (B, P + T, C)
        return self.head(self._read(x, None, kind, valid, extra_edges)[:, P:])

    def forward(self, prefix: Tensor, target: Tensor) -> Tensor:
        """Return decode(encode(prefix), target), in one pass if possible."""
        if self.cfg.one_sequence:
            cache = KVCache(0)
            cache.prefix = prefix
        else:
            cache = self.encode(prefix)
        return self.decode(cache, target)

    def expected_embedding(self, logits: Tensor) -> Tensor:
        """Return the mean embedding (..., C) of logits (..., V)."""
        return logits.softmax(-1).to(self.tok.weight.dtype) @ self.tok.weight

    def embed(self, tokens: Tensor, P: int, self_cond: Tensor | None) -> Tensor:
        """Return embeddings (B, P + T, C), with self_cond (B, T, C)."""
        x = self.tok(tokens)
        if self_cond is None or not self.cfg.self_conditioning:
            return x
        normed = F.rms_norm(self_cond, self_cond.shape[-1:], eps=1e-5)  # zeros stay zeros
        hint = self.self_cond_proj(normed)  # (B, T, C)
        if self.cfg.shift:  # slot i is predicted at i - 1
            return x + F.pad(hint[:, 1:], (0, 0, P, 1))
        return x + F.pad(hint, (0, 0, P, 0))

    def _read(self, x, cache, kind, valid, extra_edges=None):
        inputs = self.prepare_input(x, cache, kind, valid, extra_edges)
        return self.run_blocks(*inputs, cache)

    def prepare_input(self, x, cache, kind, valid, extra_edges=None):
        """Return (x, rope, mask, is_causal). valid (B, T): False for padding."""
        B, T = x.shape[:2]
        S = cache.length if cache is not None else 0
        past = cache.valid if cache is not None else None
        most = self.cfg.block_size
        require(S + T <= most, f"{S + T} tokens exceed the model's block_size {most}")
        padded = past is not None or valid is not None
        full = x.new_ones(B if padded else 1, S + T, dtype=torch.bool)
        past = full[:, :S] if past is None else past
        valid = full[:, S:] if valid is None else valid
        position = torch.arange(S, S + T, device=x.device)  # (T,)
        if padded:
            position = past.sum(1, keepdim=True) + valid.cumsum(1) - 1
            position = position.clamp(min=0)  # (B, T)
        rope = None
        if self.cfg.position == "learned":
            x = x + self.pos(position)
        else:
            rope = self.rope[:, position].to(x.dtype)  # (2, T, D)
            rope = rope[:, :, None] if padded else rope  # (2, B, 1, T, D)
        # A dense mask turns off the flash kernel, so it is built only if it is needed.
        # is_causal aligns queries and keys at the start, so it is wrong after a cache.
        plain = not padded and extra_edges is None
        if plain and (kind == "bidirectional" or T == 1):
            return self.drop(x), rope, None, False
        if plain and S == 0:
            return self.drop(x), rope, None, True
        mask = attention_mask(kind, past, valid, extra_edges)
        return self.drop(x), rope, mask, False

    def run_blocks(self, x, rope, mask, causal, cache):
        """Return the last hidden states (B, T, C)."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        if recompute:  # the caller's cache moves on before the backward pass
            cache = copy.copy(cache)
        for layer, block in enumerate(self.blocks):
            args = (x, rope, mask, causal, cache, layer)
            if recompute:  # keep only its input (arXiv 1604.06174)
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        return self.norm(x)

    def init_weights(self):
        """Draw all weights anew."""
        std = 0.5 * self.cfg.n_embd**-0.5  # GPT-2: 0.02
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Layers that write to the residual stream: smaller with depth (GPT-2, section 2.3).
        std = std * (2 * self.cfg.n_layer) ** -0.5
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(weight, std=std)
        for name in NEW_MODULES:
            if hasattr(self, name):
                nn.init.zeros_(getattr(self, name).weight)


def find_padding(tokens: Tensor, cfg: ModelConfig) -> Tensor | None:
    """Return False for pads, else True; None if there are no pads."""
    valid = tokens != cfg.pad_id
    return None if bool(valid.all()) else valid


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build_model(cfg: ModelConfig) -> Transformer:
    """Return a network with random weights."""
    if cfg.arch == "encoder_decoder":
        from extras.encoder_decoder import EncoderDecoder

        return EncoderDecoder(cfg)
    return Transformer(cfg)


class _SkipInit(TorchFunctionMode):
    """Skips torch.nn.init, which is slow to load for meta tensors."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def meta_model(cfg: ModelConfig) -> Transformer:
    """Return the network on the meta device: shapes without memory."""
    with torch.device("meta"), _SkipInit():
        return build_model(cfg)


def model_from_state_dict(cfg: ModelConfig, weights: dict) -> Transformer:
    """Return the network around these tensors. New modules are zero."""
    model = meta_model(cfg)
    first = next(iter(weights.values()))
    shapes = {name: meta.shape for name, meta in model.state_dict().items()}
    new = [n for n in shapes.keys() - weights.keys() if n.startswith(NEW_MODULES)]
    zeros = {name: first.new_zeros(shapes[name]) for name in new}
    try:
        model.load_state_dict(weights | zeros, assign=True)
    except RuntimeError as error:  # names or shapes
        reason = " ".join(str(error).split())
        raise ValueError(f"the weights do not fit: {reason}") from None
    if cfg.tie_weights:
        model.head.weight = model.tok.weight
    return model.to(first.device).eval()
