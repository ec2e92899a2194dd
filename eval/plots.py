"""Draw the pictures: training curves, a moving canvas, quality, speed, the figures of the docs.

    python -m eval.plots RUN_DIR [RUN_DIR ...] --out=out/loss.png
    python -m eval.plots --canvas=CKPT --prompt="fr nine hundred eighty-one" --out=out/canvas.svg
    python -m eval.plots --speed=results/speed.jsonl --out=results/speed.png
    python -m eval.plots --docs=docs/figures      # of the masks, the noise, the samplers

The canvas takes the settings of the sampler, such as --steps=5. All others need matplotlib.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from xml.sax.saxutils import escape

import torch
from torch import Tensor
from torch.nn import functional as F

from configurator import configure, group, run, setting, validate
from data.tokenizer import get_tokenizer
from diffusion import SAMPLERS, SamplerConfig, corrupt, generate
from infra.checkpoint import load, load_model, write_atomically
from infra.rng import make_rng
from model import ModelConfig, attention_mask
from view.cells import NEWLINE, PAD, UNPRINTABLE, spans
from view.record import Frame, Recorder

# Okabe and Ito 2008: colours that colour-blind readers can tell apart, without the yellow.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#56B4E9"]
BLUE, ORANGE, *_, LIGHT_BLUE = COLOURS
LINES = ["-", "--", ":", "-."]
MARKERS = "osD^vPX"
INK = "#222222"
GREY = "#EEEEEE"
WIDTH = 11.5  # inches; at 100 dots per inch as wide as a README


@dataclass
class PlotConfig:
    sampler: SamplerConfig = group(SamplerConfig)
    canvas: str = setting("", "diffusion checkpoint: draw how it writes a text", path=True)
    prompt: str = setting("", "of the canvas")
    speed: str = setting("", "file of eval.speed: draw seconds by length", path=True)
    docs: str = setting("", "folder: draw the figures of docs/method.md", path=True)
    out: str = setting("out/loss.png", "picture", path=True)
    seed: int = setting(1337, "of the canvas", minimum=0)

    def __post_init__(self):
        validate(self)


def new_figure(width: float, height: float):
    """Return an empty figure, sized in inches. It needs no window and no pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")


def save_figure(figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))


