"""Pictures: that they are there, how large they are, what is in them where that can be read, and what is refused."""

import json
import struct
import sys
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("matplotlib")

import diffusion  # noqa: E402
from checkpoint import save  # noqa: E402
from data.tokenizer import get_tokenizer  # noqa: E402
from eval import animate_canvas, figures, plot_canvas, plot_runs, plots  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from tests.browser import Browser, find_browser  # noqa: E402
from view.cells import spans  # noqa: E402

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
    monkeypatch.setattr(plot_runs, "save_figure", lambda figure, path: drawn.append(figure))
    plots.plot_losses(runs, tmp_path / "loss.png")
    ar, diffusion, rates = drawn[0].axes
    assert [text.get_text() for text in ar.get_legend().get_texts()] == ["one", "three", "held out", "training"]
    assert "two" in [text.get_text() for text in diffusion.get_legend().get_texts()]
    assert "not comparable" in diffusion.get_title(loc="left")
    training, held_out = ar.get_lines()[:2]
    assert list(training.get_ydata()) == [1 / step for step in range(1, 7)]
    assert list(held_out.get_xdata()) == [3, 6] and training.get_alpha() < 0.5
    assert [text.get_text() for text in rates.texts] == ["0.1", "0.9"]


def panels_of(runs, tmp_path, monkeypatch) -> dict:
    """title -> axis of the picture, and its texts under ""."""
    drawn = []
    monkeypatch.setattr(plot_runs, "save_figure", lambda figure, path: drawn.append(figure))
    plots.plot_losses(runs, tmp_path / "loss.png")
    axes = {axis.get_title(loc="left"): axis for axis in drawn[0].axes if axis.get_visible()}
    return axes | {"": [text.get_text() for text in drawn[0].texts]}


def lines_of(axis) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(line.get_xdata(), line.get_ydata())) for line in axis.get_lines()}


def a_full_run(folder, paradigm="diffusion", origin="scratch", steps=4, **more):
    """A log with everything, and the checkpoint that says where it began."""
    a_run(folder, paradigm, steps)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        entry |= {"grad_norm": 2.0, "flops": 10**12, "tokens_per_s": 100 * entry["step"]} | more
        entry["sample"] = f"step {entry['step']} sample: 'a' -> '{'b' * 200}'"
        if paradigm == "diffusion":
            entry["passes"] = [3.0, 1.0]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    save(folder / "ckpt.pt", Transformer(ModelConfig(**TINY)), steps, "bytes", converted_from=origin)
    return folder


def test_everything_a_log_tells_has_its_panel(tmp_path, monkeypatch):
    found = panels_of([a_full_run(tmp_path / "one")], tmp_path, monkeypatch)
    assert len(found) == 7  # six panels and the texts; no AR run is there
    passes = lines_of(found["diffusion: the passes in training, smoothed"])
    assert passes["one: L(1)"] == [(k, 3.0) for k in range(1, 5)] and passes["one: L(2)"][0] == (1, 1.0)
    assert lines_of(found["gradient norm, before clipping"])["one"][0] == (1, 2.0)
    assert lines_of(found["speed"])["one"] == [(k, 100 * k) for k in range(1, 5)]
    samples = found[""]
    assert samples[0] == "one" and samples[1].startswith("step 1 sample") and samples[-1].startswith("step 4")
    assert max(map(len, samples)) == plot_runs.LETTERS


def test_compute_counts_the_runs_before(tmp_path, monkeypatch):
    """AR for 4 steps of 1 TFLOP; converted at step 3, which has no log; then diffusion for 4 of 1 TFLOP each."""
    ar = a_full_run(tmp_path / "ar", "ar")
    (tmp_path / "start").mkdir()
    origin = f"{ar / 'ckpt.pt'} step 3"
    save(tmp_path / "start" / "ckpt.pt", Transformer(ModelConfig(**TINY)), 0, "bytes", converted_from=origin)
    adapt = a_full_run(tmp_path / "adapt", origin=str(tmp_path / "start" / "ckpt.pt"), val_ar_loss=0.25)
    lines = lines_of(panels_of([ar, adapt], tmp_path, monkeypatch)["held-out loss by compute"])
    assert [x for x, _ in lines["ar"]] == [3.0] and [x for x, _ in lines["adapt"]] == [6.0]
    assert lines["adapt: its AR loss"][0] == (4.0, 0.25)
    assert plot_runs.flops_before(tmp_path / "start") == 3e12 and plot_runs.flops_before(ar) == 0


