"""Sampling: a prompt in, text out. The checkpoint decides AR or diffusion.

    python sample.py                                       # a demonstration
    python sample.py --init_from=out/run/ckpt.pt --prompt=hello
    python sample.py --prompt_file=prompt.txt > answer.txt # or: < prompt.txt
    python sample.py --prompt="forty-two" --show           # or --html=page.html
    python sample.py --infill="quarante-[[6]]"             # 6 free slots

--sampler=ar reads a diffusion model with a cached prefix from left to right.
--sampler=diffusion_gemma stops by itself.
--draft=FOLDER gives the text of an AR model in fewer calls (extras/draft.py).
"""

import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch

import autoregressive
import configurator
import diffusion
from configurator import build, refuse_changes, require, setting, suggest, validate
from data.sources import normalize_text
from data.tokenizer import Tokenizer
from infra.checkpoint import load_model
from infra.device import autocast, pick_device
from model import ModelConfig, Transformer

DEMO = Path(__file__).absolute().parent / "checkpoints"
DEMO_PROMPT = "fr seven hundred eighty-four"
PARADIGMS = {"ar": autoregressive, "diffusion": diffusion}


@dataclass
class SampleConfig:
    """What to generate. The settings of the samplers come with it."""

    init_from: str = setting(str(DEMO / "diffusion.pt"), "checkpoint", path=True)
    prompt: str = setting("", "text to continue; default: stdin")
    prompt_file: str = setting("", "or a UTF-8 file; - is stdin", path=True)
    chat: bool = setting(False, "use the model's chat template")
    infill: str = setting("", "a target with [[n]] for n free slots")
    num_samples: int = setting(1, "texts for the prompt", minimum=1)
    seed: int = setting(1337, "of all random numbers")
    device: str = setting("auto", "auto, cpu, cuda, mps")
    dtype: str = setting("float32", "of autocast", ("float32", "bfloat16"))
    show: bool = setting(False, "draw a text in the terminal")
    pause: float = setting(0.1, "seconds per step", maximum=60)
    html: str = setting("", "page that plays a text", path=True)
    compare: str = setting("", "a second checkpoint", path=True)

    def __post_init__(self):
        validate(self)
        require(not (self.show and self.html), "use --show or --html, not both")
        require(self.html or not self.compare, "--compare needs --html=FILE")


class Decoder(NamedTuple):
    """A model, and how it generates."""

    model: Transformer
    tokenizer: Tokenizer
    module: object  # it has generate
    sampler: object  # its SamplerConfig
    template: list[int] | None = None  # ids, -1 for a free slot


def open_decoder(path: str, given: dict, device: torch.device) -> Decoder:
    """Load a checkpoint; `given` has its sampler's settings."""
    model, tokenizer, _ = load_model(path, device)
    model, module, sampler = choose_sampler(model, given, path)
    template = None
    if "infill" in given:
        from extras.infilling import parse_template

        template = parse_template(given["infill"], tokenizer, model.cfg)
    return Decoder(model, tokenizer, module, sampler, template)


def choose_sampler(model: Transformer, given: dict, path: str) -> tuple:
    """Return the model, the module that generates, its settings."""
    model_cfg = model.cfg
    module = PARADIGMS[model_cfg.paradigm]
    name = given.get("sampler", "resample")
    known = [*diffusion.SAMPLERS, "ar", "diffusion_gemma"]
    require(name in known, f"unknown sampler {name!r}{suggest(name, known)}")
    if name not in diffusion.SAMPLERS:
        given = {key: value for key, value in given.items() if key != "sampler"}
        module = autoregressive
    if name == "diffusion_gemma":
        from extras import diffusion_gemma as module
    if given.get("draft"):
        from extras import speculative as module
    refuse_changes(given, vars(model_cfg), f"{path} has")
    names = {f.name for f in fields(module.SamplerConfig)}
    others = {f.name for cls in sampler_configs() for f in fields(cls)} - names
    for key in given.keys() & others:
        problem = f"{key!r} is not a setting of {module.__name__}, used by {path}"
        raise ValueError(problem + suggest(key, names))
    T = model_cfg.target_length
    require(T > 1, f"{path} has target_length={T}: train it first")
    fills = "infill" not in given or module is diffusion
    require(fills, "--infill needs a diffusion model, read by diffusion.py")
    sampler = build(module.SamplerConfig, given)
    if given.get("draft"):
        model = module.open_draft(model, sampler, path)
    return model, module, sampler


