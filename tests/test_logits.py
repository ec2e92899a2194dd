"""infra/logits.py: torch's cross-entropy and softmax as oracles, with less memory."""

import math

import pytest
import torch
from memory import peak_bytes
from torch.nn import functional as F

from infra import logits as module
from infra.logits import (
    argmax,
    banned_token_ids,
    cross_entropy_in_place,
    draw_tokens,
    entropy,
    token_nll,
)
from model import ModelConfig

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def example(rows: int, V: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (2, rows, V), some of them large, and tokens, of which some are not scored."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.randint(V, (2, rows), generator=generator)
    expected[:, 0] = -100
    return 5 * torch.randn(2, rows, V, generator=generator).to(dtype), expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_and_gradient_equal_torchs(monkeypatch, dtype, chunk, device):
    """A part of the loss too, as with gradient accumulation. bfloat16 rounds the gradient."""
    monkeypatch.setattr(module, "LOSS_CHUNK", {device: chunk})
    logits, expected = (part.to(device) for part in example(7, 19, dtype))
    exact = logits.to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
    theirs = F.cross_entropy(exact.flatten(0, 1), expected.flatten())
    (theirs / 3).backward()
    leaf = logits.clone().requires_grad_()
    ours = cross_entropy_in_place(leaf * 1, expected)
    (ours / 3).backward()
    torch.testing.assert_close(ours, theirs, check_dtype=False)
    rounding = dict(rtol=0.02, atol=1e-5) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(leaf.grad.to(exact.dtype), exact.grad, **rounding)


def test_without_a_gradient_the_logits_are_unchanged():
    logits, expected = example(4, 9)
    before = logits.clone()
    theirs = F.cross_entropy(logits.flatten(0, 1), expected.flatten())
    assert cross_entropy_in_place(logits, expected) == theirs
    assert torch.equal(logits, before)


def test_no_second_array_of_logits_is_made(monkeypatch):
    """torch makes three more in float32."""
    monkeypatch.setattr(module, "LOSS_CHUNK", {"cpu": 1 << 14})
    monkeypatch.setattr(module, "CHUNK", {"cpu": 1 << 14})
    logits, expected = example(64, 4096, torch.bfloat16)
    tokens = expected.clamp(min=0)
    for function in (lambda: token_nll(logits, tokens), lambda: entropy(logits)):
        assert peak_bytes(function) < 0.2 * logits.nbytes
    peaks = []
    for loss in (
        cross_entropy_in_place,
        lambda x, e: F.cross_entropy(x.flatten(0, 1), e.flatten()),
    ):
        product = example(64, 4096, torch.bfloat16)[0].requires_grad_() * 1
        step = peak_bytes(lambda loss=loss, product=product: loss(product, expected).backward())
        peaks.append(step / logits.nbytes)
    assert peaks[0] < 1.5 < 3 < peaks[1], peaks  # ours: the gradient of the product


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("V, chunk", [(40, 1 << 18), (40, 100), (3000, 1 << 18), (3000, 7000)])
def test_nll_entropy_and_argmax_equal_those_of_log_softmax(monkeypatch, V, chunk, device):
    """In float64. A banned token has probability 0, and 0 log 0 is 0."""
    monkeypatch.setattr(module, "CHUNK", {device: chunk})
    logits, tokens = (part.to(device) for part in example(11, V))
    tokens = tokens.clamp(min=1)
    logits[..., 0] = -math.inf
    logits = logits[:, 1:]  # not contiguous, as in sampling
    tokens = tokens[:, 1:]
    log_p = logits.double().log_softmax(-1)
    expected = -log_p.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(token_nll(logits, tokens).double(), expected, rtol=1e-5, atol=1e-5)
    for temperature in (1.0, 0.3):
        exact = torch.special.entr((logits.double() / temperature).softmax(-1)).sum(-1)
        ours = entropy(logits, temperature).double()
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)
    assert torch.equal(argmax(logits), logits.argmax(-1))
    assert torch.equal(draw_tokens(logits, 0.0, torch.ones_like(expected)), logits.argmax(-1))


@pytest.mark.parametrize("V, temperature", [(256, 0.5), (3000, 1.0), (7, 2.0)])
def test_drawing_inverts_the_cdf(V, temperature):
    """The oracle is one running sum in float64. A number on a step of it may go to either side."""
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(40, 50, V, generator=generator) * 3
    u = torch.rand(40, 50, generator=generator)
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    drawn = draw_tokens(logits, temperature, u)
    exact = torch.searchsorted(cdf, u.double()[..., None], right=True)[..., 0]
    low, high = cdf.gather(-1, torch.stack([drawn - 1, drawn], -1).clamp(min=0)).unbind(-1)
    low = torch.where(drawn > 0, low, 0.0)
    assert (drawn == exact).float().mean() > 0.999
    assert ((u > low - 1e-6) & (u < high + 1e-6)).all()


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize("V", [300, 3000])
def test_a_banned_token_is_never_drawn(u, V):
    """Banned ids at both ends and in the middle; a search may slip past them at both ends."""
    logits = torch.randn(500, 4, V, generator=torch.Generator().manual_seed(0))
    banned = torch.tensor([0, 1, 100, 101, 102, *range(V - 2, V)])
    logits[..., banned] = -math.inf
    logits[0, 0, 2:100] = 0.0  # equal masses put a step of the CDF exactly on u
    drawn = draw_tokens(logits, 1.0, torch.full((500, 4), u))
    assert not torch.isin(drawn, banned).any()


def test_a_number_beyond_the_last_token_gives_the_likeliest():
    logits = torch.tensor([[[0.0, 3.0, 1.0, -math.inf]]])
    assert draw_tokens(logits, 1.0, torch.tensor([[1.0]])).item() == 1


@pytest.mark.parametrize("eos_id, banned", [(-1, [6, 7, 8]), (2, [2, 6, 7, 8])])
def test_text_holds_ordinary_tokens_and_pad_only(eos_id, banned):
    cfg = ModelConfig(vocab_size=9, n_ordinary=5, pad_id=5, sep_id=6, mask_id=7, eos_id=eos_id)
    assert banned_token_ids(cfg, "cpu").tolist() == banned
