"""What stands for a token where a canvas is drawn: characters that take their place and do nothing else."""

import unicodedata

from data.tokenizer import Tokenizer

PAD, NEWLINE, UNPRINTABLE = "░", "↵", "·"


def spans(ids: list[int], tokenizer: Tokenizer) -> list[tuple[str, int, int]]:
    """(text, first slot, slot after the last) of each cell. A newline stays one; see lay_out in terminal.py."""
    found, i = [], 0
    while i < len(ids):
        n, text = 1, PAD
        if ids[i] != tokenizer.pad_id:
            n = next((n for n in range(1, 5) if _is_text(ids[i : i + n], tokenizer)), 1)
            text = tokenizer.decode(ids[i : i + n])
        found.append(("".join(visible(c) if c != "\n" else c for c in text), i, i + n))
        i += n
    return found


def _is_text(ids: list[int], tokenizer: Tokenizer) -> bool:
    return "\ufffd" not in tokenizer.decode(ids) and (len(ids) == 1 or max(ids) < tokenizer.n_ordinary)


def visible(char: str) -> str:
    # A combining mark would join the colour of its neighbour and take no column.
    return char if char.isprintable() and not unicodedata.combining(char) and char != "\ufffd" else UNPRINTABLE


def width(char: str) -> int:
    """Columns of a terminal that a character takes."""
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def harmless(text: str) -> str:
    """The text without control characters: an escape sequence that a model makes up is no command to a terminal."""
    return "".join(UNPRINTABLE if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
