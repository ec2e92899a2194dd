"""What sample.py shows: --show draws in the terminal, --html writes a page."""

import sys
from dataclasses import fields
from pathlib import Path

import torch

import autoregressive
from view.page import Track, write_page
from view.record import Recorder
from view.terminal import TerminalView


def watch_for(decoder, cfg):
    """Return the context manager whose on_step records or draws a generation."""
    candidates = getattr(decoder.sampler, "candidates", 1)
    if not cfg.show:
        return Recorder(decoder.tokenizer.pad_id, is_growing(decoder), candidates)
    steps = getattr(decoder.sampler, "steps", "?")
    total = decoder.model.cfg.target_length - 1 if is_growing(decoder) else steps
    facts = (is_growing(decoder), total, candidates, fixed_slots(decoder), cfg.pause)
    return TerminalView(decoder.tokenizer, *facts)


def is_growing(decoder) -> bool:
    return decoder.module is autoregressive


def fixed_slots(decoder) -> list[bool]:
    template = decoder.template or [-1] * (decoder.model.cfg.target_length - 1)
    return [token >= 0 for token in template]


def track_of(decoder, recorder: Recorder, out) -> Track:
    sampler = decoder.sampler
    title = getattr(sampler, "sampler", "speculative")
    if is_growing(decoder):
        title = "autoregressive" if decoder.model.cfg.paradigm == "ar" else "left to right"
    flags = " ".join(f"--{f.name}={getattr(sampler, f.name)}" for f in fields(sampler))
    frames = recorder.frames(out.tokens[0])
    return Track(title, flags, frames, decoder.tokenizer, fixed_slots(decoder))


def write(cfg, text: str, tracks: list[Track], demo: Path) -> None:
    """Write the page. The folder of the demonstration is not named, because it names a machine."""
    path = Path(cfg.init_from)
    path = path.relative_to(demo.parent) if path.is_relative_to(demo) else path
    facts = {"checkpoint": str(path), "seed": str(cfg.seed), "dtype": cfg.dtype}
    facts |= {"threads": str(torch.get_num_threads()), "torch": torch.__version__}
    write_page(cfg.html, "How a text is generated", text, facts, tracks)
    print(cfg.html, file=sys.stderr)
