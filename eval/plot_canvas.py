"""A picture of one canvas over its steps, a row a step: python -m eval.plots --canvas=CKPT --prompt=TEXT.

With --out=NAME.svg it moves instead, a frame a step: animate_canvas.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import diffusion
from checkpoint import write_atomically
from eval.animate_canvas import animation
from eval.figures import CHANGED, INK, MONO, WIDTH, blue, glyphs, new_figure, save_figure
from sample import encode_prompt
from view.cells import NEWLINE, PAD, UNPRINTABLE, spans

MAX_COLUMNS, MAX_ROWS = 64, 32  # of a canvas; more cannot be read
LEFT, TOP, BOTTOM = 0.95, 0.62, 0.85  # inches around a canvas


@dataclass
class CanvasConfig(diffusion.SamplerConfig):
    """One canvas is drawn, so candidates is 1 here."""

    canvas: str = ""  # a diffusion checkpoint
    prompt: str = ""
    out: str = "out/canvas.png"  # or .svg: it moves
    candidates: int = 1
    seed: int = 1337

    def __post_init__(self):
        super().__post_init__()
        if self.candidates != 1:
            raise ValueError(f"one canvas is drawn: candidates must be 1, got {self.candidates}")


class Row(NamedTuple):
    name: str
    ids: list[int]
    chances: list[float]  # what the network gives each token; nan where it was not asked


def plot_canvas(model, tokenizer, prompt: str, path: str | Path, sampler: CanvasConfig | None = None) -> str:
    """Draw how one canvas becomes text, a row a step, or a frame a step where path ends in .svg; returns the text.

    A cell's blue says how likely the network found the character, before temperature; a frame that it just changed.
    """
    if Path(path).suffix not in (".png", ".svg"):
        raise ValueError(f"a canvas is drawn as .png or, moving, as .svg; got {path}")
    if model.cfg.paradigm != "diffusion":
        raise ValueError("a canvas over steps needs a diffusion checkpoint; this one is AR, which writes left to right")
    sampler = sampler or CanvasConfig()
    prefix = torch.tensor([encode_prompt(prompt, tokenizer, model.cfg)])
    rows: list[Row] = []
    probs = None  # (S, V) of the last network call

    def keep(step, canvas, logits, _):
        nonlocal probs
        probs = None if logits is None else logits[0].softmax(-1)
        rows.append(_row(f"{step}" if step else "0: noise", canvas[0], probs))

    made = diffusion.generate(model, prefix, sampler, sampler.seed, on_step=keep)
    ids = made.tokens[0].tolist()
    if ids != rows[-1].ids:  # some samplers answer with something else than their canvas
        rows.append(_row("answer", made.tokens[0], probs))
    text = tokenizer.decode(ids[: ids.index(model.cfg.pad_id)] if model.cfg.pad_id in ids else ids)
    calls = int(made.calls[0])
    if Path(path).suffix == ".svg":
        picture = animation(rows, tokenizer, f"{prompt} \N{RIGHTWARDS ARROW} {text}   {calls} network calls")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(picture.encode()))
        return text
    title = f"{prompt!r} \N{RIGHTWARDS ARROW} {text!r}   {calls} network calls, sampler {sampler.sampler}"
    save_figure(draw_canvas(rows, tokenizer, title), path)
    return text


def _row(name: str, ids: torch.Tensor, probs: torch.Tensor | None) -> Row:
    chances = [math.nan] * len(ids) if probs is None else probs.gather(-1, ids[:, None])[:, 0].tolist()
    return Row(name, ids.tolist(), chances)


def draw_canvas(rows: list[Row], tokenizer, title: str):
    """The figure of plot_canvas: at most MAX_ROWS rows and MAX_COLUMNS characters a row; what is left out is said."""
    slots, last = len(rows[0].ids), len(rows) - 1
    every = [_cells(row.ids, tokenizer) for row in rows]
    letters = min(4, max(len(text) for line in every for text, _, _ in line))  # of the widest cell
    columns = min(slots, MAX_COLUMNS // letters)
    # With too many rows some are left out, evenly, never the first nor the last.
    shown = sorted({round(k * last / (MAX_ROWS - 1)) for k in range(MAX_ROWS)}) if last >= MAX_ROWS else range(last + 1)
    side = (WIDTH - LEFT - 0.1) / max(columns, 24)  # inches of a slot
    tall = min(max(side * 1.25, 0.24), 0.42)
    height = len(shown) * tall + TOP + BOTTOM
    figure = new_figure(WIDTH, height)
    from matplotlib.patches import Rectangle

    figure.set_layout_engine("none")  # the size of a cell is what all else follows
    panel = figure.add_axes((LEFT / WIDTH, BOTTOM / height, side * columns / WIDTH, len(shown) * tall / height))
    panel.set(xlim=(0, columns), ylim=(len(shown), 0))
    ticks = [k for k in range(columns) if k == 0 or k % 8 == 7]
    panel.set_xticks([k + 0.5 for k in ticks], [k + 1 for k in ticks])
    panel.set_yticks([k + 0.5 for k in range(len(shown))], [rows[k].name for k in shown])
    panel.tick_params(length=0, labelsize=10, colors=INK)
    panel.set_xlabel("slot" if columns == slots else f"slot (the first {columns} of {slots})", fontsize=10, color=INK)
    panel.spines[:].set_visible(False)
    look = dict(fontsize=min(72 * side * 1.15 / letters, 13.0), family=MONO, ha="center", va="center_baseline")
    drawable, before = glyphs(), None
    for y, k in enumerate(shown):
        ids = rows[k].ids
        for text, first, end in every[k]:
            if first >= columns:
                break
            chance = min(rows[k].chances[first:end])
            changed = before is not None and before[first:end] != ids[first:end]
            inset = 0.06 if changed else 0.0  # so that neighbouring frames do not cover each other
            box = dict(facecolor=blue(chance), edgecolor=CHANGED if changed else "white", lw=1.4 if changed else 0.6)
            panel.add_patch(Rectangle((first + inset, y + inset), end - first - 2 * inset, 1 - 2 * inset, **box))
            dark = chance > 0.75
            colour = ("#7FB4D8" if dark else "#7D909C") if text == PAD else "white" if dark else INK
            text = "".join(c if drawable(c) else UNPRINTABLE for c in text[:letters])
            panel.text((first + end) / 2, y + 0.5, text, color=colour, clip_on=True, parse_math=False, **look)
        before = ids
    title = title if len(title) <= 125 else title[:124] + "…"
    figure.text(0.1 / WIDTH, 1 - 0.2 / height, title, fontsize=11, color=INK, va="center", parse_math=False)
    figure.text(0.1 / WIDTH, 1 - 0.5 / height, "step", fontsize=10, color=INK, va="center")
    keys = {f"{p}%": dict(facecolor=blue(p / 100), edgecolor="#BBBBBB", lw=0.5) for p in (0, 25, 50, 75)}
    keys["100% likely to the network"] = dict(facecolor=blue(1.0))
    keys["changed since the row above"] = dict(facecolor="white", edgecolor=CHANGED, lw=1.4)
    boxes = [Rectangle((0, 0), 1, 1, **key) for key in keys.values()]
    shape = dict(handlelength=1.2, handleheight=1.2, columnspacing=1.2, handletextpad=0.5, ncols=len(keys))
    place = dict(loc="lower left", bbox_to_anchor=(LEFT / WIDTH - 0.01, 0), fontsize=10, labelcolor=INK, frameon=False)
    figure.legend(boxes, list(keys), **shape, **place)
    marks = dict(s=f"{PAD} pad: no text   {UNPRINTABLE} not printable", fontsize=10, color=INK)
    figure.text(1 - 0.1 / WIDTH, 0.2 / height, va="center", ha="right", **marks)
    return figure


def _cells(ids: list[int], tokenizer) -> list[tuple[str, int, int]]:
    """(text, first slot, slot after the last): the bytes of one character share a cell."""
    return [(text.replace("\n", NEWLINE), first, end) for text, first, end in spans(ids, tokenizer)]
