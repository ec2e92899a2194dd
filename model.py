"""The network: a decoder-only Transformer, its attention masks and its KV cache.

An autoregressive model and a text diffusion model are the same class with two different settings,
`prefix_attention` and `target_attention`. Callers use three methods: `encode` reads the prefix,
`decode` reads a target after it, `forward` does both.
"""

import copy
import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from configurator import require, setting, validate

# The only layers that a diffusion model may have and its AR source has not. They start at zero.
NEW_MODULES = ("self_cond_proj",)


@dataclass
class ModelConfig:
    """Every choice that fixes what the network computes. Each checkpoint stores it."""

    paradigm: str = setting("ar", "the loss and the way to decode", ("ar", "diffusion"))
    arch: str = setting("decoder_only", "see extras/", ("decoder_only", "encoder_decoder"))
    n_layer: int = setting(4, "blocks (in each half)", minimum=1, maximum=1000)
    n_head: int = setting(4, "attention heads", minimum=1)
    n_embd: int = setting(128, "width", minimum=1)
    n_hidden: int = setting(0, "width of the MLP; 0: 8/3 or 4 n_embd", minimum=0)
    block_size: int = setting(0, "longest prefix + target; 0: from the data", minimum=0)
    target_length: int = setting(0, "slots of a target; 0: from the data", minimum=0)
    dropout: float = setting(0.0, "share of activations set to 0", minimum=0, maximum=0.99)
    tie_weights: bool = setting(True, "the output layer is the embedding")
    prefix_attention: str = setting(
        "causal", "joint: it reads the target too", ("causal", "bidirectional", "joint")
    )
    target_attention: str = setting("causal", "among the target", ("causal", "bidirectional"))
    noise: str = setting("uniform", "uniform is the paper's", ("uniform", "mask"))
    shift: bool = setting(False, "diffusion: position i - 1 predicts slot i, as in AR models")
    self_conditioning: bool = setting(False, "diffusion: read the last prediction too")

    # Set by the tokenizer.
    vocab_size: int = setting(288, "rows of the embedding", minimum=1, hidden=True)
    n_ordinary: int = setting(256, "ids below this are text", minimum=1, hidden=True)
    pad_id: int = setting(256, "ends a text; ignored in a prefix", minimum=0, hidden=True)
    sep_id: int = setting(257, "slot 0; -1: the prompt's last token", minimum=-1, hidden=True)
    mask_id: int = setting(258, "the token of noise='mask'", minimum=0, hidden=True)
    eos_id: int = setting(-1, "end of text of imported weights", minimum=-1, hidden=True)

    # Set by hf/ for imported weights.
    n_kv_head: int = setting(0, "key and value heads; 0: n_head", minimum=0, hidden=True)
    head_dim: int = setting(0, "width of a head; 0: n_embd / n_head", minimum=0, hidden=True)
    norm: str = setting("rmsnorm", "kind of norm", ("rmsnorm", "layernorm"), hidden=True)
    norm_eps: float = setting(1e-5, "epsilon of every norm", above=0, hidden=True)
    activation: str = setting("swiglu", "of the MLP", ("swiglu", "gelu", "gelu_tanh"), hidden=True)
    position: str = setting("rope", "encoding", ("rope", "learned"), hidden=True)
    qk_norm: bool = setting(False, "norm queries and keys (arXiv 2302.05442)", hidden=True)
    bias: bool = setting(False, "on every linear layer and layernorm", hidden=True)
    qkv_bias: bool = setting(False, "on queries, keys and values (Qwen 2)", hidden=True)
    rope_base: float = setting(10000.0, "base of the frequencies", above=0, hidden=True)
    rope_factor: float = setting(1.0, "Llama 3: slow pairs turn slower", above=0, hidden=True)
    rope_slow_turns: float = setting(1.0, "Llama 3: fewer are slow", minimum=0, hidden=True)
    rope_fast_turns: float = setting(4.0, "Llama 3: more are fast", above=0, hidden=True)
    rope_trained_length: int = setting(8192, "Llama 3: old context", minimum=1, hidden=True)

    def __post_init__(self):
        validate(self)
        C = self.n_embd
        H = self.n_head
        G = self.kv_heads
        prefix = self.prefix_attention
        target = self.target_attention
        largest_id = max(self.pad_id, self.sep_id, self.mask_id, self.n_ordinary - 1)
        slow = self.rope_slow_turns
        fast = self.rope_fast_turns
        even = self.position != "rope" or self.head_size % 2 == 0
        require(self.head_dim or C % H == 0, f"n_embd {C} must be a multiple of n_head {H}")
        require(even, f"rope needs an even n_embd / n_head, got {self.head_size}")
        require(H % G == 0, f"n_head {H} must be a multiple of n_kv_head {G}")
        require(slow < fast, f"rope_slow_turns {slow} must be below rope_fast_turns {fast}")
        require(largest_id < self.vocab_size, f"id {largest_id} is not below {self.vocab_size}")
        require(self.eos_id < self.n_ordinary, f"eos_id {self.eos_id} must be an ordinary id")
        if prefix == "joint":
            require(target == "bidirectional", "joint needs target_attention=bidirectional")
        if self.arch == "encoder_decoder":
            require(prefix == "bidirectional", "an encoder needs prefix_attention=bidirectional")
        if self.paradigm == "ar":
            require(target == "causal", "paradigm=ar needs target_attention=causal")
            require(not self.shift, "shift needs paradigm=diffusion")
            require(not self.self_conditioning, "self_conditioning needs paradigm=diffusion")

    @property
    def head_size(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def hidden_size(self) -> int:
        if self.n_hidden:
            return self.n_hidden
        if self.activation == "swiglu":
            return 32 * math.ceil(self.n_embd / 12)  # 8/3 n_embd, rounded up to a multiple of 32
        return 4 * self.n_embd

    @property
    def single_pass(self) -> bool:
        """Whether prefix and target go through the network together."""
        causal = self.prefix_attention == self.target_attention == "causal"
        return self.arch == "decoder_only" and (causal or self.prefix_attention == "joint")


def model_settings(settings: dict) -> dict:
    """Return the part of a flat dict of settings that belongs to ModelConfig."""
    return {f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}


def rope_table(cfg: ModelConfig) -> Tensor:
    """Return cos and sin of the rotary position embedding, (2, block_size, D), halves repeated.

    RoFormer, arXiv 2104.09864, section 3.2. rope_factor: the rule of Llama 3's published code.
    """
    D = cfg.head_size
    frequency = cfg.rope_base ** (-torch.arange(0, D, 2).float() / D)  # (D / 2,)
    if cfg.rope_factor != 1:
        turns = cfg.rope_trained_length * frequency / (2 * math.pi)
        width = cfg.rope_fast_turns - cfg.rope_slow_turns
        kept = ((turns - cfg.rope_slow_turns) / width).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / cfg.rope_factor)
    angle = torch.outer(torch.arange(cfg.block_size).float(), frequency).repeat(1, 2)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by its positions; pairs are (i, i + D/2), as in Llama's weights."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def attention_mask(
    kind: str, past: Tensor, new: Tensor, extra_edges: Tensor | None = None
) -> Tensor:
    """Return which keys each of T new tokens may attend to: (B, 1, T, S + T) bool.

    past (B, S) and new (B, T) are True for tokens and False for padding. Example with two cached
    tokens, the second one padding, and three new tokens:

        causal        bidirectional
        x . x . .     x . x x x
        x . x x .     x . x x x
        x . x x x     x . x x x

    Two settings give the five patterns of the literature. p: prefix, t: target; rows attend to columns.

        prefix causal    bidirectional    joint            bidirectional    causal
        target causal    causal           bidirectional    bidirectional    bidirectional
             p p t t t   p p t t t        p p t t t        p p t t t        p p t t t
        p    x . . . .   x x . . .        x x x x x        x x . . .        x . . . .
        p    x x . . .   x x . . .        x x x x x        x x . . .        x x . . .
        t    x x x . .   x x x . .        x x x x x        x x x x x        x x x x x
        t    x x x x .   x x x x .        x x x x x        x x x x x        x x x x x
        t    x x x x x   x x x x x        x x x x x        x x x x x        x x x x x
             GPT         prefix LM        AR2Diff          cached prefix    AR-readable prompt

    extra_edges (T, T) bool: edges between new tokens in addition to the causal ones (mask annealing).
    """
    (B, S), T = past.shape, new.shape[1]
    square = torch.ones(T, T, dtype=torch.bool, device=new.device)
    if extra_edges is not None:
        square = square.tril() | extra_edges
    elif kind == "causal":
        square = square.tril()
    diagonal = torch.eye(T, dtype=torch.bool, device=new.device)
    # A padding token attends to itself, because softmax over an empty row is NaN.
    among_new = (square & new[:, None]) | diagonal  # (B, T, T)
    return torch.cat([past[:, None].expand(B, T, S), among_new], dim=2)[:, None]


