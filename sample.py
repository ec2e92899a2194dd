"""Sampling: a prompt in, text out. AR or diffusion is what the checkpoint is; --show and --html let you watch it.

    python sample.py --show                                                 # the trained pair in pair/, its example
    python sample.py --init_from=out/run/ckpt.pt --prompt=hello             # text on stdout, the numbers on stderr
    python sample.py --init_from=out/run/ckpt.pt --prompt_file=a.txt --num_samples=4
    echo hello | python sample.py --init_from=out/run/ckpt.pt > answer.txt
    python sample.py --init_from=out/run/ckpt.pt --prompt=hello --steps=20 --show     # live, in the terminal
    python sample.py --init_from=out/run/ckpt.pt --prompt=hello --html=out/hello.html # a page to play and scrub
    python sample.py --init_from=out/run/ckpt.pt --infill="def f(x):[[12]]return y"   # diffusion: 12 free slots
    python sample.py --init_from=out/run/ckpt.pt --prompt=hello --sampler=speculative # a diffusion model, read as AR

The text is written as it is; only on a terminal do control characters show as dots. Several samples get a heading each.
A file or a pipe loses the one newline at its end, which echo and editors put there. With --infill the prompt is
optional and stdin is not read. The settings of a sampler stand in autoregressive.SamplerConfig,
diffusion.SamplerConfig and speculative.SamplerConfig; those of the model are the checkpoint's. --sampler=ar reads a
diffusion model with a prefix of its own left to right; --sampler=speculative says the same in fewer network calls.
--beside puts a second text on the page, of the same prompt and on the same clock.
"""

import re
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch

import autoregressive
import diffusion
import speculative
from checkpoint import load_model
from configurator import nearest, read_settings, refuse_changes, run
from data.tokenizer import Tokenizer
from device import autocast, pick_device
from draws import Generated
from model import ModelConfig, Transformer
from samplers import SAMPLERS
from view.cells import harmless
from view.page import Lane, write_page
from view.record import Recorder
from view.terminal import Show

PAIR = Path(__file__).absolute().parent / "pair"  # a small AR model of Python and the diffusion model made of it
EXAMPLE = 'def close(self):\n    """Close the file."""\n'
PARADIGMS = {"ar": autoregressive, "diffusion": diffusion}
LEFT_TO_RIGHT = {"ar": autoregressive, "speculative": speculative}  # by --sampler, whatever the checkpoint's paradigm


@dataclass
class SampleConfig:
    """What is asked for."""

    init_from: str = str(PAIR / "diffusion.pt")  # a checkpoint; without one the trained pair that comes with the code
    prompt: str = ""
    prompt_file: str = ""  # a UTF-8 file, - is stdin; with neither prompt nor prompt_file a pipe on stdin is read, and
    # where there is nothing in it the pair is shown with an example
    infill: str = ""  # diffusion: the target, with [[n]] where n slots are free
    num_samples: int = 1
    seed: int = 1337
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16 (autocast)
    show: bool = False  # draw the first sample step by step: in place on a terminal, else as plain lines
    pause: float = 0.1  # seconds a drawn step stays on a terminal; not counted in tokens/s
    html: str = ""  # write a page of how the first sample came about to this file
    beside: str = "auto"  # beside it: none | ar (these weights left to right) | a checkpoint | auto: see beside_of

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be one of float32, bfloat16; got {self.dtype!r}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {self.num_samples}")
        if not 0 <= self.pause <= 60:
            raise ValueError(f"pause must be 0 to 60 seconds, got {self.pause}")
        if self.show and self.html:
            raise ValueError("give --show or --html, not both: the page has the times of a run that nothing else slows")
        if self.beside != "auto" and not self.html:
            raise ValueError("beside puts a second text on a page; name the page with --html=FILE")


@dataclass
class _AnySetting(
    SampleConfig, autoregressive.SamplerConfig, speculative.SamplerConfig, diffusion.SamplerConfig, ModelConfig
):
    """Every name that can be typed. Which of them fit is known when the checkpoint is read."""


