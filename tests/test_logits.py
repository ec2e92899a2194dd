"""cross_entropy.py: torch's cross-entropy, in value and gradient, with less memory."""

import pytest
import torch
from memory import peak_bytes
from torch.nn import functional as F

import cross_entropy
from cross_entropy import cross_entropy_


def made(rows: int, V: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (2, rows, V), some of them large, and what is expected, some of it not scored."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randint(V, (2, rows), generator=generator)
    expected[:, 0] = -100
    return 5 * torch.randn(2, rows, V, generator=generator).to(dtype), expected


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
@pytest.mark.parametrize("at_a_time", [1, 50, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradient_are_those_of_torch(monkeypatch, dtype, at_a_time, device):
    """Also of a part of the loss, as gradient accumulation asks for it. bfloat16: its own rounding, of the gradient."""
    monkeypatch.setattr(cross_entropy, "AT_A_TIME", {device: at_a_time})
    logits, expected = (part.to(device) for part in made(7, 19, dtype))
    exact = logits.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
    theirs = F.cross_entropy(exact.flatten(0, 1), expected.flatten())
    (theirs / 3).backward()
    leaf = logits.clone().requires_grad_()
    ours = cross_entropy_(leaf * 1, expected)
    (ours / 3).backward()
    torch.testing.assert_close(ours, theirs, check_dtype=False)
    rounding = dict(rtol=0.02, atol=1e-5) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(leaf.grad.to(exact.dtype), exact.grad, **rounding)


def test_without_a_gradient_the_logits_stay():
    logits, expected = made(4, 9)
    before = logits.clone()
    assert cross_entropy_(logits, expected) == F.cross_entropy(logits.flatten(0, 1), expected.flatten())
    assert torch.equal(logits, before)


def test_a_second_backward_pass_is_refused():
    logits, expected = made(4, 9)
    loss = cross_entropy_(logits.requires_grad_() * 1, expected)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="used up"):
        loss.backward()


def test_it_needs_a_few_slots_and_no_second_array_of_logits(monkeypatch):
    """torch holds three more in float32."""
    monkeypatch.setattr(cross_entropy, "AT_A_TIME", {"cpu": 1 << 14})
    peaks = []
    for loss in (cross_entropy_, lambda x, e: F.cross_entropy(x.flatten(0, 1), e.flatten())):
        logits, expected = made(64, 4096, torch.bfloat16)
        kept = (logits.requires_grad_() * 1, expected)
        peaks.append(peak_bytes(lambda loss=loss, kept=kept: loss(*kept).backward()) / logits.nbytes)
    assert peaks[0] < 1.5 < 3 < peaks[1], peaks  # ours: the gradient of the product before it
