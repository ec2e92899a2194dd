"""What sample.py shows: --show draws in the terminal, --html writes a page that plays the texts.

page.html is the template of the page. The page needs no network: its Content-Security-Policy
forbids every request, and allows only the script and the style whose hashes it names.
"""

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

import autoregressive
from data.tokenizer import Tokenizer
from infra.checkpoint import write_atomically
from infra.device import pick_device
from view.record import Frame, Recorder
from view.terminal import TerminalView


def watch_for(decoder, cfg):
    """Return the context manager whose on_step records or draws a generation."""
    tokenizer = decoder.tokenizer
    growing = decoder.module is autoregressive
    candidates = getattr(decoder.sampler, "candidates", 1)
    if not cfg.show:
        return Recorder(tokenizer.pad_id, growing, candidates)
    fixed = fixed_slots(decoder)
    total = len(fixed) if growing else getattr(decoder.sampler, "steps", "?")
    return TerminalView(tokenizer, growing, total, candidates, fixed, cfg.pause)


def open_compared(cfg, given: dict, demo: Path, open_decoder) -> list:
    """Return the decoder of the page's second track, with default settings, if there is one."""
    path = cfg.compare
    if not path and not given.keys() & {"init_from", "infill"}:
        path = str(demo / "ar.pt")
    if not path or not cfg.html:
        return []
    return [open_decoder(path, {}, pick_device(cfg.device))]


def fixed_slots(decoder) -> list[bool]:
    template = decoder.template or [-1] * (decoder.model.cfg.target_length - 1)
    return [token >= 0 for token in template]


def track_of(decoder, recorder: Recorder, out) -> dict:
    settings = vars(decoder.sampler)
    title = settings.get("sampler", decoder.module.__name__.removeprefix("extras."))
    flags = " ".join(f"--{name}={value}" for name, value in settings.items())
    frames = recorder.frames(out.tokens[0])
    return pack(title, flags, frames, decoder.tokenizer, fixed_slots(decoder))


def write(cfg, text: str, first: dict, others: list, generate, demo: Path) -> None:
    """Write the page: the first track and those of other decoders, which generate here."""
    tracks = [first]
    for other in others:
        recorder = watch_for(other, cfg)
        out, _ = generate(other, text, cfg, recorder)
        tracks.append(track_of(other, recorder, out))
    path = Path(cfg.init_from)  # of the demonstration, without the folder of this machine
    path = path.relative_to(demo.parent) if path.is_relative_to(demo) else path
    facts = {"checkpoint": str(path), "seed": str(cfg.seed), "dtype": cfg.dtype}
    facts |= {"threads": str(torch.get_num_threads()), "torch": torch.__version__}
    write_page(cfg.html, text, facts, tracks)
    print(cfg.html, file=sys.stderr)


def write_page(path, prompt: str, facts: dict[str, str], tracks: list[dict]) -> None:
    """Write the page atomically. facts: its foot, such as the seed. tracks: see pack."""
    data = {"prompt": prompt, "facts": facts, "tracks": tracks}
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        page = page.replace(f"sha256-{tag}", f"sha256-{digest}")
    # Without "<" no text in the data can end the element or start a comment.
    page = page.replace("{{DATA}}", json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(page.encode("utf-8", errors="replace")))


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
