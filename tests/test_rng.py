"""draws.py: the published numbers, their statistics, and that a draw depends on its place alone."""

import pytest
import torch

from draws import (
    BLOCK,
    CANVAS,
    CORRUPT,
    RATE,
    SAMPLE,
    SELECT,
    Draws,
    draw_tokens,
    draws_for,
    forbidden_ids,
    noise_tokens,
    philox,
)
from model import ModelConfig

# kat_vectors of Random123, philox4x32 10: counter, key, result.
KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_published_numbers(name):
    counter, key, result = (words(text) for text in KNOWN_ANSWERS[name])
    assert [int(x) for x in philox([torch.tensor(c) for c in counter], tuple(key))] == result


def test_numbers_are_uniform_and_do_not_follow_one_another():
    """100,000 numbers in 64 bins; 103 is the 99.9% point of chi-square with 63 degrees of freedom."""
    for u in draws_for(1, torch.arange(200)).uniform(CORRUPT, 500):
        counts = torch.histc(u, bins=64, min=0, max=1)
        expected = u.numel() / 64
        assert ((counts - expected) ** 2 / expected).sum() < 103
        assert 0 <= u.min() and u.max() < 1
    a, b = draws_for(1, torch.arange(200)).uniform(CORRUPT, 500)
    other = draws_for(1, torch.arange(200), step=1).uniform(CORRUPT, 500)[0]
    for one, two in ((a, b), (a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a, other)):
        correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]
        assert abs(correlation) < 4 * one.numel() ** -0.5  # four standard errors


PLACE = dict(seed=3, example=5, candidate=2, step=7, purpose=SAMPLE, salt=0)


def at_place(seed, example, candidate, step, purpose, salt):
    return Draws(seed, torch.tensor([example]), torch.tensor([candidate]), step).uniform(purpose, 8, salt)[0]


@pytest.mark.parametrize(
    "word, value",
    [
        *(("seed", seed) for seed in (4, 3 + 2**32, -1)),
        *(("example", 6), ("candidate", 3), ("step", 8), ("purpose", SELECT), ("salt", 1)),
    ],
)
def test_every_part_of_a_place_changes_the_draw(word, value):
    assert torch.equal(at_place(**PLACE), at_place(**PLACE))
    assert not torch.isin(at_place(**PLACE | {word: value}), at_place(**PLACE)).any()


def test_a_row_draws_the_same_whatever_stands_beside_it():
    together = draws_for(0, torch.arange(10, 30), step=4)
    some = torch.tensor([17, 3, 8])
    for left in (draws_for(0, torch.tensor([27, 13, 18]), step=4), together.rows(some)):
        assert torch.equal(left.uniform(RATE, 6)[0], together.uniform(RATE, 6)[0][some])
    candidates = Draws(0, torch.tensor([7, 7, 8, 8]), torch.tensor([0, 1, 0, 1]))
    left = candidates.rows(torch.tensor([3, 1]))
    assert torch.equal(left.uniform(RATE, 6)[0], candidates.uniform(RATE, 6)[0][[3, 1]])
    assert torch.equal(together.uniform(CANVAS, 20)[1][:, :6], together.uniform(CANVAS, 6)[1])
    assert torch.equal(draws_for(0, torch.arange(10, 30)).at(4).uniform(RATE, 6)[0], together.uniform(RATE, 6)[0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_drawn_tokens_follow_the_softmax(temperature):
    """20,000 draws of 7 tokens; 22.5 is the 99.9% point of chi-square with 6 degrees of freedom."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -0.5, 1.5])
    uniform = draws_for(2, torch.arange(100)).uniform(SAMPLE, 200)[0]
    drawn = draw_tokens(logits.expand(100, 200, 7), temperature, uniform)
    expected = (logits / temperature).softmax(-1) * drawn.numel()
    assert ((drawn.flatten().bincount(minlength=7) - expected) ** 2 / expected).sum() < 22.5


def test_temperature_0_takes_the_likeliest():
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw_tokens(logits, 0.0, torch.full((3, 5), 0.99)), logits.argmax(-1))


@pytest.mark.parametrize("V", [BLOCK, 4 * BLOCK + 1, 6 * BLOCK, 6 * BLOCK + 77])
def test_drawing_by_blocks_inverts_the_same_cdf(V):
    """The oracle is one running sum in float64. A number that stands on a step of it may fall to either side."""
    generator = torch.Generator().manual_seed(V)
    logits, u = torch.randn(40, 50, V, generator=generator) * 3, torch.rand(40, 50, generator=generator)
    cdf = logits.double().softmax(-1).cumsum(-1)
    drawn = draw_tokens(logits, 1.0, u)
    right = torch.searchsorted(cdf, u.double()[..., None], right=True)[..., 0]
    low, high = cdf.gather(-1, torch.stack([drawn - 1, drawn], -1).clamp(min=0)).unbind(-1)
    low = torch.where(drawn > 0, low, 0.0)
    assert (drawn == right).float().mean() > 0.999
    assert ((u > low - 1e-6) & (u < high + 1e-6)).all()


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1 - 2.0**-24], ids=["first", "quarter", "half", "last"])
@pytest.mark.parametrize("V", [300, 5 * BLOCK + 1], ids=["one_sum", "by_blocks"])
def test_a_forbidden_token_is_never_drawn(u, V):
    """Walls at both ends and in the middle; u = 0 and the largest float below 1 are where a search slips past them."""
    logits = torch.randn(500, 4, V, generator=torch.Generator().manual_seed(0))
    walled = torch.tensor([0, 1, 100, 101, 102, *range(V - 2, V)])
    logits[..., walled] = float("-inf")
    logits[0, 0, 2:100] = 0.0  # equal masses put a step of the CDF on u exactly
    drawn = draw_tokens(logits, 1.0, torch.full((500, 4), u))
    assert not torch.isin(drawn, walled).any()


def test_a_number_that_rounds_past_the_last_token_takes_the_likeliest():
    logits = torch.tensor([[[0.0, 3.0, 1.0, float("-inf")]]])
    assert draw_tokens(logits, 1.0, torch.tensor([[1.0]])).item() == 1


def test_only_ordinary_tokens_and_pad_pass_the_wall():
    m = ModelConfig(vocab_size=9, n_ordinary=5, pad_id=5, sep_id=6, mask_id=7)
    assert forbidden_ids(m, "cpu").tolist() == [6, 7, 8]


def test_what_ended_a_text_in_foreign_weights_is_neither_noise_nor_text():
    """All other ids stay equally likely: 5 ordinary ones, of which 2 is shut out, and pad."""
    m = ModelConfig(vocab_size=9, n_ordinary=5, pad_id=5, sep_id=6, mask_id=7, eos_id=2)
    assert forbidden_ids(m, "cpu").tolist() == [2, 6, 7, 8]
    evenly = (torch.arange(1000) + 0.5) / 1000
    assert noise_tokens(evenly, m).bincount(minlength=9).tolist() == [200, 200, 0, 200, 200, 200, 0, 0, 0]
