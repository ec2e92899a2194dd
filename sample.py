"""Sampling: a prompt in, text out. AR or diffusion is what the checkpoint is; --show draws how the text comes about.

    python sample.py --init_from=out/run/ckpt.pt --prompt=hello             # text on stdout, the numbers on stderr
    python sample.py --init_from=out/run/ckpt.pt --prompt_file=a.txt --num_samples=4
    echo hello | python sample.py --init_from=out/run/ckpt.pt > answer.txt
    python sample.py --init_from=out/run/ckpt.pt --prompt=hello --steps=20 --show
    python sample.py --init_from=out/run/ckpt.pt --infill="def f(x):[[12]]return y"   # diffusion: 12 free slots
    python sample.py --init_from=out/run/ckpt.pt --prompt=hello --sampler=speculative # a diffusion model, read as AR

The text is written as it is; only on a terminal do control characters show as dots. Several samples get a heading each.
A file or a pipe loses the one newline at its end, which echo and editors put there. With --infill the prompt is
optional and stdin is not read. The settings of a sampler stand in autoregressive.SamplerConfig,
diffusion.SamplerConfig and speculative.SamplerConfig; those of the model are the checkpoint's. --sampler=ar reads a
diffusion model with a prefix of its own left to right; --sampler=speculative says the same in fewer network calls.
"""

import math
import os
import re
import shutil
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, fields
from itertools import groupby, zip_longest
from pathlib import Path

import torch
from torch import Tensor

import autoregressive
import diffusion
import speculative
from checkpoint import load_model
from configurator import nearest, read_settings, refuse_changes, run
from data.tokenizer import Tokenizer
from device import autocast, pick_device
from model import ModelConfig
from samplers import SAMPLERS

PARADIGMS = {"ar": autoregressive, "diffusion": diffusion}
LEFT_TO_RIGHT = {"ar": autoregressive, "speculative": speculative}  # by --sampler, whatever the checkpoint's paradigm


@dataclass
class SampleConfig:
    """What is asked for."""

    init_from: str = "out/run/ckpt.pt"  # a checkpoint
    prompt: str = ""
    prompt_file: str = ""  # a UTF-8 file, - is stdin; with neither prompt nor prompt_file a pipe on stdin is read
    infill: str = ""  # diffusion: the target, with [[n]] where n slots are free
    num_samples: int = 1
    seed: int = 1337
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16 (autocast)
    show: bool = False  # draw the first sample step by step: in place on a terminal, else (or with NO_COLOR) lines
    pause: float = 0.1  # seconds a drawn step stays on a terminal; not counted in tokens/s

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be one of float32, bfloat16; got {self.dtype!r}")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be 1 or more, got {self.num_samples}")
        if not 0 <= self.pause <= 60:
            raise ValueError(f"pause must be 0 to 60 seconds, got {self.pause}")


@dataclass
class _AnySetting(
    SampleConfig, autoregressive.SamplerConfig, speculative.SamplerConfig, diffusion.SamplerConfig, ModelConfig
):
    """Every name that can be typed. Which of them fit is known when the checkpoint is read."""


