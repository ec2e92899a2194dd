"""extras/speculative.py: its text is autoregressive.generate's, however bad the drafts are."""

import math
from itertools import product

import pytest
import torch
from drafters import KINDS, ORDINARY, PAD, S, drafter, network, prompts

import autoregressive
from extras import speculative
from extras.speculative import SamplerConfig, generate, probabilities, round_layout, verify
from infra.rng import make_rng

GREEDY = autoregressive.SamplerConfig()


@pytest.mark.parametrize("masks", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_greedy_text_is_ars_on_200_prompts(kind, masks):
    model = network(**kind)
    prefix = prompts(200)
    expected = autoregressive.generate(model, prefix, GREEDY)
    found = generate(drafter(model, masks), prefix, SamplerConfig())
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.score, expected.score, atol=1e-5, rtol=0)
    assert (found.calls <= expected.calls).all()
    assert (found.calls < expected.calls).any() and (found.calls == expected.calls).any()
    assert expected.calls.unique().numel() > 2 and len(expected.tokens.unique(dim=0)) > 30


@pytest.mark.parametrize(("masks", "calls"), [(1, 5), (3, 3), (7, 2)])
def test_right_drafts_add_a_token_for_each_mask_and_one_more(monkeypatch, masks, calls):
    """1 token in the first call, masks + 1 in each other one. Wrong drafts: 1 in each."""
    model = network()
    prefix = torch.tensor([[0, 3, 5, 1]])
    text = autoregressive.generate(model, prefix, GREEDY).tokens
    assert PAD not in text

    def drawn(error):
        def draw(logits, cfg, rng):
            start = 1 + rng.step * (1 if error else masks + 1)
            new = torch.full((1, masks), PAD)
            rest = text[:, start : start + masks]
            new[:, : rest.shape[1]] = (rest + error) % ORDINARY
            return new, None

        return draw

    shown = []

    def watch(*step):
        shown.append(step)

    for error, expected in ((0, calls), (1, S)):
        monkeypatch.setattr(speculative, "draw", drawn(error))
        shown.clear()
        found = generate(drafter(model, masks), prefix, SamplerConfig(), on_step=watch)
        assert torch.equal(found.tokens, text) and found.calls.tolist() == [expected]
        _, canvas, logits, _ = shown[0]
        assert canvas[0, 0] == text[0, 0] == logits[0, 0].argmax() and (logits[:, 1:] == 0).all()
        assert torch.equal(canvas[0, 1 : masks + 1], (text[0, 1 : masks + 1] + error) % ORDINARY)


def test_the_layout_is_that_of_its_picture():
    number, offset, edges = round_layout(2, 2)
    lines = round_layout.__wrapped__.__doc__.splitlines()
    drawn = [line.split()[-6:] for line in lines if " . " in line or "x x x" in line]
    assert len(drawn) == 6
    assert [[mark == "x" for mark in row] for row in drawn] == edges.tolist()
    assert number.tolist() == [0, 0, 1, 2, 1, 2] and offset.tolist() == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_gets_the_same_text_and_calls_alone_and_among_eight(temperature):
    made = drafter(network())
    cfg = SamplerConfig(temperature)
    prefix = prompts(8)
    example = torch.arange(30, 38)
    together = generate(made, prefix, cfg, seed=3, example=example)
    assert len(together.calls.unique()) > 1
    for row in range(8):
        alone = generate(made, prefix[row : row + 1], cfg, 3, example[row : row + 1])
        assert torch.equal(alone.tokens[0], together.tokens[row])
        assert alone.calls[0] == together.calls[row]
        torch.testing.assert_close(alone.score[0], together.score[row])
    other = generate(made, prefix, cfg, seed=4, example=example)
    assert torch.equal(other.tokens, together.tokens) == (temperature == 0)


SMALL = dict(vocab_size=6, n_ordinary=2, pad_id=2, sep_id=3, mask_id=4, target_length=4)
TEXTS = list(product(range(2), repeat=3))  # all texts of three slots: nothing follows a pad, 2
TEXTS += [(a, b, 2) for a, b in product(range(2), repeat=2)] + [(0, 2, 2), (1, 2, 2), (2, 2, 2)]
CHI_SQUARE = 36.12  # 14 degrees of freedom, exceeded once in 1,000 times
SAMPLES = 4000


