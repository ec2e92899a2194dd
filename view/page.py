"""One HTML page, whole in itself, of texts that appear: play, scrub, ask a token for its history.

The page needs no network and may use none: its Content-Security-Policy forbids every request and runs the one script
whose hash it names. view/page.html is the page; here its data are made and put in.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import write_atomically
from data.tokenizer import Tokenizer
from view.record import Look

UNKNOWN, SCALE = 255, 254  # a chance is a whole number of 254ths; 255: the network was not asked


class Lane(NamedTuple):
    """One text of the page, and how it came about."""

    title: str
    settings: str  # of the sampler, as flags
    frames: Iterable[Look]  # whole canvases, see Recorder.frames
    tokenizer: Tokenizer
    given: list[bool]  # (S,) True where the token was given (infilling)


def write_page(path: str | Path, title: str, prompt: str, facts: dict[str, str], lanes: list[Lane]) -> None:
    """Write the page to path, whole or not at all. facts: what stands at its foot, such as the seed."""
    text = page(title, prompt, facts, lanes)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode("utf-8", errors="replace")))


def page(title: str, prompt: str, facts: dict[str, str], lanes: list[Lane]) -> str:
    """The page as text."""
    data = {"prompt": prompt, "facts": facts, "lanes": [pack(lane) for lane in lanes]}
    # No `<` is left in the data, so no text in it can end the element or begin a comment.
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    fill = {"TITLE": html.escape(title), "DATA": embedded}
    fill |= {"STYLE_HASH": _hash(template, "style"), "SCRIPT_HASH": _hash(template, "script")}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: fill[found[1]], template)


def _hash(template: str, tag: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def pack(lane: Lane) -> dict:
    """A lane as plain values. Only what changes from frame to frame is kept.

    A record is what one slot shows from a frame on: its token, the chance of it, the likeliest tokens and theirs.
    counts[f] says how many records begin at frame f; the records stand one after the other in columns of little-endian
    integers of `bits` bits (chances: 8), in base64.
    """
    names, calls, ms, counts, columns, before = [], [], [], [], [], None
    for frame in lane.frames:
        names.append(frame.name)
        calls.append(frame.calls)
        ms.append(round(1000 * frame.seconds, 3))
        record = np.concatenate(
            [frame.ids[:, None], _scaled(frame.chance)[:, None], frame.top, _scaled(frame.top_chance)], axis=1
        ).astype(np.int64)  # (S, 2 + 2 TOP)
        differs = (record[:, 0] >= 0) if before is None else (record != before).any(1)  # an empty slot has no record
        slots = np.flatnonzero(differs)
        counts.append(len(slots))
        columns.append(np.concatenate([slots[:, None], record[slots]], axis=1))
        before = record
    table, top = np.concatenate(columns), (record.shape[1] - 2) // 2  # (records, 3 + 2 TOP)
    ids = np.unique(table[:, [1, *range(3, 3 + top)]])
    bits = 16 if max(len(record), ids.max()) < 1 << 16 else 32
    return {
        "title": lane.title,
        "settings": lane.settings,
        "slots": len(record),
        "top": top,
        "bits": bits,
        "pad": lane.tokenizer.pad_id,
        "given": [i for i, fixed in enumerate(lane.given) if fixed],
        "vocabulary": {int(i): _piece(int(i), lane.tokenizer) for i in ids if i >= 0},
        "names": names,
        "calls": calls,
        "ms": ms,
        "counts": counts,
        "slot": _base64(table[:, 0], bits),
        "id": _base64(table[:, 1], bits),
        "chance": _base64(table[:, 2], 8),
        # A likeliest token that is not known is the token itself, at UNKNOWN.
        "topId": _base64(np.where(table[:, 3 : 3 + top] < 0, table[:, 1:2], table[:, 3 : 3 + top]), bits),
        "topChance": _base64(np.where(table[:, 3 : 3 + top] < 0, UNKNOWN, table[:, 3 + top :]), 8),
    }


def _scaled(chance: torch.Tensor) -> torch.Tensor:
    return torch.where(chance.isnan(), UNKNOWN, (chance * SCALE).round())


def _piece(i: int, tokenizer: Tokenizer) -> str | list[int]:
    """The token as text, or its bytes where they are text only together with others."""
    text = tokenizer.decode([i])
    return list(tokenizer.piece(i)) if "\ufffd" in text else text


def _base64(values: np.ndarray, bits: int) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype=f"<u{bits // 8}").tobytes()).decode()
