"""The network: one decoder-only Transformer, its masks and its cache.

An autoregressive model and a text diffusion model are this same class under two settings, `prefix_attention` and
`target_attention`; which token sees which is all that tells them apart. Callers use three methods: `encode` reads the
prefix, `decode` reads a target after it, `forward` does both.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from attention import by_products, products_pay
from rope import RopeConfig, rope_table, rotate

PARADIGMS = ("ar", "diffusion")


@dataclass
class ModelConfig(RopeConfig):
    """Every choice that fixes what the network computes. Stored in each checkpoint, checked once, here."""

    paradigm: str = "ar"  # ar: trained by autoregressive.loss | diffusion: by diffusion.loss
    arch: str = "decoder_only"  # decoder_only | encoder_decoder (encdec.py: n_layer blocks in each half)
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0  # heads of keys and values (grouped-query attention); 0: as many as n_head
    n_embd: int = 128
    head_dim: int = 0  # width of a head; 0: n_embd / n_head
    n_hidden: int = 0  # width inside the MLP; 0: 8/3 n_embd for swiglu, else 4 n_embd
    block_size: int = 0  # longest prefix + target, in tokens; 0: what the data set needs
    target_length: int = 0  # slots of a target, separator and pads included; 0: what the data set says
    dropout: float = 0.0
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5  # all norms add it to what they take the root of
    activation: str = "swiglu"  # swiglu | gelu (exact) | gelu_tanh (GPT-2's published weights)
    position: str = "rope"  # rope (rope.py) | learned
    qk_norm: bool = False  # RMSNorm on queries and keys (arXiv 2302.05442); at laptop size it learns to copy slower
    bias: bool = False  # on every linear layer, and on a layernorm
    qkv_bias: bool = False  # on queries, keys and values alone (Qwen 2)
    tie_weights: bool = True  # the output layer is the embedding
    prefix_attention: str = "causal"  # causal | bidirectional | joint (read again with every target)
    target_attention: str = "causal"  # causal | bidirectional
    noise: str = "uniform"  # diffusion: uniform (any ordinary token or pad, as the paper) | mask
    shift: bool = False  # diffusion: slot i is predicted at position i - 1, as an AR model does
    lookahead: bool = False  # with shift: position i - 1 also reads slot i's token, by a zero-initialised layer
    self_conditioning: bool = False  # diffusion: the last soft prediction is read through a zero-initialised layer
    vocab_size: int = 288  # the rest is the tokenizer's (bytes by default)
    n_ordinary: int = 256  # ids below this are text; noise draws them and pad, nothing else
    pad_id: int = 256  # never a key while in the prefix; an ordinary token, learned, in the target
    sep_id: int = 257
    mask_id: int = 258
    eos_id: int = -1  # foreign weights: what ended a text where they come from; here pad does, and no text holds this

    def __post_init__(self):
        for name, allowed in (
            ("paradigm", PARADIGMS),
            ("arch", ("decoder_only", "encoder_decoder")),
            ("norm", ("rmsnorm", "layernorm")),
            ("activation", ("swiglu", "gelu", "gelu_tanh")),
            ("position", ("rope", "learned")),
            ("prefix_attention", ("causal", "bidirectional", "joint")),
            ("target_attention", ("causal", "bidirectional")),
            ("noise", ("uniform", "mask")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name in ("n_layer", "n_head", "n_embd", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        if self.head_dim < 0 or (self.head_size % 2 and self.position == "rope"):
            raise ValueError(f"rope needs an even head size, got head_dim or n_embd / n_head = {self.head_size}")
        self.check_rope()
        if self.n_kv_head < 0 or self.n_head % self.kv_heads:
            raise ValueError(f"n_head must be a multiple of n_kv_head, got {self.n_head} and {self.n_kv_head}")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps must be above 0, got {self.norm_eps}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.prefix_attention == "joint" and self.target_attention == "causal":
            raise ValueError("a joint prefix needs target_attention='bidirectional', got 'causal'")
        if self.arch == "encoder_decoder" and self.prefix_attention != "bidirectional":
            raise ValueError(f"an encoder needs prefix_attention='bidirectional', got {self.prefix_attention!r}")
        if self.paradigm == "ar" and self.target_attention != "causal":
            raise ValueError(
                "paradigm 'ar' needs target_attention='causal': a token that is predicted must not be seen"
            )
        if self.paradigm == "ar" and (self.shift or self.lookahead or self.self_conditioning):
            raise ValueError("shift, lookahead and self_conditioning are settings of paradigm 'diffusion'")
        if self.lookahead and not self.shift:
            raise ValueError("lookahead needs shift: without it a position reads its own slot's token already")
        if max(self.pad_id, self.sep_id, self.mask_id) >= self.vocab_size or self.n_ordinary > self.vocab_size:
            raise ValueError(f"special ids must be below vocab_size {self.vocab_size}")
        if not -1 <= self.eos_id < self.n_ordinary:
            raise ValueError(f"eos_id must be -1 or an ordinary id, got {self.eos_id}")

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
        return 32 * math.ceil(self.n_embd / 12) if self.activation == "swiglu" else 4 * self.n_embd  # 8/3 in whole 32s


def model_settings(settings: dict) -> dict:
    """The part of a flat dict of settings that belongs to ModelConfig."""
    return {f.name: settings[f.name] for f in fields(ModelConfig) if f.name in settings}


def attention_mask(kind: str, past: Tensor, new: Tensor, opened: Tensor | None = None) -> Tensor:
    """Which keys each of T new tokens may attend to: (B, 1, T, S + T) bool.

    past (B, S) and new (B, T) are True where a token is real, False where it is padding.
    With two cached tokens, the second one padding, and three new tokens:

        causal        bidirectional
        x . x . .     x . x x x
        x . x x .     x . x x x
        x . x x x     x . x x x

    The five patterns of the literature are two settings. p: prefix of two, t: target of three; a row sees a column.

        prefix causal    bidirectional    joint            bidirectional    causal
        target causal    causal           bidirectional    bidirectional    bidirectional
             p p t t t   p p t t t        p p t t t        p p t t t        p p t t t
        p    x . . . .   x x . . .        x x x x x        x x . . .        x . . . .
        p    x x . . .   x x . . .        x x x x x        x x . . .        x x . . .
        t    x x x . .   x x x . .        x x x x x        x x x x x        x x x x x
        t    x x x x .   x x x x .        x x x x x        x x x x x        x x x x x
        t    x x x x x   x x x x x        x x x x x        x x x x x        x x x x x
             GPT         prefix LM        AR2Diff          frozen prefix    AR-readable prompt

    opened (T, T) bool: edges among the new tokens that are open beside the causal ones. All open is bidirectional;
    a growing share of them is mask annealing (anneal.py, which on CUDA has a rule in the place of this tensor).
    """
    (B, S), T = past.shape, new.shape[1]
    square = torch.ones(T, T, dtype=torch.bool, device=new.device)
    if opened is not None:
        square = square.tril() | opened
    elif kind == "causal":
        square = square.tril()
    itself = torch.eye(T, dtype=torch.bool, device=new.device)
    # A padding row may see itself: softmax over an empty row would be NaN.
    among_new = (square & new[:, None]) | itself  # (B, T, T)
    return torch.cat([past[:, None].expand(B, T, S), among_new], dim=2)[:, None]


class KVCache:
    """What has been read so far: keys and values k[l], v[l] (B, H, capacity, D) per layer, the first `length` in force.

    New tokens write theirs behind `length`. AR decoding then moves `length` on; diffusion does not, so the next
    canvas overwrites the last one and nothing is copied or reallocated between steps.
    """

    def __init__(self, n_layer: int, room: int = 0):
        self.k: list[Tensor | None] = [None] * n_layer
        self.v: list[Tensor | None] = [None] * n_layer
        self.length, self.room = 0, room
        self.real: Tensor | None = None  # (B, length) bool, False at padding; None where nothing is padding
        self.prefix: Tensor | None = None  # (B, P), only for joint attention, where nothing can be computed ahead

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values in force with the new ones (B, H, T, D) after them: 2 x (B, H, length + T, D)."""
        self.k[layer], k = self._write(self.k[layer], k)
        self.v[layer], v = self._write(self.v[layer], v)
        return k, v

    def _write(self, old: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
        B, H, T, D = new.shape
        start, end = self.length, self.length + T
        if torch.is_grad_enabled():  # autograd may need what stands there, so make new tensors
            whole = torch.cat([old[:, :, :start], new], dim=2) if start else new
            return whole, whole
        if old is None or old.shape[2] < end or old.dtype != new.dtype:
            buffer = new.new_empty(B, H, max(end, self.room), D)
            if start:
                buffer[:, :, :start] = old[:, :, :start]
            old = buffer
        old[:, :, start:end] = new
        return old, old[:, :, :end]

    @staticmethod
    def attend(q, k, v, mask, dropout, causal, layer) -> Tensor:
        """Attention (B, H, T, D). A cache that keeps keys another way (fast.py) has its own, and so has a FlexMask."""
        if hasattr(mask, "attend"):
            return mask.attend(q, k, v)
        if products_pay(q, k, dropout):
            return by_products(q, k, v, mask, causal)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)

    def rows(self, index: Tensor) -> "KVCache":
        """The cache of some rows, in the order of index; a row may be asked for several times."""
        other = type(self)(len(self.k), self.room)
        other.length = self.length
        other.k = [None if k is None else k[index] for k in self.k]
        other.v = [None if v is None else v[index] for v in self.v]
        other.real = None if self.real is None else self.real[index]
        other.prefix = None if self.prefix is None else self.prefix[index]
        return other


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the type of x: under autocast a mixed call is slow and warns."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(cfg: ModelConfig) -> nn.Module:
    if cfg.norm == "layernorm":
        return nn.LayerNorm(cfg.n_embd, eps=cfg.norm_eps, bias=cfg.bias)
    return RMSNorm(cfg.n_embd, eps=cfg.norm_eps)


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head, self.kv_heads, self.head_size, self.dropout = cfg.n_head, cfg.kv_heads, cfg.head_size, cfg.dropout
        width, bias = cfg.n_head * cfg.head_size, cfg.bias or cfg.qkv_bias
        self.qkv = nn.Linear(cfg.n_embd, width + 2 * cfg.kv_heads * cfg.head_size, bias=bias)
        self.proj = nn.Linear(width, cfg.n_embd, bias=cfg.bias)
        self.q_norm = RMSNorm(cfg.head_size, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.head_size, eps=cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    # fmt: off
    def forward(self, x, rope, mask, causal, cache, layer):
        B, T, _ = x.shape
        H, G, D = self.n_head, self.kv_heads, self.head_size
        q, k, v = self.qkv(x).split((H * D, G * D, G * D), dim=2)                   # (B, T, HD), 2 x (B, T, GD)
        q = self.q_norm(q.view(B, T, H, D)).transpose(1, 2)                         # (B, H, T, D)
        k = self.k_norm(k.view(B, T, G, D)).transpose(1, 2)                         # (B, G, T, D)
        v = v.view(B, T, G, D).transpose(1, 2)                                      # (B, G, T, D)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)                                        # (B, G, S + T, D)
        if G != H:
            k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))             # (B, H, S + T, D)
        dropout = self.dropout if self.training else 0.0
        attend = KVCache.attend if cache is None else cache.attend
        y = attend(q, k, v, mask, dropout, causal, layer)                           # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))                    # (B, T, C)
    # fmt: on