def main(argv: list[str]) -> None:
    given, _ = read_settings(_AnySetting, argv)
    cfg = SampleConfig(**_settings_of(SampleConfig, given))
    model, tokenizer, _ = load_model(cfg.init_from, pick_device(cfg.device))
    decoder, sampler = decoder_of(model.cfg, given.get("sampler")), sampler_config(given, model.cfg, cfg.init_from)
    device = model.tok.weight.device
    prompt = encode_prompt(read_prompt(given), tokenizer, model.cfg)
    prefix = torch.tensor(prompt, dtype=torch.long, device=device).repeat(cfg.num_samples, 1)  # (B, P)
    options = {}
    if "infill" in given:
        template = parse_template(cfg.infill, tokenizer, model.cfg)
        options["given"] = torch.tensor(template, device=device).repeat(cfg.num_samples, 1)  # (B, T - 1)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal or pipe that is not UTF-8
    show = Show(tokenizer, sampler, model.cfg, template if options else None, cfg.pause) if cfg.show else None
    if decoder is not diffusion and sampler.temperature == 0 and cfg.num_samples > 1:
        print("temperature 0 is greedy: all samples are alike (try --temperature=0.8)", file=sys.stderr)

    start = time.perf_counter()
    with autocast(device, cfg.dtype):
        out = decoder.generate(model, prefix, sampler, cfg.seed, on_step=show, **options)
    rows = [_without_pads(row, tokenizer.pad_id, bool(options)) for row in out.tokens.tolist()]  # waits for the device
    seconds = time.perf_counter() - start - (show.seconds if show else 0.0)

    for i, (row, score, calls) in enumerate(zip(rows, out.score.tolist(), out.calls.tolist())):
        if cfg.num_samples > 1:
            print(f"--- sample {i} | {calls} network calls | score {score:.4f}")
        text = tokenizer.decode(row)
        print(_harmless(text) if sys.stdout.isatty() else text, flush=True)
    print(closing_line(out, sum(map(len, rows)), seconds, sampler), file=sys.stderr)


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
        raise ValueError(f"sampler must be one of {', '.join(known)}; got {sampler!r}{nearest(sampler, known)}")
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
    """The prompt: as given, from a file, or from stdin that is no terminal. Raises ValueError where it is empty."""
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


