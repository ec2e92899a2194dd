"""Draw a text in the terminal while it is generated: an on_step hook for all decoders.

Colour shows how probable a token is for the network. The line below marks it: ~ noise, ^ new in
this step, or how often the token has changed its mind. On a terminal, each frame replaces the one
before on the alternate screen. Elsewhere, each step prints the lines that changed.
"""

import math
import os
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from itertools import groupby

import torch
from torch import Tensor

from view.cells import NEWLINE, UNPRINTABLE, spans, width
from view.record import UNKNOWN, Recorder

ENTER = "\x1b[?1049h\x1b[?25l"  # alternate screen, no cursor
LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
NOISE, NEW = "2", ";1;4"  # SGR codes: faint; bold and underlined
BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


class TerminalView(Recorder):
    """Draw the first candidate of the first sample. Pass it to a decoder as on_step, inside `with`.

    fixed: (S,) True at tokens that were given (infilling). pause: seconds after each frame.
    seconds: the time that drawing took. growing, candidates: see Recorder.
    """

    def __init__(self, tokenizer, growing: bool, total, candidates: int, fixed: list, pause: float):
        super().__init__(tokenizer.pad_id, growing, candidates)
        self.tokenizer = tokenizer
        self.total = total
        self.fixed = torch.tensor(fixed)
        self.pause = pause
        self.in_place = is_terminal() and os.environ.get("TERM") != "dumb"
        self.colour = self.in_place and not os.environ.get("NO_COLOR")

    def __enter__(self) -> "TerminalView":
        if self.in_place:
            with suppress(ValueError):  # only the main thread may handle signals
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs __exit__
            write(ENTER)
        return super().__enter__()

    def __exit__(self, kind, error, trace) -> None:
        start = time.perf_counter()
        if self.in_place:
            write(LEAVE)
        if self.history[0] and kind in (None, KeyboardInterrupt):
            columns = drawable_columns()
            rows = self._rows(self._lines(columns)) if self.in_place else []
            below = self._below(columns)
            write("".join(f"{row}\n" for row in rows + below[not self.in_place :]))
        self.seconds += time.perf_counter() - start

    def __call__(self, step: int, canvas: Tensor, logits: Tensor | None, rows: Tensor) -> None:
        drawn = len(self.history[0])
        super().__call__(step, canvas, logits, rows)
        start = time.perf_counter()
        if len(self.history[0]) > drawn:
            self._draw()
        self.seconds += time.perf_counter() - start

    def _draw(self) -> None:
        columns = drawable_columns()
        lines = self._lines(columns)
        below = self._below(columns)
        changed = [i for i, (_, marks) in enumerate(lines) if re.search("[~^]", marks)]
        if not self.in_place:
            rows = self._rows([lines[i] for i in changed])
            write("\n".join([below[0], *rows]) + "\n")
            return
        height = shutil.get_terminal_size((80, 24)).lines
        room = max(height - len(below), 1)
        # Show the part with the last change if not all fits.
        end = len(self._rows(lines[: changed[-1] + 1])) if changed else 0
        start = max(0, end - room)
        rows = self._rows(lines)[start : start + room] + below
        write("\x1b[H" + "\r\n".join(f"\x1b[K{row}" for row in rows[-height:]) + "\x1b[J")
        time.sleep(self.pause)

    def _changes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return for each position (S,): the frame of its last change, whether it changed in the
        last frame, and how often the token has changed its mind."""
        ids = torch.stack([frame.ids for frame in self.history[0]])  # (frames, S)
        first = torch.full_like(ids[:1], UNKNOWN) if self.growing else ids[:1]
        changed = ids != torch.cat([first, ids[:-1]])
        since = (changed * torch.arange(len(ids))[:, None]).amax(0)
        flips = (changed.sum(0) - 1).clamp(min=0)  # the first change only replaces noise
        return since, changed[-1] & ~self.fixed, flips

    def _cells(self) -> list[tuple[str, str, str]]:
        """Return (character, SGR codes, mark) of the canvas."""
        frame = self.history[0][-1]
        _, new, flips = self._changes()
        levels = {0.9: "32", 0.5: "33", 1 / self.tokenizer.vocab_size: "31"}  # green, yellow, red
        cells = []
        for text, start, end in spans(frame.ids[frame.ids >= 0].tolist(), self.tokenizer):
            part = slice(start, end)
            p = 1.0 if self.fixed[part].all() else float(frame.table[part, 1].min())
            codes = next((codes for least, codes in levels.items() if p >= least), NOISE)
            mark = " 123456789+"[min(int(flips[part].max()), 10)]
            if codes == NOISE:
                mark = "~"
            elif new[part].any():
                mark = "^"
                codes += NEW
            cells += [(char, codes, mark) for char in encodable(text)]
        return cells

    def _lines(self, columns: int) -> list[tuple[str, str]]:
        """Return the canvas as (text, marks) of each line."""
        lines = []
        for line in lay_out(self._cells(), columns, break_lines=self.in_place):
            marks = "".join(mark * width(char) for char, _, mark in line)
            text = ""
            for codes, part in groupby(line, lambda cell: cell[1]):
                chars = "".join(char for char, _, _ in part)
                text += f"\x1b[{codes}m{chars}\x1b[0m" if self.colour else chars
            lines.append((text, marks))
        return lines

    def _rows(self, lines: list[tuple[str, str]]) -> list[str]:
        """Return the text of the lines, each followed by its marks if it has any."""
        rows = []
        for text, marks in lines:
            if self.colour:
                marks = re.sub("[~^]", " ", marks)
            rows += [text, marks.rstrip()] if marks.strip() else [text]
        return rows

    def _below(self, columns: int) -> list[str]:
        """Return the status and, if tokens can change, a summary of when they settled."""
        frame = self.history[0][-1]
        since, new, flips = (column[~self.fixed] for column in self._changes())
        text = int(((frame.ids >= 0) & (frame.ids != self.pad_id)).sum())
        news = f"{text} tokens" if self.growing else f"{new.float().mean():.0%} changed"
        speed = f"{text / max(frame.seconds, 1e-9):,.0f} tokens/s"
        status = f"step {frame.name} of {self.total} | {frame.calls} network calls | "
        status += f"{news} | {speed}" if frame.calls else "noise"
        if self.growing:
            return [status[:columns]]
        counts = torch.bincount(since, minlength=len(self.history[0]))
        bars = [int(part.sum()) for part in counts.split(math.ceil(len(counts) / 24))]
        ramp = BARS if encodable(BARS) == BARS else ASCII_BARS
        settled = "".join(ramp[math.ceil(8 * n / max(*bars, 1))] for n in bars)
        summary = f"settled |{settled}| {int((flips > 0).sum())} of {len(flips)} changed their mind"
        if len(self.history) > 1:
            summary += f" | candidate 1 of {len(self.history)}, the best is not known yet"
        return [status[:columns], summary[:columns]]


def lay_out(cells: list, columns: int, break_lines: bool) -> list[list[tuple[str, str, str]]]:
    """Split cells into lines that fit. break_lines: a newline ends its line."""
    lines = [[]]
    used = 0
    for char, codes, mark in cells:
        char = char if width(char) <= columns else UNPRINTABLE
        if used + width(char) > columns:
            lines.append([])
            used = 0
        lines[-1].append((NEWLINE if char == "\n" else char, codes, mark))
        used = columns if char == "\n" and break_lines else used + width(char)
    return lines


def is_terminal() -> bool:
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):
        return False  # no stdout, or a closed one


def drawable_columns() -> int:
    # A full last column would make some terminals wrap.
    return max(shutil.get_terminal_size((80, 24)).columns - 1, 1)


def encodable(text: str) -> str:
    """Replace what the encoding of stdout lacks by question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def write(text: str) -> None:
    """Write to stdout. A text that cannot be drawn must not stop the decoder."""
    with suppress(AttributeError, OSError, ValueError):  # no stdout, closed, or without a reader
        sys.stdout.write(encodable(text))
        sys.stdout.flush()
