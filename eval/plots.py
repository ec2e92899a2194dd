"""Pictures: loss curves of runs, one canvas over its steps, quality against steps.

    python -m eval.plots RUN_DIR [RUN_DIR ...] [--out=out/loss.png]
    python -m eval.plots --canvas=CKPT --prompt="fr nine hundred eighty-one" [--out=out/canvas.png] [sampler settings]
    python -m eval.plots --quality=FILE.json [--out=out/quality.png]

FILE.json: {"title": text, "metric": "exact match",
            "ar": {"value": 0.9, "interval": [0.87, 0.93], "calls": 22.5},
            "series": [{"name": text, "points": [{"steps": 10, "calls": 10, "value": 0.8, "interval": [0.76, 0.83]}]}]}
"ar" may be left out, and so may an interval. AR and diffusion losses stand on panels of their own: a likelihood and a
denoising loss have no scale in common. Needs matplotlib, which nothing else here does.
"""

import json
import math
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch

import diffusion
from checkpoint import load, load_model, write_atomically
from configurator import configure, run
from sample import encode_prompt
from view.cells import NEWLINE, PAD, UNPRINTABLE, spans

# Okabe and Ito 2008, without the yellow, which is lost on white: told apart with every common colour blindness.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
LINES = ["-", "--", ":", "-."]  # the second, third, .. time round the colours
MARKERS = "osD^vPX"
INK, CHANGED, MONO = "#222222", "#D55E00", "DejaVu Sans Mono"
WIDTH, DPI = 11.5, 100  # inches and dots an inch: 1,150 pixels, what a README shows without shrinking it much
MAX_COLUMNS, MAX_ROWS = 64, 32  # of a canvas; more cannot be read
LEFT, TOP, BOTTOM = 0.95, 0.62, 0.85  # inches around a canvas


TITLES = {
    "ar": "autoregressive",
    "diffusion": "diffusion (not comparable with AR)",
    "rates": "diffusion: held-out L(1) by corruption rate",
}
MEASURES = {
    "ar": ("held out", "training"),
    "diffusion": ("held out, L(1), mean over rates", "training, sum of the passes"),
}


@dataclass
class LossConfig:
    out: str = "out/loss.png"


@dataclass
class QualityConfig:
    quality: str = ""  # the JSON file
    out: str = "out/quality.png"


@dataclass
class CanvasConfig(diffusion.SamplerConfig):
    """One canvas is drawn, so candidates is 1 here."""

    canvas: str = ""  # a diffusion checkpoint
    prompt: str = ""
    out: str = "out/canvas.png"
    candidates: int = 1
    seed: int = 1337

    def __post_init__(self):
        super().__post_init__()
        if self.candidates != 1:
            raise ValueError(f"one canvas is drawn: candidates must be 1, got {self.candidates}")


# Loss curves


