"""What sample.py shows: --show draws in the terminal, --html writes a page."""

import sys
from pathlib import Path

import torch

import autoregressive
from configurator import require
from infra.device import pick_device
from view.page import pack, write_page
from view.record import Recorder
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


def open_beside(decoder, cfg, given: dict, demo: Path, open_decoder) -> list:
    """Return the decoder of the page's second track, with default settings, if there is one."""
    path = cfg.beside
    if not path and not given.keys() & {"init_from", "infill"}:
        path = str(demo / "ar.pt")
    if not path or not cfg.html:
        return []
    if path != "ar":
        return [open_decoder(path, {}, pick_device(cfg.device))]
    m = decoder.model.cfg
    cached = m.paradigm == "diffusion" and m.prefix_attention != "joint"
    require(cached, f"--beside=ar needs a cached prefix, which {cfg.init_from} has not")
    sampler = autoregressive.SamplerConfig()
    return [decoder._replace(module=autoregressive, sampler=sampler)]


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