def style(panel, title: str) -> None:
    """Remove the box, add pale lines and a title."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#DDDDDD", lw=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK, labelsize=10)
    panel.set_title(title, loc="left", fontsize=11, color=INK)


def label_lengths(panel, ticks: list) -> None:
    """Label a logarithmic x axis at these places only."""
    panel.set(xscale="log")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xticks([], minor=True)


# Training curves, from the logs of runs

QUANTITIES = [  # key in the log, panel, look of its line
    ("loss", "loss", {"lw": 0.8, "alpha": 0.3}),
    ("val_loss", "loss", {"lw": 2.2}),
    ("val_ar_loss", "AR loss of a diffusion model", {}),
    ("grad_norm", "gradient norm before clipping", {"lw": 1.0}),
    ("tokens_per_s", "tokens per second", {}),
]


def plot_runs(folders: list[str], path: str | Path) -> None:
    """Draw what the logs of the folders contain, each run in its own colour."""
    paths = [Path(folder).resolve() for folder in folders]
    unique = len({folder.name for folder in paths}) == len(paths)
    panels: dict[str, list] = {}
    for i, folder in enumerate(paths):
        name = folder.name if unique else f"{folder.parent.name}/{folder.name}"
        look = {"color": COLOURS[i % 6], "ls": LINES[i // 6 % 4]}
        for panel, label, points, own_look in curves(*read_run(folder)):
            label = f"{name}, {label}"
            panels.setdefault(panel, []).append((points, look | own_look | {"label": label}))
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(WIDTH, 4.6 if rows == 1 else 3.4 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (title, drawn) in zip(axes, panels.items()):
        for points, look in drawn:
            axis.plot(*zip(*points), **look)
        axis.set(xlabel="step", yscale="linear" if title == "tokens per second" else "log")
        style(axis, title)
        axis.legend(fontsize=8, framealpha=0.85, edgecolor="white")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    save_figure(figure, path)


def curves(paradigm: str, entries: list[dict]) -> Iterator[tuple[str, str, list, dict]]:
    """Yield (panel, label, points, look) for each quantity that the log contains."""
    for key, panel, look in QUANTITIES:
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if panel == "loss":
            panel = "AR loss" if paradigm == "ar" else "diffusion loss (not comparable with AR)"
        if points:
            yield panel, key, points, look
    by_rate: dict[str, list] = {}
    for entry in entries:
        for rate, loss in entry.get("val_loss_by_rate", {}).items():
            by_rate.setdefault(rate, []).append((entry["step"], loss))
    for rate, points in by_rate.items():
        yield "validation L(1) by corruption rate", rate, points, {"alpha": 0.3 + 0.6 * float(rate)}
    means: list[float] = []
    terms: list[list] = [[] for _ in entries[0].get("terms", [])]
    for entry in entries if len(terms) > 1 else []:  # smoothed: single batches are noisy
        means = [m + (t - m) / 20 for m, t in zip(means or entry["terms"], entry["terms"])]
        for k, mean in enumerate(means):
            terms[k].append((entry["step"], mean))
    for k, points in enumerate(terms if len(terms) > 1 else []):
        yield "terms of the training loss", f"L({k + 1})", points, {"alpha": 0.4 + 0.3 * min(k, 2)}


def read_run(folder: Path) -> tuple[str, list[dict]]:
    """Return the paradigm of a run and the entries of its log."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the out_dir of a training")
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:  # the last line of a running training may be incomplete
            break
    if not entries:
        raise ValueError(f"{path} is empty: the run has not finished a step")
    if any("val_loss" in entry for entry in entries):
        by_rate = any("val_loss_by_rate" in entry for entry in entries)
        return "diffusion" if by_rate else "ar", entries
    return load(folder / "ckpt.pt")["model_config"]["paradigm"], entries


# Quality and speed


def plot_quality(data: dict, path: str | Path) -> None:
    """Draw a share against network calls: a line for each series, a star for the AR model.

    data: {"title", "metric", "series": [{"name", "points": [point]}], "ar": point}. A point is
    {"calls", "value", "interval": [low, high]}.
    """
    figure = new_figure(WIDTH * 0.75, 5.2)
    panel = figure.subplots()
    for i, series in enumerate(data["series"]):
        points = sorted(series["points"], key=lambda point: point["calls"])
        calls = [point["calls"] for point in points]
        below = [max(0.0, p["value"] - p["interval"][0]) for p in points]
        above = [max(0.0, p["interval"][1] - p["value"]) for p in points]
        look = {"color": COLOURS[i % 6], "marker": MARKERS[i % 7], "label": series["name"]}
        values = [point["value"] for point in points]
        panel.errorbar(calls, values, yerr=[below, above], capsize=3, lw=2, **look)
    ar = data["ar"]
    label = f"autoregressive ({ar['calls']:g} calls)"
    panel.axhline(ar["value"], color="black", ls="--", label=label)
    panel.axhspan(*ar["interval"], color="black", alpha=0.08, lw=0)
    panel.plot([ar["calls"]], [ar["value"]], "k*", ms=13)
    panel.set(ylim=(-0.03, 1.03), xlabel="network calls", ylabel=data["metric"])
    label_lengths(panel, sorted({p["calls"] for one in data["series"] for p in one["points"]}))
    panel.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    style(panel, data["title"])
    panel.legend(frameon=False)
    save_figure(figure, path)


