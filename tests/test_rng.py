"""infra/rng.py: the published numbers, their statistics, and what a number depends on."""

import pytest
import torch

from infra.rng import CANVAS, CORRUPT, RATE, SAMPLE, SELECT, CounterRNG, make_rng, philox

# kat_vectors of Random123, philox4x32 10: four words of counter, two of key, four of result.
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("answer", KNOWN_ANSWERS.strip().splitlines())
def test_philox_gives_the_published_numbers(answer):
    words = [int(word, 16) for word in answer.split()]
    counter = tuple(map(torch.tensor, words[:4]))
    assert [int(x) for x in philox(counter, tuple(words[4:6]))] == words[6:]


def test_numbers_are_uniform_and_uncorrelated():
    """100,000 numbers in 64 bins; 103 is the 99.9% point of chi-square, 63 degrees of freedom."""
    a, b = make_rng(1, torch.arange(200)).uniform(CORRUPT, 500)
    for u in (a, b):
        counts = torch.histc(u, bins=64, min=0, max=1)
        expected = u.numel() / 64
        assert ((counts - expected) ** 2 / expected).sum() < 103
        assert 0 <= u.min() and u.max() < 1
    other = make_rng(1, torch.arange(200), step=1).uniform(CORRUPT, 500)[0]
    for one, two in ((a, b), (a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a, other)):
        correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]
        assert abs(correlation) < 4 * one.numel() ** -0.5  # four standard errors


KEY = dict(seed=3, example=5, candidate=2, step=7, stream=SAMPLE, index=0)


def uniform_at(seed, example, candidate, step, stream, index):
    rng = CounterRNG(seed, torch.tensor([example]), torch.tensor([candidate]), step)
    return rng.uniform(stream, 8, index)[0]


@pytest.mark.parametrize(
    "name, value",
    [
        *(("seed", seed) for seed in (4, 3 + 2**32, -1)),
        *(("example", 6), ("candidate", 3), ("step", 8), ("stream", SELECT), ("index", 1)),
    ],
)
def test_every_part_of_the_key_changes_the_numbers(name, value):
    assert torch.equal(uniform_at(**KEY), uniform_at(**KEY))
    assert not torch.isin(uniform_at(**KEY | {name: value}), uniform_at(**KEY)).any()


def test_a_row_gets_the_same_numbers_in_every_batch():
    batch = make_rng(0, torch.arange(10, 30), step=4)
    rows = torch.tensor([17, 3, 8])
    alone = make_rng(0, torch.tensor([27, 13, 18]), step=4)
    assert torch.equal(alone.uniform(RATE, 6)[0], batch.uniform(RATE, 6)[0][rows])
    candidates = CounterRNG(0, torch.tensor([7, 7, 8, 8]), torch.tensor([0, 1, 0, 1]))
    selected = CounterRNG(0, torch.tensor([8, 7]), torch.tensor([1, 1]))
    assert torch.equal(selected.uniform(RATE, 6)[0], candidates.uniform(RATE, 6)[0][[3, 1]])
    assert torch.equal(batch.uniform(CANVAS, 20)[1][:, :6], batch.uniform(CANVAS, 6)[1])
    folded = make_rng(0, torch.arange(10, 30)).fold_in(4)
    assert torch.equal(folded.uniform(RATE, 6)[0], batch.uniform(RATE, 6)[0])