def ar_probabilities(model, prefix: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return AR's probability of each of TEXTS, from its own step-by-step logits."""
    found = []
    for text in TEXTS:
        cache, last, chance = model.encode(prefix), torch.tensor([[3]]), 1.0
        for token in text[: text.index(2) + 1 if 2 in text else 3]:
            logits = model.decode(cache, last, append=True)[0, -1, :3]
            chance *= (logits / temperature).softmax(-1)[token].item()
            last = torch.tensor([[token]])
        found.append(chance)
    return torch.tensor(found, dtype=torch.double)


def chi_square(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.tensor([(tokens == torch.tensor(text)).all(1).sum() for text in TEXTS])
    assert counts.sum() == len(tokens)  # each text is one of TEXTS
    return ((counts - len(tokens) * expected) ** 2 / (len(tokens) * expected)).sum().item()


@pytest.mark.parametrize("temperature", [0.6, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "bias",
    [None, [-2.0, 2.0, -2.0, 0.0, 0.0, 0.0], [3.0, 0.0, -math.inf, 0.0, 0.0, 0.0]],
    ids=["own", "certain and wrong", "never a pad"],
)
def test_samples_have_ars_distribution_whatever_the_draft(bias, temperature, monkeypatch):
    model = network(**SMALL)
    model.head.weight.data[:3] *= 0.2  # no text too rare; banned tokens remain the likeliest
    prefix = torch.tensor([[0, 1]])
    expected = ar_probabilities(model, prefix, temperature)
    assert expected.sum().item() == pytest.approx(1, abs=1e-9)
    own = speculative.draw
    if bias is not None:
        wrong = torch.tensor(bias).double()
        monkeypatch.setattr(speculative, "draw", lambda x, *rest: own(wrong.expand_as(x), *rest))
    cfg = SamplerConfig(temperature)
    found = generate(drafter(model), prefix.expand(SAMPLES, 2), cfg, seed=1)
    assert chi_square(found.tokens, expected) < CHI_SQUARE
    assert found.calls.unique().numel() > 1  # some drafts were accepted and some rejected


def test_a_token_is_accepted_with_probability_min_1_p_over_q():
    """Token 0 in 40% of cases, 1 and 2 always. A rejected one becomes 2, always."""
    n = 20_000
    q = torch.tensor([0.5, 0.3, 0.2]).expand(n, 1, 3)
    p = torch.tensor([0.2, 0.3, 0.5]).expand(n, 2, 3)
    draft = torch.arange(n)[:, None] % 3
    rng = make_rng(0, torch.arange(n))
    found, count = verify(draft, q, p.log(), SamplerConfig(1.0), rng)
    kept = count == 2
    assert torch.equal(kept, found[:, 0] == draft[:, 0])
    shares = [kept[draft[:, 0] == token].double().mean().item() for token in range(3)]
    assert shares == pytest.approx([0.4, 1.0, 1.0], abs=0.02) and shares[1:] == [1.0, 1.0]
    assert (found[~kept, 0] == 2).all()
    last = torch.bincount(found[kept, 1], minlength=3) / kept.sum()
    assert last.tolist() == pytest.approx([0.2, 0.3, 0.5], abs=0.02)


@pytest.mark.parametrize("settings", [dict(top_k=2), dict(top_p=0.7), dict(top_k=3, top_p=0.8)])
def test_top_k_and_top_p_are_autoregressives(settings):
    """Its draws as frequencies, and no token that it never draws."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0]).log_softmax(-1)
    cfg = SamplerConfig(0.8, **settings)
    p = probabilities(logits[None, None], cfg)[0, 0]
    drawn = autoregressive.draw_next(
        logits.expand(20_000, -1), cfg, make_rng(0, torch.arange(20_000))
    )
    shares = torch.bincount(drawn, minlength=5) / 20_000
    assert torch.equal(shares > 0, p > 0) and (p == 0).any()
    assert shares.tolist() == pytest.approx(p.tolist(), abs=0.012)
    q = torch.zeros(2, 3, 5)
    drafts, _ = speculative.draw(q, cfg, make_rng(0, torch.arange(2)))
    assert drafts.shape == (2, 3)
