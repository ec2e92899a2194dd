"""Cross-entropy that needs no memory: its gradient is written where the logits were.

F.cross_entropy holds a vocabulary of float32 numbers for each slot three times over, log-probabilities and two
gradients. With GPT-2's vocabulary and 12 blocks that is twice as much as all activations. Here a few slots at a time
become float32, and what the backward pass will ask for is computed at once. So whoever reads the logits (the next
pass of diffusion does) reads them before.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

AT_A_TIME = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits that are float32: what a cache holds, what keeps a GPU busy


def cross_entropy_(logits: Tensor, expected: Tensor) -> Tensor:
    """Mean negative log-likelihood (), nats, of expected (B, T) under logits (B, T, V); -100 is not scored.

    Uses the logits up, where they have a gradient: they must be another computation's result, with no other gradient.
    """
    if not logits.requires_grad:
        return F.cross_entropy(logits.flatten(0, 1), expected.flatten())
    return _CrossEntropy.apply(logits, expected)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, expected):
        rows, expected = logits.detach().reshape(-1, logits.shape[-1]), expected.reshape(-1, 1)  # (N, V), (N, 1)
        exact = torch.promote_types(logits.dtype, torch.float32)
        scored = (expected >= 0).to(exact)
        weight, expected = scored / scored.sum(), expected.clamp(min=0)
        few = max(1, AT_A_TIME.get(logits.device.type, 1 << 20) // logits.shape[-1])
        total = scored.new_zeros(())
        for part, right, w in zip(rows.split(few), expected.split(few), weight.split(few)):
            p, high = part.to(exact), part.amax(-1, keepdim=True).to(exact)
            given = p.gather(1, right)
            mass = p.sub_(high).exp_().sum(-1, keepdim=True)
            total += ((mass.log() + high - given) * w).sum()
            part.copy_(p.mul_(w / mass).scatter_add_(1, right, -w))  # d loss / d logits: softmax less what is right
        ctx.gradient = rows.view_as(logits)
        return total

    @staticmethod
    def backward(ctx, of_loss):
        gradient, ctx.gradient = ctx.gradient, None
        assert gradient is not None, "the logits are used up: there is one backward pass"
        return gradient.mul_(of_loss), None
