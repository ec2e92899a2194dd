"""speculative.py: what it says is what autoregressive.generate says, however good or bad the draft is."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoregressive
from draws import draws_for
from model import ModelConfig, Transformer
from speculative import SamplerConfig, check, generate

ORDINARY, PAD, SEP, MASK, V, S = 6, 6, 7, 8, 9, 8
SIZES = dict(vocab_size=V, n_ordinary=ORDINARY, pad_id=PAD, sep_id=SEP, mask_id=MASK, target_length=S + 1)
FROZEN = dict(paradigm="diffusion", target_attention="bidirectional")
GREEDY = autoregressive.SamplerConfig()
KINDS = {
    f"{prefix} prefix, {'shift' if shift else 'no shift'}, {noise}{', self-conditioning' * conditioned}": dict(
        prefix_attention=prefix, shift=shift, noise=noise, self_conditioning=conditioned
    )
    for prefix, shift, noise, conditioned in [
        ("causal", True, "uniform", True),
        ("causal", False, "mask", False),
        ("bidirectional", True, "mask", False),
        ("bidirectional", False, "uniform", True),
        ("bidirectional", True, "uniform", True),
    ]
}


def network(**settings) -> Transformer:
    """Random weights, wild enough to say different things; pad is rare, so that texts have a length."""
    torch.manual_seed(0)
    sizes = SIZES | FROZEN | dict(n_layer=2, n_head=2, n_embd=16, block_size=16, tie_weights=False)
    model = Transformer(ModelConfig(**sizes | settings)).double().eval()
    for p in model.parameters():
        p.data *= 2
    if model.cfg.self_conditioning:
        nn.init.normal_(model.condition.weight)
    return model


def prompts(n: int, seed: int = 0) -> torch.Tensor:
    """(n, 5) prefixes of 0 to 5 tokens, pads behind them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(ORDINARY, (n, 5), generator=generator)
    return torch.where(torch.arange(5) < torch.randint(6, (n, 1), generator=generator), ids, PAD)


class Drafted:
    """A model whose bidirectional read is replaced: draft(target) gives the logits (B, S, V). It counts its calls."""

    def __init__(self, model, draft=None):
        self.model, self.cfg, self.draft, self.drafts, self.checks = model, model.cfg, draft, 0, 0
        self.encode, self.soft_embedding = model.encode, model.soft_embedding

    def decode(self, cache, target, estimate=None, opened=None):
        if opened is not None:
            self.checks += 1
            return self.model.decode(cache, target, opened=opened)
        self.drafts += 1
        if self.draft is None:
            return self.model.decode(cache, target, estimate=estimate)
        logits = self.draft(target)
        other = torch.zeros_like(logits[:, :1])
        return torch.cat([logits, other] if self.cfg.shift else [other, logits], dim=1)


def sure_of(tokens: torch.Tensor) -> torch.Tensor:
    return 50.0 * F.one_hot(tokens, V).double()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_ar_token_for_token_on_200_prompts(kind):
    model, prefix = network(**KINDS[kind]), prompts(200)
    expected, found = autoregressive.generate(model, prefix, GREEDY), generate(model, prefix, SamplerConfig())
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.score, expected.score, atol=1e-5, rtol=0)
    rounds = (found.calls - 1) // 2  # two drafts and a check, then a draft and a check
    assert (rounds < expected.calls).any() and (rounds > 1).any()  # drafts were kept, and drafts were refused
    assert expected.calls.unique().numel() > 2 and len(expected.tokens.unique(dim=0)) > 30


@pytest.mark.parametrize("shift", [True, False])
def test_a_draft_of_garbage_changes_no_token_and_costs_two_calls_a_token(shift):
    """The draft never says what AR would: the token after AR's in the vocabulary."""
    model, prefix = network(prefix_attention="causal", shift=shift), prompts(10)
    expected = autoregressive.generate(model, prefix, GREEDY)
    for row in range(10):
        other = sure_of((expected.tokens[row : row + 1] + 1) % ORDINARY)
        wrong = Drafted(model, lambda target, other=other: other)
        found = generate(wrong, prefix[row : row + 1], SamplerConfig(draft_steps=1))
        assert torch.equal(found.tokens[0], expected.tokens[row])
        assert found.calls[0] == 2 * expected.calls[row] == wrong.drafts + wrong.checks