# Section 4.7 and Figure 3 of AR2Diff (arXiv 2401.17181): 14 ms per AR token, 179 ms per step at
# 4,000 tokens, and 10 steps ten times as fast as AR at 500. Hardware and batch size are not given.
PAPER_SECONDS = {
    "AR": {500: 7.0, 4000: 56.0},
    "cached prefix, 10 steps": {500: 0.7, 4000: 1.79},
    "cached prefix, 20 steps": {4000: 3.58},
    "cached prefix, 50 steps": {4000: 8.95},
}


def plot_speed(lines: list[dict], path: str | Path) -> None:
    """Draw seconds by length: the faster of the plain and the compiled form, next to the paper."""
    from statistics import median

    from eval.speed import faster_forms

    panels: dict[str, dict[str, dict[int, float]]] = {}
    for line in lines:
        if line["what"] == "decode":
            panel = panels.setdefault("{dtype}, batch {batch}".format(**line["case"]), {})
            for name, entry in faster_forms(line["systems"]).items():
                seconds = median(entry["seconds"])
                panel.setdefault(name, {})[line["case"]["length"]] = seconds
    if not panels:
        raise ValueError("no decoding speeds in the file: run eval.speed --what=decode")
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(WIDTH, 4.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flat
    for panel, (title, systems) in zip(axes, sorted(panels.items())):
        for i, (name, paper) in enumerate(PAPER_SECONDS.items()):
            look = {"color": COLOURS[i], "marker": MARKERS[i]}
            points = sorted(systems.get(name, {}).items())
            if points:
                panel.plot(*zip(*points), lw=2, label=name, **look)
            panel.plot(paper.keys(), paper.values(), ls=":", mfc="white", **look)
        panel.plot([], [], ":o", color="grey", mfc="white", label="the paper's Figure 3")
        panel.set(yscale="log", xlabel="tokens", ylabel="seconds")
        label_lengths(panel, sorted({n for points in systems.values() for n in points}))
        style(panel, title)
        panel.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


# One canvas, a frame per step

PER_LINE, MAX_LINES = 40, 8  # positions per line, lines
CELL, HEIGHT, EDGE, TOP = 21, 30, 14, 64  # pixels: a cell, around everything, above the canvas
STEP_SECONDS, HOLD_SECONDS = 0.7, 3.0  # of a frame, of the last frame
LEGEND = f"blue: probability; orange: changed in this step; {PAD} pad: no text"


def plot_canvas(cfg: PlotConfig) -> str:
    """Draw how one canvas becomes text. Return the text."""
    if not cfg.out.endswith(".svg"):
        raise ValueError(f"--out of a canvas must end with .svg, got {cfg.out}")
    if not cfg.prompt or cfg.sampler.candidates != 1:
        raise ValueError("a canvas needs --prompt=TEXT and --candidates=1")
    model, tokenizer, _ = load_model(cfg.canvas)
    if model.cfg.paradigm != "diffusion":
        raise ValueError(f"a canvas needs a diffusion checkpoint; {cfg.canvas} is an AR model")
    prompt = torch.tensor([tokenizer.encode_prompt(cfg.prompt)])
    with Recorder(model.cfg.pad_id, growing=False, candidates=1) as recorder:
        out = generate(model, prompt, cfg.sampler, cfg.seed, on_step=recorder)
    frames = list(recorder.frames(out.tokens[0]))
    ids = [token for token in out.tokens[0].tolist() if token != model.cfg.pad_id]
    text = tokenizer.decode(ids)
    title = f"{cfg.prompt} → {text}   {int(out.calls[0])} network calls"
    svg = animate_canvas(frames, tokenizer, title).encode()
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cfg.out, lambda file: file.write(svg))
    return text


