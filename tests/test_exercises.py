"""The graders of docs/exercises.md. They pass the solutions, and fail handouts and near misses.

The environment variable SOLUTIONS names the folder to grade, by default tests/solutions.
"""

import math
import os
import runpy
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusion import SamplerConfig, SamplerState, sample_noise
from eval.bound import BoundConfig, step_nats
from infra.rng import RENOISE, make_rng
from model import ModelConfig

ROOT = Path(__file__).parent.parent
SOLUTIONS = ROOT / "tests" / "solutions"


def grade_sampler(margin: Callable) -> None:
    """Four slots by hand: their order by margin differs from that by probability."""
    both_ways = dict(prefix_attention="bidirectional", target_attention="bidirectional")
    model_cfg = ModelConfig(paradigm="diffusion", **both_ways)
    p = torch.zeros(1, 4, model_cfg.vocab_size)
    p[0, :, 65:69] = torch.diag(torch.tensor([0.6, 0.5, 0.9, 0.3]))
    p[0, :, 97] = torch.tensor([0.4, 0.05, 0.08, 0.2])
    p += (1 - p.sum(-1, keepdim=True)) / model_cfg.vocab_size
    best = torch.tensor([[65, 66, 67, 68]])
    rng = make_rng(1, torch.arange(1), 3)
    noise = sample_noise(rng.uniform(RENOISE, 4)[0], model_cfg)

    def after(step: int, editable: list[bool]) -> SamplerState:
        canvas = torch.tensor([[5, 6, 7, 8]])
        aux, converged = torch.zeros(1, 4), torch.zeros(1, dtype=torch.bool)
        state = SamplerState(canvas, canvas, canvas, aux, converged, torch.tensor([editable]))
        return margin((p + 1e-9).log(), state, step, SamplerConfig(steps=4), rng, model_cfg)

    for step, kept in enumerate(([2], [2, 1], [2, 1, 0], [2, 1, 0, 3])):
        state = after(step, [True] * 4)
        expected = noise.clone()
        expected[0, kept] = best[0, kept]
        assert state.canvas.equal(expected), f"step {step + 1} of 4 keeps {len(kept)} slots"
        likeliest = state.output.equal(best) and state.scored.equal(best)
        assert likeliest, "output and scored are most probable"
        assert not state.converged.any(), "no row converges"
    state = after(0, [True, True, False, True])
    assert state.output.tolist() == [[65, 66, 7, 68]], "a given slot does not change"
    expected = [[noise[0, 0], 66, 7, noise[0, 3]]]
    assert state.canvas.tolist() == expected, "and is not counted: one of three slots is kept"


def grade_noise(unigram_noise: Callable) -> None:
    """A grid of numbers instead of random ones: every share is exact."""
    model_cfg = SimpleNamespace(n_ordinary=4, pad_id=4, vocab_size=8)
    grid = ((torch.arange(1000) + 0.5) / 1000).view(2, 500)
    drawn = unigram_noise(grid, torch.tensor([1, 0, 2, 5, 2]), model_cfg)
    assert drawn.shape == grid.shape and not drawn.is_floating_point(), "one token per number"
    counts = torch.bincount(drawn.flatten(), minlength=8).tolist()
    assert counts == [100, 0, 200, 500, 200, 0, 0, 0], "each token as often as counted"
    ends = torch.tensor([[0.0, 1 - 2**-24]])
    drawn = unigram_noise(ends, torch.tensor([0, 3, 1, 0, 0]), model_cfg)
    assert drawn.tolist() == [[1, 2]], "at 0 and almost 1: no token that never occurs"
    model_cfg.pad_id = 7
    drawn = unigram_noise(ends, torch.tensor([0, 0, 0, 0, 1]), model_cfg)
    assert drawn.tolist() == [[7, 7]], "pad is the model's pad_id"


def grade_bound(predictor: Callable) -> None:
    """Exact: all bits are enumerated, and the mean over the rate is an integral over a line."""
    p = [float(predictor(seen)) for seen in (0, 1)]
    assert all(0 < value < 1 for value in p), "two probabilities"
    loss = 0.0
    for bit, seen in product((0, 1), repeat=2):
        # At rate r a bit is flipped with probability r / 2: 1 / 4 on average.
        weight = 0.5 * (0.75 if seen == bit else 0.25)
        loss -= weight * math.log(p[seen] if bit else 1 - p[seen])
    entropy = math.log(2)
    assert loss < entropy - 1e-6, (
        f"L(1) is {loss:.3f} nats per bit, below the entropy {entropy:.3f}"
    )
    bound = bound_of(p)
    assert bound >= entropy - 1e-9, f"its bound is {bound:.3f}, not below the entropy"


def bound_of(p: list[float], T: int = 20) -> float:
    """Return the nats per bit of the process in eval/bound.py, over all steps and all bits."""
    cfg = BoundConfig(noise_steps=T)
    model_cfg = SimpleNamespace(n_ordinary=1, pad_id=1, vocab_size=2, eos_id=-1, noise="uniform")
    nats = 0.0
    for t, bit, seen in product(range(1, T + 1), (0, 1), (0, 1)):
        weight = 0.5 * ((1 - t / T) * (seen == bit) + t / T / 2)
        logits = torch.tensor([[1 - p[seen], p[seen]]]).log()
        tokens = torch.tensor([bit]), torch.tensor([seen])
        nats += weight * float(step_nats(logits, *tokens, t, cfg, model_cfg))
    return nats


EXERCISES = {
    "sampler": ("margin", grade_sampler),
    "noise": ("unigram_noise", grade_noise),
    "bound": ("predictor", grade_bound),
}


def grade(name: str, path: Path) -> None:
    function, check = EXERCISES[name]
    check(runpy.run_path(str(path))[function])


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_passes(name):
    grade(name, Path(os.environ.get("SOLUTIONS", SOLUTIONS), f"{name}.py"))


def test_the_handouts_fail():
    for name in EXERCISES:
        with pytest.raises((AssertionError, NotImplementedError)):
            grade(name, ROOT / "docs" / "exercises" / f"{name}.py")


# One mistake in each: (exercise, text of the solution, its replacement, the check that must fail).
NEAR_MISSES = [
    ("sampler", "best[..., 0] - best[..., 1]", "best[..., 0]", "step 2 of 4"),
    ("sampler", "(step + 1)", "step", "step 1 of 4"),
    ("sampler", "output=output", "output=likeliest", "a given slot"),
    ("sampler", "(~state.editable, -math.inf)", "(~state.editable, 2.0)", "and is not counted"),
    ("noise", "right=True", "right=False", "at 0 and almost 1"),
    ("noise", "token == model_cfg.n_ordinary", "token == -1", "pad"),
    ("noise", "uniform.double() * cdf[-1]", "uniform.double() * (cdf[-1] - 1)", "each token"),
    ("bound", "0.75 if seen else 0.25", "0.25 if seen else 0.75", r"L\(1\) is"),
]


@pytest.mark.parametrize("number", range(len(NEAR_MISSES)))
def test_a_near_miss_fails_the_right_check(tmp_path, number):
    name, right, wrong, check = NEAR_MISSES[number]
    text = (SOLUTIONS / f"{name}.py").read_text()
    assert right in text
    (tmp_path / "a.py").write_text(text.replace(right, wrong))
    with pytest.raises(AssertionError, match=f"^{check}"):
        grade(name, tmp_path / "a.py")


def test_without_knowledge_the_bound_is_the_entropy():
    """With T = 1 the only step starts from pure noise, where p = 1/2 is right."""
    assert bound_of([0.5, 0.5], T=1) == pytest.approx(math.log(2))
