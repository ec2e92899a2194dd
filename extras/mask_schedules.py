"""Other ways to open the causal mask of a converted model during adaptation.

The default, mask_schedule=random, opens random edges (ar2diff.open_edges). Here a target of four
tokens is half of the way from causal to bidirectional; rows attend to columns:

    causal      random      blocks      bidirectional
    x . . .     x . x .     x x . .     x x x x
    x x . .     x x . x     x x . .     x x x x
    x x x .     x x x .     x x x x     x x x x
    x x x x     x x x x     x x x x     x x x x
"""

import torch
from torch import Tensor


def block_edges(batch, step: int, steps: int) -> Tensor:
    """Return the edges (T, T) bool that are open at this step; step steps - 1 opens all.

    Attention is bidirectional inside a block and causal across blocks, as in block diffusion
    (BD3-LM, arXiv 2503.09573). The block length grows linearly from 1, which is AR, to T. Because
    block borders move, an edge may close again for a few steps. Differs from BD3-LM: earlier blocks
    are corrupted too, and slot 0 belongs to the first block.
    """
    T = batch.target.shape[1]
    size = max(1, T * (step + 1) // steps)
    block = torch.arange(T, device=batch.target.device) // size
    return block[:, None] == block