def animate_canvas(frames: list[Frame], tokenizer, title: str) -> str:
    """Return an SVG that shows a frame per step. It uses CSS only, which GitHub allows.

    If nothing may move (print, reduced motion), it shows the last frame.
    """
    total = len(frames[0].ids)
    length = min(total, PER_LINE * MAX_LINES)
    width = 2 * EDGE + CELL * max(min(length, PER_LINE), 24)
    height = TOP + HEIGHT * math.ceil(length / PER_LINE) + 30 + EDGE
    period = (len(frames) - 1) * STEP_SECONDS + HOLD_SECONDS
    groups = []
    delays = []
    before = frames[0].ids
    for k, frame in enumerate(frames):
        groups.append(svg_frame(k, frame, before, tokenizer, length))
        delays.append(f"#f{k} {{ animation-delay: {k * STEP_SECONDS - period:.6g}s; }}")
        before = frame.ids
    cut = f"the first {length} of {total} positions; " if length < total else ""
    shown = "{ visibility: visible; }"
    hidden = "{ visibility: hidden; }"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"
  width="{width}" height="{height}">
<title>{svg_text(title)}</title>
<style>
text {{ font: 15px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: {INK}; }}
.c {{ text-anchor: middle; }} .s {{ font-size: 13px; }}
.n {{ stroke: {ORANGE}; stroke-width: 2; }}
.f {hidden} .f:last-of-type {shown}
@media (prefers-reduced-motion: no-preference) {{
.f {{ animation: step {period:g}s step-end infinite; }} .f:last-of-type {{ animation-name: last; }}
{" ".join(delays[1:])}
}}
@keyframes step {{ 0% {shown} {100 * STEP_SECONDS / period:.6g}%, 100% {hidden} }}
@keyframes last {{ 0% {shown} {100 * HOLD_SECONDS / period:.6g}%, 100% {hidden} }}
</style>
<rect width="{width}" height="{height}" rx="8" fill="#FAFAFA" stroke="#BBBBBB"/>
<text x="{EDGE}" y="27">{svg_text(title)}</text>
{"".join(groups)}
<text class="s" x="{EDGE}" y="{height - EDGE - 4}">{cut}{LEGEND}</text>
</svg>
"""


def svg_frame(k: int, frame: Frame, before: Tensor, tokenizer, length: int) -> str:
    """Return the group of frame k: its name and its cells."""
    name = "noise" if k == 0 else frame.name if frame.name == "answer" else f"step {frame.name}"
    parts = [f'<g class="f" id="f{k}"><text class="s" x="{EDGE}" y="50">{name}</text>']
    for text, start, end in spans(frame.ids[:length].tolist(), tokenizer):
        line, column = divmod(start, PER_LINE)
        x = EDGE + column * CELL
        y = TOP + line * HEIGHT
        # A cell of several positions is cut at the end of the line.
        wide = min(end - start, PER_LINE - column) * CELL
        probability = float(frame.table[start:end, 1].min())
        colour = "#7D909C" if text == PAD else "white" if probability > 0.75 else INK
        changed = not torch.equal(frame.ids[start:end], before[start:end])
        new = ' class="n"' if changed else ""
        box = f'x="{x + 1}" y="{y + 1}" width="{wide - 2}" height="{HEIGHT - 2}"'
        parts.append(f'<rect{new} {box} fill="{blue(probability)}"/>')
        place = f'x="{x + wide / 2:g}" y="{y + 20}" style="fill: {colour}"'
        parts.append(f'<text class="c" {place}>{svg_text(text)}</text>')
    return "\n".join([*parts, "</g>\n"])


def blue(probability: float) -> str:
    """Return white for 0, blue for 1, grey for a probability that is not known."""
    if not probability >= 0:
        return GREY
    channels = [int(BLUE[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - probability * (255 - c)):02X}" for c in channels)


def svg_text(text: str) -> str:
    """Return the text as XML: spaces that stay, no character that cannot be printed."""
    text = text.replace("\n", NEWLINE)
    text = "".join(c if c.isprintable() else UNPRINTABLE for c in text)
    return escape(text.replace(" ", "\N{NO-BREAK SPACE}"))


# The figures of docs/method.md

BYTES = get_tokenizer("bytes")
TEXT = "neuf cent quatre-vingt-un"
SIZES = {"block_size": len(TEXT) + 2, "target_length": len(TEXT) + 1}
DIFFUSION = ModelConfig(paradigm="diffusion", target_attention="bidirectional", **SIZES)
PATTERNS = {  # name -> prefix_attention, target_attention
    "GPT": ("causal", "causal"),
    "prefix LM": ("bidirectional", "causal"),
    "AR2Diff (full attention)": ("joint", "bidirectional"),
    "cached prefix": ("bidirectional", "bidirectional"),
    "AR-readable prompt": ("causal", "bidirectional"),
}


def style_grid(panel, columns, rows) -> None:
    """Prepare a panel for cells. columns, rows: their labels."""
    panel.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    panel.set_xticks([k + 0.5 for k in range(len(columns))], columns)
    panel.set_yticks([k + 0.5 for k in range(len(rows))], rows)
    panel.tick_params(length=0, colors=INK)
    panel.spines[:].set_visible(False)


def draw_cell(panel, x: int, y: int, fill: str, edge: str = "white", text: str = "") -> None:
    from matplotlib.patches import Rectangle

    inset = 0.05  # so that neighbouring frames do not overlap
    size = 1 - 2 * inset
    box = {"facecolor": fill, "edgecolor": edge, "lw": 1.3}
    panel.add_patch(Rectangle((x + inset, y + inset), size, size, **box))
    font = {"family": "DejaVu Sans Mono", "ha": "center", "va": "center_baseline"}
    panel.text(x + 0.5, y + 0.5, text, color=INK, parse_math=False, **font)


def mask_pattern(prefix_attention: str, target_attention: str, P: int, T: int) -> Tensor:
    """Return (P + T, P + T) bool: which token (row) sees which (column)."""

    def mask(kind: str, past: int, new: int) -> Tensor:
        valid = torch.ones(1, past + new, dtype=torch.bool)
        return attention_mask(kind, valid[:, :past], valid[:, past:])[0, 0]  # (new, past + new)

    if prefix_attention == "joint":
        return mask(target_attention, 0, P + T)
    prefix = F.pad(mask(prefix_attention, 0, P), (0, T))
    return torch.cat([prefix, mask(target_attention, P, T)])


def draw_masks():
    """Five patterns from two settings. A dark cell is a key that the row may read."""
    figure = new_figure(WIDTH, 3.0)
    P, T = 3, 4  # tokens of prefix and target
    tokens = ["p"] * P + ["t"] * T
    for panel, (name, settings) in zip(figure.subplots(1, len(PATTERNS)), PATTERNS.items()):
        style_grid(panel, tokens, tokens)
        visible = mask_pattern(*settings, P, T)
        for y, x in itertools.product(range(P + T), repeat=2):
            colour = LIGHT_BLUE if y < P else BLUE
            draw_cell(panel, x, y, colour if visible[y, x] else GREY)
        panel.set(aspect="equal", xlabel="prefix {}\ntarget {}".format(*settings))
        panel.set_title(name, fontsize=11, color=INK)
    return figure


def draw_noise():
    """One text at rising corruption rates, with uniform noise and with mask noise."""
    rates = [0.0, 0.25, 0.5, 0.75, 1.0]
    figure = new_figure(WIDTH, 3.4)
    target = torch.tensor([[BYTES.sep_id, *BYTES.encode(TEXT)]])
    rng = make_rng(6, torch.zeros(1, dtype=torch.long))
    for panel, noise in zip(figure.subplots(1, 2), ("uniform", "mask")):
        style_grid(panel, [""] * len(TEXT), rates)
        for y, rate in enumerate(rates):
            noisy = corrupt(target, torch.tensor([[rate]]), replace(DIFFUSION, noise=noise), rng)
            for x, token in enumerate(noisy[0, 1:].tolist()):
                text = chr(token) if 31 < token < 127 else UNPRINTABLE
                text = "_" if token == BYTES.mask_id else text
                changed = token != target[0, x + 1]
                draw_cell(panel, x, y, "#FCE3D4" if changed else "#E6F0F7", text=text)
        panel.set(ylabel="corruption rate", title=f"{noise} noise")
    return figure


class ToyNetwork:
    """Takes the place of a model: the more neighbours of a letter are right, the surer it is.

    Some letters are hard: with fewer than two right neighbours another letter is more likely.
    """

    def __init__(self):
        self.cfg = DIFFUSION
        self.text = torch.tensor(BYTES.encode(TEXT))  # (S,)
        rng = make_rng(2, torch.zeros(1, dtype=torch.long))
        self.ease = rng.uniform(0, len(TEXT))[0][0]  # (S,)

    def encode(self, prefix, reserve=0):
        return None

    def decode(self, cache, target, self_cond=None):
        right = (target[:, 1:] == self.text).float()  # (R, S)
        near = F.avg_pool1d(right[:, None], 5, stride=1, padding=2)[:, 0] * 5 - right
        strength = 3.5 + 2.5 * self.ease + 1.5 * near + right  # logit of the favourite letter
        misled = (self.ease < 0.6) & (near < 2)
        favourite = torch.where(misled, self.text + 1, self.text)
        logits = strength[..., None] * F.one_hot(favourite, self.cfg.vocab_size)
        return F.pad(logits, (0, 0, 1, 0))  # slot 0 is not predicted


def draw_samplers():
    """Each sampler on the toy network, a row per step: blue is right, orange has changed."""
    steps = 8
    figure = new_figure(WIDTH, 4.6)
    prompt = torch.zeros(1, 1, dtype=torch.long)
    network = ToyNetwork()
    for panel, name in zip(figure.subplots(2, 2).flat, SAMPLERS):
        fraction = 0.5 if name in ("resample", "argmax_unrolled") else 1.0
        settings = {"update_fraction": fraction, "stop_entropy": 0.0, "entropy_bound": 1.5}
        sampler = SamplerConfig(sampler=name, steps=steps, **settings)
        with Recorder(BYTES.pad_id, growing=False, candidates=1) as recorder:
            out = generate(network, prompt, sampler, 3, on_step=recorder)
        canvases = [frame.ids for frame in recorder.frames(out.tokens[0])][: steps + 1]
        style_grid(panel, TEXT, range(steps + 1))
        for y, canvas in enumerate(canvases):
            changed = canvas != canvases[max(y - 1, 0)]
            for x in range(len(TEXT)):
                fill = blue(0.75) if canvas[x] == network.text[x] else GREY
                draw_cell(panel, x, y, fill, ORANGE if changed[x] else "white")
        panel.set_ylabel("step")
        note = f", update_fraction {fraction}" if fraction < 1 else ""
        panel.set_title(f"{name}{note}", loc="left", fontsize=11, color=INK)
    return figure


FIGURES = {"mask": draw_masks, "noise": draw_noise, "samplers": draw_samplers}


def main(argv: list[str]) -> None:
    folders = [arg for arg in argv if not arg.startswith("--")]
    cfg = configure(PlotConfig, [arg for arg in argv if arg.startswith("--")])
    if sum(map(bool, (folders, cfg.canvas, cfg.speed, cfg.docs))) != 1:
        raise ValueError("give one of: RUN_DIR ..., --canvas=CKPT, --speed=FILE, --docs=FOLDER")
    if folders:
        plot_runs(folders, cfg.out)
    elif cfg.canvas:
        print(plot_canvas(cfg))
    elif cfg.speed:
        lines = Path(cfg.speed).read_text(encoding="utf-8").splitlines()
        plot_speed([json.loads(line) for line in lines], cfg.out)
    else:
        for name, draw in FIGURES.items():
            save_figure(draw(), Path(cfg.docs) / f"{name}.png")
    print(cfg.docs or cfg.out)


if __name__ == "__main__":
    run(main, PlotConfig)
