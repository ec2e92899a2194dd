"""Draw a text in the terminal while it is generated: an on_step hook for all decoders.

Colour shows how probable a token is for the network. The line below marks it: ~ noise, ^ new in
this step, or how often the token has changed its mind. On a terminal, each frame replaces the one
before on the alternate screen. Elsewhere, each step prints the lines that changed.
"""

import math
import os
import shutil
import signal
import sys
import time
from contextlib import suppress

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
        self.in_place = call_stdout("isatty") and os.environ.get("TERM") != "dumb"
        self.colour = self.in_place and not os.environ.get("NO_COLOR")
        self.size = shutil.get_terminal_size((80, 24))

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
            status, *summary = self._below()
            rows = [*rows_of(self._lines()), status] if self.in_place else []
            write("".join(f"{row}\n" for row in rows + summary))
        self.seconds += time.perf_counter() - start

    def __call__(self, step: int, canvas: Tensor, logits: Tensor | None, rows: Tensor) -> None:
        drawn = len(self.history[0])
        super().__call__(step, canvas, logits, rows)
        start = time.perf_counter()
        if len(self.history[0]) > drawn:
            self.size = shutil.get_terminal_size((80, 24))
            self._draw()
        self.seconds += time.perf_counter() - start

    def _draw(self) -> None:
        lines = self._lines()
        below = self._below()
        if not self.in_place:
            rows = below[:1] + rows_of([line for line in lines if line[1]])
            write("".join(f"{row}\n" for row in rows))
            return
        # If not all rows fit, show those up to the last change.
        room = max(self.size.lines - len(below), 1)
        last = max((i for i, (_, changed) in enumerate(lines) if changed), default=0)
        start = max(0, len(rows_of(lines[: last + 1])) - room)
        rows = rows_of(lines)[start : start + room] + below
        rows = [f"\x1b[K{row}" for row in rows[-self.size.lines :]]
        write("\x1b[H" + "\r\n".join(rows) + "\x1b[J")
        time.sleep(self.pause)

    @property
    def columns(self) -> int:
        return max(self.size.columns - 1, 1)  # a full last column makes some terminals wrap

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

    def _lines(self) -> list[tuple[list[str], bool]]:
        """Return each line as its rows, text and marks, and whether it is new or noise."""
        lines = []
        for line in lay_out(self._cells(), self.columns, break_lines=self.in_place):
            marks = "".join(mark * width(char) for char, _, mark in line)
            changed = "^" in marks or "~" in marks
            text = "".join(char for char, _, _ in line)
            if self.colour:
                text = "".join(f"\x1b[{codes}m{char}\x1b[0m" for char, codes, _ in line)
                marks = marks.replace("^", " ").replace("~", " ")
            lines.append(([text, marks.rstrip()] if marks.strip() else [text], changed))
        return lines

    def _below(self) -> list[str]:
        """Return the status and, if tokens can change, a summary of when they settled."""
        frame = self.history[0][-1]
        since, new, flips = (column[~self.fixed] for column in self._changes())
        text = int(((frame.ids >= 0) & (frame.ids != self.pad_id)).sum())
        news = f"{text} tokens" if self.growing else f"{new.float().mean():.0%} changed"
        speed = f"{text / max(frame.seconds, 1e-9):,.0f} tokens/s"
        status = f"step {frame.name} of {self.total} | {frame.calls} network calls | "
        status += f"{news} | {speed}" if frame.calls else "noise"
        if self.growing:
            return [status[: self.columns]]
        counts = torch.bincount(since, minlength=len(self.history[0]))
        bars = [int(part.sum()) for part in counts.split(math.ceil(len(counts) / 24))]
        ramp = BARS if encodable(BARS) == BARS else ASCII_BARS
        settled = "".join(ramp[math.ceil(8 * n / max(*bars, 1))] for n in bars)
        summary = f"settled |{settled}| {int((flips > 0).sum())} of {len(flips)} changed their mind"
        if len(self.history) > 1:
            summary += f" | candidate 1 of {len(self.history)}, the best is not known yet"
        return [status[: self.columns], summary[: self.columns]]


def rows_of(lines: list[tuple[list[str], bool]]) -> list[str]:
    return [row for rows, _ in lines for row in rows]


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


def encodable(text: str) -> str:
    """Replace what the encoding of stdout lacks by question marks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def call_stdout(method: str, *args):
    """Call a method of stdout. What cannot be drawn must not stop the decoder."""
    with suppress(AttributeError, OSError, ValueError):  # no stdout, closed, or without a reader
        return getattr(sys.stdout, method)(*args)


def write(text: str) -> None:
    call_stdout("write", encodable(text))
    call_stdout("flush")