def test_the_ar_loss_that_is_kept_is_no_pass(tmp_path, monkeypatch):
    runs = [a_full_run(tmp_path / "one", ar_loss=0.5)]
    passes = lines_of(panels_of(runs, tmp_path, monkeypatch)["diffusion: the passes in training, smoothed"])
    assert list(passes) == ["one: L(1)"]


def test_smoothing_is_a_mean_first_and_then_forgets():
    assert plot_runs.smoothed([4.0, 2.0, 0.0], span=10) == [4.0, 3.0, 2.0]
    assert plot_runs.smoothed([0.0] * 2 + [1.0], span=2)[-1] == 0.5


@pytest.mark.slow  # 2 s
def test_a_picture_of_many_runs_is_written(tmp_path):
    runs = [a_full_run(tmp_path / name, kind) for name, kind in (("a", "ar"), ("b", "diffusion"), ("c", "diffusion"))]
    plots.main([*map(str, runs), f"--out={tmp_path / 'loss.png'}"])
    width, height = size_of(tmp_path / "loss.png")
    assert width == 1150 and height == pytest.approx(3 * 340 + 20 * (3 * 5 + 1), abs=1)


def test_places_without_a_panel_stay_empty(tmp_path, monkeypatch):
    """Seven panels in three rows of three: the other two are not drawn as empty boxes."""
    runs = [a_full_run(tmp_path / name, kind) for name, kind in (("a", "ar"), ("b", "diffusion"))]
    found = panels_of(runs, tmp_path, monkeypatch)
    assert len(found) == 8 and "" in found  # seven titles and the texts: no axis without a title is visible
    assert all(axis.has_data() for title, axis in found.items() if title)


def test_losses_are_written_whole_and_as_wide_as_a_readme(tmp_path, capsys):
    a_run(tmp_path / "one")
    plots.main([str(tmp_path / "one"), f"--out={tmp_path / 'new' / 'loss.png'}"])
    assert size_of(tmp_path / "new" / "loss.png") == (1150, 460)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["loss.png"]


def test_a_run_without_held_out_loss_is_told_by_its_checkpoint(tmp_path):
    a_run(tmp_path / "one", steps=2)
    a_checkpoint(tmp_path / "one" / "ckpt.pt", **DIFFUSION)
    assert plot_runs.read_run(tmp_path / "one")[0] == "diffusion"
    plots.plot_losses([tmp_path / "one"], tmp_path / "loss.png")
    assert size_of(tmp_path / "loss.png") == (1150, 460)


def test_runs_of_one_name_are_told_apart_by_their_folder(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_runs, "save_figure", lambda figure, path: drawn.append(figure))
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
        plot_canvas.Row("0: noise", [97, 1, 98, *E, pad], [nan] * 6),
        plot_canvas.Row("1", [97, 99, 98, *E, pad], [1.0, 0.5, 1.0, 1.0, 0.25, 0.0]),
    ]
    figure = plot_canvas.draw_canvas(rows, BYTES, "title")
    boxes = figure.axes[0].patches
    assert [text.get_text() for text in figure.axes[0].texts] == ["a", "·", "b", "é", "░", "a", "c", "b", "é", "░"]
    framed = [box.get_linewidth() > 1 for box in boxes]
    assert framed == [False] * 5 + [False, True, False, False, False]
    assert boxes[8].get_width() == 2  # the two bytes of é
    assert boxes[8].get_facecolor()[:3] == pytest.approx(figures.blue(0.25))  # as likely as the less likely of them
    assert boxes[9].get_facecolor()[:3] == (1, 1, 1) and boxes[0].get_facecolor()[:3] == (0.93, 0.93, 0.93)


@pytest.mark.slow  # 2,048 texts, 3 s
def test_a_large_canvas_is_cut_and_says_so():
    rows = [plot_canvas.Row(str(k), [97] * 100, [0.5] * 100) for k in range(101)]
    panel = plot_canvas.draw_canvas(rows, BYTES, "$_not math_$ " * 30).axes[0]
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert len(names) == 32 and names[0] == "0" and names[-1] == "100"
    assert panel.get_xlabel() == "slot (the first 64 of 100)" and len(panel.patches) == 32 * 64


@pytest.mark.parametrize("sampler", ["argmax_unrolled", "confidence", "entropy_bound"])
def test_every_sampler_can_be_drawn(sampler, tmp_path):
    model = Transformer(ModelConfig(**TINY | DIFFUSION, noise="mask")).eval()
    plot_canvas.plot_canvas(model, BYTES, "ab", tmp_path / "a.png", plot_canvas.CanvasConfig(sampler=sampler, steps=3))
    assert size_of(tmp_path / "a.png")[0] == 1150