class MLP(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gated = cfg.activation == "swiglu"
        self.gelu_form = "tanh" if cfg.activation == "gelu_tanh" else "none"
        self.up = nn.Linear(cfg.n_embd, cfg.hidden_size * (2 if self.gated else 1), bias=cfg.bias)
        self.down = nn.Linear(cfg.hidden_size, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(x), approximate=self.gelu_form))


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.norm1, self.attn = make_norm(cfg), Attention(cfg)
        self.norm2, self.mlp = make_norm(cfg), MLP(cfg)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x, rope, mask, causal, cache, layer):
        x = x + self.drop(self.attn(self.norm1(x), rope, mask, causal, cache, layer))
        return x + self.drop(self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    """Maps (prefix, target) to logits over the target, whose first token is a separator: given, not predicted."""

    block = Block

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        if cfg.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {cfg.block_size}")
        self.cfg = cfg
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
            self.condition = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        if cfg.lookahead:
            self.ahead = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)
        self._init_weights()

    def encode(self, prefix: Tensor, room: int = 0) -> KVCache:
        """Read the prefix (B, P) once and keep what later calls can reuse.

        room: tokens that will be decoded after it, so that buffers are made once.
        """
        P = prefix.shape[1]
        cache, padded = KVCache(len(self.blocks), P + room), bool((prefix == self.cfg.pad_id).any())
        real = prefix != self.cfg.pad_id if padded else None
        if self.cfg.prefix_attention == "joint":
            cache.prefix, cache.real = prefix, real  # the prefix will look at the target: nothing can be read yet
        elif P:
            self._read(self.tok(prefix), cache, self.cfg.prefix_attention, real)
            cache.length, cache.real = P, real
        return cache

    def decode(
        self,
        cache: KVCache,
        target: Tensor,
        append: bool = False,
        estimate: Tensor | None = None,
        opened: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) for target (B, T). append=True also files the target in the cache.

        estimate (B, T, C): soft embedding of the last prediction of each slot, zeros where there is none.
        opened: see attention_mask. Raises ValueError where a joint prefix is to be appended to.
        """
        kind = self.cfg.target_attention
        if cache.prefix is not None:
            if append:
                raise ValueError("a joint prefix cannot be cached; set prefix_attention='causal' or 'bidirectional'")
            P, real = cache.prefix.shape[1], None
            if cache.real is not None:
                real = torch.cat([cache.real, torch.ones_like(target, dtype=torch.bool)], dim=1)
            x = self._embed(torch.cat([cache.prefix, target], dim=1), P, estimate)  # (B, P + T, C)
            return self.head(self._read(x, None, kind, real, opened)[:, P:])
        x = self._read(self._embed(target, 0, estimate), cache, kind, None, opened)
        if append:
            cache.length += target.shape[1]
            if cache.real is not None:
                cache.real = torch.cat([cache.real, torch.ones_like(target, dtype=torch.bool)], dim=1)
        return self.head(x)

    def forward(self, prefix, target, estimate=None, opened=None) -> Tensor:
        """Logits (B, T, V): decode(encode(prefix), target), in one pass where the attention allows it."""
        P = prefix.shape[1]
        if {self.cfg.prefix_attention, self.cfg.target_attention} != {"causal"} or opened is not None:
            return self.decode(self.encode(prefix), target, estimate=estimate, opened=opened)
        real = torch.cat([prefix != self.cfg.pad_id, torch.ones_like(target, dtype=torch.bool)], dim=1)
        x = self._embed(torch.cat([prefix, target], dim=1), P, estimate)
        return self.head(self._read(x, None, "causal", None if bool(real.all()) else real)[:, P:])

    def soft_embedding(self, logits: Tensor) -> Tensor:
        """Expected embedding (..., C) under softmax(logits) (..., V): what self-conditioning carries."""
        return logits.softmax(-1).to(self.tok.weight.dtype) @ self.tok.weight

    def compile_(self) -> None:
        """torch.compile the stack of blocks; checkpoint keys stay as they are."""
        self._run_blocks = torch.compile(self._run_blocks)

    def _embed(self, tokens: Tensor, P: int, estimate: Tensor | None) -> Tensor:
        """Embeddings (B, P + T, C) of a prefix of P tokens and a target, with what is known of the target's slots."""
        x, extra = self.tok(tokens), []  # one lookup for both: the gradient of each is as large as the table
        if self.cfg.self_conditioning and estimate is not None:
            extra.append(self.condition(F.rms_norm(estimate, estimate.shape[-1:], eps=1e-5)))  # zero stays zero
        if self.cfg.lookahead:
            extra.append(self.ahead(x[:, P:]))
        if not extra:
            return x
        known = sum(extra)  # (B, T, C)
        if self.cfg.shift:  # what is known of slot i enters where slot i is predicted, at position i - 1
            return x + F.pad(known[:, 1:], (0, 0, P, 1))
        return x + F.pad(known, (0, 0, P, 0))

    def _read(self, x, cache, kind, real, opened=None):
        """x (B, T, C) through the stack; real (B, T) marks what is no padding, None: nothing is."""
        return self._run_blocks(*self._place(x, cache, kind, real, opened), cache)

    def _place(self, x, cache, kind, real, opened=None):
        """What the blocks need to know of x (B, T, C): (x, rope, mask, is_causal), by where each token stands."""
        (B, T), S = x.shape[:2], cache.length if cache is not None else 0
        past = cache.real if cache is not None else None
        if S + T > self.cfg.block_size:
            raise ValueError(f"{S + T} tokens are longer than the model's block_size {self.cfg.block_size}")
        if past is None and real is None:
            position = torch.arange(S, S + T, device=x.device)  # (T,)
        else:  # padding takes no position
            past = x.new_ones(B, S, dtype=torch.bool) if past is None else past
            real = x.new_ones(B, T, dtype=torch.bool) if real is None else real
            position = (past.sum(1, keepdim=True) + real.cumsum(1) - 1).clamp(min=0)  # (B, T)
        rope = None
        if self.cfg.position == "learned":
            x = x + self.pos(position)
        else:
            rope = self.rope[:, position].to(x.dtype)  # (2, T, D) or (2, B, T, D)
            rope = rope if position.dim() == 1 else rope[:, :, None]  # (2, B, 1, T, D)
        return self.drop(x), rope, *_plan_mask(kind, past, real, opened, S, T, x.device)

    def _run_blocks(self, x, rope, mask, causal, cache):
        for layer, block in enumerate(self.blocks):
            x = block(x, rope, mask, causal, cache, layer)
        return self.norm(x)

    def _init_weights(self):
        # Matrices: normal, GPT-2's 0.02 at the width of about 600 and wider spread below it.
        std = 0.5 * self.cfg.n_embd**-0.5
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # What writes into the residual stream: smaller with depth (GPT-2, section 2.3), so that its variance stays put.
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(weight, std=std * (2 * self.cfg.n_layer) ** -0.5)
        # What a conversion adds: zero, so that the converted model starts as its source.
        for name in ADDED_BY_CONVERSION:
            if hasattr(self, name):
                nn.init.zeros_(getattr(self, name).weight)


ADDED_BY_CONVERSION = ("condition", "ahead")  # the only layers a diffusion model may have that its AR source has not


def _plan_mask(kind, past, real, opened, S, T, device):
    """(mask, is_causal) for scaled_dot_product_attention. No dense mask where none is needed: it turns off flash."""
    if hasattr(opened, "mask"):  # anneal.Ahead; a tensor has no such method
        return opened.mask(past, real, S, T, device), False
    if past is None and opened is None:
        if kind == "bidirectional" or T == 1:
            return None, False
        if S == 0:
            return None, True
    # Several causal tokens after a cache come here too: is_causal would align them upper-left, which is wrong.
    past = torch.ones(1, S, dtype=torch.bool, device=device) if past is None else past
    real = torch.ones(1, T, dtype=torch.bool, device=device) if real is None else real
    return attention_mask(kind, past, real, opened), False
