"""autoregressive.py: a bigram table stands in for the model, so each number is found by hand."""

import math

import pytest
import torch
from eval_models import tiny_model

from autoregressive import SamplerConfig, draw_next, generate, loss
from data.objectives import Batch
from infra.rng import make_rng
from model import ModelConfig

PAD, SEP = 4, 5
SIZES = dict(vocab_size=8, n_ordinary=4, pad_id=PAD, sep_id=SEP, mask_id=6, target_length=7)


class Bigram:
    """Logits are a row of a table, chosen by the last token. The prefix has no effect."""

    def __init__(self, table: torch.Tensor):
        self.cfg = ModelConfig(**SIZES)
        self.table = table
        self.calls = 0

    def __call__(self, prefix, target):
        return self.table[target]

    def encode(self, prefix, reserve=0):
        return None

    def decode(self, cache, target, append=False):
        self.calls += 1
        return self.table[target]


def chain(after: dict[int, int]) -> Bigram:
    """A bigram model in which after[i] follows token i."""
    table = torch.zeros(8, 8)
    for token, following in after.items():
        table[token, following] = 50.0
    return Bigram(table)


def test_the_loss_is_the_mean_nll_of_every_slot_after_the_separator_pads_included():
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[SEP, 0, 1, 2, PAD, PAD, PAD], [SEP, 3, 3, 0, 1, 2, PAD]])
    log_p, total = table.log_softmax(-1), 0.0
    for row in target.tolist():
        total -= sum(log_p[before, token].item() for before, token in zip(row, row[1:]))
    found = loss(Bigram(table), Batch(target[:, :2], target, torch.arange(2)), None, None)
    assert found.item() == pytest.approx(total / 12, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, dict(prefix_attention="bidirectional"), dict(sep_id=-1)])
def test_greedy_with_a_cache_equals_greedy_without(settings):
    model = tiny_model(**SIZES | dict(n_layer=2) | settings)
    for p in model.parameters():
        p.data *= 2  # so that the text depends on the tokens so far
    prompt = torch.tensor([[0, 1, 2], [3, 2, PAD], [1, PAD, PAD]])
    prefix, canvas = prompt, torch.full((3, 1), SEP)
    if model.cfg.sep_id < 0:  # slot 0 is the last token of the prompt
        prefix, canvas = torch.tensor([[0, 1], [3, PAD], [PAD, PAD]]), torch.tensor([[2], [2], [1]])
    for _ in range(6):
        logits = model(prefix, canvas)[:, -1]
        logits[:, SEP:] = -math.inf
        following = logits.argmax(-1)
        following[(canvas[:, 1:] == PAD).any(1)] = PAD
        canvas = torch.cat([canvas, following[:, None]], dim=1)
    tokens = generate(model, prompt, SamplerConfig()).tokens
    assert torch.equal(tokens, canvas[:, 1:])
    assert len(tokens.unique()) > 2  # otherwise the test proves little


def test_a_row_ends_with_pad_and_costs_no_more_calls():
    """sep, 0, 1, pad: three calls. The table goes on after the pad, the text does not."""
    model, seen = chain({SEP: 0, 0: 1, 1: PAD, PAD: 2}), []
    found = generate(model, torch.tensor([[0]]), SamplerConfig(), on_step=lambda *a: seen.append(a))
    assert found.tokens.tolist() == [[0, 1, PAD, PAD, PAD, PAD]]
    assert found.calls.tolist() == [3] and model.calls == 3
    assert [step for step, *_ in seen] == [1, 2, 3]
    assert [tuple(t.shape) for t in seen[0][1:]] == [(1, 6), (1, 1, 8), (1,)]


def test_the_score_is_the_mean_nll_of_the_text():
    table = torch.full((8, 8), -math.inf)
    table[:, 0], table[:, PAD] = math.log(0.75), math.log(0.25)
    table[0, 0], table[0, PAD] = math.log(0.25), math.log(0.75)
    found = generate(Bigram(table), torch.tensor([[0]]), SamplerConfig())
    assert found.tokens[0, :2].tolist() == [0, PAD]
    assert found.score.item() == pytest.approx(-math.log(0.75), rel=1e-6)


@pytest.mark.parametrize("settings", [{}, dict(top_k=3), dict(top_p=0.8)], ids=str)
def test_a_row_gets_the_same_text_alone_and_among_eight(settings):
    table = 0.5 * torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    table[SEP, PAD] = -9.0  # no empty text
    model, cfg = Bigram(table), SamplerConfig(temperature=1.0, **settings)
    example, prefix = torch.arange(20, 28), torch.zeros(8, 1, dtype=torch.long)
    together = generate(model, prefix, cfg, seed=3, example=example)
    for i in range(8):
        alone = generate(model, prefix[:1], cfg, seed=3, example=example[i : i + 1])
        for one, all_rows in zip(alone, together):
            torch.testing.assert_close(one[0], all_rows[i])
    assert len(together.tokens.unique(dim=0)) > 4
    other = generate(model, prefix, cfg, seed=4, example=example)
    assert not torch.equal(other.tokens, together.tokens)


@pytest.mark.parametrize(
    "settings, kept",
    [
        (dict(), {0, 1, 2, 3}),
        (dict(top_k=2), {0, 2}),
        (dict(top_p=0.1), {0}),
        (dict(top_p=0.45), {0, 2}),
        (dict(top_p=0.75), {0, 2, 3}),
        (dict(top_k=2, top_p=0.75), {0, 2}),
    ],
    ids=str,
)
def test_top_k_and_top_p_keep_exactly_the_right_tokens(settings, kept):
    """Probabilities .4 .1 .3 .2: the kept tokens are drawn in their old proportions."""
    probs = torch.tensor([0.4, 0.1, 0.3, 0.2])
    cfg = SamplerConfig(temperature=1.0, **settings)
    drawn = draw_next(probs.log().expand(4000, 4), cfg, make_rng(0, torch.arange(4000)))
    share = drawn.bincount(minlength=4) / 4000
    assert set(drawn.tolist()) == kept
    expected = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(probs.tolist())])
    torch.testing.assert_close(share, expected / expected.sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0), dict(temperature=1.0, top_k=2)])
def test_no_banned_token_is_written_even_if_it_is_most_likely(settings):
    table = torch.zeros(8, 8)
    table[:, SEP:] = 9.0
    prefix = torch.zeros(20, 1, dtype=torch.long)
    assert generate(Bigram(table), prefix, SamplerConfig(**settings)).tokens.max() <= PAD