class Reading(NamedTuple):
    """A checkpoint and the way it is decoded."""

    model: Transformer
    tokenizer: Tokenizer
    decoder: object  # autoregressive | diffusion | speculative: the module whose generate is called
    sampler: object  # its SamplerConfig
    template: list[int] | None = None  # (T - 1) ids of an infilling, -1 where a slot is free

    @property
    def growing(self) -> bool:
        return self.decoder is autoregressive

    @property
    def candidates(self) -> int:
        return getattr(self.sampler, "candidates", 1)

    @property
    def given(self) -> list[bool]:
        """Which slots stand fixed."""
        length = getattr(self.sampler, "max_new_tokens", 0) or self.model.cfg.target_length - 1
        return [False] * length if self.template is None else [i >= 0 for i in self.template]

    @property
    def title(self) -> str:
        if self.growing:
            same = "the diffusion model" if self.model.cfg.paradigm == "diffusion" else "autoregressive"
            return f"{same}, left to right"
        return "speculative" if self.decoder is speculative else f"diffusion, {self.sampler.sampler}"


def main(argv: list[str]) -> None:
    given, _ = read_settings(_AnySetting, argv)
    cfg = SampleConfig(**_settings_of(SampleConfig, given))
    model, tokenizer, state = load_model(cfg.init_from, pick_device(cfg.device))
    decoder, sampler = decoder_of(model.cfg, given.get("sampler")), sampler_config(given, model.cfg, cfg.init_from)
    text = read_prompt(given)
    if "init_from" not in given:
        print("no checkpoint named: the trained pair writes, a small model of functions (pair/)", file=sys.stderr)
    encode_prompt(text, tokenizer, model.cfg)  # what does not fit is said before anything else
    template = parse_template(cfg.infill, tokenizer, model.cfg) if "infill" in given else None
    one = Reading(model, tokenizer, decoder, sampler, template)
    other = beside_of(one, state, text, cfg) if cfg.html else None
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal or pipe that is not UTF-8
    if decoder is not diffusion and sampler.temperature == 0 and cfg.num_samples > 1:
        print("temperature 0 is greedy: all samples are alike (try --temperature=0.8)", file=sys.stderr)

    watch = nullcontext()
    if cfg.show:
        total = model.cfg.target_length - 1 if one.growing else getattr(sampler, "steps", "?")
        watch = Show(tokenizer, one.growing, total, one.candidates, one.given, cfg.pause)
    elif cfg.html:
        watch = Recorder(tokenizer.pad_id, one.growing, one.candidates)
    out, seconds = generate(one, text, cfg, cfg.num_samples, watch)
    rows = [_without_pads(row, tokenizer.pad_id, template is not None) for row in out.tokens.tolist()]
    for i, (row, score, calls) in enumerate(zip(rows, out.score.tolist(), out.calls.tolist())):
        if cfg.num_samples > 1:
            print(f"--- sample {i} | {calls} network calls | score {score:.4f}")
        text_of_row = tokenizer.decode(row)
        print(harmless(text_of_row) if sys.stdout.isatty() else text_of_row, flush=True)
    print(closing_line(out, sum(map(len, rows)), seconds, sampler), file=sys.stderr)
    if cfg.html:
        lanes = [lane_of(one, watch, out)]
        if other is not None:
            watch = Recorder(other.tokenizer.pad_id, other.growing, other.candidates)
            lanes.append(lane_of(other, watch, generate(other, text, cfg, cfg.num_samples, watch)[0]))
        write_page(cfg.html, "How a text comes about", text, page_facts(cfg, model), lanes)
        print(cfg.html, file=sys.stderr)


def generate(one: Reading, text: str, cfg: SampleConfig, n: int, watch) -> tuple[Generated, float]:
    """n samples after the prompt, and the seconds they took without those of watch, a context that gives on_step."""
    m, device = one.model.cfg, one.model.tok.weight.device
    prompt = encode_prompt(text, one.tokenizer, m)
    prefix = torch.tensor(prompt, dtype=torch.long, device=device).repeat(n, 1)  # (n, P)
    options = {}
    if one.template is not None:
        options["given"] = torch.tensor(one.template, device=device).repeat(n, 1)  # (n, T - 1)
    with autocast(device, cfg.dtype):
        if cfg.html:  # the first call of a process is slower: keep that off the page's clock
            with torch.no_grad():
                one.model(prefix, torch.full((n, m.target_length), m.sep_id, device=device))
        start = time.perf_counter()
        with watch as on_step:
            out = one.decoder.generate(one.model, prefix, one.sampler, cfg.seed, on_step=on_step, **options)
            out.tokens.cpu()  # waits for the device
    return out, time.perf_counter() - start - getattr(watch, "seconds", 0.0)