def test_a_draft_that_is_right_is_kept_whole():
    model, prefix = network(prefix_attention="causal", shift=True), prompts(50)
    expected = autoregressive.generate(model, prefix, GREEDY)
    right = Drafted(model, lambda target: sure_of(expected.tokens))
    found = generate(right, prefix, SamplerConfig(draft_steps=1))
    assert torch.equal(found.tokens, expected.tokens)
    assert found.calls.tolist() == [2] * 50 and (right.drafts, right.checks) == (1, 1)
    torch.testing.assert_close(found.score, expected.score, atol=1e-5, rtol=0)


@pytest.mark.parametrize("draft_steps", [1, 3])
def test_calls_are_the_drafts_and_checks_of_the_row(draft_steps):
    model, prefix, cfg = network(**next(iter(KINDS.values()))), prompts(8), SamplerConfig(draft_steps=draft_steps)
    together = generate(model, prefix, cfg)
    for row in range(8):
        counted = Drafted(model)
        generate(counted, prefix[row : row + 1], cfg, example=torch.tensor([row]))
        assert counted.drafts == draft_steps + counted.checks - 1
        assert together.calls[row] == counted.drafts + counted.checks
    whole = Drafted(model)
    generate(whole, prefix, cfg)
    assert whole.drafts + whole.checks == together.calls.max()  # rows that have ended are not waited for
    assert len(together.calls.unique()) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_says_the_same_alone_and_among_eight(temperature):
    model, cfg = network(**next(iter(KINDS.values()))), SamplerConfig(temperature=temperature)
    prefix, example = prompts(8), torch.arange(30, 38)
    together = generate(model, prefix, cfg, seed=3, example=example)
    for row in range(8):
        alone = generate(model, prefix[row : row + 1], cfg, seed=3, example=example[row : row + 1])
        assert torch.equal(alone.tokens[0], together.tokens[row]) and alone.calls[0] == together.calls[row]
        torch.testing.assert_close(alone.score[0], together.score[row])
    other = generate(model, prefix, cfg, seed=4, example=example)
    assert torch.equal(other.tokens, together.tokens) == (temperature == 0)


def test_at_a_temperature_the_score_is_the_nll_of_what_was_said():
    model, prefix = network(prefix_attention="bidirectional", shift=True), prompts(20)
    found = generate(model, prefix, SamplerConfig(temperature=1.5))
    closed = torch.zeros(S + 1, S + 1, dtype=torch.bool)
    logits = model(prefix, F.pad(found.tokens, (1, 0), value=SEP), opened=closed)[:, :-1]
    logits[..., SEP:] = -math.inf
    nll = F.cross_entropy(logits.transpose(1, 2), found.tokens, reduction="none")
    for row, tokens in enumerate(found.tokens.tolist()):
        end = tokens.index(PAD) + 1 if PAD in tokens else S
        assert tokens[end:] == [PAD] * (S - end)
        assert found.score[row].item() == pytest.approx(nll[row, :end].mean().item(), abs=1e-5)


SMALL = dict(vocab_size=6, n_ordinary=2, pad_id=2, sep_id=3, mask_id=4, target_length=4)
TEXTS = [t for t in product(range(3), repeat=3) if all(a != 2 or b == 2 for a, b in zip(t, t[1:]))]  # nothing after pad
CHI_SQUARE = 36.12  # 14 degrees of freedom, exceeded once in 1,000 times


def calm_network() -> Transformer:
    """Three slots, and no text so rare that 8,000 samples would hardly hold it."""
    model = network(prefix_attention="bidirectional", self_conditioning=True, **SMALL)
    model.head.weight.data *= 0.2
    return model


def chances(model, prefix: torch.Tensor, temperature: float) -> torch.Tensor:
    """AR's probability of each of TEXTS, by its own step-by-step logits."""
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
@pytest.mark.parametrize("draft", ["its own", "flat", "sure and wrong", "never a pad"])
def test_samples_have_exactly_ars_distribution_whatever_the_draft(draft, temperature):
    model, prefix = calm_network(), torch.tensor([[0, 1]])
    expected = chances(model, prefix, temperature)
    assert expected.sum().item() == pytest.approx(1, abs=1e-9) and (8000 * expected).min() > 4
    logits = {
        "its own": None,
        "flat": torch.zeros(6),
        "sure and wrong": torch.tensor([-2.0, 2.0, -2.0, 0.0, 0.0, 0.0]),
        "never a pad": torch.tensor([3.0, 0.0, -math.inf, 0.0, 0.0, 0.0]),
    }[draft]
    drafted = Drafted(model, logits if logits is None else lambda target: logits.double().expand(len(target), 3, 6))
    cfg = SamplerConfig(temperature=temperature)
    found = generate(drafted, prefix.expand(8000, 2), cfg, seed=1)
    assert chi_square(found.tokens, expected) < CHI_SQUARE
    assert found.calls.unique().numel() > 1  # some drafts were kept and some refused


