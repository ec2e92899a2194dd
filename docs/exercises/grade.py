"""Grade an exercise: python -m docs.exercises.grade NAME [FILE]. Status 1 if a check fails.

NAME: sampler, noise or bound. FILE: by default NAME.py in this folder.
"""

import math
import runpy
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch

from configurator import require, run, suggest
from diffusion import SamplerConfig, SamplerState, sample_noise
from infra.rng import RENOISE, make_rng
from model import ModelConfig

Check = tuple[str, bool]


def grade_sampler(margin: Callable) -> Iterator[Check]:
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
        yield f"step {step + 1} of 4 keeps {len(kept)} slots", state.canvas.equal(expected)
        likeliest = state.output.equal(best) and state.scored.equal(best)
        yield "output and scored are most probable", likeliest
        yield "no row converges", not state.converged.any()
    state = after(0, [True, True, False, True])
    yield "a given slot does not change", state.output.tolist() == [[65, 66, 7, 68]]
    expected = [[noise[0, 0], 66, 7, noise[0, 3]]]
    yield "and is not counted: one of three slots is kept", state.canvas.tolist() == expected


def grade_noise(unigram_noise: Callable) -> Iterator[Check]:
    """A grid of numbers instead of random ones: every share is exact."""
    model_cfg = SimpleNamespace(n_ordinary=4, pad_id=4, vocab_size=8)
    grid = ((torch.arange(1000) + 0.5) / 1000).view(2, 500)
    drawn = unigram_noise(grid, torch.tensor([1, 0, 2, 5, 2]), model_cfg)
    yield "one token per number", drawn.shape == grid.shape and not drawn.is_floating_point()
    counts = torch.bincount(drawn.flatten(), minlength=8).tolist()
    yield "each token as often as counted", counts == [100, 0, 200, 500, 200, 0, 0, 0]
    ends = torch.tensor([[0.0, 1 - 2**-24]])
    drawn = unigram_noise(ends, torch.tensor([0, 3, 1, 0, 0]), model_cfg)
    yield "at 0 and almost 1: no token that never occurs", drawn.tolist() == [[1, 2]]
    model_cfg.pad_id = 7
    drawn = unigram_noise(ends, torch.tensor([0, 0, 0, 0, 1]), model_cfg)
    yield "pad is the model's pad_id", drawn.tolist() == [[7, 7]]


def grade_bound(predictor: Callable) -> Iterator[Check]:
    """Exact: all bits are enumerated, and the mean over the rate is an integral over a line."""
    p = [float(predictor(seen)) for seen in (0, 1)]
    yield "two probabilities", all(0 < value < 1 for value in p)
    loss = 0.0
    for bit, seen in product((0, 1), repeat=2):
        # At rate r a bit is flipped with probability r / 2: 1 / 4 on average.
        weight = 0.5 * (0.75 if seen == bit else 0.25)
        loss -= weight * math.log(p[seen] if bit else 1 - p[seen])
    entropy = math.log(2)
    yield f"L(1) is {loss:.3f} nats per bit, below the entropy {entropy:.3f}", loss < entropy - 1e-6
    bound = bound_of(p)
    yield f"its bound is {bound:.3f}, not below the entropy", bound >= entropy - 1e-9


def bound_of(p: list[float], T: int = 20) -> float:
    """Return the nats per bit of the process in eval/bound.py, over all steps and all bits."""
    from eval.bound import BoundConfig, step_nats

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


def grade(name: str, path: str | Path) -> list[Check]:
    """Return (check, passed) in order. An exception in the solution is a failed check."""
    function, check = EXERCISES[name]
    done: list[Check] = []
    try:
        done += check(runpy.run_path(str(path))[function])
    except Exception as error:
        done.append((f"{function} runs: {type(error).__name__}: {error}", False))
    return done


def main(argv: list[str]) -> None:
    name = " ".join(argv[:1])
    require(name in EXERCISES, f"name one exercise{suggest(name, EXERCISES)}")
    path = Path(argv[1] if argv[1:] else Path(__file__).parent / f"{name}.py")
    require(path.is_file(), f"{path}: no such file")
    checks = grade(name, path)
    for text, passed in checks:
        print(f"{'ok  ' if passed else 'FAIL'}  {text}")
    if not all(passed for _, passed in checks):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
