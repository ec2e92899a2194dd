"""attention.py: torch's attention, in value and gradient."""

import pytest
import torch
from torch.nn import functional as F

import attention
from attention import by_products, products_pay
from device import autocast
from model import KVCache

MASKS = {
    "none": (None, False),
    "causal": (None, True),
    "some": (torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(1)) > 0.5, False),
}


def parts(dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("case", MASKS)
def test_values_and_gradients_are_those_of_torch(case):
    mask, causal = MASKS[case]
    mask = mask if mask is None else mask | torch.eye(7, dtype=torch.bool)  # every row sees itself
    found = []
    for attend in (by_products, lambda q, k, v, mask, causal: F.scaled_dot_product_attention(q, k, v, mask, 0, causal)):
        q, k, v = parts()
        y = attend(q, k, v, mask, causal)
        (y * torch.arange(8)).sum().backward()
        found.append([y, q.grad, k.grad, v.grad])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


def test_in_bfloat16_the_error_is_that_of_torch():
    """Of the float32 result both kernels are off by bfloat16's rounding; ours by no more than twice torch's."""
    q, k, v = (part.detach() * 3 for part in parts())
    exact = F.scaled_dot_product_attention(q, k, v)
    half = [part.bfloat16() for part in (q, k, v)]
    ours = (by_products(*half, None, False) - exact).abs().max()
    theirs = (F.scaled_dot_product_attention(*half) - exact).abs().max()
    assert ours < max(2 * theirs, 0.02 * exact.abs().max())


def test_products_are_used_where_they_pay(monkeypatch):
    """bfloat16 with a gradient, by type or by autocast, up to MOST keys and without dropout; else torch's kernel."""
    q, k, _ = parts(torch.bfloat16)
    assert products_pay(q, k, 0.0)
    assert not products_pay(q.detach(), k, 0.0) and not products_pay(q, k, 0.1)
    q, k, v = parts()
    assert not products_pay(q, k, 0.0)
    with autocast(torch.device("cpu"), "bfloat16"):
        assert products_pay(q, k, 0.0)
        assert KVCache.attend(q, k, v, None, 0.0, True, 0).grad_fn.name() != "ScaledDotProductAttentionBackward0"
        monkeypatch.setattr(attention, "MOST", 6)
        assert not products_pay(q, k, 0.0)
