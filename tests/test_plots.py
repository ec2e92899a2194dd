"""Pictures: that they are there, how large they are, what is in them where that can be read, and what is refused."""

import json
import struct
import sys

import pytest
import torch

pytest.importorskip("matplotlib")

from checkpoint import save  # noqa: E402
from data.tokenizer import get_tokenizer  # noqa: E402
from eval import plots  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

BYTES = get_tokenizer("bytes")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=24, target_length=12)
DIFFUSION = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
POINT = {"steps": 10, "calls": 10, "value": 0.5, "interval": [0.4, 0.6]}
QUALITY = {"title": "t", "metric": "exact match", "series": [{"name": "a", "points": [POINT, POINT | {"calls": 20}]}]}
AR = {"ar": {"value": 0.9, "interval": [0.8, 0.95], "calls": 22.5}}

pytestmark = pytest.mark.filterwarnings("error")  # matplotlib warns of missing glyphs and of what does not fit


def size_of(path) -> tuple[int, int]:
    """(width, height) from the header of a PNG file (RFC 2083, section 11.2.1)."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR"
    return struct.unpack(">II", head[16:24])


def a_run(folder, paradigm="ar", steps=6, torn=""):
    folder.mkdir()
    lines = []
    for step in range(1, steps + 1):
        entry = {"step": step, "loss": 1 / step}
        if step % 3 == 0:
            entry["val_loss"] = 0.5 / step
            if paradigm == "diffusion":
                entry["val_loss_by_rate"] = {"0.1": 0.1 / step, "0.9": 0.9 / step}
        lines.append(json.dumps(entry))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n" + torn)
    return folder


def a_checkpoint(path, **settings):
    torch.manual_seed(0)
    save(path, Transformer(ModelConfig(**TINY | settings)), 0, "bytes")
    return path


# Losses


def test_losses_of_both_paradigms_are_drawn_on_their_own_panels(tmp_path, monkeypatch):
    runs = [
        a_run(tmp_path / "one"),
        a_run(tmp_path / "two", "diffusion"),
        a_run(tmp_path / "three", torn='{"step": 7, "lo'),
    ]
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.plot_losses(runs, tmp_path / "loss.png")
    ar, diffusion, rates = drawn[0].axes
    assert [text.get_text() for text in ar.get_legend().get_texts()] == ["one", "three", "held out", "training"]
    assert "two" in [text.get_text() for text in diffusion.get_legend().get_texts()]
    assert "not comparable" in diffusion.get_title(loc="left")
    training, held_out = ar.get_lines()[:2]
    assert list(training.get_ydata()) == [1 / step for step in range(1, 7)]
    assert list(held_out.get_xdata()) == [3, 6] and training.get_alpha() < 0.5
    assert [text.get_text() for text in rates.texts] == ["0.1", "0.9"]


def test_losses_are_written_whole_and_as_wide_as_a_readme(tmp_path, capsys):
    a_run(tmp_path / "one")
    plots.main([str(tmp_path / "one"), f"--out={tmp_path / 'new' / 'loss.png'}"])
    assert size_of(tmp_path / "new" / "loss.png") == (1150, 460)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_a_run_without_held_out_loss_is_told_by_its_checkpoint(tmp_path):
    a_run(tmp_path / "one", steps=2)
    a_checkpoint(tmp_path / "one" / "ckpt.pt", **DIFFUSION)
    assert plots.read_run(tmp_path / "one")[0] == "diffusion"
    plots.plot_losses([tmp_path / "one"], tmp_path / "loss.png")
    assert size_of(tmp_path / "loss.png") == (1150, 460)


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
    plots.plot_losses([a_run(tmp_path / "a" / "run"), a_run(tmp_path / "b" / "run")], "loss.png")
    assert [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()][:2] == ["a/run", "b/run"]


def test_logs_that_cannot_be_drawn_are_refused(tmp_path):
    a_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text("")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 1.0}\n')
    for name, message in (("none", "no such log; runs beside it: .*good"), ("empty", "empty"), ("bad", "line 1")):
        with pytest.raises(ValueError, match=message) as error:
            plots.plot_losses([tmp_path / name], tmp_path / "loss.png")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "loss.png").exists()


# Canvas


def test_a_canvas_has_a_row_a_step(tmp_path, capsys):
    path = a_checkpoint(tmp_path / "d.pt", **DIFFUSION)
    out = tmp_path / "canvas.png"
    plots.main([f"--canvas={path}", "--prompt=abc", f"--out={out}", "--steps=3", "--temperature=1"])
    heights = {3: size_of(out)[1]}
    assert size_of(out)[0] == 1150
    plots.main([f"--canvas={path}", "--prompt=abc", f"--out={out}", "--steps=5", "--temperature=1"])
    assert size_of(out)[1] - heights[3] == pytest.approx(2 * 42, abs=1)  # 0.42 inches a row, the tallest there is


def test_cells_show_what_changed_and_how_likely_it_is():
    E = BYTES.encode("é")
    pad = BYTES.pad_id
    nan = float("nan")
    rows = [
        plots.Row("0: noise", [97, 1, 98, *E, pad], [nan] * 6),
        plots.Row("1", [97, 99, 98, *E, pad], [1.0, 0.5, 1.0, 1.0, 0.25, 0.0]),
    ]
    figure = plots.draw_canvas(rows, BYTES, "title")
    boxes = figure.axes[0].patches
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "·", "b", "é", "░", "a", "c", "b", "é", "░"]
    framed = [box.get_linewidth() > 1 for box in boxes]
    assert framed == [False] * 5 + [False, True, False, False, False]
    assert boxes[8].get_width() == 2  # the two bytes of é
    assert boxes[8].get_facecolor()[:3] == pytest.approx(plots._blue(0.25))  # as likely as the less likely of them
    assert boxes[9].get_facecolor()[:3] == (1, 1, 1) and boxes[0].get_facecolor()[:3] == (0.93, 0.93, 0.93)


def test_a_large_canvas_is_cut_and_says_so():
    rows = [plots.Row(str(k), [97] * 100, [0.5] * 100) for k in range(101)]
    panel = plots.draw_canvas(rows, BYTES, "$_not math_$ " * 30).axes[0]
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert len(names) == 32 and names[0] == "0" and names[-1] == "100"
    assert panel.get_xlabel() == "slot (the first 64 of 100)" and len(panel.patches) == 32 * 64


@pytest.mark.parametrize("sampler", ["argmax_unrolled", "confidence", "entropy_bound"])
def test_every_sampler_can_be_drawn(sampler, tmp_path):
    model = Transformer(ModelConfig(**TINY | DIFFUSION, noise="mask")).eval()
    plots.plot_canvas(model, BYTES, "ab", tmp_path / "a.png", plots.CanvasConfig(sampler=sampler, steps=3))
    assert size_of(tmp_path / "a.png")[0] == 1150


# Quality


@pytest.mark.parametrize("data", [QUALITY, QUALITY | AR, QUALITY | {"ar": {"value": 1.0}}])
def test_quality_is_drawn(data, tmp_path, capsys):
    (tmp_path / "q.json").write_text(json.dumps(data))
    plots.main([f"--quality={tmp_path / 'q.json'}", f"--out={tmp_path / 'q.png'}"])
    assert size_of(tmp_path / "q.png") == (862, 520)


def test_quality_shows_the_shares_and_their_intervals(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.plot_quality(QUALITY | {"ar": AR["ar"] | {"calls": 20.5}}, "q.png")
    panel = drawn[0].axes[0]
    line = next(line for line in panel.get_lines() if list(line.get_xdata()) == [10, 20])
    assert list(line.get_ydata()) == [0.5, 0.5]
    (low, high), _ = [segment[:, 1] for segment in panel.collections[0].get_segments()]
    assert (low, high) == pytest.approx((0.4, 0.6))
    assert [label.get_text() for label in panel.get_xticklabels()] == ["10", "20"]  # 20.5 would overprint 20
    assert "autoregressive (20.5 calls)" in [text.get_text() for text in panel.get_legend().get_texts()]


@pytest.mark.parametrize(
    "data, message",
    [
        ({}, "title, metric, series missing"),
        (QUALITY | {"series": []}, "there must be a point"),
        (QUALITY | {"series": [{"name": "a", "points": [POINT | {"value": 50}]}]}, "from 0 to 1"),
        (QUALITY | {"series": [{"name": "a", "points": [POINT | {"calls": 0}]}]}, "above 0"),
        (QUALITY | {"series": [{"name": "a", "points": [{"steps": 1}]}]}, "KeyError 'value'"),
        (QUALITY | {"series": "text"}, "TypeError"),
        ([1], "missing"),
    ],
)
def test_quality_data_of_another_form_is_refused(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plots.plot_quality(data, tmp_path / "q.png")


# The command line


def test_what_is_asked_for_must_be_one_thing(tmp_path):
    ar, diffusion = a_checkpoint(tmp_path / "ar.pt"), a_checkpoint(tmp_path / "d.pt", **DIFFUSION)
    for argv, message in (
        ([], "one of the three"),
        (["out/run", "--quality=a.json"], "one of the three"),
        (["out/run", "--titel=x"], "unknown setting"),
        ([f"--canvas={ar}", "--prompt=x"], "needs a diffusion checkpoint"),
        ([f"--canvas={diffusion}"], "prompt is empty"),
        ([f"--canvas={diffusion}", "--prompt=x", "--candidates=2"], "candidates must be 1"),
        ([f"--canvas={diffusion}", f"--prompt={'x' * 20}"], "a prompt of at most 12 tokens fits"),
        ([f"--canvas={tmp_path / 'none.pt'}", "--prompt=x"], "no such checkpoint"),
        ([f"--quality={ar}"], "no JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.main(argv)


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib")] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    a_run(tmp_path / "one")
    for draw in (lambda: plots.plot_losses([tmp_path / "one"], "a.png"), lambda: plots.plot_quality(QUALITY, "a.png")):
        with pytest.raises(ValueError, match="pip install matplotlib"):
            draw()
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plots.draw_canvas([plots.Row("1", [97], [1.0])], BYTES, "title")
