"""A text as it comes about, in the terminal: an on_step hook that draws the canvas after every network call.

Colour says how sure the network is, a row of marks under the text what has just changed and how often a token has
changed its mind. On a terminal a frame takes the place of the one before, on the alternate screen, so a window may
change its size; what stood there before comes back at the end, and after Ctrl-C. Elsewhere each step is plain lines.
"""

import math
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from data.tokenizer import Tokenizer
from view.cells import NEWLINE, spans, width
from view.record import chances

ENTER, LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[0m\x1b[?25h\x1b[?1049l"  # alternate screen, cursor hidden; and back
# How sure the network is of a token -> SGR codes that any colour terminal knows.
COLOUR = {"noise": "2", "doubtful": "31", "likely": "33", "sure": "32"}
CHANGED = "1;4"  # bold and underlined: new in this step
BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class Slot:
    """What is known of one place on the canvas."""

    id: int
    chance: float = math.nan  # what the network gave the token; nan: it was not asked
    since: int = 0  # the drawing from which on the token has stood
    moves: int = 0  # how often the place has changed
    fixed: bool = False  # given, not drawn

    def take(self, token: int, chance: float, drawing: int) -> None:
        if token != self.id:
            self.id, self.since, self.moves = token, drawing, self.moves + 1
        self.chance = chance

    @property
    def flips(self) -> int:
        """Changes of mind: the first change only replaces noise."""
        return max(self.moves - 1, 0)


class Look(NamedTuple):
    """How a cell is drawn."""

    sure: str  # noise | doubtful | likely | sure
    changed: bool
    flips: int

    @property
    def mark(self) -> str:
        """~ noise, ^ new in this step, else how often the token has changed its mind."""
        if self.sure == "noise":
            return "~"
        return "^" if self.changed else " " if not self.flips else str(self.flips) if self.flips < 10 else "+"


class Show:
    """An on_step hook that draws the first candidate of the first sample. Use it in a `with`, which cleans up.

    growing: the text is written token by token, all else is rewritten as a whole. total: steps, as far as they are
    known. given: the slots that are fixed, of an infilling. seconds: what drawing took, pauses included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        growing: bool,
        total: int | str,
        candidates: int = 1,
        given: list[bool] | None = None,
        pause: float = 0.0,
    ):
        self.tokenizer, self.growing, self.total, self.candidates = tokenizer, growing, total, candidates
        self.given, self.pause = given, pause
        self.in_place = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.colour = self.in_place and not os.environ.get("NO_COLOR")
        self.slots: list[Slot] = []
        self.finished, self.block = 0, 0  # slots of the blocks before this one, and its number
        self.drawing, self.calls, self.seconds, self.begun = -1, 0, 0.0, time.perf_counter()
        self.status, self.handler = "", None

    def __enter__(self) -> "Show":
        if self.in_place:
            try:
                self.handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            except ValueError:
                pass  # not the main thread: whoever called us decides about signals
            print(ENTER, end="", flush=True)
        self.begun = time.perf_counter()
        return self

    def __exit__(self, kind, error, trace) -> None:
        start = time.perf_counter()
        if self.in_place:
            print(LEAVE, end="", flush=True)
            if self.handler is not None:
                signal.signal(signal.SIGTERM, self.handler)
        if self.status and kind in (None, KeyboardInterrupt):
            columns = shutil.get_terminal_size((80, 24)).columns
            if self.in_place:  # the last frame stays
                rows = [row for line in self._lines(columns - 1) for row in self._rows(line)]
                print("\n".join([*rows, self.status[: columns - 1]]))
            if not self.growing:
                print(self._summary(columns - 1), flush=True)
        self.seconds += time.perf_counter() - start

    def __call__(self, step: int, canvas: Tensor, logits: Tensor | None, rows: Tensor) -> None:
        numbers = rows.tolist()  # waits for the device, so not drawing time
        self.calls += 0 if logits is None else sum(0 <= r < self.candidates for r in numbers)
        if 0 not in numbers or (self.growing and self.slots and self.slots[-1].id == self.tokenizer.pad_id):
            return  # it has settled or ended; the others go on
        start, row = time.perf_counter(), numbers.index(0)
        elapsed = start - self.begun - self.seconds
        self._take(step, canvas[row].tolist(), None if logits is None else logits[row])
        self.status = self._status(step, elapsed, logits is None)
        columns, height = shutil.get_terminal_size((80, 24))
        if self.in_place:
            print(self._frame(columns - 1, height), end="", flush=True)
            time.sleep(self.pause)
        else:
            print("\n".join([self.status, *plain_lines(self._lines(columns - 1))]), flush=True)
        self.seconds += time.perf_counter() - start

    def _take(self, step: int, ids: list[int], logits: Tensor | None) -> None:
        """Remember what stands there now."""
        self.drawing += 1
        if self.growing:
            new = ids[step - 1]
            self.slots.append(Slot(new, float(chances(_column([new], logits), logits)), self.drawing))
            return
        if logits is None:  # a canvas of noise: the first one, or that of the next block
            self.finished = len(self.slots) if self.candidates == 1 else 0  # else the block that was kept is not known
            self.slots, self.block = self.slots[: self.finished], self.block + 1
            given = self.given or [False] * (self.finished + len(ids))
            own = given[self.finished : self.finished + len(ids)]
            self.slots += [Slot(i, since=self.drawing, fixed=fixed) for i, fixed in zip(ids, own)]
            return
        likely = chances(_column(ids, logits), logits)[:, 0].tolist()
        for slot, token, chance in zip(self.slots[self.finished :], ids, likely):
            slot.take(token, chance, self.drawing)

    def _status(self, step: int, elapsed: float, noise: bool) -> str:
        own = [slot for slot in self.slots[self.finished :] if not slot.fixed]
        text = sum(slot.id != self.tokenizer.pad_id for slot in self.slots)
        changed = sum(slot.since == self.drawing for slot in own)
        block = f"block {self.block}, " if self.block > 1 else ""
        news = f"{text} tokens" if self.growing else "noise" if noise else f"{changed / max(len(own), 1):.0%} changed"
        speed = f" | {text / elapsed:,.0f} tokens/s" if elapsed > 0 and not noise else ""
        return f"{block}step {step} of {self.total} | {self.calls} network calls | {news}{speed}"

    def _summary(self, columns: int) -> str:
        """Which slots settled when: a bar for each drawing, and how many tokens changed their mind."""
        own = [slot for slot in self.slots if not slot.fixed]
        counts = [sum(slot.since == k for slot in own) for k in range(self.drawing + 1)]
        several = f" | candidate 1 of {self.candidates}, best not known" if self.candidates > 1 else ""
        text = f"{sum(slot.flips > 0 for slot in own)} of {len(own)} changed their mind{several}"
        if self.in_place:
            each = math.ceil(len(counts) / 24)  # drawings of a bar
            sums = [sum(counts[k : k + each]) for k in range(0, len(counts), each)]
            bars = "".join(BARS[math.ceil(8 * count / max(*sums, 1))] for count in sums)
            return f"settled |{bars}| {text}"[:columns]
        return f"settled at step {', '.join(f'{k}: {count}' for k, count in enumerate(counts) if count)} | {text}"

    def _look(self, slots: list[Slot]) -> Look:
        known = [slot.chance for slot in slots if not math.isnan(slot.chance)]
        chance, fixed = min(known, default=math.nan), all(slot.fixed for slot in slots)
        changed = any(slot.since == self.drawing and not slot.fixed for slot in slots) and self.drawing > 0
        if fixed or chance >= 0.9:
            sure = "sure"
        elif not chance >= 1 / self.tokenizer.vocab_size:  # less than chance, or not asked
            sure, changed = "noise", False
        else:
            sure = "likely" if chance >= 0.5 else "doubtful"
        return Look(sure, changed or (self.growing and slots[-1] is self.slots[-1]), max(slot.flips for slot in slots))

    def _lines(self, columns: int) -> list[list[tuple[str, Look]]]:
        found = spans([slot.id for slot in self.slots], self.tokenizer)
        cells = [(text, self._look(self.slots[first:end])) for text, first, end in found]
        return lay_out(cells, columns, self.in_place)

    def _rows(self, line: list[tuple[str, Look]], marked: bool = True) -> list[str]:
        """A line as it goes to the terminal, and its marks where it has any."""
        text = paint(line) if self.colour else "".join(char for char, _ in line)
        marks = marks_of(line).translate({ord("^"): " ", ord("~"): " "}) if self.colour else marks_of(line)
        return [text, marks.rstrip()] if marked and marks.strip() else [text]

    def _frame(self, columns: int, height: int) -> str:
        lines, below = self._lines(columns), [self.status[:columns]]
        below += [] if self.growing else [self._summary(columns)]
        room = max(height - len(below), 1)
        groups = [self._rows(line) for line in lines]
        if sum(map(len, groups)) > room and self.colour:  # text before marks
            groups = [self._rows(line, marked=False) for line in lines]
        rows = [row for group in groups for row in group]
        news = [i for i, line in enumerate(lines) if any(look.changed for _, look in line)]
        end = sum(map(len, groups[: news[-1] + 1])) if news else 0
        start = max(0, end - room)  # what does not fit is above or below the last change
        shown = [*rows[start : start + room], *below][-height:]
        return "\x1b[H" + "\r\n".join(f"{row}\x1b[K" for row in shown) + "\x1b[J"


def _column(ids: list[int], logits: Tensor) -> Tensor:
    return logits.new_tensor(ids).long()[:, None]


def lay_out(cells: list[tuple], columns: int, break_lines: bool) -> list[list[tuple]]:
    """The cells as lines of (character, look), none wider than columns. break_lines: a newline token ends its line."""
    lines, used = [[]], 0
    for text, look in cells:
        for char in text:
            if used + width(char) > columns:
                lines, used = [*lines, []], 0
            lines[-1].append((NEWLINE if char == "\n" else char, look))
            used += width(char)
            if char == "\n" and break_lines:
                lines, used = [*lines, []], 0
    return lines


def paint(line: list[tuple[str, Look]]) -> str:
    """The line with colour codes, each run of one look closed again."""
    text = ""
    for (sure, changed), part in groupby(line, lambda cell: cell[1][:2]):
        codes = COLOUR[sure] + (f";{CHANGED}" if changed else "")
        text += f"\x1b[{codes}m{''.join(char for char, _ in part)}\x1b[0m"
    return text


def marks_of(line: list[tuple[str, Look]]) -> str:
    return "".join(look.mark * width(char) for char, look in line).rstrip()


def plain_lines(lines: list[list[tuple[str, Look]]]) -> list[str]:
    """Each line in which something is new or noise, and its marks under it."""
    found = []
    for line in lines:
        marks = marks_of(line)
        if "^" in marks or "~" in marks:
            found += ["".join(char for char, _ in line), marks]
    return found
