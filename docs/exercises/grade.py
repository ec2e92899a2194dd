"""Grades the exercises: python -m docs.exercises.grade NAME [--file=PATH]; status 1 where a claim does not hold.

Names: sampler, noise, mask_schedule, crossover, bound. Each is a file beside this one with a function to write.
"""

import math
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F

import autoregressive
import diffusion
from configurator import configure, nearest, run
from draws import RENOISE, draws_for, noise_tokens
from eval.bound import BoundConfig, step_nats
from model import ModelConfig, attention_mask
from samplers import SAMPLERS, SamplerConfig, State

Claim = tuple[str, bool]


@dataclass
class GradeConfig:
    file: str = ""  # the solution; by default the file beside this one


def grade_sampler(margin: Callable) -> Iterator[Claim]:
    """By hand: four slots, whose order by margin is not that by probability."""
    m = ModelConfig(paradigm="diffusion", target_attention="bidirectional", prefix_attention="bidirectional")
    probability = torch.zeros(1, 4, m.vocab_size)
    for slot, (first, second) in enumerate([(0.6, 0.4), (0.5, 0.05), (0.9, 0.08), (0.3, 0.2)]):
        probability[0, slot] = (1 - first - second) / (m.vocab_size - 2)  # the rest is spread over all others
        probability[0, slot, 65 + slot], probability[0, slot, 97] = first, second
    logits, likeliest = (probability + 1e-9).log(), torch.tensor([[65, 66, 67, 68]])
    draws, cfg = draws_for(1, torch.arange(1), 3), SamplerConfig(steps=4)

    def after(step: int, given: list[int] = ()) -> State:
        canvas = torch.tensor([[5, 6, 7, 8]])
        free = torch.tensor([[slot not in given for slot in range(4)]])
        state = State(canvas, canvas, canvas, torch.zeros(1, 4), torch.zeros(1, dtype=torch.bool), free)
        return margin(logits.clone(), state, step, cfg, draws, m)

    noise = noise_tokens(draws.uniform(RENOISE, 4)[0], m)
    for step, kept in enumerate(([2], [2, 1], [2, 1, 0], [2, 1, 0, 3])):
        is_kept = torch.tensor([[slot in kept for slot in range(4)]])
        wanted = torch.where(is_kept, likeliest, noise)
        yield f"step {step + 1} of 4 keeps {len(kept)} slots, those of largest margin", after(step).canvas.equal(wanted)
    done = after(0, given=[2])
    yield "a given slot stays", int(done.canvas[0, 2]) == 7 and done.answer.equal(torch.tensor([[65, 66, 7, 68]]))
    yield (
        "and is not counted: one of three free slots is kept",
        done.canvas[0, 1] == 66 and done.canvas[0, 0] == noise[0, 0],
    )
    yield (
        "answer and judged are the likeliest tokens",
        after(0).answer.equal(likeliest) and after(0).judged.equal(likeliest),
    )
    yield "no row settles", not after(3).settled.any()
    SAMPLERS["margin"] = margin
    try:
        out = diffusion.generate(StandIn(16), torch.zeros(1, 1).long(), SamplerConfig("margin", steps=16, candidates=1))
    finally:
        del SAMPLERS["margin"]
    yield (
        "diffusion.generate writes a text with it",
        bool((out.tokens == StandIn(16).text).all()) and out.calls[0] == 16,
    )


def grade_noise(unigram_noise: Callable) -> Iterator[Claim]:
    """A grid of numbers in the place of chance: every share comes out exactly."""
    m = SimpleNamespace(n_ordinary=4, pad_id=4, sep_id=5, mask_id=6, eos_id=-1, vocab_size=8, noise="uniform")
    grid = ((torch.arange(1000) + 0.5) / 1000).view(2, 500)
    found = unigram_noise(grid, torch.tensor([1, 0, 2, 5, 2]), m)
    yield "one token a number", found.shape == grid.shape and not found.is_floating_point()
    yield (
        "each as often as it was counted",
        torch.bincount(found.flatten(), minlength=8).tolist() == [100, 0, 200, 500, 200, 0, 0, 0],
    )
    ends = torch.tensor([[0.0, 1 - 2**-24]])
    yield (
        "the ends: what was never counted is never drawn",
        unigram_noise(ends, torch.tensor([0, 3, 1, 0, 0]), m).tolist() == [[1, 2]],
    )
    m.pad_id = 7
    yield (
        "pad is the id that the model calls pad",
        unigram_noise(ends, torch.tensor([0, 0, 0, 0, 1]), m).tolist() == [[7, 7]],
    )
    torch.manual_seed(0)
    counts, uniform = torch.randint(0, 9, (50257,)), torch.rand(4, 64)
    m.n_ordinary, m.pad_id = 50256, 50256
    expected = torch.multinomial(counts.float(), 4 * 64, replacement=True)  # another sampler of the same distribution
    again = unigram_noise(uniform, counts, m)
    yield (
        "a large vocabulary",
        bool((counts[again] > 0).all()) and abs(again.float().mean() - expected.float().mean()) < 4000,
    )


def grade_mask_schedule(near_first: Callable) -> Iterator[Claim]:
    T, none = 6, torch.zeros(1, 0, dtype=torch.bool)
    edges, real = T * (T - 1) // 2, torch.ones(1, T, dtype=torch.bool)
    row, column = torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
    order = sorted((c - r, r) for r in range(T) for c in range(T) if c > r)

    def mask(share: float):
        return attention_mask("bidirectional", none, real, opened=near_first(T, share))

    opened = [near_first(T, k / edges) for k in range(edges + 1)]
    yield "a (T, T) mask of booleans", all(one.shape == (T, T) and one.dtype == torch.bool for one in opened)
    yield "at share 0 the mask is causal", mask(0.0).equal(attention_mask("causal", none, real))
    yield "at share 1 it is bidirectional", mask(1.0).equal(attention_mask("bidirectional", none, real))
    later = column > row
    yield "the share is exact", [int((one & later).sum()) for one in opened] == list(range(edges + 1))
    new = [(opened[k + 1] & ~opened[k] & later).nonzero().tolist() for k in range(edges)]
    yield "short edges come before long ones, earlier slots before later", new == [[[r, r + d]] for d, r in order]
    yield "an edge that is open stays open", all((a & later <= b & later).all() for a, b in zip(opened, opened[1:]))


