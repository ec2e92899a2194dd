"""Write one HTML page that plays how texts were generated. page.html is its template.

The page needs no network: its Content-Security-Policy forbids every request, and allows only the
script and the style whose hashes it names.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

from data.tokenizer import Tokenizer
from infra.checkpoint import write_atomically
from view.record import Frame


def write_page(path, prompt: str, facts: dict[str, str], tracks: list[dict]) -> None:
    """Write the page atomically. facts: its foot, such as the seed. tracks: see pack."""
    data = {"prompt": prompt, "facts": facts, "tracks": tracks}
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    page = template.replace("{{STYLE_HASH}}", _hash(template, "style"))
    page = page.replace("{{SCRIPT_HASH}}", _hash(template, "script"))
    # Without "<" no text in the data can end the element or start a comment.
    page = page.replace("{{DATA}}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(page.encode("utf-8", errors="replace")))


def _hash(template: str, tag: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def pack(
    title: str, flags: str, frames: Iterable[Frame], tokenizer: Tokenizer, fixed: list
) -> dict:
    """Return one text of the page as plain values. A frame holds only the positions that changed,
    each as [position, *row of the frame's table], with probabilities in thousandths.

    flags: the sampler's settings. fixed (S,): True at tokens that were given (infilling).
    """
    packed = []
    used = {tokenizer.pad_id}
    before = [[]] * len(fixed)
    for frame in frames:
        table = frame.table.clone()
        table[:, 1::2] = (1000 * table[:, 1::2]).round().clamp(min=-1)
        rows = table.long().tolist()
        pairs = enumerate(zip(rows, before))
        changes = [[s, *row] for s, (row, old) in pairs if row != old and row[0] >= 0]
        used.update(token for row in changes for token in row[1::2] if token >= 0)
        ms = round(1000 * frame.seconds, 3)
        packed.append({"name": frame.name, "calls": frame.calls, "ms": ms, "changes": changes})
        before = rows
    return {
        "title": title,
        "flags": flags,
        "length": len(fixed),
        "pad": tokenizer.pad_id,
        "fixed": [i for i, given in enumerate(fixed) if given],
        "vocabulary": {i: _piece(i, tokenizer) for i in sorted(used)},
        "frames": packed,
    }


def _piece(i: int, tokenizer: Tokenizer) -> str | list[int]:
    """Return the token's text, or its bytes if they are only part of a character."""
    text = tokenizer.decode([i])
    return list(tokenizer.piece(i)) if "\ufffd" in text else text
