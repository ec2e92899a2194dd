"""The figures of docs/method.md, made from the code they are about and from the JSON of results/.

    python -m eval.doc_figures [--out=docs/figures]

No figure needs a checkpoint: masks and noise are what the functions return, samplers run on a stand-in network, and
what a choice is worth is read from results/study.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from configurator import configure, run
from data.tokenizer import get_tokenizer
from diffusion import corrupt, generate
from draws import draws_for
from eval.figures import CHANGED, COLOURS, INK, MARKERS, MONO, WIDTH, blue, new_figure, plain, save_figure
from model import ModelConfig, attention_mask
from samplers import SAMPLERS, SamplerConfig

BYTES = get_tokenizer("bytes")
TEXT = "neuf cent quatre-vingt-un"
P, T = 3, 4  # tokens of the prefix and of the target in the picture of masks
PATTERNS = {  # name -> prefix_attention, target_attention
    "GPT": ("causal", "causal"),
    "prefix LM": ("bidirectional", "causal"),
    "AR2Diff (joint)": ("joint", "bidirectional"),
    "frozen prefix": ("bidirectional", "bidirectional"),
    "AR-readable prompt": ("causal", "bidirectional"),
}


@dataclass
class FiguresConfig:
    out: str = "docs/figures"
    results: str = "results"


def pattern(prefix_attention: str, target_attention: str) -> Tensor:
    """(P + T, P + T) bool: which token (row) sees which (column), as Transformer.encode and decode ask for it."""

    def mask(kind: str, past: int, new: int) -> Tensor:
        real = torch.ones(1, past + new, dtype=torch.bool)
        return attention_mask(kind, real[:, :past], real[:, past:])[0, 0]  # (new, past + new)

    if prefix_attention == "joint":
        return mask(target_attention, 0, P + T)
    return torch.cat([F.pad(mask(prefix_attention, 0, P), (0, T)), mask(target_attention, P, T)])


def draw_masks(cfg: FiguresConfig):
    """Five patterns, two settings: a dark cell is a key that the row may read."""
    figure = new_figure(WIDTH, 3.0)
    for panel, (name, settings) in zip(figure.subplots(1, len(PATTERNS)), PATTERNS.items()):
        seen = pattern(*settings)
        for row in range(P + T):
            for column in range(P + T):
                colour = COLOURS[0] if row >= P else COLOURS[5]
                face = colour if seen[row, column] else "#EEEEEE"
                panel.add_patch(_box(column, row, facecolor=face, edgecolor="white", lw=1.5))
        names = ["p"] * P + ["t"] * T
        panel.set(
            xlim=(0, P + T), ylim=(P + T, 0), aspect="equal", xlabel=f"prefix {settings[0]}\ntarget {settings[1]}"
        )
        panel.set_xticks([k + 0.5 for k in range(P + T)], names)
        panel.set_yticks([k + 0.5 for k in range(P + T)], names)
        panel.tick_params(length=0, colors=INK)
        panel.spines[:].set_visible(False)
        panel.set_title(name, fontsize=11, color=INK)
    return figure


def draw_noise(cfg: FiguresConfig):
    """One text at rising corruption rates, uniform and mask noise; the draws of a slot are the same in each row."""
    rates, figure = [0.0, 0.25, 0.5, 0.75, 1.0], new_figure(WIDTH, 3.4)
    target = torch.tensor([[BYTES.sep_id, *BYTES.encode(TEXT)]])
    for panel, noise in zip(figure.subplots(1, 2), ("uniform", "mask")):
        m = ModelConfig(paradigm="diffusion", target_attention="bidirectional", noise=noise)
        for row, rate in enumerate(rates):
            noisy = corrupt(target, torch.tensor([[rate]]), m, draws_for(6, torch.zeros(1).long()))[0, 1:]
            for slot, (token, clean) in enumerate(zip(noisy.tolist(), target[0, 1:].tolist())):
                changed = token != clean
                letter = (
                    chr(token) if 32 < token < 127 else "▁" if token == BYTES.mask_id else " " if token == 32 else "·"
                )
                panel.add_patch(_box(slot, row, facecolor="#FCE3D4" if changed else "#E6F0F7", edgecolor="white"))
                look = dict(family=MONO, fontsize=10, ha="center", va="center", parse_math=False)
                panel.text(slot + 0.5, row + 0.5, letter, color=CHANGED if changed else INK, **look)
        panel.set(xlim=(0, len(TEXT)), ylim=(len(rates), 0), ylabel="corruption rate", title=f"{noise} noise")
        panel.set_xticks([])
        panel.set_yticks([k + 0.5 for k in range(len(rates))], [f"{rate:g}" for rate in rates])
        panel.tick_params(length=0, colors=INK)
        panel.spines[:].set_visible(False)
    return figure


class StandIn:
    """A network that is the surer of a slot's letter the more of its neighbours stand right, in the place of a model.

    Some letters are hard: with fewer than two neighbours that are right it takes another one for likelier. It has
    what denoise asks of a model: cfg, encode, decode, and a cache, which is itself.
    """

    def __init__(self):
        self.cfg = ModelConfig(
            paradigm="diffusion",
            prefix_attention="bidirectional",
            target_attention="bidirectional",
            block_size=len(TEXT) + 2,
            target_length=len(TEXT) + 1,
        )
        self.text = torch.tensor(BYTES.encode(TEXT))  # (S,)
        self.ease = draws_for(2, torch.zeros(1).long()).uniform(0, len(TEXT))[0][0]  # (S,) some letters are easier

    def encode(self, prefix, room=0):
        return self

    def rows(self, index):
        return self

    def decode(self, cache, target, estimate=None):
        right = (target[:, 1:] == self.text).float()  # (R, S)
        near = F.avg_pool1d(right[:, None], 5, stride=1, padding=2)[:, 0] * 5 - right
        strength = 3.5 + 2.5 * self.ease + 1.5 * near + right  # logit of the letter above all others
        misled = (self.ease < 0.6) & (near < 2)
        logits = strength[..., None] * F.one_hot(torch.where(misled, self.text + 1, self.text), self.cfg.vocab_size)
        return F.pad(logits, (0, 0, 1, 0))  # the separator's slot is not read


def draw_samplers(cfg: FiguresConfig):
    """Each sampler on the stand-in network, a row a step: what is right, what has changed."""
    steps, figure = 8, new_figure(WIDTH, 4.6)
    for panel, name in zip(figure.subplots(2, 2).flat, SAMPLERS):
        model, rows = StandIn(), []
        sampler = SamplerConfig(sampler=name, steps=steps, candidates=1, settle_entropy=0.0, entropy_bound=1.5)
        if name in ("resample", "argmax_unrolled"):
            sampler.update_fraction = 0.5
        generate(
            model, torch.zeros(1, 1).long(), sampler, 3, on_step=lambda k, canvas, *_, rows=rows: rows.append(canvas[0])
        )
        for step, canvas in enumerate(rows):
            for slot, token in enumerate(canvas.tolist()):
                right, moved = token == model.text[slot], step and token != rows[step - 1][slot]
                inset = 0.08 if moved else 0.0
                look = dict(
                    facecolor=blue(0.75) if right else "#EEEEEE", edgecolor=CHANGED if moved else "white", lw=1.3
                )
                panel.add_patch(_box(slot, step, inset, **look))
        panel.set(xlim=(0, len(TEXT)), ylim=(steps + 1, 0), ylabel="step")
        panel.set_xticks([k + 0.5 for k in range(len(TEXT))], TEXT, family=MONO, fontsize=9)
        panel.set_yticks([k + 0.5 for k in range(0, steps + 1, 2)], range(0, steps + 1, 2))
        panel.tick_params(length=0, colors=INK)
        panel.spines[:].set_visible(False)
        share = f", update_fraction {sampler.update_fraction}" if sampler.update_fraction < 1 else ""
        panel.set_title(f"{name}{share}", loc="left", fontsize=11, color=INK)
    return figure


def read(cfg: FiguresConfig, name: str, metric: str) -> list[float]:
    """The metric of the seeds of a row of results/study."""
    paths = sorted((Path(cfg.results) / "study").glob(f"{name}.json"))
    if not paths:
        raise ValueError(f"{cfg.results}/study: no {name}.json; the figures of docs/ read what runs.study wrote")
    return [json.loads(path.read_text(encoding="utf-8"))[metric] for path in paths]


def bars(cfg: FiguresConfig, rows: dict[str, tuple[str, str]], title: str, height: float = 2.6):
    """Rows as bars, the mean over seeds, and each seed as a point. rows: label -> (file pattern, metric)."""
    figure = new_figure(WIDTH * 0.75, height)
    panel = figure.subplots()
    for place, (name, metric) in enumerate(rows.values()):
        values = read(cfg, name, metric)
        panel.barh(place, statistics.mean(values), color=COLOURS[5], height=0.6)
        panel.plot(values, [place] * len(values), ls="", marker=MARKERS[0], color=COLOURS[0], ms=6)
        said = f"{statistics.mean(values):.1%}, {len(values)} seed{'s' * (len(values) > 1)}"
        panel.text(1.02, place, said, va="center", fontsize=9, color=INK)
    panel.set(xlim=(0, 1.25), ylim=(len(rows) - 0.5, -0.5))
    panel.set_xticks([k / 5 for k in range(6)], [f"{k / 5:.0%}" for k in range(6)])
    panel.set_yticks(range(len(rows)), list(rows))
    panel.set_title(title, loc="left", fontsize=11, color=INK)
    plain(panel)
    panel.grid(axis="y", visible=False)
    return figure


def draw_unroll(cfg: FiguresConfig):
    em = "exact_match"
    rows = {
        "L(1) alone": ("tried_[12]_mini_translation_one_pass__l_1__alone", em),
        "L(1) + L(2), argmax between": ("tried_[12]_mini_translation_no_self_conditioning", em),
        "L(1) + L(2), argmax, self-conditioning": ("tried_[12]_mini_translation_mask_opened_at_once", em),
        "L(1) + L(2), a sample (SUNDAE), self-conditioning": (
            "tried_[12]_mini_translation_unroll_by_sampling__sundae",
            em,
        ),
    }
    return bars(cfg, rows, "The second pass: exact match, mini translation (results/study/tried_*)")


def draw_self_conditioning(cfg: FiguresConfig):
    rows = {}
    for task, metric in (("mini_translation", "exact_match"), ("mini_code", "pass@1")):
        rows[f"{task}, with"] = (f"mini_?_{task}_ar2diff_n", metric)
        rows[f"{task}, without"] = (f"mini_?_{task}_ar2diff_n__no_self_conditioning", metric)
    return bars(cfg, rows, "Self-conditioning in AR2Diff_N (results/study/mini_*)")


def draw_conversion(cfg: FiguresConfig):
    em = "exact_match"
    rows = {
        "diffusion from scratch, N steps": ("mini_?_mini_translation_diffusion__n_steps", em),
        "AR2Diff_0: converted, not adapted": ("mini_?_mini_translation_ar2diff_0", em),
        "AR2Diff_N": ("mini_?_mini_translation_ar2diff_n", em),
        "AR2Diff_2N": ("mini_?_mini_translation_ar2diff_2n", em),
        "shift (mask opened at once)": ("tried_[12]_mini_translation_mask_opened_at_once", em),
        "no shift": ("tried_[12]_mini_translation_no_shift__own_position", em),
    }
    return bars(cfg, rows, "Conversion: exact match, mini translation (results/study)", 3.4)


def _box(x: float, y: float, inset: float = 0.0, **look):
    from matplotlib.patches import Rectangle

    return Rectangle((x + inset, y + inset), 1 - 2 * inset, 1 - 2 * inset, **look)


FIGURES = {
    "mask": draw_masks,
    "noise": draw_noise,
    "unroll": draw_unroll,
    "self_conditioning": draw_self_conditioning,
    "samplers": draw_samplers,
    "conversion": draw_conversion,
}


def main(argv: list[str]) -> None:
    """Draw all figures into the folder."""
    cfg = configure(FiguresConfig, argv)
    for name, draw in FIGURES.items():
        path = Path(cfg.out) / f"{name}.png"
        save_figure(draw(cfg), path)
        print(path)


if __name__ == "__main__":
    run(main)
