"""Gradient checkpointing: the backward pass computes the inside of each block again, and memory need not keep it.

What stays of a block is its input, n_embd numbers a token, where otherwise about 20 times as many stay. The price is
one more forward pass through the blocks, a third of a training step (Chen et al. 2016, arXiv 1604.06174).
"""

from copy import copy

import torch
from torch.utils.checkpoint import checkpoint


def recompute_blocks(model) -> None:
    """Let the model train so, with the same gradients; what runs without gradients is not touched. Not for a compiled
    model."""
    plain = model._run_blocks

    def run_blocks(x, rope, mask, causal, cache):
        if not torch.is_grad_enabled():
            return plain(x, rope, mask, causal, cache)
        past = _copy(cache)  # the caller's moves on, and the backward pass must find what was there
        for layer, block in enumerate(model.blocks):
            x, k, v = checkpoint(_run, block, x, rope, mask, causal, past, layer, use_reentrant=False)
            if cache is not None:
                cache.k[layer], cache.v[layer] = k, v
        return model.norm(x)

    model._run_blocks = run_blocks
    if model.cfg.arch == "encoder_decoder":
        plain_encoder = model._run_encoder

        def run_encoder(x, rope, mask):
            if not torch.is_grad_enabled():
                return plain_encoder(x, rope, mask)
            for block in model.encoder:
                x = checkpoint(block, x, rope, mask, False, None, 0, use_reentrant=False)
            return model.encoder_norm(x)

        model._run_encoder = run_encoder


def _run(block, x, rope, mask, causal, past, layer):
    """(x, k, v) of a block that reads behind `past` and leaves it as it is, so that it can be run twice."""
    cache = _copy(past)
    x = block(x, rope, mask, causal, cache, layer)
    return (x, None, None) if cache is None else (x, cache.k[layer], cache.v[layer])


def _copy(cache):
    if cache is None:
        return None
    other = copy(cache)
    other.k, other.v = list(cache.k), list(cache.v)
    return other
