"""The page of sample.py --html: it shows what was recorded, and is harmless."""

import base64
import hashlib
import importlib
import json
import re
import shutil
import subprocess

import pytest
import torch

from data.tokenizer import Tokenizer
from extras.adapter import AdapterConfig, DraftModel
from tests.eval_models import BYTES, CACHED, save_model, tiny_model
from view.record import TOP, UNKNOWN, Frame, Recorder
from view.watch import pack, write_page

AR = dict(block_size=40, target_length=13)
DIFFUSION = AR | CACHED | dict(shift=True)
# Tokens that would end a script, start a comment, hide, reverse the text, or are half a letter.
NASTY = ["</script><script>alert(1)</script>", "<!--", "&lt;", "\u202e", "\n", '"', "\\"]
NASTY += ["a", "b", "\u2028"]
HALF = len(NASTY)
WORDS = Tokenizer("nasty", [*(t.encode() for t in NASTY), b"\xc3", b"\xa9"], 16, lambda text: [])
SHOWN = [*NASTY[:3], "·", "↵\n", '"', "\\", "b", "b", "·", "é", ""]


def recorded(module: str, settings: dict, rows: int = 1):
    """Return (model, frames of the first text, output, recorder)."""
    decoder = importlib.import_module(module)
    growing = module == "autoregressive"
    model = tiny_model(**(DIFFUSION if module == "diffusion" else AR))
    if module == "extras.speculative":
        model = DraftModel(model, AdapterConfig(masks=2))
    cfg = decoder.SamplerConfig(**settings)
    with Recorder(BYTES.pad_id, growing, getattr(cfg, "candidates", 1)) as recorder:
        prompt = torch.tensor([[97, 98]] * rows)
        out = decoder.generate(model, prompt, cfg, 1, on_step=recorder)
    return model, list(recorder.frames(out.tokens[0])), out, recorder


def frame(name: str, ids: list[int], p: float = 0.5, calls: int = 0) -> Frame:
    """Return a frame made by hand; the likeliest tokens are the one shown and those after it."""
    table = torch.full((len(ids), 2 + 2 * TOP), UNKNOWN, dtype=torch.double)
    table[:, 0] = torch.tensor(ids)
    if name != "0":
        table[:, 1] = p
        table[:, 2::2] = (torch.tensor(ids)[:, None] + torch.arange(TOP)) % 16
        table[:, 3::2] = torch.tensor([p, 0.2, 0.1, 0.0])
    table[torch.tensor(ids) < 0] = UNKNOWN
    return Frame(name, calls, 0.01 * calls, table)


def nasty_frames() -> list[list[Frame]]:
    n = len(NASTY)
    last = [*range(n), HALF, HALF + 1]
    steps = [[8] * (n + 2), [0, 8, *range(2, n), 8, 8], last, [*last[:7], 8, *last[8:]]]
    grown = [frame(f"{k + 1}", [7] * (k + 1) + [-1] * (2 - k), calls=k + 1) for k in range(3)]
    return [[frame(f"{k}", ids, k / 4, k) for k, ids in enumerate(steps)], grown]


def page_of(tmp_path, texts: list[list[Frame]], tokenizer=WORDS, prompt="p", facts=None) -> str:
    sizes = [len(frames[0].table) for frames in texts]
    texts = [pack("</script>", "", f, tokenizer, [False] * n) for f, n in zip(texts, sizes)]
    write_page(tmp_path / "a.html", prompt, facts or {}, texts)
    return (tmp_path / "a.html").read_text(encoding="utf-8")


def data_of(text: str) -> dict:
    pattern = '<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(pattern, text, re.DOTALL)[1])


def assert_replays(track: dict, frames: list[Frame]) -> None:
    """Applying the changes one frame after another gives every recorded table."""
    assert len(track["frames"]) == len(frames)
    state = torch.full_like(frames[0].table, UNKNOWN)
    for stored, one in zip(track["frames"], frames):
        for position, *row in stored["changes"]:
            state[position] = torch.tensor(row, dtype=torch.double)
        expected = one.table.clone()
        known = expected[:, 1::2] >= 0
        expected[:, 1::2][known] *= 1000
        assert torch.allclose(state, expected, rtol=0, atol=0.501)
        assert torch.equal(state[:, ::2], expected[:, ::2])
        assert (stored["name"], stored["calls"]) == (one.name, one.calls)
        assert stored["ms"] == pytest.approx(1000 * one.seconds, abs=1e-3)


WAYS = [
    ("autoregressive", dict(temperature=1.0)),
    ("diffusion", dict(steps=4, candidates=3, temperature=1.0)),
    ("diffusion", dict(steps=9, candidates=3, temperature=0.0)),  # rows converge early
    ("diffusion", dict(sampler="argmax_unrolled", steps=5, candidates=2, update_fraction=0.3)),
    ("diffusion", dict(sampler="confidence", steps=3, candidates=2)),
    ("diffusion", dict(sampler="entropy_bound", steps=5, candidates=2)),
    ("extras.speculative", dict(temperature=1.0)),
]


