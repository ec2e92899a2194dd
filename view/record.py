"""Record what a decoder does to the first sample: an on_step hook for all decoders."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TOP = 4  # most probable tokens recorded per position
UNKNOWN = -1.0  # no token yet, or a probability that was not computed


class Frame(NamedTuple):
    """The canvas of S positions after one network call."""

    name: str  # the step, or "answer"
    calls: int  # network calls so far, over all candidates
    seconds: float  # since the start, without the time that recording took
    table: Tensor  # (S, 2 + 2 TOP) token, its probability, likeliest token, its probability, ..

    @property
    def ids(self) -> Tensor:
        return self.table[:, 0].long()  # (S,)


class Recorder:
    """Pass it to a decoder as on_step, inside `with`; then call frames().

    growing: each call adds one token (autoregressive). candidates: rows of the first sample.
    seconds: the time that recording took.
    """

    def __init__(self, pad_id: int, growing: bool, candidates: int):
        self.pad_id = pad_id
        self.growing = growing
        # All candidates are recorded, because the best one is known only at the end.
        self.history: list[list[Frame]] = [[] for _ in range(candidates)]
        self.calls = 0
        self.clock = 0.0
        self.seconds = 0.0

    def __enter__(self) -> "Recorder":
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_) -> None: ...

    def __call__(self, step: int, canvas: Tensor, logits: Tensor | None, rows: Tensor) -> None:
        numbers = rows[: len(self.history)].tolist()  # waits for the device: not recording time
        now = time.perf_counter()
        # An AR text ends with its first pad, while others of the batch go on.
        ended = self.growing and step > 1 and canvas[0, step - 2] == self.pad_id
        active = [r for r, number in enumerate(numbers) if number >= 0 and not ended]
        if active:
            self.clock = now - self.start - self.seconds
            self.calls += 0 if logits is None else len(active)
        for r in active:
            table = self._table(step, canvas[r], None if logits is None else logits[r])
            self.history[r].append(Frame(f"{step}", self.calls, self.clock, table))
        if 0 in active:
            self.draw()
        self.seconds += time.perf_counter() - now

    def draw(self) -> None:
        """Called after each frame of the first candidate."""

    def _table(self, step: int, ids: Tensor, logits: Tensor | None) -> Tensor:
        """Return the table of a frame for ids (S,) with logits (S, V), or (1, V) if growing."""
        table = torch.full((len(ids), 2 + 2 * TOP), UNKNOWN, dtype=torch.double)
        new = slice(step - 1, step) if self.growing else slice(None)
        if self.growing and self.history[0]:
            table = self.history[0][-1].table.clone()
        table[new, 0] = ids[new].cpu()
        if logits is not None:
            log_p = logits.float().log_softmax(-1)  # before temperature
            top = log_p.topk(TOP, dim=-1)
            table[new, 1] = log_p.gather(-1, ids[new, None])[:, 0].exp().cpu()
            table[new, 2::2] = top.indices.cpu()
            table[new, 3::2] = top.values.exp().cpu()
        return table

    def frames(self, tokens: Tensor) -> Iterator[Frame]:
        """Yield the canvases of the candidate closest to the text, tokens (S,), then the text."""
        tokens = tokens.cpu()

        def n_equal(frames: list[Frame]) -> int:
            # Some samplers return the canvas, others the most probable tokens.
            return max(int((frames[-1].table[:, column] == tokens).sum()) for column in (0, 2))

        chosen = max(self.history, key=n_equal)
        yield from chosen
        last = chosen[-1]
        if self.growing or (last.calls == self.calls and torch.equal(last.ids, tokens)):
            return
        answer = last.table.clone()
        answer[:, 0] = tokens
        known = torch.where(answer[:, 2::2] == tokens[:, None], answer[:, 3::2], UNKNOWN).amax(1)
        answer[:, 1] = torch.where(last.ids == tokens, answer[:, 1], known)
        yield Frame("answer", self.calls, self.clock, answer)
