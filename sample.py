"""Sampling: a prompt in, text out. The checkpoint decides whether it is AR or diffusion.

    python sample.py                                                     # a small demonstration model
    python sample.py --init_from=out/run/ckpt.pt --prompt=hello          # text on stdout, speed on stderr
    echo hello | python sample.py --init_from=out/run/ckpt.pt > answer.txt
    python sample.py --prompt="forty-two" --show                         # watch it in the terminal
    python sample.py --prompt="forty-two" --html=out/page.html           # or on a page
    python sample.py --infill="quarante-[[6]]"                           # diffusion: 6 free slots

--sampler=ar reads a diffusion model with a cached prefix from left to right; --sampler=speculative
gives the same text in fewer network calls. The one newline at the end of a file or pipe is dropped.
"""

import re
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch

import autoregressive
import diffusion
from configurator import build, read_settings, refuse_changes, run, setting, suggest, validate
from data.sources import normalize_text
from data.tokenizer import Tokenizer
from infra.checkpoint import load_model
from infra.device import autocast, pick_device
from infra.logits import GenerateOutput
from model import ModelConfig, Transformer

DEMO = Path(__file__).absolute().parent / "checkpoints"
DEMO_PROMPT = "fr seven hundred eighty-four"
PARADIGMS = {"ar": autoregressive, "diffusion": diffusion}


@dataclass
class SampleConfig:
    """What to generate. The settings of the samplers come with it."""

    init_from: str = setting(str(DEMO / "diffusion.pt"), "checkpoint", path=True)
    prompt: str = setting("", "the text to continue")
    prompt_file: str = setting("", "read the prompt from a UTF-8 file; - is stdin", path=True)
    chat: bool = setting(False, "the prompt is a message; use the model's chat template")
    infill: str = setting("", "diffusion: the target, with [[n]] for n free slots")
    num_samples: int = setting(1, "samples of the same prompt", minimum=1)
    seed: int = setting(1337, "of all random numbers", minimum=0, maximum=2**62)
    device: str = setting("auto", "auto, cpu, cuda, mps")
    dtype: str = setting("float32", "bfloat16: autocast", ("float32", "bfloat16"))
    show: bool = setting(False, "draw the first sample step by step in the terminal")
    pause: float = setting(0.1, "seconds after each drawn step", minimum=0, maximum=60)
    html: str = setting("", "write a page that plays the first sample", path=True)
    beside: str = setting("", "on the page too: ar, or a checkpoint", path=True)

    def __post_init__(self):
        validate(self)
        if self.show and self.html:
            raise ValueError("use --show or --html, not both: drawing would change the times")
        if self.beside and not self.html:
            raise ValueError("--beside needs --html=FILE")


class Decoder(NamedTuple):
    """A checkpoint and the way to decode it."""

    model: Transformer
    tokenizer: Tokenizer
    module: object  # autoregressive, diffusion or extras.speculative: has generate
    sampler: object  # its SamplerConfig
    template: list[int] | None = None  # infilling: (T - 1) ids, -1 for a free slot


def open_decoder(path: str, given: dict, device: torch.device) -> Decoder:
    """Read a checkpoint; given: settings of a sampler. Raises ValueError if they do not fit it."""
    model, tokenizer, _ = load_model(path, device)
    module, sampler = choose_sampler(model.cfg, given, path)
    template = None
    if "infill" in given:
        template = parse_template(given["infill"], tokenizer, model.cfg)
    return Decoder(model, tokenizer, module, sampler, template)


