"""Attention of a training step on a CPU in bfloat16: two products of matrices with a softmax between them.

torch's kernel makes the products in pieces that are small for a CPU and converts them to float32 and back: twice the
time. What the products cost is memory: the scores, (B, H, T, S), are kept for the backward pass. So they are used up
to MOST keys.
"""

import math

import torch
from torch import Tensor

MOST = 512  # keys; their scores are a third of what is kept of a block at GPT-2's head size of 64


def products_pay(q: Tensor, k: Tensor, dropout: float) -> bool:
    """Whether by_products is the faster way for queries (B, H, T, D) and keys (B, H, S, D)."""
    half = q.device.type == "cpu" and (q.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"))
    return half and q.requires_grad and k.shape[2] <= MOST and not dropout


def by_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """scaled_dot_product_attention(q, k, v, mask, is_causal=causal): (B, H, T, D).

    The scores are bfloat16, which rounds them to 8 bits; softmax computes in float32 and rounds what it returns.
    """
    T, S = q.shape[2], k.shape[2]
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, T, S)
    if causal:
        mask = torch.ones(T, S, dtype=torch.bool).tril()  # upper-left, as there
    if mask is not None:
        scores += torch.zeros(mask.shape, dtype=scores.dtype).masked_fill_(~mask, -math.inf)
    return scores.softmax(-1) @ v
