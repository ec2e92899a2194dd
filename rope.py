"""Rotary position embedding (RoFormer, arXiv 2104.09864), and the stretching of it that Llama 3 was trained with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RopeConfig:
    """How fast queries and keys are turned. With rope_factor=1 the other three have no effect."""

    rope_base: float = 10000.0
    rope_factor: float = 1.0  # how much slower the slow pairs turn (Llama 3.1: 8, 3.2: 32), so that more text fits
    rope_slow_turns: float = 1.0  # slow: fewer turns than this within rope_trained_length
    rope_fast_turns: float = 4.0  # fast: more; those stay as they are, and between the two it is blended
    rope_trained_length: int = 8192  # tokens that were read at once before the stretching

    def check_rope(self) -> None:
        """Raises ValueError where a setting makes no table."""
        for name in ("rope_base", "rope_factor", "rope_trained_length"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.rope_slow_turns < self.rope_fast_turns:
            raise ValueError(
                f"rope_slow_turns must be 0 or more and below rope_fast_turns, got {self.rope_slow_turns} and "
                f"{self.rope_fast_turns}"
            )


def rope_table(cfg) -> Tensor:
    """cos and sin of the rotary position embedding, (2, block_size, D), halves repeated. RoFormer, section 3.2."""
    frequency = cfg.rope_base ** (-torch.arange(0, cfg.head_size, 2).float() / cfg.head_size)  # (D / 2,)
    if cfg.rope_factor != 1:  # Llama 3's rule, as its published code and transformers' rope_type "llama3" have it
        turns = cfg.rope_trained_length * frequency / (2 * math.pi)
        kept = ((turns - cfg.rope_slow_turns) / (cfg.rope_fast_turns - cfg.rope_slow_turns)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / cfg.rope_factor)
    angle = torch.outer(torch.arange(cfg.block_size).float(), frequency).repeat(1, 2)  # (block_size, D)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn x (B, H, T, D) by its positions; pairs are (i, i + D/2), as in Llama's and Qwen's weights."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
