"""An on_step hook that keeps what a decoder does to the first sample, call by call, with the time it took.

All decoders call their hook alike (diffusion.denoise, autoregressive.generate, speculative.generate). Of several
candidates all are kept until it is known which one is the answer.
"""

import math
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TOP = 4  # candidates that are kept for each slot
EMPTY = -1  # a slot where nothing stands yet


class Look(NamedTuple):
    """What one network call left in the n slots from `at` on: a whole canvas, a block of it, or one new token."""

    name: str  # the step, or "answer"; "block 2, step 3" where a text is written block by block
    calls: int  # network calls so far, all candidates counted
    seconds: float  # since the decoder began, without what recording took
    at: int
    ids: Tensor  # (n,) EMPTY where nothing stands yet
    chance: Tensor  # (n,) what the network gave the token, before temperature; nan where it was not asked
    top: Tensor  # (n, TOP) the likeliest tokens, likeliest first; EMPTY where it was not asked
    top_chance: Tensor  # (n, TOP)


class Recorder:
    """Hand it to a decoder as on_step, in a `with`, which starts the clock; then ask for looks or frames.

    growing: the decoder writes one token a call (autoregressive). candidates: rows that belong to the first sample.
    seconds: what recording took.
    """

    def __init__(self, pad_id: int, growing: bool, candidates: int = 1):
        self.pad_id, self.growing, self.candidates = pad_id, growing, candidates
        self.blocks: list[list[list[Look]]] = []  # the looks at each candidate of each block
        self.calls, self.begun, self.clock, self.seconds, self.ended = 0, 0.0, 0.0, 0.0, False

    def __enter__(self) -> "Recorder":
        self.begun = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        pass

    def __call__(self, step: int, canvas: Tensor, logits: Tensor | None, rows: Tensor) -> None:
        numbers = rows.tolist()  # waits for the device: what it still computes is the network's time, not ours
        now = time.perf_counter()
        mine = [(place, r) for place, r in enumerate(numbers) if 0 <= r < self.candidates]
        if mine and not self.ended:  # else it goes on for other samples
            self.clock = now - self.begun - self.seconds
            self._keep(step, canvas, logits, mine)
        self.seconds += time.perf_counter() - now

    def _keep(self, step: int, canvas: Tensor, logits: Tensor | None, mine: list[tuple[int, int]]) -> None:
        self.calls += 0 if logits is None else len(mine)
        if self.growing:
            self.blocks = self.blocks or [[[]]]
            new = canvas[0, step - 1 : step]
            self.blocks[0][0].append(self._look(f"{step}", step - 1, new, logits[0]))
            self.ended = int(new) == self.pad_id
            return
        if logits is None:
            self.blocks.append([[] for _ in range(self.candidates)])
        at = sum(len(block[0][0].ids) for block in self.blocks[:-1])
        name = f"block {len(self.blocks)}, step {step}" if at else f"{step}"
        for place, r in mine:
            look = self._look(name, at, canvas[place], None if logits is None else logits[place])
            self.blocks[-1][r].append(look)

    def _look(self, name: str, at: int, tokens: Tensor, logits: Tensor | None) -> Look:
        ids = tokens.cpu().to(torch.int32, copy=True)
        return Look(name, self.calls, self.clock, at, ids, *_asked(tokens, logits))

    def looks(self, tokens: Tensor) -> list[Look]:
        """What was seen of the text that was kept, tokens (S,). The last look is that text, at the end of the clock.

        A decoder does not say which candidate it kept: it is the one whose last canvas, or whose likeliest tokens where
        a sampler answers with these, agree with the text in most slots. Raises ValueError where nothing was recorded.
        """
        if not self.blocks:
            raise ValueError("nothing was recorded: the decoder never called its hook")
        found, tokens = [], tokens.cpu().to(torch.int32)
        for block in self.blocks:
            first = block[0][0]
            part = tokens[first.at : first.at + len(first.ids)]
            kept = block[0] if self.growing else max(block, key=lambda looks: _agreement(looks[-1], part))
            found += kept
            if not self.growing and not torch.equal(kept[-1].ids, part):
                found.append(_answer(kept[-1], part))
        if self.calls > found[-1].calls:  # the other candidates went on: only now it is known which one is best
            found.append(found[-1]._replace(name="answer", calls=self.calls, seconds=self.clock))
        return found

    def frames(self, tokens: Tensor) -> Iterator[Look]:
        """The looks as whole canvases (S slots): each with what was seen before of the slots it says nothing about."""
        S = len(tokens)
        parts = [torch.full((S,), EMPTY, dtype=torch.int32), *_asked(torch.zeros(S), None)]
        for look in self.looks(tokens):
            parts = [part.clone() for part in parts]
            for part, new in zip(parts, look[4:]):
                part[look.at : look.at + len(new)] = new
            yield Look(*look[:3], 0, *parts)


def _asked(ids: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(chance (n,), top (n, TOP), top_chance (n, TOP)) of tokens (n,) under logits (n, V)."""
    n = len(ids)
    if logits is None:
        return torch.full((n,), math.nan), torch.full((n, TOP), EMPTY, dtype=torch.int32), torch.zeros(n, TOP)
    top = logits.topk(TOP, dim=-1).indices  # (n, TOP)
    return chances(ids[:, None], logits)[:, 0], top.to(torch.int32).cpu(), chances(top, logits)


def chances(ids: Tensor, logits: Tensor) -> Tensor:
    """What logits (n, V) give the tokens (n, K): (n, K) on the CPU, before temperature."""
    return (logits.gather(-1, ids).float() - logits.float().logsumexp(-1, keepdim=True)).exp().cpu()


def _agreement(look: Look, tokens: Tensor) -> int:
    return max(int((look.ids == tokens).sum()), int((look.top[:, 0] == tokens).sum()))


def _answer(last: Look, tokens: Tensor) -> Look:
    """The last look with what the sampler answers instead of its canvas. The chance of a token that is not among the
    likeliest is not known here."""
    same = last.top == tokens[:, None]  # (n, TOP)
    known = torch.where(same.any(1), (last.top_chance * same).sum(1), math.nan)
    chance = torch.where(last.ids == tokens, last.chance, known)
    return last._replace(name="answer", ids=tokens.clone(), chance=chance)