class StandIn:
    """A network that knows one text and sees it eight slots at a time; its cache is nothing. See exercise 4."""

    def __init__(self, length: int):
        self.cfg = ModelConfig(
            paradigm="diffusion",
            prefix_attention="bidirectional",
            target_attention="bidirectional",
            block_size=length + 2,
            target_length=length + 1,
        )
        self.text = (torch.arange(length) * 7) % 26 + 97  # (S,)
        self.cost = 0.0

    def encode(self, prefix, room=0):
        return self

    def rows(self, index):
        return self

    def decode(self, cache, target, estimate=None, append=False):
        right = target[:, 1:] == self.text
        S = len(self.text)
        reach = (right.long().cumprod(1).sum(1, keepdim=True) // 8 + 1) * 8  # (R, 1) slots that are seen
        said = torch.where(torch.arange(S) < reach, self.text, (self.text - 96) % 26 + 97)
        self.cost += max(1.0, target[:, 1:].numel() / 64)
        return 20.0 * F.one_hot(F.pad(said, (1, 0)), self.cfg.vocab_size)


def grade_crossover(settings: Callable) -> Iterator[Claim]:
    cfg = settings()
    yield "one SamplerConfig", type(cfg) is SamplerConfig
    for length in (16, 64, 256):
        model = StandIn(length)
        out = diffusion.generate(model, torch.zeros(1, 1).long(), cfg, seed=length)
        yield f"{length} tokens come out right", bool((out.tokens == model.text).all())
        yield f"{length} tokens cost {model.cost:.0f}, AR's cost {length}", model.cost < length
    assert autoregressive.SamplerConfig().temperature == 0  # AR: a call a token, whatever it says


def grade_bound(predictor: Callable) -> Iterator[Claim]:
    """Exact: the mean over the rate is an integral over a line, bits are enumerated."""
    said = {seen: float(predictor(seen)) for seen in (0, 1)}
    yield "two probabilities", all(0 < p < 1 for p in said.values())
    # At rate r a bit is seen flipped with probability r / 2: 1 / 4 on average.
    costs = [[-math.log(said[seen] if bit else 1 - said[seen]) for seen in (0, 1)] for bit in (0, 1)]
    loss = sum(0.5 * (0.75 if seen == bit else 0.25) * costs[bit][seen] for bit in (0, 1) for seen in (0, 1))
    yield f"L(1) is {loss:.3f} nats a bit, below the entropy of {math.log(2):.3f}", loss < math.log(2) - 1e-6
    bound = bound_of(said)
    yield (
        f"the bound of the same predictor is {bound:.3f}, and no bound is below the entropy",
        bound >= math.log(2) - 1e-9,
    )


def bound_of(said: dict[int, float], T: int = 20) -> float:
    """Nats a bit by the process of eval/bound.py: all steps, all bits and all that may be seen of them, weighed."""
    m = SimpleNamespace(n_ordinary=1, pad_id=1, vocab_size=2, eos_id=-1, noise="uniform")  # K = 2 ids: 0 and pad
    logits = torch.tensor([[1 - said[seen], said[seen]] for seen in (0, 1)]).log()
    nats = 0.0
    for t in range(1, T + 1):
        for bit in (0, 1):
            for seen in (0, 1):
                chance = (1 - t / T) * (seen == bit) + t / T / 2
                step = step_nats(
                    logits[seen][None], torch.tensor([bit]), torch.tensor([seen]), t, BoundConfig(noise_steps=T), m
                )
                nats += 0.5 * chance * float(step)
    return nats


EXERCISES = {
    "sampler": ("margin", grade_sampler),
    "noise": ("unigram_noise", grade_noise),
    "mask_schedule": ("near_first", grade_mask_schedule),
    "crossover": ("settings", grade_crossover),
    "bound": ("predictor", grade_bound),
}


def grade(name: str, path: str | Path) -> list[Claim]:
    """(claim, whether it holds) in order. What the solution raises is a claim that does not hold."""
    function, check = EXERCISES[name]
    found: list[Claim] = []
    try:
        found += check(runpy.run_path(str(path))[function])
    except NotImplementedError:
        found.append((f"{function} is written", False))
    except KeyError:
        found.append((f"{path} has a function {function}", False))
    except Exception as error:  # whatever the solution does wrong is the reader's to mend
        found.append((f"{function} runs: {type(error).__name__}: {error}", False))
    return found


def main(argv: list[str]) -> None:
    """Grade one exercise; exits with status 1 where a claim fails."""
    names = [arg for arg in argv if not arg.startswith("--")]
    if len(names) != 1 or names[0] not in EXERCISES:
        hint = nearest(names[0], EXERCISES) if names else f": {', '.join(EXERCISES)}"
        raise ValueError(f"name one exercise{hint}")
    cfg = configure(GradeConfig, [arg for arg in argv if arg.startswith("--")])
    path = Path(cfg.file or Path(__file__).parent / f"{names[0]}.py")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    found = grade(names[0], path)
    print("\n".join(f"{'ok  ' if holds else 'FAIL'}  {claim}" for claim, holds in found))
    if not all(holds for _, holds in found):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