@pytest.mark.slow  # 1 s
def test_the_chi_square_would_find_a_draft_that_is_not_checked():
    """The draft's tokens as they are, against the check's."""
    model, prefix, n = calm_network(), torch.tensor([[0, 1]]), 8000
    drafts = []
    generate(model, prefix.expand(n, 2), SamplerConfig(temperature=1.0), on_step=lambda *args: drafts.append(args[1]))
    unchecked = torch.where(((drafts[1] == 2).cumsum(1) > 0), 2, drafts[1])
    assert chi_square(unchecked, chances(model, prefix, 1.0)) > 10 * CHI_SQUARE


def test_a_token_stays_with_probability_min_1_p_over_q():
    """q = .5 .3 .2, p = .2 .3 .5. Drawn 0: it stays in 40% of cases; 1 and 2 stay. What goes becomes 2, always."""
    n, q, p = 20_000, torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    draft = torch.arange(n)[:, None] % 3
    written, draws = torch.zeros(n, dtype=torch.long), draws_for(0, torch.arange(n))
    found, end = check(draft, written, q.log().expand(n, 1, 3), p.log().expand(n, 1, 3), 1.0, draws)
    stayed = (found == draft)[:, 0]
    shares = [stayed[draft[:, 0] == token].double().mean().item() for token in range(3)]
    assert shares == pytest.approx([0.4, 1.0, 1.0], abs=0.02) and shares[1:] == [1.0, 1.0]
    assert (found[~stayed] == 2).all() and (end == 1).all()


def test_what_is_text_already_is_not_judged_again():
    draft, surely = torch.tensor([[0, 0, 0]]), sure_of(torch.tensor([[1, 1, 1]]))
    found, end = check(draft, torch.tensor([2]), sure_of(draft), surely, 0.0, draws_for(0, torch.arange(1)))
    assert found.tolist() == [[0, 0, 1]] and end.tolist() == [3]


def test_no_reserved_token_is_said_even_if_it_is_likeliest():
    model = network(prefix_attention="causal", noise="mask")
    model.head.weight.data[SEP:] *= 20
    for temperature in (0.0, 1.0):
        assert generate(model, prompts(50), SamplerConfig(temperature=temperature)).tokens.max() <= PAD
    assert torch.equal(
        generate(model, prompts(50), SamplerConfig()).tokens, autoregressive.generate(model, prompts(50), GREEDY).tokens
    )


def test_the_hook_sees_the_noise_and_every_call():
    model, seen = network(prefix_attention="causal", shift=True), []
    found = generate(model, prompts(3), SamplerConfig(draft_steps=2), on_step=lambda *args: seen.append(args))
    assert [step for step, *_ in seen] == list(range(found.calls.max() + 1))
    assert seen[0][2] is None and [tuple(t.shape) for t in seen[1][1:]] == [(3, S), (3, S, V), (3,)]
    told = torch.zeros(3, dtype=torch.long)
    for _, _, _, rows in seen[1:]:
        told[rows[rows >= 0]] += 1
    assert torch.equal(told, found.calls)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(prefix_attention="joint"), "joint"),
        (dict(prefix_attention="causal", shift=True, lookahead=True), "lookahead"),
        (dict(paradigm="ar", target_attention="causal"), "paradigm='ar'"),
    ],
    ids=["joint", "lookahead", "ar"],
)
def test_a_model_that_cannot_be_read_both_ways_is_refused_in_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as refused:
        generate(network(**settings), prompts(2), SamplerConfig())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("bad", [dict(temperature=-1.0), dict(draft_steps=0), dict(draft_steps=17)], ids=str)
def test_a_bad_setting_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplerConfig(**bad)
