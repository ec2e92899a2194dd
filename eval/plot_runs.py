"""A picture of training runs, any number of them beside each other, from their logs: python -m eval.plots RUN_DIR ...

Panels, each where a log tells of it: the losses, AR and diffusion apart; the held-out L(1) by corruption rate; L(1)
against L(2) in training; held-out loss by the FLOPs spent, those of the runs a run began from counted; gradient norm;
speed. Below them samples along the way.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path
from typing import NamedTuple

from checkpoint import load
from eval.figures import COLOURS, INK, LINES, MONO, WIDTH, glyphs, new_figure, plain, save_figure
from view.cells import UNPRINTABLE

TITLES = {"ar": "autoregressive", "diffusion": "diffusion (not comparable with AR)"}
MEASURES = {
    "ar": ("held out", "training"),
    "diffusion": ("held out, L(1), mean over rates", "training, sum of the passes"),
}
SAMPLES, LETTERS = 4, 150  # samples a run that are shown, and letters of each


@dataclass
class RunsConfig:
    out: str = "out/loss.png"


class Run(NamedTuple):
    """A log and how it is drawn."""

    name: str
    folder: Path
    paradigm: str
    entries: list[dict]
    colour: str
    line: str

    def curve(self, name: str) -> tuple[list[int], list]:
        """(steps, values) of the entries that have this value."""
        told = [(entry["step"], entry[name]) for entry in self.entries if name in entry]
        return [step for step, _ in told], [value for _, value in told]


def plot_losses(folders: list[str | Path], path: str | Path) -> None:
    """Draw what the logs of the run folders tell, each run in a colour of its own.

    Raises ValueError, one line, where a folder holds no log that can be drawn.
    """
    runs = open_runs(folders)
    panels = [panel for panel in PANELS if any(panel.drawn(run) for run in runs)]
    samples = [line for run in runs for line in sample_lines(run)]
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    below = 0.2 * (len(samples) + 1) if samples else 0.0  # inches
    whole = (4.6 if rows == 1 else 3.4 * rows) + below
    figure = new_figure(WIDTH, whole)
    figure.get_layout_engine().set(rect=(0, below / whole, 1, 1 - below / whole))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels):
        for run in runs:
            if panel.drawn(run):
                panel.draw(axis, run)
        axis.set(xlabel="step", ylabel="nats per slot")
        axis.set_title(panel.title, loc="left", fontsize=11, color=INK)
        plain(axis)
        panel.finish(axis)
        axis.legend(fontsize=9, framealpha=0.85, edgecolor="white")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    drawable = glyphs()
    for i, (text, colour) in enumerate(samples):
        text = "".join(c if drawable(c) else UNPRINTABLE for c in text)
        place = dict(va="top", fontsize=8, family=MONO, color=colour, parse_math=False)
        figure.text(0.1 / WIDTH, (below - 0.1 - 0.2 * i) / whole, text, **place)
    save_figure(figure, path)


def open_runs(folders: list[str | Path]) -> list[Run]:
    found = [read_run(folder) for folder in folders]
    if not found:
        raise ValueError("no run: name at least one folder that holds a log.jsonl")
    paths = [Path(folder).resolve() for folder in folders]
    twice = len({path.name for path in paths}) < len(paths)
    names = [f"{path.parent.name}/{path.name}" if twice else path.name for path in paths]
    looks = [(colour, LINES[i // len(COLOURS) % 4]) for i, colour in zip(range(len(names)), cycle(COLOURS))]
    return [Run(name, Path(folder), *one, *look) for name, folder, one, look in zip(names, folders, found, looks)]


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


def flops_before(folder: Path, depth: int = 8) -> float:
    """FLOPs of the runs whose weights the run in folder began with, as far as their logs are still there.

    A checkpoint says where it began (converted_from); a conversion has no log and costs nothing.
    """
    try:
        origin, _, step = str(load(folder / "ckpt.pt").get("converted_from") or "").partition(" step ")
    except ValueError:
        return 0.0
    before = Path(origin).parent
    if not origin.endswith(".pt") or not depth or not (before / "ckpt.pt").exists():
        return 0.0
    spent = 0.0
    if (before / "log.jsonl").exists():
        until = int(step) if step else math.inf
        spent = sum(entry.get("flops", 0) for entry in read_run(before)[1] if entry["step"] <= until)
    return spent + flops_before(before, depth - 1)


def sample_lines(run: Run) -> list[tuple[str, str]]:
    """(text, colour): the run's name and some of its samples, evenly from the first to the last."""
    _, said = run.curve("sample")
    if not said:
        return []
    chosen = sorted({round(k * (len(said) - 1) / max(SAMPLES - 1, 1)) for k in range(SAMPLES)})
    lines = [said[k] if len(said[k]) <= LETTERS else said[k][: LETTERS - 1] + "…" for k in chosen]
    return [(text, run.colour) for text in (run.name, *lines)]


# Panels: what is drawn of one run, where its log has it


class Panel(NamedTuple):
    title: str
    drawn: Callable[[Run], bool]
    draw: Callable
    finish: Callable