@pytest.mark.parametrize("module, settings", WAYS)
def test_the_last_frame_is_the_text_and_the_page_replays_all(module, settings, tmp_path):
    _, frames, out, recorder = recorded(module, settings, rows=2)
    tokens = out.tokens[0]
    shown = frames[-1].ids >= 0
    assert torch.equal(frames[-1].ids[shown], tokens[shown])
    assert (tokens[~shown] == BYTES.pad_id).all() and (shown.all() or module != "diffusion")
    assert frames[-1].calls == out.calls[0]
    times = [one.seconds for one in frames]
    assert times == sorted(times) and 0 < times[-1] and recorder.seconds > 0
    (track,) = data_of(page_of(tmp_path, [frames], BYTES))["tracks"]
    assert_replays(track, frames)


def test_probabilities_are_the_softmax_of_the_network():
    model, frames, out, _ = recorded("diffusion", dict(steps=1, temperature=0.0))
    canvas = torch.cat([torch.tensor([[BYTES.sep_id]]), frames[0].ids[None]], 1)
    with torch.no_grad():
        logits = model(torch.tensor([[97, 98]]), canvas)[0, :-1]
    logits[:, [i for i in range(256, 288) if i != BYTES.pad_id]] = -float("inf")
    expected = logits.softmax(-1).double()
    table = frames[1].table
    assert torch.allclose(table[:, 1], expected.gather(1, out.tokens[0][:, None])[:, 0], atol=1e-6)
    assert torch.equal(table[:, 2::2].long(), expected.topk(TOP).indices)
    assert torch.allclose(table[:, 3::2], expected.topk(TOP).values, atol=1e-6)
    assert (frames[0].table[:, 1:] == UNKNOWN).all()


def test_no_text_can_leave_its_place(tmp_path):
    facts = {"<b>": "</script>"}
    text = page_of(tmp_path, nasty_frames(), WORDS, NASTY[0], facts)
    assert len(re.findall("<script", text)) == len(re.findall("</script>", text)) == 2
    assert "<!--" not in text and "alert(1)</script>" not in text
    data = data_of(text)
    assert data["prompt"] == NASTY[0] and data["facts"] == facts
    vocabulary = data["tracks"][0]["vocabulary"]
    assert [vocabulary[f"{i}"] for i in range(HALF)] == NASTY
    assert vocabulary[f"{HALF}"] == [0xC3]


def test_the_page_requests_nothing_and_must_not(tmp_path):
    text = page_of(tmp_path, nasty_frames())
    policy = re.search('Content-Security-Policy" content="(.*?)"', text)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        content = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[0]
        assert not re.search(r"https?:|src=|fetch\(|url\(|innerHTML", content)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_sample_writes_the_printed_text_and_a_second_track(tmp_path, capsys):
    import sample

    save_model(tmp_path / "ar.pt", **AR)
    save_model(tmp_path / "diffusion.pt", **DIFFUSION)
    flags = [f"--init_from={tmp_path / 'diffusion.pt'}", "--device=cpu", "--steps=3"]
    page = f"--html={tmp_path / 'a.html'}"
    sample.main([*flags, "--prompt=ab", page, f"--compare={tmp_path / 'ar.pt'}"])
    data = data_of((tmp_path / "a.html").read_text(encoding="utf-8"))
    first, second = data["tracks"]
    ids = {s: token for one in first["frames"] for s, token, *_ in one["changes"]}
    shown = [*(ids[s] for s in range(12)), BYTES.pad_id]
    text = BYTES.decode(shown[: shown.index(BYTES.pad_id)])
    assert capsys.readouterr().out == text + "\n" and data["prompt"] == "ab"
    assert [one["calls"] for one in first["frames"]] == [0, 1, 2, 3]
    assert second["frames"][0]["calls"] == 1 and data["facts"]["seed"] == "1337"
    sample.main([*flags, "--infill=a[[3]]b", page])
    (only,) = data_of((tmp_path / "a.html").read_text(encoding="utf-8"))["tracks"]
    assert only["fixed"] == [0, *range(4, 12)]


# The script


def test_the_script_matches_the_frames(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    text = page_of(tmp_path, nasty_frames())
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    ask = """
    const text = require("fs").readFileSync(process.argv[2], "utf8");
    const data = JSON.parse(text).tracks.map(unpack);
    const ids = (track, f) => track.slots.map((_, s) => recordAt(track, s, f)?.id ?? -1);
    console.log(JSON.stringify({
      ids: data.map((track) => track.frames.map((_, f) => ids(track, f))),
      texts: texts(data[0], ids(data[0], 3)),
      final: data.map((track) => track.slots.map((list) => list.find((one) => one.final).since)),
      flips: data[0].slots.map((_, s) => recordAt(data[0], s, 3).flips),
      calls: timesOf(data, "calls"), ms: timesOf(data, "ms"),
      at: [-1, 0, 1, 2.5, 99].map((time) => frameAt(data[1], time, "calls")),
      percent: [0, 12, 500, 1000, -1].map(percent),
    }));
    """
    (tmp_path / "a.js").write_text(script + ask, encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(data_of(text)), encoding="utf-8")
    command = [node, "a.js", "a.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "ids": [[one.ids.tolist() for one in frames] for frames in nasty_frames()],
        "texts": SHOWN,
        "final": [[1, 2, *[1] * 5, 3, 0, 1, 2, 2], [0, 1, 2]],
        "flips": [0] * 7 + [1] + [0] * 4,
        "calls": [0, 1, 2, 3],
        "ms": [0, 10, 20, 30],
        "at": [-1, -1, 0, 1, 2],
        "percent": ["<1%", "1%", "50%", "100%", "unknown"],
    }
