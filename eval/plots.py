"""Pictures: runs as their logs tell them, one canvas over its steps, quality against steps.

    python -m eval.plots RUN_DIR [RUN_DIR ...] [--out=out/loss.png]
    python -m eval.plots --canvas=CKPT --prompt="fr nine hundred eighty-one" [--out=out/canvas.png] [sampler settings]
    python -m eval.plots --canvas=CKPT --prompt="fr nine hundred eighty-one" --out=out/canvas.svg       # it moves
    python -m eval.plots --quality=FILE.json [--out=out/quality.png]

FILE.json: {"title": text, "metric": "exact match",
            "ar": {"value": 0.9, "interval": [0.87, 0.93], "calls": 22.5},
            "series": [{"name": text, "points": [{"steps": 10, "calls": 10, "value": 0.8, "interval": [0.76, 0.83]}]}]}
"ar" may be left out, and so may an interval. AR and diffusion losses stand on panels of their own: a likelihood and a
denoising loss have no scale in common. All but the moving canvas need matplotlib, which nothing else here does.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

from checkpoint import load_model
from configurator import configure, run
from eval.figures import COLOURS, INK, LINES, MARKERS, WIDTH, new_figure, plain, save_figure
from eval.plot_canvas import CanvasConfig, plot_canvas
from eval.plot_runs import RunsConfig, plot_losses


@dataclass
class QualityConfig:
    quality: str = ""  # the JSON file
    out: str = "out/quality.png"


def plot_quality(data: dict, path: str | Path) -> None:
    """Draw the JSON of this file's docstring: a share over network calls, a line for each series and one for AR."""
    ar, series = _checked(data)
    figure = new_figure(WIDTH * 0.75, 5.2)
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
    plain(panel)
    panel.legend(frameon=False, fontsize=10)
    save_figure(figure, path)


def plot_study(panels: list[dict], path: str | Path) -> None:
    """Panels side by side, a line for each task: the mean over seeds, a bar from the lowest to the highest seed.

    panels: {"title", "x", "ticks": names in order, "series": {name: {tick: values of the seeds}}, "levels": {name: y}}.
    A level is drawn dashed in the colour of the series of that name. Values are shares in [0, 1].
    """
    figure = new_figure(WIDTH, 4.6)
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
        plain(panel)
        panel.legend(frameon=False, fontsize=10)
    save_figure(figure, path)


# Section 4.7 and Figure 3 of AR2Diff (arXiv 2401.17181): 14 ms a token of AR; diffusion 179 ms a step, which fits its
# 4,000 tokens, and with 10 steps 10 times as fast as AR at 500. Hardware and batch size are not stated.
PAPER = {"AR": {500: 7.0, 4000: 56.0}, 10: {500: 0.7, 4000: 1.79}, 20: {4000: 3.58}, 50: {4000: 8.95}}


def plot_speed(rows: list[dict], path: str | Path) -> None:
    """Seconds to decode over length, a panel for each number format and batch: the fastest AR and diffusion at 10, 20
    and 50 steps of a frozen prefix, one candidate. Hollow: the paper's Figure 3. rows: see speed_table.rows_of."""
    rows = [r for r in rows if r["times"] and not (r["adaptive"] or r["conditioned"] or r["candidates"] > 1)]
    panels = list(dict.fromkeys((row["dtype"], row["batch"]) for row in rows))
    columns = min(len(panels), 3) or 1
    figure = new_figure(WIDTH, 4.4 * math.ceil(len(panels) / columns))
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
        plain(panel)
        panel.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


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


def main(argv: list[str]) -> None:
    folders, flags = [a for a in argv if not a.startswith("--")], [a for a in argv if a.startswith("--")]
    asked = [mode for mode in ("canvas", "quality") if any(flag.split("=")[0] == f"--{mode}" for flag in flags)]
    if len(asked) + bool(folders) != 1:
        usage = "python -m eval.plots RUN_DIR [RUN_DIR ...] | --canvas=CKPT --prompt=TEXT | --quality=FILE.json"
        raise ValueError(f"name run folders, or --canvas, or --quality, one of the three: {usage}")
    if folders:
        cfg = configure(RunsConfig, flags)
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
