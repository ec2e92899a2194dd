"""The encoder-decoder of the paper's architecture study (arXiv 2401.17181, section 4.3).

The encoder reads the prefix once, in both directions. The decoder reads the target, causal (AR) or
bidirectional (diffusion), and attends to the encoder's output through cross-attention. `encode`,
`decode` and `forward` are those of the decoder-only network, so losses, samplers and the conversion
work with both.
"""

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model import Block, KVCache, ModelConfig, Transformer, attend, find_padding, make_norm, rotate


class CrossCache(KVCache):
    """L decoder layers have 2 L entries: those of the target, then those of the prefix."""

    prefix_mask: Tensor | None = None  # (B, 1, 1, P) bool, False for padding

    def select(self, index: Tensor) -> "CrossCache":
        other = super().select(index)
        other.prefix_mask = None if self.prefix_mask is None else self.prefix_mask[index]
        return other


class CrossAttention(nn.Module):
    """Attention from target to prefix.

    Differs from T5: queries and keys are rotated, so pure noise can find its place in the prefix.
    """

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        width = cfg.n_head * cfg.head_size
        kv_width = cfg.kv_heads * cfg.head_size
        self.q = nn.Linear(cfg.n_embd, width, bias=cfg.bias or cfg.qkv_bias)
        self.kv = nn.Linear(cfg.n_embd, 2 * kv_width, bias=cfg.bias or cfg.qkv_bias)
        self.proj = nn.Linear(width, cfg.n_embd, bias=cfg.bias)

    def read(self, memory: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys and values, 2 x (B, G, P, D), of the encoder's output (B, P, C)."""
        B, P, _ = memory.shape
        kv = self.kv(memory).view(B, P, 2, self.cfg.kv_heads, self.cfg.head_size)
        k, v = kv.permute(2, 0, 3, 1, 4)  # 2 x (B, G, P, D)
        return (k if rope is None else rotate(k, rope)), v

    def forward(self, x, rope, k, v, mask) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.cfg.n_head, self.cfg.head_size)
        q = q.transpose(1, 2)  # (B, H, T, D)
        q = q if rope is None else rotate(q, rope)
        dropout = self.cfg.dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout, causal=False)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).flatten(2))  # (B, T, C)


class DecoderBlock(Block):
    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.norm_cross = make_norm(cfg)
        self.cross = CrossAttention(cfg)

    def forward(self, x, rope, mask, causal, cache, layer):
        prefix = self.cross.cfg.n_layer + layer
        k, v = cache.k[prefix], cache.v[prefix]
        x = x + self.drop(self.attn(self.norm1(x), rope, mask, causal, cache, layer))
        x = x + self.drop(self.cross(self.norm_cross(x), rope, k, v, cache.prefix_mask))
        return x + self.drop(self.mlp(self.norm2(x)))


class EncoderDecoder(Transformer):
    """Maps (prefix, target) to logits over the target, with n_layer blocks in each half.

    Both halves share one embedding. With tie_weights=False, as in T5 1.1, the output layer has its
    own weights. Only then do the parameters of the paper's Base model add up to its 590M.
    """

    block = DecoderBlock

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.encoder = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.encoder_norm = make_norm(cfg)
        self.init_weights()

    def encode(self, prefix: Tensor, reserve: int = 0) -> CrossCache:
        """Read the prefix (B, P), for each decoder layer. See Transformer.encode."""
        n_layer = self.cfg.n_layer
        cache = CrossCache(2 * n_layer, reserve)
        valid = find_padding(prefix, self.cfg)
        cache.prefix_mask = None if valid is None else valid[:, None, None]
        x, rope, mask, causal = self.prepare_input(self.tok(prefix), None, "bidirectional", valid)
        memory = self.run_blocks(x, rope, mask, causal, None)  # (B, P, C)
        for layer, block in enumerate(self.blocks, start=n_layer):
            cache.k[layer], cache.v[layer] = block.cross.read(memory, rope)
        return cache

    def run_blocks(self, x, rope, mask, causal, cache):
        """Run the decoder or, without a cache, the encoder. So one torch.compile serves both."""
        if cache is not None:
            return super().run_blocks(x, rope, mask, causal, cache)
        for block in self.encoder:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, causal, None, 0, use_reentrant=False)
            else:
                x = block(x, rope, mask, causal, None, 0)
        return self.encoder_norm(x)