def choose_sampler(model_cfg: ModelConfig, given: dict, path: str):
    """Return the decoding module and its SamplerConfig for a flat dict of settings."""
    module = PARADIGMS[model_cfg.paradigm]
    name = given.get("sampler")
    if name in ("ar", "speculative"):
        given = {key: value for key, value in given.items() if key != "sampler"}
        module = autoregressive
    elif name is not None and name not in diffusion.SAMPLERS:
        known = [*diffusion.SAMPLERS, "ar", "speculative"]
        raise ValueError(f"unknown sampler {name!r}{suggest(name, known)}")
    if name == "speculative":
        from extras import speculative as module
    refuse_changes(given, vars(model_cfg), f"{path} has", "the model's settings are fixed")
    names = {f.name for f in fields(module.SamplerConfig)}
    others = {f.name for cls in sampler_configs() for f in fields(cls)} - names
    for key in given.keys() & others:
        hint = suggest(key, names)
        raise ValueError(
            f"{key!r} is not a setting of {module.__name__}, which decodes {path}{hint}"
        )
    if model_cfg.target_length < 2:
        raise ValueError(f"{path} has target_length={model_cfg.target_length}: train it first")
    if "infill" in given and module is not diffusion:
        raise ValueError(f"--infill needs a diffusion model; {path} is read to the right")
    return module, build(module.SamplerConfig, given)


def sampler_configs() -> list[type]:
    modules = [diffusion, autoregressive]
    with suppress(ImportError):  # extras/ may be deleted
        from extras import speculative

        modules.append(speculative)
    return [module.SamplerConfig for module in modules]


def main(argv: list[str]) -> None:
    given = read_settings((SampleConfig, *sampler_configs(), ModelConfig), argv)
    cfg = build(SampleConfig, given)
    text = read_prompt(cfg, given)
    decoder = open_decoder(cfg.init_from, given, pick_device(cfg.device))
    other = open_beside(decoder, cfg, given)
    for each in filter(None, (decoder, other)):
        encode_prompt(text, each, cfg.chat)  # raises if it does not fit
    if decoder.module is not diffusion and cfg.num_samples > 1 and not decoder.sampler.temperature:
        print("temperature 0 is greedy: all samples are equal", file=sys.stderr)
    watch = nullcontext()
    if cfg.show or cfg.html:
        from view import watch as view

        watch = view.watch_for(decoder, cfg)
    out, seconds = generate(decoder, text, cfg, watch)
    print_samples(decoder, out, seconds, cfg.chat)
    if cfg.html:
        tracks = [view.track_of(decoder, watch, out)]
        if other is not None:
            watch = view.watch_for(other, cfg)
            tracks.append(view.track_of(other, watch, generate(other, text, cfg, watch)[0]))
        view.write(cfg, text, tracks, DEMO)


def open_beside(decoder: Decoder, cfg: SampleConfig, given: dict) -> Decoder | None:
    """Return the decoder of the page's second track, with the default settings of its sampler."""
    path = cfg.beside
    if cfg.html and not path and not given.keys() & {"init_from", "infill"}:
        path = str(DEMO / "ar.pt")
    if not path:
        return None
    if path != "ar":
        return open_decoder(path, {}, pick_device(cfg.device))
    model_cfg = decoder.model.cfg
    if model_cfg.paradigm == "ar" or model_cfg.prefix_attention == "joint":
        raise ValueError("--beside=ar needs a diffusion model with a cached prefix")
    return decoder._replace(module=autoregressive, sampler=autoregressive.SamplerConfig())


def generate(decoder: Decoder, text: str, cfg: SampleConfig, watch) -> tuple[GenerateOutput, float]:
    """Return cfg.num_samples samples and the seconds they took, drawing not counted."""
    n = cfg.num_samples
    device = decoder.model.tok.weight.device
    prompt = encode_prompt(text, decoder, cfg.chat)
    prompt = torch.tensor(prompt, dtype=torch.long, device=device).repeat(n, 1)  # (n, P)
    options = {}
    if decoder.template is not None:
        options["given"] = torch.tensor(decoder.template, device=device).repeat(n, 1)
    run = partial(decoder.module.generate, decoder.model, prompt, decoder.sampler, cfg.seed)
    with autocast(device, cfg.dtype):
        if cfg.html:  # the first call of a process is slower: do not show that
            run(**options)
        start = time.perf_counter()
        with watch as on_step:
            out = run(on_step=on_step, **options)
            out.tokens.cpu()  # wait for the device
    return out, time.perf_counter() - start - getattr(watch, "seconds", 0.0)