def _losses(kind: str) -> Panel:
    held_out, training = MEASURES[kind]

    def draw(axis, run: Run) -> None:
        axis.plot(*run.curve("loss"), color=run.colour, lw=0.8, alpha=0.3)
        steps, values = run.curve("val_loss")
        marker = "o" if len(steps) <= 30 else ""
        axis.plot(steps, values, color=run.colour, ls=run.line, lw=2.2, marker=marker, ms=4, label=run.name)

    def finish(axis) -> None:
        axis.plot([], [], color="grey", lw=2.2, label=held_out)
        axis.plot([], [], color="grey", lw=0.8, alpha=0.5, label=training)
        _log_axis(axis)

    return Panel(TITLES[kind], lambda run: run.paradigm == kind, draw, finish)


def _draw_rates(axis, run: Run) -> None:
    told = [entry for entry in run.entries if "val_loss_by_rate" in entry]
    for rate in told[-1]["val_loss_by_rate"] if told else []:
        steps = [entry["step"] for entry in told if rate in entry["val_loss_by_rate"]]
        values = [entry["val_loss_by_rate"][rate] for entry in told if rate in entry["val_loss_by_rate"]]
        look = dict(color=run.colour, ls=run.line, lw=1.2, alpha=0.3 + 0.6 * float(rate), ms=3)
        axis.plot(steps, values, marker="o" if len(steps) == 1 else "", **look)
        place = dict(xytext=(4, 0), textcoords="offset points", va="center")
        axis.annotate(rate, (steps[-1], values[-1]), color=run.colour, fontsize=9, **place)
    axis.plot([], [], color=run.colour, ls=run.line, lw=1.2, label=run.name)


def _draw_passes(axis, run: Run) -> None:
    """L(1), L(2), .. of training, smoothed: one line each, the later the stronger."""
    steps, passes = run.curve("passes")
    # With ar_weight the last term is the AR loss, which is another thing.
    n = len(passes[0]) - any("ar_loss" in entry for entry in run.entries)
    for k in range(n):
        values = smoothed([terms[k] for terms in passes])
        look = dict(color=run.colour, ls=LINES[k % 4], lw=1.6, alpha=0.5 + 0.5 * (k + 1) / n)
        axis.plot(steps, values, label=f"{run.name}: L({k + 1})", **look)


def smoothed(values: list[float], span: int = 20) -> list[float]:
    """A running mean whose weights fall by a factor e within `span` values; it starts at the first value's own."""
    found, mean = [], 0.0
    for i, value in enumerate(values):
        mean += (value - mean) / min(i + 1, span)
        found.append(mean)
    return found


def _draw_by_flops(axis, run: Run) -> None:
    spent = list(accumulate((entry.get("flops", 0) for entry in run.entries), initial=flops_before(run.folder)))[1:]
    for name, text, width in (("val_loss", run.name, 2.2), ("val_ar_loss", f"{run.name}: its AR loss", 1.2)):
        told = [(flops / 1e12, entry[name]) for flops, entry in zip(spent, run.entries) if name in entry]
        if told:
            line = "-" if run.paradigm == "ar" or name == "val_ar_loss" else "--"
            look = dict(color=run.colour, ls=line, lw=width, marker="o", ms=3, label=text)
            axis.plot([flops for flops, _ in told], [loss for _, loss in told], **look)


def _finish_by_flops(axis) -> None:
    axis.set(xlabel="TFLOPs, those of earlier runs counted", ylabel="nats per slot, held out")
    axis.plot([], [], color="grey", ls="-", label="AR: -log p")
    axis.plot([], [], color="grey", ls="--", label="diffusion: L(1), another measure")
    _log_axis(axis)


def _series(title: str, name: str, unit: str, log: bool) -> Panel:
    def draw(axis, run: Run) -> None:
        axis.plot(*run.curve(name), color=run.colour, ls=run.line, lw=1.2, label=run.name)

    def finish(axis) -> None:
        axis.set_ylabel(unit)
        if log:
            _log_axis(axis)
        else:
            axis.set_ylim(bottom=0)

    return Panel(title, _has(name), draw, finish)


def _has(name: str) -> Callable[[Run], bool]:
    return lambda run: any(name in entry for entry in run.entries)


def _log_axis(axis) -> None:
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axis.yaxis.set_minor_formatter(NullFormatter())


PANELS = [
    _losses("ar"),
    _losses("diffusion"),
    Panel("diffusion: held-out L(1) by corruption rate", _has("val_loss_by_rate"), _draw_rates, _log_axis),
    Panel("diffusion: the passes in training, smoothed", _has("passes"), _draw_passes, _log_axis),
    Panel(
        "held-out loss by compute",
        lambda run: (
            any("flops" in entry for entry in run.entries) and any("val_loss" in entry for entry in run.entries)
        ),
        _draw_by_flops,
        _finish_by_flops,
    ),
    _series("gradient norm, before clipping", "grad_norm", "norm", log=True),
    _series("speed", "tokens_per_s", "tokens a second", log=False),
]
