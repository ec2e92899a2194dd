"""autoregressive.py: a bigram table stands in for the model, so that every number can be found by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoregressive import SamplerConfig, draw_next, generate, loss
from data.objectives import Batch
from draws import draws_for
from model import ModelConfig, Transformer

PAD, SEP = 4, 5
SIZES = dict(vocab_size=8, n_ordinary=4, pad_id=PAD, sep_id=SEP, mask_id=6, eos_id=-1, target_length=7)


class Bigram:
    """A model whose logits are a row of a table, chosen by the token just read; the prefix is not seen."""

    def __init__(self, table: torch.Tensor):
        self.cfg, self.table, self.calls = SimpleNamespace(**SIZES), table, 0

    def __call__(self, prefix, target):
        return self.table[target]

    def encode(self, prefix, room=0):
        return None

    def decode(self, cache, target, append=False):
        self.calls += 1
        return self.table[target]


def chain(after: dict[int, int]) -> Bigram:
    """A bigram model that is sure: token i is followed by after[i]."""
    table = torch.zeros(8, 8)
    for token, following in after.items():
        table[token, following] = 50.0
    return Bigram(table)


def network(**settings) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES | dict(n_layer=2, n_head=2, n_embd=16, block_size=16) | settings)).eval()
    for p in model.parameters():
        p.data *= 2  # so that what is likeliest depends on what was said
    return model


def batch() -> Batch:
    target = torch.tensor([[SEP, 0, 1, 2, PAD, PAD, PAD], [SEP, 3, 3, 0, 1, 2, PAD]])
    return Batch(torch.tensor([[1, 2], [3, PAD]]), target, torch.arange(2))


def test_loss_is_the_mean_nll_of_every_slot_after_the_separator_pads_included():
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    log_p, total = table.log_softmax(-1), 0.0
    for row in batch().target.tolist():
        for before, token in zip(row, row[1:]):
            total -= log_p[before, token].item()
    assert loss(Bigram(table), batch(), None, None).item() == pytest.approx(total / 12, rel=1e-6)


def test_a_model_that_knows_nothing_pays_log_v():
    model = network(tie_weights=False)
    nn.init.zeros_(model.head.weight)
    assert loss(model, batch(), None, None).item() == pytest.approx(math.log(8), rel=1e-6)


@pytest.mark.parametrize("prefix_attention", ["causal", "bidirectional"])
def test_greedy_with_a_cache_equals_greedy_without(prefix_attention):
    model = network(prefix_attention=prefix_attention)
    prefix = torch.tensor([[0, 1, 2], [3, 2, PAD], [1, PAD, PAD], [PAD, PAD, PAD]])
    canvas = torch.full((4, 1), SEP)
    for _ in range(6):
        logits = model(prefix, canvas)[:, -1]
        logits[:, SEP:] = -math.inf
        following = torch.where(canvas[:, -1] == PAD, PAD, logits.argmax(-1))
        canvas = torch.cat([canvas, following[:, None]], dim=1)
    tokens = generate(model, prefix, SamplerConfig()).tokens
    assert torch.equal(tokens, canvas[:, 1:])
    assert len(tokens.unique()) > 2  # otherwise the test says little


def test_a_row_ends_with_pad_and_costs_no_more_calls():
    """sep -> 0 -> 1 -> pad, three calls; nothing is said after the pad although the table goes on."""
    model = chain({SEP: 0, 0: 1, 1: PAD, PAD: 2})
    found = generate(model, torch.tensor([[0]]), SamplerConfig())
    assert found.tokens.tolist() == [[0, 1, PAD, PAD, PAD, PAD]]
    assert found.calls.tolist() == [3] and model.calls == 3


def test_a_row_that_never_ends_fills_the_target():
    found = generate(chain({SEP: 0, 0: 0}), torch.tensor([[0], [1]]), SamplerConfig())
    assert found.tokens.tolist() == [[0] * 6] * 2 and found.calls.tolist() == [6, 6]


def test_score_is_the_mean_nll_of_what_was_said():
    table = torch.full((8, 8), -math.inf)
    table[:, 0], table[:, PAD] = math.log(0.75), math.log(0.25)
    table[0, 0], table[0, PAD] = math.log(0.25), math.log(0.75)
    found = generate(Bigram(table), torch.tensor([[0]]), SamplerConfig())
    assert found.tokens[0, :2].tolist() == [0, PAD]
    assert found.score.item() == pytest.approx(-math.log(0.75), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, dict(top_k=3), dict(top_p=0.8)], ids=["plain", "top_k", "top_p"])
def test_a_row_says_the_same_alone_and_among_eight(settings):
    table = 0.5 * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    table[SEP, PAD] = -9.0  # say something first
    cfg, example = SamplerConfig(temperature=1.0, **settings), torch.arange(20, 28)
    prefix = torch.zeros(8, 1, dtype=torch.long)
    together = generate(Bigram(table), prefix, cfg, seed=3, example=example)
    for i in range(8):
        alone = generate(Bigram(table), prefix[:1], cfg, seed=3, example=example[i : i + 1])
        assert torch.equal(alone.tokens[0], together.tokens[i]) and alone.calls[0] == together.calls[i]
        torch.testing.assert_close(alone.score[0], together.score[i])  # what others still say does not count
    assert len(together.tokens.unique(dim=0)) > 4
    assert not torch.equal(generate(Bigram(table), prefix, cfg, seed=4, example=example).tokens, together.tokens)


@pytest.mark.parametrize(
    "settings, kept",
    [
        (dict(), {0, 1, 2, 3}),
        (dict(top_k=1), {0}),
        (dict(top_k=2), {0, 2}),
        (dict(top_k=9), {0, 1, 2, 3}),
        (dict(top_p=0.1), {0}),
        (dict(top_p=0.45), {0, 2}),
        (dict(top_p=0.75), {0, 2, 3}),
        (dict(top_k=2, top_p=0.75), {0, 2}),
    ],
    ids=str,
)
def test_top_k_and_top_p_keep_exactly_the_right_tokens(settings, kept):
    """Probabilities .4 .1 .3 .2: what is kept is drawn, in its old proportions."""
    probs = torch.tensor([0.4, 0.1, 0.3, 0.2])
    cfg = SamplerConfig(temperature=1.0, **settings)
    drawn = draw_next(probs.log().expand(4000, 4), cfg, draws_for(0, torch.arange(4000)))
    share = drawn.bincount(minlength=4) / 4000
    assert set(drawn.tolist()) == kept
    expected = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probs.tolist())])
    torch.testing.assert_close(share, expected / expected.sum(), atol=0.03, rtol=0)


def test_no_reserved_token_but_pad_is_said_even_if_it_is_likeliest():
    table = torch.zeros(8, 8)
    table[:, SEP:] = 9.0
    for cfg in (SamplerConfig(), SamplerConfig(temperature=1.0), SamplerConfig(temperature=1.0, top_k=2)):
        assert generate(Bigram(table), torch.zeros(20, 1, dtype=torch.long), cfg).tokens.max() <= PAD


def test_the_hook_sees_every_call():
    model, seen = chain({SEP: 0, 0: 1, 1: PAD}), []
    generate(model, torch.tensor([[0], [1]]), SamplerConfig(), on_step=lambda *args: seen.append(args))
    assert [step for step, *_ in seen] == [1, 2, 3]
    assert [tuple(t.shape) for t in seen[0][1:]] == [(2, 6), (2, 1, 8), (2,)]


@pytest.mark.parametrize("bad", [dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5)], ids=str)
def test_a_bad_setting_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplerConfig(**bad)