def beside_of(one: Reading, state: dict, text: str, cfg: SampleConfig) -> Reading | None:
    """What stands beside the first text on a page, with the default settings of its sampler.

    auto: the AR model of the trained pair; else the weights of a diffusion model left to right, if their training kept
    that up (ar_weight): without it they have forgotten, and the comparison would be none. ar: these weights in any
    case. A name else is a second checkpoint.
    Raises ValueError where it cannot be decoded after this prompt.
    """
    m = one.model.cfg
    if cfg.beside == "auto" and cfg.init_from == SampleConfig.init_from and one.template is None:
        cfg = replace(cfg, beside=str(PAIR / "ar.pt"))
    if cfg.beside in ("ar", "auto"):
        kept = ((state.get("train_config") or {}).get("ar_weight") or 0) > 0
        fits = m.paradigm == "diffusion" and m.prefix_attention != "joint" and not one.growing and one.template is None
        if cfg.beside == "ar" and not fits:
            raise ValueError(
                "beside=ar reads a diffusion model with a prefix of its own from left to right, beside another sampler "
                f"and without infill; {cfg.init_from} has paradigm={m.paradigm}, prefix_attention={m.prefix_attention}"
            )
        if not fits or (cfg.beside == "auto" and not kept):
            return None
        return Reading(one.model, one.tokenizer, autoregressive, autoregressive.SamplerConfig())
    if cfg.beside == "none":
        return None
    model, tokenizer, _ = load_model(cfg.beside, pick_device(cfg.device))
    sampler = sampler_config({}, model.cfg, cfg.beside)
    encode_prompt(text, tokenizer, model.cfg)
    return Reading(model, tokenizer, decoder_of(model.cfg, None), sampler)


def lane_of(one: Reading, recorder: Recorder, out: Generated) -> Lane:
    """The first sample as the page shows it."""
    told = ("steps", "candidates", "draft_steps", "temperature")  # also where they are the defaults
    flags = [(f.name, getattr(one.sampler, f.name), f.default) for f in fields(one.sampler)]
    flags = [f"--{name}={value}" for name, value, default in flags if name in told or value != default]
    return Lane(one.title, " ".join(flags), recorder.frames(out.tokens[0]), one.tokenizer, one.given)


def page_facts(cfg: SampleConfig, model: Transformer) -> dict[str, str]:
    """What the page says of its making."""
    known = Path(cfg.init_from)  # the pair's is absolute, and where it lies is nobody's business
    known = known.relative_to(PAIR.parent) if known.is_relative_to(PAIR) else known
    facts = {"checkpoint": str(known)} | ({} if cfg.beside in ("auto", "ar", "none") else {"beside": cfg.beside})
    facts |= {"seed": str(cfg.seed), "device": str(model.tok.weight.device), "dtype": cfg.dtype}
    return facts | {"threads": str(torch.get_num_threads()), "torch": torch.__version__}


def closing_line(out, n_tokens: int, seconds: float, sampler) -> str:
    """Speed, cost and score (mean NLL, nats a slot, lower is better). Tokens are those of the texts, without pads."""
    calls = f"{float(out.calls.float().mean()):g} network calls" + (" a sample" if len(out.calls) > 1 else "")
    chosen = f", best of {sampler.candidates}" if getattr(sampler, "candidates", 1) > 1 else ""
    speed = f"{n_tokens / seconds:,.0f} tokens/s ({n_tokens} in {seconds:.3f} s, all included)"
    return f"{speed} | {calls} | score {float(out.score.mean()):.4f}{chosen}"


def decoder_of(m: ModelConfig, sampler: str | None):
    """The module whose SamplerConfig and generate are meant: the paradigm's, unless sampler names another.

    Raises ValueError where there is no sampler of that name.
    """
    known = [*SAMPLERS, *LEFT_TO_RIGHT]
    if sampler is not None and sampler not in known:
        raise ValueError(f"unknown sampler {sampler!r}{nearest(sampler, known)}")
    return LEFT_TO_RIGHT.get(sampler, PARADIGMS[m.paradigm])


