"""extras/speculative.py: its text is autoregressive.generate's, however bad the draft is."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoregressive
from extras.speculative import SamplerConfig, generate, verify_draft
from infra.rng import make_rng
from model import ModelConfig, Transformer

ORDINARY, PAD, SEP, MASK, V, S = 6, 6, 7, 8, 9, 8
SIZES = dict(vocab_size=V, n_ordinary=ORDINARY, pad_id=PAD, sep_id=SEP, mask_id=MASK)
SIZES |= dict(target_length=S + 1, block_size=16, n_layer=2, n_head=2, n_embd=16)
SIZES |= dict(tie_weights=False, paradigm="diffusion", target_attention="bidirectional")
GREEDY = autoregressive.SamplerConfig()
KINDS = [
    dict(prefix_attention="causal", shift=True, self_conditioning=True),
    dict(prefix_attention="causal", noise="mask"),
    dict(prefix_attention="bidirectional", shift=True, noise="mask"),
    dict(prefix_attention="bidirectional", self_conditioning=True),
    dict(prefix_attention="bidirectional", shift=True, sep_id=-1),
]


def network(**settings) -> Transformer:
    """Random weights, large enough for different texts."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES | settings)).double().eval()
    for p in model.parameters():
        p.data *= 2
    if model.cfg.self_conditioning:
        nn.init.normal_(model.self_cond_proj.weight)
    return model


def prompts(n: int) -> torch.Tensor:
    """Prefixes (n, 5) of 1 to 5 tokens, then pads."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ORDINARY, (n, 5), generator=generator)
    lengths = torch.randint(1, 6, (n, 1), generator=generator)
    return torch.where(torch.arange(5) < lengths, ids, PAD)


class Drafted:
    """A model with another draft: draft (B or 1, S, V) replaces its bidirectional logits."""

    def __init__(self, model, draft=None):
        self.model = model
        self.cfg = model.cfg
        self.draft = draft
        self.drafts = 0
        self.checks = 0
        self.encode = model.encode
        self.expected_embedding = model.expected_embedding

    def decode(self, cache, target, self_cond=None, attention=None):
        if attention == "causal":
            self.checks += 1
            return self.model.decode(cache, target, attention=attention)
        self.drafts += 1
        if self.draft is None:
            return self.model.decode(cache, target, self_cond=self_cond)
        logits = self.draft.expand(len(target), -1, -1)
        other = torch.zeros_like(logits[:, :1])
        return torch.cat([logits, other] if self.cfg.shift else [other, logits], dim=1)


def certain(tokens: torch.Tensor) -> torch.Tensor:
    return 50.0 * F.one_hot(tokens, V).double()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_greedy_text_is_ars_on_200_prompts(kind):
    model, prefix = network(**kind), prompts(200)
    expected = autoregressive.generate(model, prefix, GREEDY)
    found = generate(model, prefix, SamplerConfig())
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.score, expected.score, atol=1e-5, rtol=0)
    rounds = (found.calls - 1) // 2  # two drafts and a check, then a draft and a check
    assert (rounds < expected.calls).any() and (rounds > 1).any()  # some accepted, some rejected
    assert expected.calls.unique().numel() > 2 and len(expected.tokens.unique(dim=0)) > 30


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("error", [0, 1])
def test_a_right_draft_needs_two_calls_and_a_wrong_one_two_per_token(error, shift):
    model, prefix = network(prefix_attention="causal", shift=shift), prompts(10)
    expected = autoregressive.generate(model, prefix, GREEDY)
    for row in range(10):
        text = expected.tokens[row : row + 1]
        drafted = Drafted(model, certain((text + error) % ORDINARY if error else text))
        found = generate(drafted, prefix[row : row + 1], SamplerConfig(draft_steps=1))
        assert torch.equal(found.tokens[0], expected.tokens[row])
        assert found.calls[0] == 2 * (expected.calls[row] if error else 1)
        assert found.calls[0] == drafted.drafts + drafted.checks


@pytest.mark.parametrize("temperature, draft_steps", [(0.0, 1), (0.0, 3), (1.0, 2)])
def test_a_row_gets_the_same_text_and_calls_alone_and_among_eight(temperature, draft_steps):
    model, cfg = network(**KINDS[0]), SamplerConfig(temperature, draft_steps)
    prefix, example = prompts(8), torch.arange(30, 38)
    together = generate(model, prefix, cfg, seed=3, example=example)
    assert len(together.calls.unique()) > 1
    for row in range(8):
        alone = Drafted(model)
        found = generate(alone, prefix[row : row + 1], cfg, 3, example[row : row + 1])
        assert torch.equal(found.tokens[0], together.tokens[row])
        assert alone.drafts == draft_steps + alone.checks - 1
        assert found.calls[0] == together.calls[row] == alone.drafts + alone.checks
        torch.testing.assert_close(found.score[0], together.score[row])
    other = generate(model, prefix, cfg, seed=4, example=example)
    assert torch.equal(other.tokens, together.tokens) == (temperature == 0)


SMALL = dict(vocab_size=6, n_ordinary=2, pad_id=2, sep_id=3, mask_id=4, target_length=4)
TEXTS = list(product(range(2), repeat=3))  # all texts of three slots: nothing follows a pad, 2
TEXTS += [(a, b, 2) for a, b in product(range(2), repeat=2)] + [(0, 2, 2), (1, 2, 2), (2, 2, 2)]
CHI_SQUARE = 36.12  # 14 degrees of freedom, exceeded once in 1,000 times
SAMPLES = 8000


def calm_network() -> Transformer:
    """Three slots, and no text too rare for the chi-square test."""
    model = network(prefix_attention="bidirectional", self_conditioning=True, **SMALL)
    model.head.weight.data[:3] *= 0.2  # banned tokens remain the most likely ones
    return model


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
    "draft",
    [None, [0.0] * 6, [-2.0, 2.0, -2.0, 0.0, 0.0, 0.0], [3.0, 0.0, -math.inf, 0.0, 0.0, 0.0]],
    ids=["own", "flat", "certain and wrong", "never a pad"],
)
def test_samples_have_ars_distribution_whatever_the_draft(draft, temperature):
    model, prefix = calm_network(), torch.tensor([[0, 1]])
    expected = ar_probabilities(model, prefix, temperature)
    assert expected.sum().item() == pytest.approx(1, abs=1e-9)
    logits = None if draft is None else torch.tensor(draft).double().expand(1, 3, 6)
    cfg, many = SamplerConfig(temperature), prefix.expand(SAMPLES, 2)
    found = generate(Drafted(model, logits), many, cfg, seed=1)
    assert chi_square(found.tokens, expected) < CHI_SQUARE
    assert found.calls.unique().numel() > 1  # some drafts were accepted and some rejected


def test_a_token_is_accepted_with_probability_min_1_p_over_q():
    """Token 0 in 40% of cases, 1 and 2 always. A rejected one becomes 2, always."""
    n, q, p = 20_000, torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    draft = torch.arange(n)[:, None] % 3
    logits = [x.log().expand(n, 1, 3) for x in (q, p)]
    zeros = torch.zeros(n, dtype=torch.long)
    found, end = verify_draft(draft, zeros, *logits, 1.0, make_rng(0, torch.arange(n)))
    kept = (found == draft)[:, 0]
    shares = [kept[draft[:, 0] == token].double().mean().item() for token in range(3)]
    assert shares == pytest.approx([0.4, 1.0, 1.0], abs=0.02) and shares[1:] == [1.0, 1.0]
    assert (found[~kept] == 2).all() and (end == 1).all()
