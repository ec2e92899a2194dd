"""Pictures: what is in them, and what is refused."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from eval_models import BYTES, JOINT, save_model

pytest.importorskip("matplotlib")

import diffusion  # noqa: E402
from eval import plots  # noqa: E402
from infra.checkpoint import load_model  # noqa: E402
from model import attention_mask  # noqa: E402
from view.cells import spans  # noqa: E402
from view.record import UNKNOWN, Frame  # noqa: E402

ROOT = Path(__file__).parent.parent
SIZES = {"block_size": 24, "target_length": 12}
SVG = "{http://www.w3.org/2000/svg}"

# matplotlib warns if a character is missing in its font or if something does not fit
pytestmark = pytest.mark.filterwarnings("error")


def test_the_curves_are_those_of_the_logs(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    entries = [{"step": step, "loss": 1 / step} for step in range(1, 7)]
    entries[2] |= {"val_loss": 0.5}
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 7, "loss": 1}')  # incomplete
    plots.plot_runs([tmp_path], "loss.png")
    lines = {line.get_label(): line.get_data() for line in figures[0].axes[0].get_lines()}
    assert [list(zip(*data)) for data in lines.values()] == [
        [(step, 1 / step) for step in range(1, 7)],
        [(3, 0.5)],
    ]
    assert list(lines) == [f"{tmp_path.name}, loss", f"{tmp_path.name}, val_loss"]


# The canvas


def frames_of(svg: str) -> list[list[str]]:
    """The texts of each frame's cells, in order."""
    groups = [g for g in ElementTree.fromstring(svg) if g.tag == f"{SVG}g"]
    return [[t.text for t in g if t.get("class") == "c"] for g in groups]


@pytest.mark.parametrize(
    "settings", [{"steps": 4, "temperature": 1.0}, {"steps": 3, "sampler": "entropy_bound"}]
)
def test_a_canvas_has_a_frame_per_step_and_shows_what_generate_writes(settings, tmp_path):
    path = tmp_path / "d.pt"
    save_model(path, **SIZES, **JOINT)
    out = tmp_path / "new" / "canvas.svg"
    flags = [f"--{name}={value}" for name, value in settings.items()]
    plots.main([f"--canvas={path}", "--prompt=a<&", f"--out={out}", *flags])
    seen = []

    def keep(step, canvas, logits, rows):
        seen.append(canvas[0].tolist())

    prompt = torch.tensor([BYTES.encode("a<&")])
    sampler = diffusion.SamplerConfig(**settings)
    made = diffusion.generate(load_model(path)[0], prompt, sampler, plots.SEED, on_step=keep)
    ids = made.tokens[0].tolist()
    seen += [ids] if ids != seen[-1] else []  # entropy_bound returns the argmax
    expected = [[text.replace("\n", "↵") for text, _, _ in spans(one, BYTES)] for one in seen]
    assert frames_of(out.read_text(encoding="utf-8")) == expected


def test_cells_show_what_changed_and_how_probable_it_is():
    """The two bytes of é share a cell, as probable as the less probable one."""

    def frame(name, ids, probabilities):
        return Frame(name, 1, 0.0, torch.tensor(list(zip(ids, probabilities))).double())

    end = [*BYTES.encode("é"), BYTES.pad_id]
    before = frame("0", [97, 1, *end], [UNKNOWN] * 5)
    after = frame("1", [97, 60, *end], [1.0, 0.5, 1.0, 0.25, 0.0])
    svg = plots.animate_canvas([before, after], BYTES, "a <b> & \x1b'c'")
    assert frames_of(svg) == [["a", "·", "é", "░"], ["a", "<", "é", "░"]]
    root = ElementTree.fromstring(svg)
    assert root[0].text == "a <b> & ·'c'"
    first, second = ([r for r in g if r.tag == f"{SVG}rect"] for g in root.findall(f"{SVG}g"))
    assert [cell.get("class") for cell in second] == [None, "n", None, None]
    opacity = [float(cell.get("fill-opacity")) for cell in second]
    assert opacity == pytest.approx([0.6, 0.3, 0.15, 0.0])
    assert {cell.get("fill-opacity") for cell in first} == {"0"}


# The figures of the docs


def test_squad_shows_shares_and_intervals():
    (panel,) = plots.draw_squad().axes
    found = plots.read_results(ROOT / "results/real.jsonl")["real_1_squad_ar"]
    star = panel.containers[-1]
    assert list(star[0].get_data()) == [[round(found["calls_per_sample"], 1)], [found["f1"]]]
    ends = star[2][0].get_segments()[0][:, 1]
    assert list(ends) == pytest.approx(found["f1_interval"])


def test_the_figures_of_the_docs_are_drawn(tmp_path):
    plots.main([f"--docs={tmp_path}"])
    assert {path.stem for path in tmp_path.iterdir()} == set(plots.FIGURES)


def test_the_mask_patterns_are_those_of_the_docstring():
    """model.attention_mask draws them with two tokens of prefix and three of target."""
    lines = [line.split() for line in attention_mask.__doc__.splitlines()]
    rows = ["".join(line[1:]) for line in lines if line[:1] in (["p"], ["t"]) and len(line) == 6]
    assert len(rows) == 5
    for k, settings in enumerate(plots.PATTERNS.values()):
        found = plots.mask_pattern(*settings, 2, 3).tolist()
        marks = ["".join("x" if visible else "." for visible in row) for row in found]
        assert marks == [row[5 * k : 5 * k + 5] for row in rows]


@pytest.mark.parametrize(
    "flags, says",
    [
        ("", "give one of"),
        ("out/run --docs=a", "give one of"),
        ("--canvas=ar.pt --prompt=x --out=a.svg", "needs a diffusion checkpoint"),
        ("--canvas=ar.pt --prompt=x --out=a.gif", "--out=FILE.svg"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    save_model("ar.pt", **SIZES)
    with pytest.raises(ValueError, match=says):
        plots.main(flags.split())
