"""Draw the pictures: training curves, a moving canvas, the figures of the docs.

    python -m eval.plots RUN_DIR [RUN_DIR ...] --out=out/loss.png
    python -m eval.plots --canvas=CKPT --prompt="fr nine hundred eighty-one" --out=out/canvas.svg
    python -m eval.plots --docs=docs/figures

The canvas takes the settings of the sampler, such as --steps=5. All others need matplotlib.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from string import Template
from xml.sax.saxutils import escape

import torch
from torch import Tensor
from torch.nn import functional as F

from configurator import configure, group, run, setting
from data.tokenizer import get_tokenizer
from diffusion import SAMPLERS, SamplerConfig, generate
from eval import real
from eval.common import Settings, write_text
from eval.study import plain, read_results
from infra.checkpoint import load_model, write_atomically
from model import attention_mask
from sample import DEMO
from view.cells import NEWLINE, spans, visible
from view.record import Frame, Recorder

BLUE = "#0072B2"
GREY = "#EEEEEE"
SEED = 1337  # of the canvas


@dataclass
class PlotConfig(Settings):
    sampler: SamplerConfig = group(SamplerConfig)
    canvas: str = setting("", "diffusion checkpoint: draw how it writes a text", path=True)
    prompt: str = setting("", "of the canvas")
    docs: str = setting("", "folder: draw the figures of the docs", path=True)
    out: str = setting("out/loss.png", "picture", path=True)


def new_figure(height: float):
    """Return an empty figure as wide as a README. It needs no window and no pyplot."""
    from matplotlib import style
    from matplotlib.figure import Figure

    style.use("petroff10")  # colours that colour-blind readers can tell apart
    return Figure(figsize=(11.5, height), dpi=100, layout="constrained")


def save_figure(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


# Training curves


def plot_runs(folders: list[str], path: str) -> None:
    """Draw the losses in the logs of some runs."""
    figure = new_figure(4.6)
    panel = figure.subplots()
    for folder in map(Path, folders):
        text = (folder / "log.jsonl").read_text(encoding="utf-8")
        # The last line of a running training may be incomplete.
        entries = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
        for name, look in {"loss": {"alpha": 0.3}, "val_loss": {"marker": "."}}.items():
            points = [(entry["step"], entry[name]) for entry in entries if name in entry]
            panel.plot(*zip(*points), label=f"{folder.name}, {name}", **look)
    panel.set(xlabel="step", yscale="log", title="loss: AR and diffusion cannot be compared")
    panel.legend(handles=panel.lines, fontsize=8)
    save_figure(figure, path)


# One canvas, a frame per step

PER_LINE = 40  # positions
CELL, HEIGHT, EDGE, TOP = 21, 30, 14, 64  # pixels: a cell, around the canvas, above it
STEP_SECONDS, HOLD_SECONDS = 0.7, 3.0  # of a frame, of the last frame


def plot_canvas(cfg: PlotConfig) -> str:
    """Draw how one canvas becomes text. Return the text."""
    if not cfg.out.endswith(".svg") or not cfg.prompt or cfg.sampler.candidates != 1:
        raise ValueError("a canvas needs --prompt=TEXT, --out=FILE.svg and --candidates=1")
    model, tokenizer, _ = load_model(cfg.canvas)
    if model.cfg.paradigm != "diffusion":
        raise ValueError(f"a canvas needs a diffusion checkpoint; {cfg.canvas} is an AR model")
    prompt = torch.tensor([tokenizer.encode_prompt(cfg.prompt)])
    with Recorder(model.cfg.pad_id, growing=False, candidates=1) as recorder:
        out = generate(model, prompt, cfg.sampler, SEED, on_step=recorder)
    text = tokenizer.decode([token for token in out.tokens[0] if token != model.cfg.pad_id])
    title = f"{cfg.prompt} → {text}   {int(out.calls[0])} network calls"
    write_text(cfg.out, animate_canvas(list(recorder.frames(out.tokens[0])), tokenizer, title))
    return text


def animate_canvas(frames: list[Frame], tokenizer, title: str) -> str:
    """Return an SVG that shows a frame per step. It uses CSS only, which GitHub allows.

    If nothing may move (print, reduced motion), it shows the last frame.
    """
    period = (len(frames) - 1) * STEP_SECONDS + HOLD_SECONDS
    pairs = zip([frames[0], *frames], frames)
    template = Path(__file__).with_suffix(".svg").read_text(encoding="utf-8")
    return Template(template).substitute(
        height=TOP + HEIGHT * math.ceil(len(frames[0].ids) / PER_LINE) + EDGE,
        title=svg_text(title),
        period=f"{period:g}",
        step=f"{100 * STEP_SECONDS / period:.6g}",
        last=f"{100 * HOLD_SECONDS / period:.6g}",
        frames="\n".join(svg_frame(k, *pair, tokenizer) for k, pair in enumerate(pairs)),
    )


def svg_frame(k: int, before: Frame, frame: Frame, tokenizer) -> str:
    """Return the group of frame k: its name and its cells."""
    parts = [f'<g class="f" style="--step: {k}"><text x="14" y="50">step {frame.name}</text>']
    for text, start, end in spans(frame.ids.tolist(), tokenizer):
        line, column = divmod(start, PER_LINE)
        x = EDGE + column * CELL
        y = TOP + line * HEIGHT
        # A cell of several positions is cut at the end of the line.
        wide = min(end - start, PER_LINE - column) * CELL
        p = max(0.0, float(frame.table[start:end, 1].min()))
        changed = not torch.equal(frame.ids[start:end], before.ids[start:end])
        look = f'fill="{BLUE}" fill-opacity="{0.6 * p:.3g}"' + ' class="n"' * changed
        box = f'x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{HEIGHT - 2}"'
        place = f'x="{x + wide / 2:g}" y="{y + 20}"'
        parts.append(f'<rect {box} {look}/><text class="c" {place}>{svg_text(text)}</text>')
    return "\n".join([*parts, "</g>"])


def svg_text(text: str) -> str:
    """Return the text as XML, without characters that cannot be printed."""
    return escape("".join(map(visible, text)).replace("\n", NEWLINE))


# The figures of the docs


def draw_squad():
    """The F1 of SmolLM2-135M on SQuAD against network calls, by sampler. Bars: 95% intervals."""
    found = read_results(Path(__file__).parent.parent / "results/real.jsonl")
    row = f"real_1_squad_{plain(real.FIRST)}"
    jobs = {"resample": [f"{row}_{steps}" for steps in real.STEPS]}
    for name in real.SAMPLERS:
        jobs[name] = [f"{row}_{name}_{steps}" for steps in real.SAMPLER_STEPS]
    jobs["autoregressive"] = ["real_1_squad_ar"]
    figure = new_figure(5.2)
    panel = figure.subplots()
    for name, names in jobs.items():
        results = [found[job] for job in names]
        results.sort(key=lambda result: result["calls_per_sample"])
        calls = [round(result["calls_per_sample"], 1) for result in results]
        values = [result["f1"] for result in results]
        errors = [[abs(r["f1"] - r["f1_interval"][end]) for r in results] for end in (0, 1)]
        form = "k*" if name == "autoregressive" else "o-"
        panel.errorbar(calls, values, errors, fmt=form, capsize=3, label=name)
    panel.axhline(values[-1], color="black", ls="--")
    title = "SmolLM2-135M on SQuAD, converted: 200 questions (AR: 1,000)"
    panel.set(xlabel="network calls", ylabel="F1", title=title)
    panel.yaxis.set_major_formatter("{x:.0%}")
    panel.legend()
    return figure


BYTES = get_tokenizer("bytes")
TEXT = "neuf cent quatre-vingt-un"
IDS = torch.tensor(BYTES.encode(TEXT))  # (S,)
PATTERNS = {  # name -> prefix_attention, target_attention
    "GPT": ("causal", "causal"),
    "prefix LM": ("bidirectional", "causal"),
    "AR2Diff (full attention)": ("joint", "bidirectional"),
    "cached prefix": ("bidirectional", "bidirectional"),
    "AR-readable prompt": ("causal", "bidirectional"),
}


def draw_cells(panel, values: Tensor, colours: list[str], columns, rows) -> None:
    """Draw a cell for each value (rows, columns): the number of a colour."""
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(colours)
    panel.pcolormesh(values, cmap=colours, vmin=0, vmax=colours.N - 1, edgecolors="white", lw=2)
    panel.invert_yaxis()
    panel.set_xticks([k + 0.5 for k in range(len(columns))], columns)
    panel.set_yticks([k + 0.5 for k in range(len(rows))], rows)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def mask_pattern(prefix_attention: str, target_attention: str, P: int, T: int) -> Tensor:
    """Return (P + T, P + T) bool: which token (row) sees which (column)."""
    seen = torch.ones(1, P + T, dtype=torch.bool)
    none = seen[:, :0]
    if prefix_attention == "joint":
        return attention_mask(target_attention, none, seen)[0, 0]
    prefix = attention_mask(prefix_attention, none, seen[:, :P])[0, 0]  # (P, P)
    target = attention_mask(target_attention, seen[:, :P], seen[:, P:])[0, 0]  # (T, P + T)
    return torch.cat([F.pad(prefix, (0, T)), target])


def draw_masks():
    """Five patterns from two settings. A coloured cell is a key that the row may read."""
    figure = new_figure(3.0)
    tokens = "ppptttt"
    colour = torch.tensor([1, 1, 1, 2, 2, 2, 2])[:, None]
    for panel, (name, settings) in zip(figure.subplots(1, len(PATTERNS)), PATTERNS.items()):
        visible = mask_pattern(*settings, 3, 4)
        draw_cells(panel, visible * colour, [GREY, "#56B4E9", BLUE], tokens, tokens)
        panel.set(aspect="equal", xlabel="prefix {}\ntarget {}".format(*settings))
        panel.set_title(name, fontsize=11)
    return figure


def draw_samplers():
    """Each sampler of the demonstration model, a row per step: blue is right, orange changed."""
    steps = 8
    rows = math.ceil(len(SAMPLERS) / 2)
    figure = new_figure(2.3 * rows)
    model, tokenizer, _ = load_model(DEMO / "diffusion.pt")
    prompt = torch.tensor([tokenizer.encode_prompt("fr nine hundred eighty-one")])
    for number, name in enumerate(SAMPLERS, 1):
        panel = figure.add_subplot(rows, 2, number)
        fraction = 0.5 if name in ("resample", "argmax_unrolled") else 1.0
        sampler = SamplerConfig(sampler=name, update_fraction=fraction, steps=steps)
        with Recorder(tokenizer.pad_id, growing=False, candidates=1) as recorder:
            out = generate(model, prompt, sampler, 3, on_step=recorder)
        frames = list(recorder.frames(out.tokens[0]))[: steps + 1]
        ids = torch.stack([frame.ids[: len(TEXT)] for frame in frames])  # (steps + 1, S) or fewer
        draw_cells(panel, ids == IDS, [GREY, "#409BC9"], TEXT, range(len(ids)))
        y, x = (ids[1:] != ids[:-1]).nonzero().T
        panel.scatter(x + 0.5, y + 1.5, 180, marker="s", facecolors="none", edgecolors="#D55E00")
        note = f", update_fraction {fraction}" if fraction < 1 else ""
        panel.set(ylabel="step", title=f"{name}{note}", ylim=(steps + 1, 0))
    return figure


FIGURES = {"mask": draw_masks, "samplers": draw_samplers, "squad": draw_squad}


def main(argv: list[str]) -> None:
    folders = [arg for arg in argv if not arg.startswith("--")]
    cfg = configure(PlotConfig, [arg for arg in argv if arg.startswith("--")])
    if sum(map(bool, (folders, cfg.canvas, cfg.docs))) != 1:
        raise ValueError("give one of: RUN_DIR ..., --canvas=CKPT, --docs=FOLDER")
    if folders:
        plot_runs(folders, cfg.out)
    elif cfg.canvas:
        print(plot_canvas(cfg))
    else:
        for name, draw in FIGURES.items():
            save_figure(draw(), Path(cfg.docs) / f"{name}.png")
    print(cfg.docs or cfg.out)


if __name__ == "__main__":
    run(main, PlotConfig)