def print_samples(decoder: Decoder, out: GenerateOutput, seconds: float, chat: bool) -> None:
    """Print texts to stdout; speed, calls and score (mean NLL per slot) to stderr."""
    from view.cells import printable

    pad_id = decoder.tokenizer.pad_id
    ends = {pad_id}
    if chat:
        from hf.chat import end_ids

        ends |= set(end_ids(decoder.tokenizer))
    n_tokens = 0
    for i, (row, score, calls) in enumerate(zip(*(part.tolist() for part in out))):
        # The first pad ends a text. In a template it is a free slot that was not needed.
        if decoder.template is None:
            row = list(takewhile(lambda token: token not in ends, row))
        row = [token for token in row if token != pad_id]
        n_tokens += len(row)
        if len(out.calls) > 1:
            print(f"--- sample {i} | {calls} network calls | score {score:.4f}")
        text = decoder.tokenizer.decode(row)
        print(printable(text) if sys.stdout.isatty() else text, flush=True)
    calls = f"{float(out.calls.float().mean()):g} network calls per sample"
    n = getattr(decoder.sampler, "candidates", 1)
    best = f" | best of {n}" if n > 1 else ""
    speed = f"{n_tokens / seconds:,.0f} tokens/s ({n_tokens} in {seconds:.3f} s)"
    print(f"{speed} | {calls} | score {float(out.score.mean()):.4f}{best}", file=sys.stderr)


def read_prompt(cfg: SampleConfig, given: dict) -> str:
    """Return the prompt: as given, from a file or stdin, or an example for the demonstration."""
    if cfg.prompt and cfg.prompt_file:
        raise ValueError("use --prompt=TEXT or --prompt_file=PATH, not both")
    path = cfg.prompt_file
    asked = given.keys() & {"prompt", "prompt_file", "infill"}
    if not asked and sys.stdin is not None and not sys.stdin.isatty():
        path = "-"
    text = cfg.prompt
    if path:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = normalize_text(raw, "stdin" if path == "-" else path).removesuffix("\n")
    if not text and not asked and "init_from" not in given:
        print(f"no prompt given, using the example {DEMO_PROMPT!r}", file=sys.stderr)
        return DEMO_PROMPT
    if not text and not cfg.infill:
        raise ValueError("the prompt is empty; use --prompt=TEXT, --prompt_file=PATH or stdin")
    return text


def encode_prompt(text: str, decoder: Decoder, chat: bool) -> list[int]:
    """Return the token ids of the prompt. Raises ValueError if the target does not fit after it."""
    if chat:
        from hf.chat import chat_ids

        ids = chat_ids(decoder.tokenizer, [{"role": "user", "content": text}])
    else:
        ids = decoder.tokenizer.encode_prompt(text)
    longest = decoder.model.cfg.block_size - decoder.model.cfg.target_length
    if len(ids) > longest:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model reads at most {longest}")
    return ids


def parse_template(text: str, tokenizer: Tokenizer, model_cfg: ModelConfig) -> list[int]:
    """Return the ids of T - 1 slots, -1 for a free one; pads after the template are fixed.

    "ab[[2]]c" -> [97, 98, -1, -1, 99, 256, 256, ..]. A free slot may become a pad, that is, nothing.
    """
    slots = []
    parts = re.split(r"\[\[([^\[\]]*)\]\]", text)  # text, n, text, n, .., text
    for i, part in enumerate(parts):
        if i % 2 == 0:
            slots += tokenizer.encode(part)
        elif re.fullmatch("[0-9]{1,6}", part) and int(part):
            slots += [-1] * int(part)
        else:
            raise ValueError(f"infill: [[{part}]] is not a number of slots, such as [[12]]")
    if len(parts) == 1:
        raise ValueError("infill: no slot is free; write [[12]] where 12 tokens are wanted")
    free = model_cfg.target_length - 1 - len(slots)
    if free < 0:
        raise ValueError(f"infill: {len(slots)} slots, {-free} more than the model has")
    return slots + [model_cfg.pad_id] * free


if __name__ == "__main__":
    run(main, SampleConfig, diffusion.SamplerConfig, autoregressive.SamplerConfig)
