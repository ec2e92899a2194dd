"""The encoder-decoder of the paper's architecture study (arXiv 2401.17181, section 4.3), on model.py's parts.

The encoder reads the prefix both ways, once. The decoder reads the target, causal (AR) or bidirectional (diffusion),
and looks at what the encoder made of the prefix through cross-attention. `encode`, `decode` and `forward` are those
of the decoder-only network, so the losses, the samplers and the conversion do not know the difference.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model import ADDED_BY_CONVERSION, Block, KVCache, ModelConfig, Transformer, make_norm
from rope import rope_table, rotate


class CrossCache(KVCache):
    """A KVCache of the target, with what each decoder layer sees of the prefix."""

    cross: list[tuple[Tensor, Tensor]]  # keys and values per layer, 2 x (B, G, P, D)
    prefix_mask: Tensor | None = None  # (B, 1, 1, P) bool, False at padding; None where nothing is padding

    def rows(self, index: Tensor) -> "CrossCache":
        other = super().rows(index)
        other.cross = [(k[index], v[index]) for k, v in self.cross]
        other.prefix_mask = None if self.prefix_mask is None else self.prefix_mask[index]
        return other


class CrossAttention(nn.Module):
    """Attention from target to prefix. Differs from T5, which tells it no positions: queries and keys are rotated, so
    that a slot of a canvas of pure noise knows where in the prefix it might look."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.n_head, self.kv_heads, self.head_size, self.dropout = cfg.n_head, cfg.kv_heads, cfg.head_size, cfg.dropout
        width, bias = cfg.n_head * cfg.head_size, cfg.bias or cfg.qkv_bias
        self.q = nn.Linear(cfg.n_embd, width, bias=bias)
        self.kv = nn.Linear(cfg.n_embd, 2 * cfg.kv_heads * cfg.head_size, bias=bias)
        self.proj = nn.Linear(width, cfg.n_embd, bias=cfg.bias)

    def read(self, memory: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, P, D) of the encoder's output (B, P, C)."""
        B, P, _ = memory.shape
        k, v = self.kv(memory).view(B, P, 2, self.kv_heads, self.head_size).permute(2, 0, 3, 1, 4)  # 2 x (B, G, P, D)
        return (k if rope is None else rotate(k, rope)), v

    def forward(self, x: Tensor, rope: Tensor | None, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, H, T, D)
        q = q if rope is None else rotate(q, rope)
        k, v = (t.repeat_interleave(self.n_head // self.kv_heads, dim=1) for t in (k, v))  # (B, H, P, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class DecoderBlock(Block):
    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.norm_cross, self.cross = make_norm(cfg), CrossAttention(cfg)

    def forward(self, x, rope, mask, causal, cache, layer):
        x = x + self.drop(self.attn(self.norm1(x), rope, mask, causal, cache, layer))
        x = x + self.drop(self.cross(self.norm_cross(x), rope, *cache.cross[layer], cache.prefix_mask))
        return x + self.drop(self.mlp(self.norm2(x)))


class EncoderDecoder(Transformer):
    """Maps (prefix, target) to logits over the target. n_layer blocks in the encoder and as many in the decoder.

    One embedding serves both. With tie_weights=False, as in T5 1.1, the output layer has a table of its own: only then
    do the parameters of the paper's Base add up to its 590M.
    """

    block = DecoderBlock

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.encoder = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.encoder_norm = make_norm(cfg)
        self._init_weights()

    def encode(self, prefix: Tensor, room: int = 0) -> CrossCache:
        """Read the prefix (B, P) once: keys and values for every decoder layer. See Transformer.encode."""
        cache, padded = CrossCache(len(self.blocks), room), bool((prefix == self.cfg.pad_id).any())
        real = prefix != self.cfg.pad_id if padded else None
        cache.prefix_mask = real[:, None, None] if padded else None
        x, rope, mask, causal = self._place(self.tok(prefix), None, "bidirectional", real)
        memory = self._run_encoder(x, rope, mask)
        cache.cross = [block.cross.read(memory, rope) for block in self.blocks]
        return cache

    def compile_(self) -> None:
        super().compile_()
        self._run_encoder = torch.compile(self._run_encoder)

    def _run_encoder(self, x, rope, mask):
        for block in self.encoder:
            x = block(x, rope, mask, False, None, 0)
        return self.encoder_norm(x)


def build_model(cfg: ModelConfig) -> Transformer:
    """The network of cfg.arch, freshly initialised."""
    return (EncoderDecoder if cfg.arch == "encoder_decoder" else Transformer)(cfg)


class _NothingDrawn(TorchFunctionMode):
    """Leaves weights as they are made: to initialise those without memory, torch would load its compiler, 2 seconds."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None  # they fill a tensor in place, and nobody reads what they return
        return func(*args, **(kwargs or {}))


def model_without_weights(cfg: ModelConfig) -> Transformer:
    """The network of cfg in names and shapes: its tensors are on the meta device and take no memory."""
    with torch.device("meta"), _NothingDrawn():
        return build_model(cfg)


def assemble(cfg: ModelConfig, weights: dict[str, Tensor]) -> Transformer:
    """The network of cfg around these tensors: none is copied or drawn, and each keeps its number format.

    Layers of ADDED_BY_CONVERSION that weights lack are zero, so that the network computes what it did without them.
    Raises ValueError, with the names, where another is missing, unexpected or of another shape.
    """
    model = model_without_weights(cfg)
    some = next(iter(weights.values()))
    added = {
        name: torch.zeros(like.shape, dtype=some.dtype, device=some.device)
        for name, like in model.state_dict().items()
        if name not in weights and name.split(".")[0] in ADDED_BY_CONVERSION
    }
    try:
        missing, unexpected = model.load_state_dict(weights | added, strict=False, assign=True)
    except RuntimeError as error:  # shapes
        raise ValueError(f"these settings need other parameters: {str(error).splitlines()[-1].strip()}") from None
    if missing or unexpected:
        raise ValueError(f"these settings need other parameters: missing {missing}, unexpected {unexpected}")
    if cfg.tie_weights:
        model.head.weight = model.tok.weight
    if cfg.position == "rope":
        model.rope = rope_table(cfg).to(some.device)
    return model.eval()