def plot_losses(runs: list[str | Path], path: str | Path) -> None:
    """Training and held-out loss of each run folder over its steps, AR and diffusion on panels of their own."""
    found = [read_run(folder) for folder in runs]
    if not found:
        raise ValueError("no run: name at least one folder that holds a log.jsonl")
    names = [Path(folder).resolve() for folder in runs]
    twice = len({name.name for name in names}) < len(names)
    names = [f"{name.parent.name}/{name.name}" if twice else name.name for name in names]
    looks = [(colour, LINES[i // len(COLOURS) % 4]) for i, colour in zip(range(len(names)), cycle(COLOURS))]
    kinds = [kind for kind in ("ar", "diffusion") if any(paradigm == kind for paradigm, _ in found)]
    titles = [TITLES[kind] for kind in kinds] + ([TITLES["rates"]] if "diffusion" in kinds else [])
    figure = _figure(WIDTH, 4.6)
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for name, (paradigm, entries), (colour, line) in zip(names, found, looks):
        panel = panels[kinds.index(paradigm)]
        panel.plot(*_curve(entries, "loss"), color=colour, lw=0.8, alpha=0.3)
        steps, values = _curve(entries, "val_loss")
        marker = "o" if len(steps) <= 30 else ""
        panel.plot(steps, values, color=colour, ls=line, lw=2.2, marker=marker, ms=4, label=name)
        if paradigm == "diffusion":
            _plot_rates(panels[-1], entries, colour, line)
    for panel, kind in zip(panels, kinds):
        held_out, training = MEASURES[kind]
        panel.plot([], [], color="grey", lw=2.2, label=held_out)
        panel.plot([], [], color="grey", lw=0.8, alpha=0.5, label=training)
        panel.legend(frameon=False, fontsize=10)
    for panel, title in zip(panels, titles):
        panel.set(xlabel="step", ylabel="nats per slot")
        panel.set_title(title, loc="left", fontsize=11, color=INK)
        _plain(panel)
        _log_axis(panel)
    _save(figure, path)


def _log_axis(panel) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    panel.set_yscale("log")
    low, high = panel.get_ylim()
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _plot_rates(panel, entries: list[dict], colour: str, line: str) -> None:
    told = [entry for entry in entries if "val_loss_by_rate" in entry]
    for rate in told[-1]["val_loss_by_rate"] if told else []:
        steps = [entry["step"] for entry in told if rate in entry["val_loss_by_rate"]]
        values = [entry["val_loss_by_rate"][rate] for entry in told if rate in entry["val_loss_by_rate"]]
        marker = "o" if len(steps) == 1 else ""
        panel.plot(steps, values, color=colour, ls=line, lw=1.2, alpha=0.3 + 0.6 * float(rate), marker=marker, ms=3)
        place = dict(xytext=(4, 0), textcoords="offset points", va="center")
        panel.annotate(rate, (steps[-1], values[-1]), color=colour, fontsize=9, **place)


def read_run(folder: str | Path) -> tuple[str, list[dict]]:
    """(paradigm, the entries of its log.jsonl). Raises ValueError, one line, where there is nothing to draw."""
    path, entries = Path(folder) / "log.jsonl", []
    if not path.is_file():
        near = sorted(str(found.parent) for found in Path(folder).parent.glob("*/log.jsonl"))
        raise ValueError(f"{path}: no such log" + (f"; runs beside it: {', '.join(near[:8])}" if near else ""))
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entries.append(entry | {"step": int(entry["step"]), "loss": float(entry["loss"])})
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last line of a running or killed run may be torn
                raise ValueError(f"{path}, line {number}: no log entry with step and loss: {line[:60]!r}") from None
    if not entries:
        raise ValueError(f"{path}: empty; the run has not finished a step")
    if any("val_loss" in entry for entry in entries):
        return "diffusion" if any("val_loss_by_rate" in entry for entry in entries) else "ar", entries
    return load(Path(folder) / "ckpt.pt")["model_config"]["paradigm"], entries  # the log does not say yet


def _curve(entries: list[dict], name: str) -> tuple[list[int], list[float]]:
    told = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return [step for step, _ in told], [value for _, value in told]


# One canvas over its steps


class Row(NamedTuple):
    name: str
    ids: list[int]
    chances: list[float]  # what the network gives each token; nan where it was not asked


def plot_canvas(model, tokenizer, prompt: str, path: str | Path, sampler: CanvasConfig | None = None) -> str:
    """Draw how one canvas becomes text, a row a step; returns the text.

    A cell's blue says how likely the network found the character, before temperature; a frame that it just changed.
    """
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
    title = f"{prompt!r} \N{RIGHTWARDS ARROW} {text!r}   {int(made.calls[0])} network calls, sampler {sampler.sampler}"
    _save(draw_canvas(rows, tokenizer, title), path)
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
    figure = _figure(WIDTH, height)
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
    drawable, before = _drawable(), None
    for y, k in enumerate(shown):
        ids = rows[k].ids
        for text, first, end in every[k]:
            if first >= columns:
                break
            chance = min(rows[k].chances[first:end])
            changed = before is not None and before[first:end] != ids[first:end]
            inset = 0.06 if changed else 0.0  # so that neighbouring frames do not cover each other
            box = dict(facecolor=_blue(chance), edgecolor=CHANGED if changed else "white", lw=1.4 if changed else 0.6)
            panel.add_patch(Rectangle((first + inset, y + inset), end - first - 2 * inset, 1 - 2 * inset, **box))
            dark = chance > 0.75
            colour = ("#7FB4D8" if dark else "#7D909C") if text == PAD else "white" if dark else INK
            text = "".join(c if drawable(c) else UNPRINTABLE for c in text[:letters])
            panel.text((first + end) / 2, y + 0.5, text, color=colour, clip_on=True, parse_math=False, **look)
        before = ids
    title = title if len(title) <= 125 else title[:124] + "…"
    figure.text(0.1 / WIDTH, 1 - 0.2 / height, title, fontsize=11, color=INK, va="center", parse_math=False)
    figure.text(0.1 / WIDTH, 1 - 0.5 / height, "step", fontsize=10, color=INK, va="center")
    keys = {f"{p}%": dict(facecolor=_blue(p / 100), edgecolor="#BBBBBB", lw=0.5) for p in (0, 25, 50, 75)}
    keys["100% likely to the network"] = dict(facecolor=_blue(1.0))
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


def _drawable():
    """Whether the font has a glyph for a character; without one matplotlib draws a box and warns."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(MONO))
    return lambda char: font.get_char_index(ord(char)) != 0


def _blue(chance: float) -> tuple[float, float, float]:
    """White at 0, the blue of COLOURS at 1: one hue that only darkens, so it reads the same in grey. Grey for nan."""
    if math.isnan(chance):
        return 0.93, 0.93, 0.93
    return tuple(1 - chance * (1 - int(COLOURS[0][i : i + 2], 16) / 255) for i in (1, 3, 5))


# Quality against steps


def plot_quality(data: dict, path: str | Path) -> None:
    """Draw the JSON of this file's docstring: a share over network calls, a line for each series and one for AR."""
    ar, series = _checked(data)
    figure = _figure(WIDTH * 0.75, 5.2)
    panel = figure.subplots()
    for i, one in enumerate(series):
        points = sorted(one["points"], key=lambda point: point["calls"])
        calls, values = [p["calls"] for p in points], [p["value"] for p in points]
        ends = [p.get("interval") or [p["value"], p["value"]] for p in points]
        below = [max(0.0, value - low) for value, (low, _) in zip(values, ends)]
        above = [max(0.0, high - value) for value, (_, high) in zip(values, ends)]
        look = dict(color=COLOURS[i % 6], marker=MARKERS[i % len(MARKERS)], ls=LINES[i // 6 % 4], lw=2, ms=6)
        panel.errorbar(calls, values, yerr=[below, above], capsize=3, elinewidth=1.2, label=one["name"], **look)
    if ar:
        name = "autoregressive" + (f" ({ar['calls']:g} calls)" if "calls" in ar else "")
        panel.axhline(ar["value"], color="black", ls="--", lw=1.6, label=name)
        if ar.get("interval"):
            panel.axhspan(*ar["interval"], color="black", alpha=0.08, lw=0)
        if "calls" in ar:
            panel.plot([ar["calls"]], [ar["value"]], "k*", ms=13)
    calls = sorted({p["calls"] for one in series for p in one["points"]} | ({ar["calls"]} if "calls" in ar else set()))
    panel.set(xscale="log", ylim=(-0.03, 1.03), xlabel="network calls per sample", ylabel=data["metric"])
    panel.set_xlim(calls[0] / 1.25, calls[-1] * 1.25)
    room = 0.045 * math.log(calls[-1] / calls[0] * 1.25**2)  # of a label; what is nearer would overprint
    ticks = calls[:1]
    for count in calls[1:]:
        ticks += [count] if math.log(count / ticks[-1]) > room else []
    panel.set_xticks(ticks, [f"{c:g}" for c in ticks])
    panel.set_xticks([], minor=True)
    panel.set_yticks([k / 5 for k in range(6)], [f"{k / 5:.0%}" for k in range(6)])
    panel.set_title(data["title"], loc="left", fontsize=12, color=INK)
    _plain(panel)
    panel.legend(frameon=False, fontsize=10)
    _save(figure, path)


def plot_study(panels: list[dict], path: str | Path) -> None:
    """Panels side by side, a line for each task: the mean over seeds, a bar from the lowest to the highest seed.

    panels: {"title", "x", "ticks": names in order, "series": {name: {tick: values of the seeds}}, "levels": {name: y}}.
    A level is drawn dashed in the colour of the series of that name. Values are shares in [0, 1].
    """
    figure = _figure(WIDTH, 4.6)
    for panel, data in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for i, (name, points) in enumerate(data["series"].items()):
            xs = [data["ticks"].index(tick) for tick in points]
            means = [sum(values) / len(values) for values in points.values()]
            below = [mean - min(values) for mean, values in zip(means, points.values())]
            above = [max(values) - mean for mean, values in zip(means, points.values())]
            look = dict(color=COLOURS[i % 6], marker=MARKERS[i % len(MARKERS)], lw=2, ms=6, label=name)
            panel.errorbar(xs, means, yerr=[below, above], capsize=3, elinewidth=1.2, **look)
            if name in data.get("levels", {}):
                panel.axhline(data["levels"][name], color=COLOURS[i % 6], ls="--", lw=1.2)
        panel.set(ylim=(-0.03, 1.03), xlabel=data["x"])
        panel.set_xticks(range(len(data["ticks"])), data["ticks"])
        panel.set_yticks([k / 5 for k in range(6)], [f"{k / 5:.0%}" for k in range(6)])
        panel.set_title(data["title"], loc="left", fontsize=12, color=INK)
        _plain(panel)
        panel.legend(frameon=False, fontsize=10)
    _save(figure, path)


# Section 4.7 and Figure 3 of AR2Diff (arXiv 2401.17181): 14 ms a token of AR; diffusion 179 ms a step, which fits its
# 4,000 tokens, and with 10 steps 10 times as fast as AR at 500. Hardware and batch size are not stated.
PAPER = {"AR": {500: 7.0, 4000: 56.0}, 10: {500: 0.7, 4000: 1.79}, 20: {4000: 3.58}, 50: {4000: 8.95}}


def plot_speed(rows: list[dict], path: str | Path) -> None:
    """Seconds to decode over length, a panel for each number format and batch: the fastest AR and diffusion at 10, 20
    and 50 steps of a frozen prefix, one candidate. Hollow: the paper's Figure 3. rows: see speed_table.rows_of."""
    rows = [r for r in rows if r["times"] and not (r["adaptive"] or r["conditioned"] or r["candidates"] > 1)]
    panels = list(dict.fromkeys((row["dtype"], row["batch"]) for row in rows))
    columns = min(len(panels), 3) or 1
    figure = _figure(WIDTH, 4.4 * math.ceil(len(panels) / columns))
    for panel, (dtype, batch) in zip(figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flat, panels):
        here = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch)]
        for (name, paper), colour, marker in zip(PAPER.items(), COLOURS, MARKERS):
            points: dict[int, float] = {}
            for row in here:
                if row["kind"] == "AR" if name == "AR" else row["kind"] != "joint" and row["steps"] == name:
                    seconds = row["seconds"]["median"]
                    points[row["length"]] = min(seconds, points.get(row["length"], math.inf))
            lengths = sorted(points)
            text = "AR, KV cache" if name == "AR" else f"diffusion, {name} steps"
            look = dict(color=colour, marker=marker, ms=6)
            panel.plot(lengths, [points[n] for n in lengths], lw=2, label=text, **look)
            panel.plot(list(paper), list(paper.values()), ls=":", lw=1, mfc="white", **look)
        panel.plot([], [], color="grey", ls=":", marker="o", mfc="white", label="the paper's Figure 3")
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel="seconds")
        ticks = sorted({row["length"] for row in here} | {4096})
        panel.set_xticks(ticks, [f"{n}" for n in ticks], rotation=45)
        panel.set_xticks([], minor=True)
        panel.set_title(f"{dtype}, batch {batch}", loc="left", fontsize=11, color=INK)
        _plain(panel)
        panel.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _checked(data: dict) -> tuple[dict, list[dict]]:
    """(ar or {}, series) of a quality file. Raises ValueError, one line that says what is missing."""
    try:
        missing = [name for name in ("title", "metric", "series") if name not in data]
        if missing:
            raise ValueError(f"quality data: {', '.join(missing)} missing")
        ar, series = data.get("ar") or {}, data["series"]
        points = [point for one in series for point in one["points"]]
        if not all("name" in one for one in series) or not points:
            raise ValueError("quality data: each of the series wants a name and points, and there must be a point")
        for point in points + ([ar] if ar else []):
            bounds = point.get("interval") or []
            if not all(0 <= value <= 1 for value in [point["value"], *bounds]) or len(bounds) not in (0, 2):
                raise ValueError(f"quality data: value and interval are shares from 0 to 1, got {point}")
        if not all(point["calls"] > 0 for point in points) or ar.get("calls", 1) <= 0:
            raise ValueError("quality data: calls must be above 0")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"quality data: not of the form in eval/plots.py: {type(error).__name__} {error}") from None
    return ar, series


# What the pictures share


def _figure(width: float, height: float):
    """An empty figure in inches, without pyplot: no window, no state that outlives it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")


def _plain(panel) -> None:
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", lw=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, labelsize=10)


def _save(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=DPI))


def main(argv: list[str]) -> None:
    folders, flags = [a for a in argv if not a.startswith("--")], [a for a in argv if a.startswith("--")]
    asked = [mode for mode in ("canvas", "quality") if any(flag.split("=")[0] == f"--{mode}" for flag in flags)]
    if len(asked) + bool(folders) != 1:
        usage = "python -m eval.plots RUN_DIR [RUN_DIR ...] | --canvas=CKPT --prompt=TEXT | --quality=FILE.json"
        raise ValueError(f"name run folders, or --canvas, or --quality, one of the three: {usage}")
    if folders:
        cfg = configure(LossConfig, flags)
        plot_losses(folders, cfg.out)
    elif asked == ["canvas"]:
        cfg = configure(CanvasConfig, flags)
        if not cfg.prompt:
            raise ValueError("the prompt is empty; give --prompt=TEXT")
        model, tokenizer, _ = load_model(cfg.canvas)
        print(plot_canvas(model, tokenizer, cfg.prompt, cfg.out, cfg))
    else:
        cfg = configure(QualityConfig, flags)
        try:
            data = json.loads(Path(cfg.quality).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{cfg.quality}: no JSON: {error}") from None
        plot_quality(data, cfg.out)
    print(cfg.out, file=sys.stderr)


if __name__ == "__main__":
    run(main)