def _harmless(text: str) -> str:
    # An escape sequence that a model makes up is no command to the user's terminal.
    return "".join(UNPRINTABLE if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


PAD, NEWLINE, UNPRINTABLE = "░", "↵", "·"
STYLE = {"changed": "1;33", "fresh": "0", "settled": "2;32", "noise": "2"}  # SGR codes; fresh: changed a step ago
MARK = {"changed": "^", "noise": "~"}


class Show:
    """An on_step hook that draws the first candidate of the first sample, slot by slot. seconds: what drawing took.

    changed: new in this step. settled: given, or the same for 2 steps. noise: the first canvas, and later what the
    network gives less than chance. On a terminal a frame takes the place of the one before; elsewhere each step is a
    status line, then the lines in which something is new, with ^ under it, or noise, with ~ under it.
    """

    def __init__(self, tokenizer: Tokenizer, sampler, m: ModelConfig, given: list[int] | None, pause: float):
        self.tokenizer, self.pause = tokenizer, pause
        self.growing = m.paradigm == "ar" or isinstance(sampler, autoregressive.SamplerConfig)
        self.total = m.target_length - 1 if self.growing else getattr(sampler, "steps", "?")
        self.candidates = getattr(sampler, "candidates", 1)
        self.fixed = [False] * (m.target_length - 1) if given is None else [i >= 0 for i in given]
        self.in_place = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.last, self.age, self.height, self.calls, self.seconds = [], [], 0, 0, 0.0

    def __call__(self, step: int, canvas: Tensor, logits: Tensor | None, rows: Tensor) -> None:
        self.calls += 0 if logits is None else int(((rows >= 0) & (rows < self.candidates)).sum())
        row = (rows == 0).nonzero().flatten().tolist()
        if not row or (self.growing and self.last[-1:] == [self.tokenizer.pad_id]):
            return  # it has settled or ended; the others go on
        ids = canvas[row[0]].tolist()[: step if self.growing else None]  # waits for the device, so not drawing time
        start = time.perf_counter()
        if self.growing:
            noise = [False] * len(ids)
        else:
            noise = unlikely(canvas[row[0]], logits[row[0]]) if logits is not None else [True] * len(ids)
        share, kinds = self._compare(ids, noise)
        news = "noise" if logits is None else f"{len(ids)} tokens" if self.growing else f"{share:.0%} changed"
        several = f" | candidate 1 of {self.candidates}, best not known" if self.candidates > 1 else ""
        columns, height = shutil.get_terminal_size((80, 24))
        status = f"step {step} of {self.total} | {self.calls} network calls | {news}{several}"[: columns - 1]
        lines = lay_out(cells(ids, kinds, self.tokenizer), columns - 1, self.in_place)
        if self.in_place:
            print(self._frame(lines, status, height), end="", flush=True)
            time.sleep(self.pause)
        else:
            print("\n".join([status, *plain_lines(lines)]), flush=True)
        self.seconds += time.perf_counter() - start

    def _compare(self, ids: list[int], noise: list[bool]) -> tuple[float, list[str]]:
        """(share of the free slots that changed, the kind of each slot), and remember the tokens."""
        before = zip_longest(self.last[: len(ids)], self.age[: len(ids)], ids)
        self.age = [age + 1 if last == token else 0 for last, age, token in before]  # steps a token has stood
        self.last, kinds = ids, []
        for age, is_noise, fixed in zip(self.age, noise, self.fixed):
            kind = "settled" if age >= 2 or fixed else "fresh" if age else "changed"
            kinds.append("noise" if is_noise and not fixed else kind)
        return self.age.count(0) / max(self.fixed.count(False), 1), kinds

    def _frame(self, lines: list, status: str, height: int) -> str:
        room = max(height - 2, 1)  # the status and the line of the cursor
        new = [i for i, line in enumerate(lines) if any(kind == "changed" for _, kind in line)]
        start = max(0, (new[-1] + 1 if new else 0) - room)  # what does not fit is above or below the last change
        shown = [paint(line) for line in lines[start : start + room]] + [status]
        up = f"\x1b[{self.height}A" if self.height else ""
        self.height = len(shown)
        return up + "".join(f"\r{line}\x1b[K\n" for line in shown) + "\x1b[J"


def unlikely(canvas: Tensor, logits: Tensor) -> list[bool]:
    """Which slots of canvas (S,) hold a token that logits (S, V) give less than one in V."""
    log_p = logits.log_softmax(-1).gather(-1, canvas[:, None])[:, 0]  # (S,)
    return (log_p < -math.log(logits.shape[-1])).tolist()


def cells(ids: list[int], kinds: list[str], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """What stands for each token: (text, kind). Tokens that only together make a character are one cell."""
    found, i = [], 0
    while i < len(ids):
        n, text = 1, PAD
        if ids[i] != tokenizer.pad_id:
            n = next((n for n in range(1, 5) if _is_text(ids[i : i + n], tokenizer)), 1)
            text = tokenizer.decode(ids[i : i + n])
        kind = "changed" if "changed" in kinds[i : i + n] else kinds[i]
        found.append(("".join(_visible(c) if c != "\n" else c for c in text), kind))
        i += n
    return found


def _is_text(ids: list[int], tokenizer: Tokenizer) -> bool:
    return "\ufffd" not in tokenizer.decode(ids) and (len(ids) == 1 or max(ids) < tokenizer.n_ordinary)


def _visible(char: str) -> str:
    # A combining mark would join the colour of its neighbour and take no column.
    return char if char.isprintable() and not unicodedata.combining(char) and char != "\ufffd" else UNPRINTABLE


def _width(char: str) -> int:
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def lay_out(cells: list[tuple[str, str]], columns: int, break_lines: bool) -> list[list[tuple[str, str]]]:
    """The cells as lines of (character, kind), none wider than columns. break_lines: a newline token ends its line."""
    lines, used = [[]], 0
    for text, kind in cells:
        for char in text:
            if used + _width(char) > columns:
                lines, used = [*lines, []], 0
            lines[-1].append((NEWLINE if char == "\n" else char, kind))
            used += _width(char)
            if char == "\n" and break_lines:
                lines, used = [*lines, []], 0
    return lines


def paint(line: list[tuple[str, str]]) -> str:
    parts = groupby(line, lambda cell: cell[1])
    return "".join(f"\x1b[{STYLE[kind]}m{''.join(char for char, _ in part)}\x1b[0m" for kind, part in parts)


def plain_lines(lines: list[list[tuple[str, str]]]) -> list[str]:
    """Each line that has marks, and its marks under it."""
    found = []
    for line in lines:
        marks = "".join(MARK.get(kind, " ") * _width(char) for char, kind in line).rstrip()
        found += ["".join(char for char, _ in line), marks] if marks else []
    return found


if __name__ == "__main__":
    run(main)
