"""Draw a text in the terminal while it is generated: an on_step hook for all decoders.

Colour is the probability of a token, faint is noise, bold is new. On a terminal, each frame
replaces the one before on the alternate screen. Elsewhere, a step prints the lines that changed.
"""

import os
import shutil
import sys
import time

import torch

from view.cells import NEWLINE, spans, width
from view.record import UNKNOWN, Recorder

ENTER = "\x1b[?1049h\x1b[?25l"  # alternate screen, no cursor
LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"
NOISE, NEW = "2", ";1;4"  # SGR codes: faint; bold and underlined


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
        self.in_place = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        # Probability -> SGR code: green, yellow, red
        self.levels = {0.9: "32", 0.5: "33", 1 / tokenizer.vocab_size: "31"}
        if os.environ.get("NO_COLOR"):
            self.levels = dict.fromkeys(self.levels, "0")

    def __enter__(self) -> "TerminalView":
        if self.in_place:
            write(ENTER)
        return super().__enter__()

    def __exit__(self, kind, *_) -> None:
        if self.in_place:
            write(LEAVE)
            if self.history[0] and kind in (None, KeyboardInterrupt):
                write(*(line for line, _ in self._lines()), self._status(), end="\n")

    def draw(self) -> None:
        columns, height = shutil.get_terminal_size((80, 24))
        self.columns = max(columns - 1, 2)  # a full last column makes some terminals wrap
        lines = self._lines()
        if not self.in_place:
            write(self._status(), *(line for line, changed in lines if changed), end="\n")
            return
        # If not all lines fit, show those up to the last change.
        last = max((i for i, (_, changed) in enumerate(lines) if changed), default=0)
        start = max(0, last + 2 - height)
        rows = [line for line, _ in lines[start : start + height - 1]] + [self._status()]
        write("\x1b[H" + "\r\n".join(f"\x1b[K{row}" for row in rows) + "\x1b[J")
        time.sleep(self.pause)

    def _cells(self) -> list[tuple[str, str]]:
        """Return (character, SGR codes) of the canvas."""
        *_, before, frame = [None, *self.history[0]]
        ids = frame.ids
        changed = (ids != (before.ids if before else UNKNOWN)) & ~self.fixed
        cells = []
        for text, start, end in spans(ids[ids >= 0].tolist(), self.tokenizer):
            part = slice(start, end)
            p = 1.0 if self.fixed[part].all() else float(frame.table[part, 1].min())
            codes = next((codes for least, codes in self.levels.items() if p >= least), NOISE)
            if codes != NOISE and changed[part].any():
                codes += NEW
            cells += [(char, codes) for char in text]
        return cells

    def _lines(self) -> list[tuple[str, bool]]:
        """Return each line and whether a part of it is new or noise."""
        lines = []
        for line in lay_out(self._cells(), self.columns):
            form = "\x1b[{1}m{0}\x1b[0m" if self.in_place else "{0}"
            changed = any(codes == NOISE or codes.endswith(NEW) for _, codes in line)
            lines.append(("".join(form.format(*cell) for cell in line), changed))
        return lines

    def _status(self) -> str:
        frame = self.history[0][-1]
        text = int(((frame.ids >= 0) & (frame.ids != self.pad_id)).sum())
        speed = f"{text / max(frame.seconds, 1e-9):,.0f} tokens/s" if frame.calls else "noise"
        status = f"step {frame.name} of {self.total} | {frame.calls} network calls | {speed}"
        return status[: self.columns]


def lay_out(cells: list[tuple[str, str]], columns: int) -> list[list[tuple[str, str]]]:
    """Split cells into lines that fit. A newline ends its line."""
    lines = [[]]
    used = 0
    for char, codes in cells:
        if used + width(char) > columns:
            lines.append([])
            used = 0
        lines[-1].append((NEWLINE if char == "\n" else char, codes))
        used = columns if char == "\n" else used + width(char)
    return lines


def write(*rows: str, end: str = "") -> None:
    """Print the rows. What the encoding of stdout lacks becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(rows).encode(encoding, "replace").decode(encoding)
    print(text, end=end, flush=True)