def sdpa_mask(kind, past, new, extra_edges, S, T, device):
    """Return (mask, is_causal) for scaled_dot_product_attention.

    A dense mask turns off the flash kernel, so it is built only if padding or edges need it.
    """
    if past is None and extra_edges is None:
        if kind == "bidirectional" or T == 1:
            return None, False
        if S == 0:
            return None, True
    # Causal tokens after a cache need a mask: is_causal aligns queries and keys at the start.
    past = torch.ones(1, S, dtype=torch.bool, device=device) if past is None else past
    new = torch.ones(1, T, dtype=torch.bool, device=device) if new is None else new
    return attention_mask(kind, past, new, extra_edges), False


def split_prompt(prompt: Tensor, cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """Split a prompt (B, P), padded anywhere, into the prefix and slot 0 of the target (B, 1).

    Slot 0 is the separator. With sep_id=-1 it is the prompt's last token, which leaves the prefix; a
    pad, which stands for the end of a text, if the prompt is empty.
    """
    if cfg.sep_id >= 0 or not prompt.shape[1]:
        first = cfg.sep_id if cfg.sep_id >= 0 else cfg.pad_id
        return prompt, torch.full((len(prompt), 1), first, device=prompt.device)
    index = torch.arange(prompt.shape[1], device=prompt.device)
    last = (index * (prompt != cfg.pad_id)).amax(1, keepdim=True)  # (B, 1)
    prefix = prompt.scatter(1, last, cfg.pad_id)
    return prefix[:, : int(last.max())], prompt.gather(1, last)


class KVCache:
    """Keys and values k[l], v[l] (B, H, capacity, D) of the tokens read so far, `length` of them valid.

    New tokens are written after `length`. AR decoding then increases `length`. Diffusion does not, so
    the next canvas overwrites the last one and no step copies or allocates anything.
    """

    def __init__(self, n_layer: int, reserve: int = 0):
        self.k: list[Tensor | None] = [None] * n_layer
        self.v: list[Tensor | None] = [None] * n_layer
        self.length = 0
        self.reserve = reserve
        self.valid: Tensor | None = None  # (B, length) bool, False for padding; None: no padding
        self.prefix: Tensor | None = None  # (B, P) token ids; only for prefix_attention='joint'

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) and return all valid ones, 2 x (B, H, length + T, D)."""
        self.k[layer], k = self._write(self.k[layer], k)
        self.v[layer], v = self._write(self.v[layer], v)
        return k, v

    def _write(self, buffer: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        B, H, T, D = new.shape
        start = self.length
        end = start + T
        if torch.is_grad_enabled():  # autograd may need the old content: do not overwrite it
            joined = torch.cat([buffer[:, :, :start], new], dim=2) if start else new
            return joined, joined
        if buffer is None or buffer.shape[2] < end or buffer.dtype != new.dtype:
            larger = new.new_empty(B, H, max(end, self.reserve), D)
            if start:
                larger[:, :, :start] = buffer[:, :, :start]
            buffer = larger
        buffer[:, :, start:end] = new
        return buffer, buffer[:, :, :end]

    def select(self, index: Tensor) -> "KVCache":
        """Return the cache of some rows, in the order of index. Rows may repeat."""
        other = copy.copy(self)
        other.k = [None if k is None else k[index] for k in self.k]
        other.v = [None if v is None else v[index] for v in self.v]
        other.valid = None if self.valid is None else self.valid[index]
        other.prefix = None if self.prefix is None else self.prefix[index]
        return other

    def fork(self) -> "KVCache":
        """Return a cache that shares what was read. What is written to it stays in it."""
        other = copy.copy(self)
        other.k = list(self.k)
        other.v = list(self.v)
        return other

    def detach(self) -> tuple["KVCache", list[tuple[Tensor, Tensor]]]:
        """Return a fork without a graph, and its tensors: pairs (original, detached leaf)."""
        other = self.fork()
        pairs = []
        for tensors in (other.k, other.v):
            for layer, tensor in enumerate(tensors):
                if tensor is not None:
                    tensors[layer] = tensor.detach().requires_grad_()
                    pairs.append((tensor, tensors[layer]))
        return other, pairs

    def append_valid(self, tokens: Tensor) -> None:
        """Count tokens (B, T), already written, as part of what was read."""
        self.length += tokens.shape[1]
        if self.valid is not None:
            self.valid = torch.cat([self.valid, torch.ones_like(tokens, dtype=torch.bool)], dim=1)


def attend(q, k, v, mask, dropout, causal) -> Tensor:
    """Attention (B, H, T, D). Each head of k and v serves as many query heads as needed."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k = k.repeat_interleave(groups, dim=1)
        v = v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the dtype of x: under autocast a mixed call is slow and warns."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "layernorm":
        return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)
    return RMSNorm(cfg.n_embd, eps=cfg.norm_eps)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        width = cfg.n_head * cfg.head_size
        kv_width = cfg.kv_heads * cfg.head_size
        self.qkv = nn.Linear(cfg.n_embd, width + 2 * kv_width, bias=cfg.bias or cfg.qkv_bias)
        self.proj = nn.Linear(width, cfg.n_embd, bias=cfg.bias)
        self.q_norm = RMSNorm(cfg.head_size, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_size, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    # fmt: off
    def forward(self, x, rope, mask, causal, cache, layer):
        B, T, _ = x.shape
        H, G, D = self.cfg.n_head, self.cfg.kv_heads, self.cfg.head_size
        q, k, v = self.qkv(x).split((H * D, G * D, G * D), dim=2)    # (B, T, HD), 2 x (B, T, GD)
        q = self.q_norm(q.view(B, T, H, D)).transpose(1, 2)          # (B, H, T, D)
        k = self.k_norm(k.view(B, T, G, D)).transpose(1, 2)          # (B, G, T, D)
        v = v.view(B, T, G, D).transpose(1, 2)                       # (B, G, T, D)
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                         # (B, G, S + T, D)
        dropout = self.cfg.dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout, causal)                   # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))     # (B, T, C)
    # fmt: on


