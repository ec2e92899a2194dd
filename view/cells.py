"""Choose the characters that show tokens. No token can move the cursor or send a command."""

import re
import unicodedata

from data.tokenizer import Tokenizer

PAD, NEWLINE, UNPRINTABLE = "░", "↵", "·"


def spans(ids: list[int], tokenizer: Tokenizer) -> list[tuple[str, int, int]]:
    """Return the cells of a canvas: (text, first position, end position).

    Tokens that only together form a character share a cell. A newline stays a newline.
    """
    cells = []
    start = 0
    while start < len(ids):
        ends = range(start + 1, min(start + 5, len(ids) + 1))
        end = next((e for e in ends if _is_text(ids[start:e], tokenizer)), start + 1)
        text = "".join(map(visible, tokenizer.decode(ids[start:end])))
        cells.append((PAD if ids[start] == tokenizer.pad_id else text, start, end))
        start = end
    return cells


def _is_text(ids: list[int], tokenizer: Tokenizer) -> bool:
    ordinary = len(ids) == 1 or max(ids) < tokenizer.n_ordinary
    return ordinary and "\ufffd" not in tokenizer.decode(ids)


def visible(char: str) -> str:
    """Return the character if it takes a place of its own or is a newline, else a dot."""
    marks = unicodedata.category(char) in ("Mn", "Me")  # they would join the character before
    shown = char == "\n" or char.isprintable() and not marks and char != "\ufffd"
    return char if shown else UNPRINTABLE


def width(char: str) -> int:
    """Return how many terminal columns a character takes."""
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def printable(text: str) -> str:
    """Replace control characters, so that no text can send a command to the terminal."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", UNPRINTABLE, text)