def sampler_configs() -> list[type]:
    """Return the settings of all that generates."""
    modules = [diffusion, autoregressive]
    for name in ("speculative", "diffusion_gemma"):
        with suppress(ImportError):  # extras/ may be deleted
            modules.append(import_module(f"extras.{name}"))
    return [module.SamplerConfig for module in modules]


def main(argv: list[str]) -> None:
    """Print samples; write or draw what is asked for."""
    from view.samples import print_samples

    classes = (SampleConfig, *sampler_configs(), ModelConfig)
    given = configurator.read_settings(classes, argv)
    cfg = build(SampleConfig, given)
    text = read_prompt(cfg, given)
    decoder = open_decoder(cfg.init_from, given, pick_device(cfg.device))
    others = []
    watch = nullcontext()
    if cfg.show or cfg.html:
        from view import watch as view

        watch = view.watch_for(decoder, cfg)
        others = view.open_compared(cfg, given, DEMO, open_decoder)
    for each in (decoder, *others):
        encode_prompt(text, each, cfg.chat)  # raises if it does not fit
    out, seconds = generate(decoder, text, cfg, watch)
    print_samples(decoder, out, seconds, cfg.chat)
    if cfg.html:
        first = view.track_of(decoder, watch, out)
        view.write(cfg, text, first, others, generate, DEMO)


def generate(decoder: Decoder, text: str, cfg: SampleConfig, watch) -> tuple:
    """Return the samples and their seconds, without drawing."""
    n = cfg.num_samples
    device = decoder.model.tok.weight.device
    prompt = encode_prompt(text, decoder, cfg.chat)
    prompt = torch.tensor([prompt] * n, dtype=torch.long, device=device)  # (n, P)
    options = {}
    if decoder.template is not None:
        options["given"] = torch.tensor([decoder.template] * n, device=device)
    args = (decoder.model, prompt, decoder.sampler, cfg.seed)
    run = partial(decoder.module.generate, *args)
    with autocast(device, cfg.dtype):
        if cfg.html:  # the first call is slower
            run(**options)
        start = time.perf_counter()
        with watch as on_step:
            out = run(on_step=on_step, **options)
            out.tokens.cpu()  # wait for the device
    return out, time.perf_counter() - start - getattr(watch, "seconds", 0.0)


def read_prompt(cfg: SampleConfig, given: dict) -> str:
    """Return the prompt: a flag, a file or pipe, or an example."""
    text = cfg.prompt
    path = cfg.prompt_file
    require(not (text and path), f"use --prompt or --prompt_file={path}, not both")
    asked = given.keys() & {"prompt", "prompt_file", "infill"}
    if not asked and sys.stdin is not None and not sys.stdin.isatty():
        path = "-"
    if path:
        source = "stdin" if path == "-" else path
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        # The one newline at the end of a file or pipe is dropped.
        text = normalize_text(raw, source).removesuffix("\n")
    if not text and not asked and "init_from" not in given:
        print(f"no prompt given, so {DEMO_PROMPT!r} is used", file=sys.stderr)
        return DEMO_PROMPT
    ways = "use --prompt=TEXT, --prompt_file=PATH or stdin"
    require(text or cfg.infill, f"the prompt is empty; {ways}")
    return text


def encode_prompt(text: str, decoder: Decoder, chat: bool) -> list[int]:
    """Return the token ids, if the model can read them all."""
    if chat:
        from hf.chat import chat_ids

        ids = chat_ids(decoder.tokenizer, [{"role": "user", "content": text}])
    else:
        ids = decoder.tokenizer.encode_prompt(text)
    n = len(ids)
    most = decoder.model.cfg.block_size - decoder.model.cfg.target_length
    require(n <= most, f"the prompt has {n} tokens, the model reads at most {most}")
    return ids


if __name__ == "__main__":
    configurator.run(main, SampleConfig, *sampler_configs())
