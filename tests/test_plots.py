"""Pictures: that they exist, how large they are, what is in them, and what is refused."""

import itertools
import json
import struct
import sys
from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import unescape

import pytest
import torch

pytest.importorskip("matplotlib")

import diffusion  # noqa: E402
from data.tokenizer import get_tokenizer  # noqa: E402
from eval import plots  # noqa: E402
from infra.checkpoint import load_model, save  # noqa: E402
from model import ModelConfig, Transformer, attention_mask  # noqa: E402
from tests.browser import Browser, find_browser  # noqa: E402
from view.cells import spans  # noqa: E402
from view.record import UNKNOWN, Frame  # noqa: E402

ROOT = Path(__file__).parent.parent
BYTES = get_tokenizer("bytes")
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 24, "target_length": 12}
DIFFUSION = {"paradigm": "diffusion", "target_attention": "bidirectional"}
POINT = {"calls": 10, "value": 0.5, "interval": [0.4, 0.6]}

# matplotlib warns if a character is missing in its font or if something does not fit
pytestmark = pytest.mark.filterwarnings("error")


def size_of(path) -> tuple[int, int]:
    """(width, height) from the header of a PNG file (RFC 2083, section 11.2.1)."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR"
    return struct.unpack(">II", head[16:24])


def a_run(folder, paradigm="ar", steps=6, last_line=""):
    folder.mkdir(parents=True)
    entries = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": 1 / step, "grad_norm": 2.0, "tokens_per_s": 100 * step}
        if paradigm == "diffusion":
            entry["terms"] = [3.0, 1.0]
        if step % 3 == 0:
            entry["val_loss"] = 0.5 / step
            if paradigm == "diffusion":
                entry["val_loss_by_rate"] = {"0.1": 0.1 / step, "0.9": 0.9 / step}
        entries.append(json.dumps(entry) + "\n")
    (folder / "log.jsonl").write_text("".join(entries) + last_line)
    return folder


def a_checkpoint(path, **settings):
    torch.manual_seed(0)
    save(path, Transformer(ModelConfig(**TINY | settings)), 0, "bytes")
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, in place of files."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def lines_of(axis) -> dict[str, list[tuple]]:
    return {line.get_label(): list(zip(*line.get_data())) for line in axis.get_lines()}


# Training curves


def test_the_curves_of_both_paradigms_have_their_own_panels(tmp_path, drawn):
    runs = [
        a_run(tmp_path / "one"),
        a_run(tmp_path / "two", "diffusion"),
        a_run(tmp_path / "three", last_line='{"step": 7, "lo'),
    ]
    plots.plot_runs(runs, tmp_path / "loss.png")
    panels = {axis.get_title(loc="left"): lines_of(axis) for axis in drawn[0].axes}
    assert len(panels) == 6
    ar = panels["AR loss"]
    assert list(ar) == ["one, loss", "one, val_loss", "three, loss", "three, val_loss"]
    assert ar["one, loss"] == [(step, 1 / step) for step in range(1, 7)]
    assert ar["three, val_loss"] == [(3, 0.5 / 3), (6, 0.5 / 6)]
    assert list(panels["diffusion loss (not comparable with AR)"]) == ["two, loss", "two, val_loss"]
    rates = panels["validation L(1) by corruption rate"]
    assert rates["two, 0.9"] == [(3, 0.3), (6, 0.15)]
    terms = panels["terms of the training loss"]
    assert terms["two, L(1)"] == [(step, pytest.approx(3.0)) for step in range(1, 7)]
    assert panels["tokens per second"]["two, tokens_per_s"][-1] == (6, 600)


def test_runs_with_the_same_name_are_called_by_their_folder(tmp_path, drawn):
    runs = [a_run(tmp_path / parent / "run") for parent in ("a", "b")]
    plots.plot_runs(runs, "loss.png")
    assert {"a/run, loss", "b/run, loss"} <= set(lines_of(drawn[0].axes[0]))


def test_the_picture_is_as_wide_as_a_readme(tmp_path, capsys):
    a_run(tmp_path / "one", steps=2)  # no validation yet: the checkpoint names the paradigm
    a_checkpoint(tmp_path / "one" / "ckpt.pt", **DIFFUSION)
    plots.main([str(tmp_path / "one"), f"--out={tmp_path / 'new' / 'loss.png'}"])
    assert size_of(tmp_path / "new" / "loss.png") == (1150, 460)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "does not exist"),
        ("", "has not finished a step"),
        ('{"step": 1', "has not finished a step"),
    ],
)
def test_logs_that_cannot_be_drawn_are_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        plots.main([str(tmp_path), f"--out={tmp_path / 'loss.png'}"])
    assert not (tmp_path / "loss.png").exists()


# The canvas

SVG = "{http://www.w3.org/2000/svg}"


def frames_of(svg: str) -> list[str]:
    """The characters of each frame, in order."""
    groups = [g for g in ElementTree.fromstring(svg) if g.tag == f"{SVG}g"]
    assert [g.get("id") for g in groups] == [f"f{k}" for k in range(len(groups))]
    return ["".join(t.text for t in g if t.get("class") == "c") for g in groups]


def a_frame(ids: list[int], probabilities: list[float]) -> Frame:
    table = torch.tensor(list(zip(ids, probabilities)), dtype=torch.double)
    return Frame("1", 1, 0.0, table)


@pytest.mark.parametrize(
    "settings", [{"steps": 4, "temperature": 1.0}, {"steps": 3, "sampler": "entropy_bound"}]
)
def test_a_canvas_has_a_frame_per_step_and_shows_what_generate_writes(settings, tmp_path, capsys):
    path = a_checkpoint(tmp_path / "d.pt", **DIFFUSION)
    out = tmp_path / "new" / "canvas.svg"
    flags = [f"--{name}={value}" for name, value in settings.items()]
    plots.main([f"--canvas={path}", "--prompt=a<&", f"--out={out}", *flags])
    seen = []

    def keep(step, canvas, logits, rows):
        seen.append(canvas[0].tolist())

    prompt = torch.tensor([BYTES.encode("a<&")])
    sampler = diffusion.SamplerConfig(**settings)
    made = diffusion.generate(load_model(path)[0], prompt, sampler, 1337, on_step=keep)
    ids = made.tokens[0].tolist()
    seen += [ids] if ids != seen[-1] else []  # entropy_bound returns the argmax
    expected = ["".join(text for text, _, _ in spans(canvas, BYTES)) for canvas in seen]
    shown = [unescape(plots.svg_text(text)) for text in expected]
    assert frames_of(out.read_text(encoding="utf-8")) == shown
    assert [path.name for path in out.parent.iterdir()] == ["canvas.svg"]


def test_cells_show_what_changed_and_how_probable_it_is():
    """The two bytes of é share a cell, as probable as the less probable one."""
    bytes_of_e = BYTES.encode("é")
    before = a_frame([97, 1, *bytes_of_e, BYTES.pad_id], [UNKNOWN] * 5)
    after = a_frame([97, 99, *bytes_of_e, BYTES.pad_id], [1.0, 0.5, 1.0, 0.25, 0.0])
    root = ElementTree.fromstring(plots.animate_canvas([before, after], BYTES, "a <b> & 'c'"))
    first, second = (g for g in root if g.tag == f"{SVG}g")
    texts = [[t.text for t in g if t.get("class") == "c"] for g in (first, second)]
    assert texts == [["a", "·", "é", "░"], ["a", "c", "é", "░"]]
    cells = [r for r in second if r.tag == f"{SVG}rect"]
    assert [cell.get("class") for cell in cells] == [None, "n", None, None]
    assert [cell.get("fill") for cell in cells] == [plots.blue(p) for p in (1.0, 0.5, 0.25, 0.0)]
    assert {r.get("fill") for r in first if r.tag == f"{SVG}rect"} == {plots.GREY}
    assert (plots.blue(0.0), plots.blue(1.0)) == ("#FFFFFF", plots.BLUE)


def test_a_large_canvas_is_cut():
    frames = [a_frame([97] * 400, [0.5] * 400)] * 2
    root = ElementTree.fromstring(plots.animate_canvas(frames, BYTES, "title"))
    assert [len(g) for g in root if g.tag == f"{SVG}g"] == [1 + 2 * 320] * 2
    assert "the first 320 of 400 positions" in "".join(root.itertext())


def test_a_browser_shows_one_frame_at_a_time():
    """At the middle of each frame. The picture in docs/ has the same form and is small."""
    browser = find_browser()
    if browser is None:
        pytest.skip("no chromium or chrome here")
    page = Browser(browser)
    picture = ROOT / "docs" / "canvas.svg"
    assert picture.stat().st_size < 100_000
    try:
        page.open(picture)
        for k in range(len(frames_of(picture.read_text(encoding="utf-8")))):
            at = 1000 * plots.STEP_SECONDS * (k + 0.5)
            seen = page.run(
                f"document.getAnimations().forEach(a => {{ a.pause(); a.currentTime = {at}; }});"
                "[...document.querySelectorAll('g')]"
                ".filter(g => getComputedStyle(g).visibility == 'visible').map(g => g.id).join()"
            )
            assert seen == f"f{k}"
    finally:
        page.close()


# Quality, speed, the figures of the docs


def test_quality_shows_shares_and_intervals(drawn):
    series = [{"name": "a", "points": [POINT | {"calls": 20}, POINT]}]
    ar = {"value": 0.9, "interval": [0.8, 0.95], "calls": 22.5}
    plots.plot_quality({"title": "t", "metric": "m", "series": series, "ar": ar}, "q.png")
    panel = drawn[0].axes[0]
    assert list(panel.get_lines()[0].get_xdata()) == [10, 20]
    low, high = panel.collections[0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.4, 0.6))
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["autoregressive (22.5 calls)", "a"]


def test_speed_shows_our_lines_and_the_points_of_the_paper(drawn):
    """The paper: 14 ms per token are 56 s for 4,000 tokens. Ours: the faster form."""

    def line(length, plain, compiled):
        systems = {"AR": {"seconds": [plain]}, "AR, compiled": {"seconds": [compiled]}}
        case = {"dtype": "float32", "batch": 1, "length": length}
        return {"what": "decode", "case": case, "systems": systems}

    plots.plot_speed([line(256, 3.0, 5.0), line(64, 2.0, 1.0)], "speed.png")
    (panel,) = drawn[0].axes
    assert panel.get_title(loc="left") == "float32, batch 1"
    assert lines_of(panel)["AR"] == [(64, 1.0), (256, 3.0)]
    assert list(zip(*panel.get_lines()[1].get_data())) == [(500, 7.0), (4000, 56.0)]
    with pytest.raises(ValueError, match="no decoding speeds"):
        plots.plot_speed([], "speed.png")


def test_the_figures_of_the_docs_are_drawn(tmp_path, capsys):
    plots.main([f"--docs={tmp_path}"])
    assert {path.stem for path in tmp_path.iterdir()} == set(plots.FIGURES)
    assert all(size_of(path)[0] == 1150 for path in tmp_path.iterdir())


def test_the_mask_patterns_are_those_of_the_docstring():
    """model.attention_mask draws them with two tokens of prefix and three of target."""
    lines = [line.split() for line in attention_mask.__doc__.splitlines()]
    rows = ["".join(line[1:]) for line in lines if line[:1] in (["p"], ["t"]) and len(line) == 26]
    assert len(rows) == 5
    for k, settings in enumerate(plots.PATTERNS.values()):
        found = plots.mask_pattern(*settings, 2, 3).tolist()
        marks = ["".join("x" if visible else "." for visible in row) for row in found]
        assert marks == [row[5 * k : 5 * k + 5] for row in rows]


# The command line


def test_what_makes_no_sense_is_refused(tmp_path):
    ar = a_checkpoint(tmp_path / "ar.pt")
    model = a_checkpoint(tmp_path / "d.pt", **DIFFUSION)
    canvas = [f"--canvas={model}", "--prompt=x", "--out=a.svg"]
    for argv, message in (
        ([], "give one of"),
        (["out/run", "--speed=a.jsonl"], "give one of"),
        (["out/run", "--titel=x"], "unknown setting"),
        ([f"--canvas={ar}", *canvas[1:]], "needs a diffusion checkpoint"),
        ([canvas[0], canvas[2]], "needs --prompt"),
        ([*canvas, "--candidates=2"], "needs --prompt=TEXT and --candidates=1"),
        ([*canvas[:2], "--out=a.gif"], "must end with .svg, got a.gif"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.main(argv)


def test_without_matplotlib_one_line_names_the_package(tmp_path, monkeypatch):
    loaded = [name for name in sys.modules if name.startswith("matplotlib")]
    for name in itertools.chain(loaded, ["matplotlib"]):
        monkeypatch.setitem(sys.modules, name, None)
    a_run(tmp_path / "one")
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plots.main([str(tmp_path / "one")])