class MLP(nn.Module):
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
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm1 = make_norm(cfg)
        self.attn = Attention(cfg)
        self.norm2 = make_norm(cfg)
        self.mlp = MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, rope, mask, causal, cache, layer):
        x = x + self.drop(self.attn(self.norm1(x), rope, mask, causal, cache, layer))
        return x + self.drop(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Maps (prefix, target) to logits over the target. Slot 0 of a target is given, not predicted."""

    block = Block

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if cfg.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {cfg.block_size}")
        self.cfg = cfg
        self.activation_checkpointing = False
        self.tok = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if cfg.position == "learned":
            self.pos = nn.Embedding(cfg.block_size, cfg.n_embd)
        else:
            self.register_buffer("rope", rope_table(cfg), persistent=False)  # (2, block_size, D)
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
        """Read the prefix (B, P) and keep what later calls can reuse.

        reserve: tokens that will be decoded after it, so that buffers are allocated once.
        """
        P = prefix.shape[1]
        cache = KVCache(len(self.blocks), P + reserve)
        valid = prefix != self.cfg.pad_id
        valid = None if bool(valid.all()) else valid
        if self.cfg.prefix_attention == "joint":
            cache.prefix = prefix  # it attends to the target, so nothing can be computed yet
            cache.valid = valid
        elif P:
            self._read(self.tok(prefix), cache, self.cfg.prefix_attention, valid)
            cache.length = P
            cache.valid = valid
        return cache

    def decode(
        self,
        cache: KVCache,
        target: Tensor,
        append: bool = False,
        self_cond: Tensor | None = None,
        attention: str | None = None,
        extra_edges: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) for target (B, T). append=True also adds the target to the cache.

        self_cond (B, T, C): expected embedding of the last prediction of each slot, zeros if none.
        attention: "causal" or "bidirectional" in place of cfg.target_attention.
        extra_edges: see attention_mask. Raises ValueError if a joint prefix is to be appended to.
        """
        kind = attention or self.cfg.target_attention
        if cache.prefix is not None:
            if append:
                raise ValueError("prefix_attention='joint' has no cache to append to")
            return self._decode_joint(cache, target, self_cond, kind, extra_edges)
        x = self.embed(target, 0, self_cond)  # (B, T, C)
        x = self._read(x, cache, kind, None, extra_edges)
        if append:
            cache.append_valid(target)
        return self.head(x)

    def _decode_joint(self, cache, target, self_cond, kind, extra_edges) -> Tensor:
        P = cache.prefix.shape[1]
        valid = None
        if cache.valid is not None:
            valid = torch.cat([cache.valid, torch.ones_like(target, dtype=torch.bool)], dim=1)
        x = self.embed(torch.cat([cache.prefix, target], dim=1), P, self_cond)  # (B, P + T, C)
        return self.head(self._read(x, None, kind, valid, extra_edges)[:, P:])

    def forward(self, prefix, target, self_cond=None, attention=None, extra_edges=None) -> Tensor:
        """Return logits (B, T, V): decode(encode(prefix), target), in one pass if both are causal."""
        kinds = {self.cfg.prefix_attention, self.cfg.target_attention}
        if kinds != {"causal"} or attention or extra_edges is not None:
            cache = self.encode(prefix)
            return self.decode(cache, target, False, self_cond, attention, extra_edges)
        cache = KVCache(0)
        cache.prefix = prefix
        valid = prefix != self.cfg.pad_id
        cache.valid = None if bool(valid.all()) else valid
        return self._decode_joint(cache, target, self_cond, "causal", None)

    def expected_embedding(self, logits: Tensor) -> Tensor:
        """Return the mean embedding (..., C) under softmax(logits) (..., V)."""
        return logits.softmax(-1).to(self.tok.weight.dtype) @ self.tok.weight

    def compile_blocks(self) -> None:
        """Compile the stack of blocks with torch.compile. Checkpoint keys do not change."""
        self.run_blocks = torch.compile(self.run_blocks)

    def embed(self, tokens: Tensor, P: int, self_cond: Tensor | None) -> Tensor:
        """Return embeddings (B, P + T, C) of a prefix and a target, with its last prediction."""
        x = self.tok(tokens)
        if self_cond is None or not self.cfg.self_conditioning:
            return x
        normed = F.rms_norm(self_cond, self_cond.shape[-1:], eps=1e-5)  # zeros stay zeros
        hint = self.self_cond_proj(normed)  # (B, T, C)
        if self.cfg.shift:  # slot i is predicted at position i - 1, so its hint enters there
            return x + F.pad(hint[:, 1:], (0, 0, P, 1))
        return x + F.pad(hint, (0, 0, P, 0))

    def _read(self, x, cache, kind, valid, extra_edges=None):
        return self.run_blocks(*self.prepare_input(x, cache, kind, valid, extra_edges), cache)

    def prepare_input(self, x, cache, kind, valid, extra_edges=None):
        """Return (x, rope, mask, is_causal) for embeddings x (B, T, C) that follow the cache.

        valid (B, T): False for padding, which takes no position; None: no padding.
        """
        B, T = x.shape[:2]
        S = cache.length if cache is not None else 0
        past = cache.valid if cache is not None else None
        if S + T > self.cfg.block_size:
            raise ValueError(f"{S + T} tokens exceed the model's block_size {self.cfg.block_size}")
        if past is None and valid is None:
            position = torch.arange(S, S + T, device=x.device)  # (T,)
        else:
            past = x.new_ones(B, S, dtype=torch.bool) if past is None else past
            valid = x.new_ones(B, T, dtype=torch.bool) if valid is None else valid
            position = past.sum(1, keepdim=True) + valid.cumsum(1) - 1
            position = position.clamp(min=0)  # (B, T)
        rope = None
        if self.cfg.position == "learned":
            x = x + self.pos(position)
        else:
            rope = self.rope[:, position].to(x.dtype)  # (2, T, D) or (2, B, T, D)
            rope = rope if position.dim() == 1 else rope[:, :, None]  # (2, B, 1, T, D)
        return self.drop(x), rope, *sdpa_mask(kind, past, valid, extra_edges, S, T, x.device)

    def run_blocks(self, x, rope, mask, causal, cache):
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        if recompute:  # a view with its own length: the caller's cache moves on before backward
            cache = copy.copy(cache)
        for layer, block in enumerate(self.blocks):
            args = (x, rope, mask, causal, cache, layer)
            # Keep only the input of each block for the backward pass (arXiv 1604.06174).
            x = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
        return self.norm(x)

    def init_weights(self):
        # Matrices: normal, GPT-2's 0.02 at a width of about 600, larger below it.
        std = 0.5 * self.cfg.n_embd**-0.5
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # Layers that write to the residual stream: smaller with depth (GPT-2, section 2.3).
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(weight, std=std * (2 * self.cfg.n_layer) ** -0.5)
        for name in NEW_MODULES:
            if hasattr(self, name):
                nn.init.zeros_(getattr(self, name).weight)


def num_params(model: nn.Module) -> int:
    """Return the number of trainable numbers; a tied output layer counts once."""
    return sum(p.numel() for p in model.parameters())


def build_model(cfg: ModelConfig) -> Transformer:
    """Return the network of cfg.arch with fresh weights."""
    if cfg.arch == "encoder_decoder":
        from extras.encoder_decoder import EncoderDecoder

        return EncoderDecoder(cfg)
    return Transformer(cfg)


class _SkipInit(TorchFunctionMode):
    """Skips torch.nn.init. On meta tensors it would load torch's compiler, which takes seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def meta_model(cfg: ModelConfig) -> Transformer:
    """Return the network of cfg on the meta device: names and shapes without memory."""
    with torch.device("meta"), _SkipInit():
        return build_model(cfg)


def model_from_state_dict(cfg: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
    """Return the network of cfg around these tensors, which are neither copied nor converted.

    Missing layers of NEW_MODULES become zeros, so the network computes what it did without them.
    Raises ValueError with the names if other weights are missing, unexpected or of another shape.
    """
    model = meta_model(cfg)
    first = next(iter(weights.values()))
    new = {
        name: torch.zeros(meta.shape, dtype=first.dtype, device=first.device)
        for name, meta in model.state_dict().items()
        if name not in weights and name.split(".")[0] in NEW_MODULES
    }
    try:
        missing, unexpected = model.load_state_dict(weights | new, strict=False, assign=True)
    except RuntimeError as error:  # shapes
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"the weights do not fit these settings: {reason}") from None
    if missing or unexpected:
        raise ValueError(
            f"the weights do not fit these settings: missing {missing}, unexpected {unexpected}"
        )
    if cfg.tie_weights:
        model.head.weight = model.tok.weight
    if cfg.position == "rope":
        model.rope = rope_table(cfg).to(first.device)
    return model.eval()