def sampler_config(given: dict, m: ModelConfig, source: str):
    """The sampler's settings that fit the model. Raises ValueError where one belongs to the other paradigm or would
    change the model."""
    hint = "a model's settings are fixed in its checkpoint, drop this one"
    refuse_changes(given, asdict(m), f"{source} is a model with", hint)
    kind, cls = (
        {"ar": "an AR", "diffusion": "a diffusion"}[m.paradigm],
        decoder_of(m, given.get("sampler")).SamplerConfig,
    )
    if given.get("sampler") in LEFT_TO_RIGHT:
        kind = f"sampler={given['sampler']} and {kind}"
        given = {name: value for name, value in given.items() if name != "sampler"}
    names = [f.name for f in fields(cls)]
    for name in given:
        if not any(name in (f.name for f in fields(c)) for c in (SampleConfig, ModelConfig, cls)):
            raise ValueError(f"unknown setting {name!r} for {kind} checkpoint, {source}{nearest(name, names)}")
    if m.target_length < 2:
        raise ValueError(f"{source} has target_length={m.target_length}: it was never trained; run train.py on it")
    if m.paradigm == "ar" and "infill" in given:
        raise ValueError(f"infill needs a diffusion checkpoint; {source} is AR and can only go on to the right")
    if "infill" in given and cls is not diffusion.SamplerConfig:
        raise ValueError(f"infill needs a sampler that fills gaps; {kind} checkpoint is read to the right")
    return cls(**_settings_of(cls, given))


def _settings_of(cls: type, given: dict) -> dict:
    return {f.name: given[f.name] for f in fields(cls) if f.name in given}


def read_prompt(given: dict) -> str:
    """The prompt: as given, from a file, from stdin that is no terminal, or the example where neither prompt nor
    checkpoint is named. Raises ValueError where it is empty."""
    path, text = given.get("prompt_file", ""), given.get("prompt", "")
    if "prompt" in given and "prompt_file" in given:
        raise ValueError("give --prompt=TEXT or --prompt_file=PATH, not both")
    if not given.keys() & {"prompt", "prompt_file", "infill"} and sys.stdin is not None and not sys.stdin.isatty():
        path = "-"
    if path:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        try:
            text = re.sub(r"\r?\n\Z", "", raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            where = "stdin" if path == "-" else path
            raise ValueError(f"{where} is not UTF-8 text: byte 0x{raw[error.start]:02x} at {error.start}") from None
    if not text and not given.keys() & {"prompt", "prompt_file", "infill", "init_from"}:
        print(f"no prompt given, an example is taken:\n{EXAMPLE}", file=sys.stderr, end="")
        return EXAMPLE
    if not text and "infill" not in given:
        raise ValueError("the prompt is empty; give --prompt=TEXT, --prompt_file=PATH or a text on stdin")
    return text


def encode_prompt(text: str, tokenizer: Tokenizer, m: ModelConfig) -> list[int]:
    """Token ids of the prompt. Raises ValueError where the target no longer fits behind it."""
    ids = tokenizer.encode(text)
    if len(ids) + m.target_length > m.block_size:
        raise ValueError(
            f"the prompt has {len(ids)} tokens and the target {m.target_length}, the model's block_size is "
            f"{m.block_size}: a prompt of at most {m.block_size - m.target_length} tokens fits"
        )
    return ids


def parse_template(text: str, tokenizer: Tokenizer, m: ModelConfig) -> list[int]:
    """Ids of the T - 1 slots after the separator, -1 where one is free. What follows the template is pad, and fixed.

    "ab[[2]]c" -> [97, 98, -1, -1, 99, 256, 256, ..]. A free slot may turn out as pad, that is, as nothing.
    """
    slots, parts = [], re.split(r"\[\[([^\[\]]*)\]\]", text)  # text, n, text, n, .., text
    for i, part in enumerate(parts):
        if i % 2 == 0:
            slots += tokenizer.encode(part)
        elif re.fullmatch("[0-9]{1,6}", part) and int(part):
            slots += [-1] * int(part)
        else:
            raise ValueError(f"infill: [[{part}]] is no number of slots; write [[n]], and brackets of the text as [ [")
    if len(parts) == 1:
        raise ValueError("infill: the text has no [[n]], so no slot is free; write [[12]] where 12 tokens are wanted")
    if len(slots) > m.target_length - 1:
        raise ValueError(f"infill: the template takes {len(slots)} slots, the model's target has {m.target_length - 1}")
    return slots + [m.pad_id] * (m.target_length - 1 - len(slots))


def _without_pads(ids: list[int], pad_id: int, infilled: bool) -> list[int]:
    # The first pad ends a text. In a template it is a free slot that was not needed, and given text follows.
    end = len(ids) if infilled or pad_id not in ids else ids.index(pad_id)
    return [i for i in ids[:end] if i != pad_id]


if __name__ == "__main__":
    run(main)