SVG = "{http://www.w3.org/2000/svg}"


def frames_of(svg: str) -> list[str]:
    """The characters of each frame, in order."""
    groups = [g for g in ElementTree.fromstring(svg) if g.tag == f"{SVG}g"]
    assert [g.get("id") for g in groups] == [f"f{k}" for k in range(len(groups))]
    return ["".join(t.text for t in g if t.tag == f"{SVG}text" and "c" in t.get("class").split()) for g in groups]


@pytest.mark.parametrize("settings", [{"steps": 4, "temperature": 1.0}, {"steps": 3, "sampler": "entropy_bound"}])
def test_a_moving_canvas_has_a_frame_a_step_and_says_what_generate_writes(settings, tmp_path, capsys):
    path, out = a_checkpoint(tmp_path / "d.pt", **DIFFUSION), tmp_path / "new" / "canvas.svg"
    flags = [f"--{name}={value}" for name, value in settings.items()]
    plots.main([f"--canvas={path}", "--prompt=a<&", f"--out={out}", *flags])
    model, sampler = plots.load_model(path)[0], plot_canvas.CanvasConfig(**settings)
    seen = []
    made = diffusion.generate(model, torch.tensor([BYTES.encode("a<&")]), sampler, sampler.seed,
                              on_step=lambda step, canvas, *_: seen.append(canvas[0].tolist()))  # fmt: skip
    ids = made.tokens[0].tolist()
    seen += [ids] if ids != seen[-1] else []
    expected = ["".join(text for text, _, _ in spans(canvas, BYTES)) for canvas in seen]
    assert frames_of(out.read_text(encoding="utf-8")) == [animate_canvas.shown(text) for text in expected]
    assert len(seen) in (settings["steps"] + 1, settings["steps"] + 2)  # entropy_bound answers with its argmax
    assert [p.name for p in out.parent.iterdir()] == ["canvas.svg"]


def test_a_moving_canvas_frames_what_changed_and_says_what_it_leaves_out():
    rows = [plot_canvas.Row("0: noise", [97] * 400, [0.5] * 400), plot_canvas.Row("1", [98] + [97] * 399, [1.0] * 400)]
    root = ElementTree.fromstring(animate_canvas.animation(rows, BYTES, "a <b> & 'c'"))
    first, second = (g for g in root if g.tag == f"{SVG}g")
    cells = [r for r in second if r.tag == f"{SVG}rect"][1:]
    assert len(cells) == animate_canvas.PER_LINE * animate_canvas.MAX_LINES
    assert [r.get("class") for r in cells] == ["n"] + [None] * (len(cells) - 1)
    assert cells[0].get("fill").lower() == figures.COLOURS[0].lower() and not any(
        r.get("class") for r in first.iter(f"{SVG}rect")
    )
    assert "the first 320 of 400 slots" in "".join(root.itertext())


def test_one_frame_of_a_moving_canvas_is_seen_at_a_time(tmp_path):
    """In a browser, at the middle of each frame; the picture in docs/ is of the same form and small."""
    browser = find_browser()
    if browser is None:
        pytest.skip("no chromium or chrome here")
    page, picture = Browser(browser), figures.Path(__file__).parent.parent / "docs" / "canvas.svg"
    assert picture.stat().st_size < 100_000
    frames = len(frames_of(picture.read_text(encoding="utf-8")))
    try:
        page.open(picture)
        for k in range(frames):
            at = 1000 * animate_canvas.STEP_SECONDS * (k + 0.5)
            seen = page.run(
                f"document.getAnimations().forEach(a => {{ a.pause(); a.currentTime = {at}; }});"
                "[...document.querySelectorAll('g')].filter(g => getComputedStyle(g).visibility == 'visible')"
                ".map(g => g.id).join()"
            )
            assert seen == f"f{k}"
    finally:
        page.close()


# Quality


@pytest.mark.parametrize("data", [QUALITY, QUALITY | AR, QUALITY | {"ar": {"value": 1.0}}])
def test_quality_is_drawn(data, tmp_path, capsys):
    (tmp_path / "q.json").write_text(json.dumps(data))
    plots.main([f"--quality={tmp_path / 'q.json'}", f"--out={tmp_path / 'q.png'}"])
    assert size_of(tmp_path / "q.png") == (862, 520)


def test_quality_shows_the_shares_and_their_intervals(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
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
        ([f"--canvas={diffusion}", "--prompt=x", "--out=a.gif"], "drawn as .png or, moving, as .svg; got a.gif"),
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
        plot_canvas.draw_canvas([plot_canvas.Row("1", [97], [1.0])], BYTES, "title")
