"""The terminal view of sample.py --show: what is drawn, on every kind of terminal and of stream."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from eval_models import BYTES, CACHED, save_model

from view.cells import printable, spans, width
from view.terminal import ENTER, LEAVE, TerminalView, lay_out

PAD = BYTES.pad_id
NASTY = ["x\n" * 50, "q" * 100, "\x1b[2J" + "w" * 96, "\té日本😀" + "\n" * 40 + "\x9b" * 23]


def logits_of(ids: list[int], p: float = 0.999) -> torch.Tensor:
    """Return logits (1, S, V) that give each token the probability p, all others the rest."""
    V = BYTES.vocab_size
    logits = torch.full((1, len(ids), V), (1 - p) / (V - 1)).log()
    return logits.scatter(2, torch.tensor([ids])[..., None], torch.tensor(p).log().item())


def draw(texts: list[str], p: float = 0.999, fixed=(), candidates=1, pause=0) -> TerminalView:
    """Draw texts as if the network gave them; the first one is noise."""
    length = len(texts[0].encode())
    canvases = [[*text.encode(), *[PAD] * length][:length] for text in texts]
    fixed = [i in fixed for i in range(length)]
    with TerminalView(BYTES, False, len(texts) - 1, candidates, fixed, pause) as view:
        for step, ids in enumerate(canvases):
            logits = logits_of(ids, p).repeat(candidates, 1, 1) if step else None
            view(step, torch.tensor([ids] * candidates), logits, torch.arange(candidates))
    return view


def draw_growing(text: str) -> TerminalView:
    ids = [*text.encode(), PAD, PAD]  # after the first pad only other texts go on
    with TerminalView(BYTES, True, len(ids), 1, [False] * len(ids), 0) as view:
        for step, token in enumerate(ids, 1):
            tokens = torch.tensor([ids[:step] + [PAD] * (len(ids) - step)])
            view(step, tokens, logits_of([token]), torch.arange(1))
    return view


# Plain lines and characters


@pytest.mark.parametrize(
    "call, expected",
    [
        (partial(draw, ["ab\nq", "cb\nx", "cb\ny"]), "0: ab↵ q  1: cb↵ x  2: y"),
        (partial(draw_growing, "hi"), "1: h  2: hi  3: hi░"),
        # A guess among 288 tokens has probability 0.0035. A given token is never noise.
        (partial(draw, ["a", "b", "b"], 0.003), "0: a  1: b  2: b"),
        (partial(draw, ["a", "b", "b"], 0.004), "0: a  1: b  2:"),
        (partial(draw, ["a", "b", "b"], 0.003, [0]), "0:  1:  2:"),
    ],
)
def test_plain_lines_show_what_changed(capsys, call, expected):
    call()
    out = capsys.readouterr().out
    shown = re.sub(r"step (\d+) of \d+ \| \1 network calls \| .*", r" \1:", out)
    assert " ".join(shown.splitlines()).strip() == expected


def test_a_converged_row_is_not_drawn_but_its_candidates_are_counted(capsys):
    view = draw(["ab"], candidates=3)
    capsys.readouterr()
    logits = logits_of([97, 98]).repeat(6, 1, 1)
    rows = torch.tensor([-1, 1, 2, 3, 4, -1])  # rows 3 to 5 belong to the next prompt
    view(1, torch.tensor([[97, 98]] * 6), logits, rows)
    assert capsys.readouterr().out == "" and view.calls == 2


def test_tokens_that_form_one_character_are_one_cell():
    found = spans([*"é€😀".encode(), 0xC3, PAD, 0xA9, BYTES.mask_id], BYTES)
    assert [text for text, _, _ in found] == ["é", "€", "😀", "·", "░", "·", "▁"]
    assert [end - start for _, start, end in found] == [2, 3, 4, 1, 1, 1, 1]


@pytest.mark.parametrize("columns", [2, 3, 4, 79])
def test_lines_fit_and_lose_no_character(columns):
    text = "日a本\n" * 3 + "\n\nx"
    lines = lay_out([(char, "") for char in text], columns)
    assert max(sum(width(char) for char, _ in line) for line in lines) <= columns
    assert "".join(char for line in lines for char, _ in line) == text.replace("\n", "↵")


def test_printable_text_has_no_commands_and_keeps_its_letters():
    for number in (*range(0x400), 0xD7FF, 0xD800, 0xDFFF, 0xE000, 0x1F600):
        char = chr(number)
        command = number < 32 or 127 <= number < 160 or 0xD800 <= number < 0xE000
        assert printable(char) == ("·" if command and char not in "\n\t" else char)


# In place


class Stream(io.TextIOWrapper):
    def __init__(self, encoding: str = "utf-8", tty: bool = True):
        super().__init__(io.BytesIO(), encoding=encoding, newline="\n")
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty


@pytest.fixture
def on_terminal(monkeypatch):
    """on_terminal(f) returns what f() writes to a terminal of this size, encoding and kind."""

    def call(f, columns=80, height=10, encoding="utf-8", tty=True, **variables):
        sizes = {"COLUMNS": str(columns), "LINES": str(height)}
        for name, value in ({"TERM": "xterm", "NO_COLOR": ""} | sizes | variables).items():
            monkeypatch.setenv(name, value)
        with redirect_stdout(Stream(encoding, tty)) as stream:
            f()
            print("the text", flush=True)
        return stream.buffer.getvalue().decode(encoding)

    return call


def frames_of(raw: str, columns: int = 80, height: int = 10) -> list[list[str]]:
    """Return the rows of each frame. Fails if one does not fit or contains an unknown code."""
    live, _ = raw.split(LEAVE)
    frames = []
    for frame in live.removeprefix(ENTER).split("\x1b[H")[1:]:
        text = re.sub(r"\x1b\[(K|J|[\d;]*m)", "", frame)
        assert "\x1b" not in text
        rows = text.split("\r\n")
        assert len(rows) <= height and max(sum(map(width, row)) for row in rows) <= columns
        frames.append(rows)
    return frames


def test_a_frame_replaces_the_one_before_and_the_last_one_stays(on_terminal):
    texts = ["a\n" * 20, "q" * 40, "w" * 38 + "é", "é" + "w" * 38]
    raw = on_terminal(partial(draw, texts, candidates=64))
    frames = frames_of(raw)
    assert len(frames) == 4 and frames[-1][0] == "é" + "w" * 38 and ENTER in raw
    after = re.sub(r"\x1b\[[\d;]*m", "", raw.split(LEAVE)[1]).splitlines()
    assert after[0] == "é" + "w" * 38 and after[1].startswith("step 3 of 3 | 192 network calls | ")


@pytest.mark.parametrize("p, code", [(0.999, "32"), (0.6, "33"), (0.3, "31"), (0.6, "0")])
def test_colour_shows_the_probability_and_bold_what_is_new(on_terminal, p, code):
    """Without colours, new tokens are still bold."""
    call = partial(draw, ["ab", "cb", "cd", "cd"], p)
    raw = on_terminal(call, NO_COLOR="1" if code == "0" else "")
    noise, first, second, third = raw.split("\x1b[H")[1:]
    assert "\x1b[2ma\x1b[0m\x1b[2mb\x1b[0m" in noise
    assert f"\x1b[{code};1;4mc\x1b[0m\x1b[{code}mb\x1b[0m" in first
    assert f"\x1b[{code}mc\x1b[0m\x1b[{code};1;4md\x1b[0m" in second
    assert f"\x1b[{code}mc\x1b[0m\x1b[{code}md\x1b[0m" in third


def test_the_part_with_the_last_change_is_shown(on_terminal):
    text = "\n".join("abcdefghijklmnopqrst")
    raw = on_terminal(partial(draw, ["?" * 39, text, text, text.replace("m", "M")]))
    rows = frames_of(raw)[-1]
    assert rows[-2] == "M↵" and rows[-1].startswith("step 3")


def test_pauses_are_no_time_of_the_network(on_terminal, monkeypatch):
    slept, views = [], []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setattr("time.perf_counter", lambda: sum(slept))
    on_terminal(lambda: views.append(draw(["a", "b", "c"], pause=9)))
    assert slept == [9, 9, 9] and views[0].seconds == 27
    assert [frame.seconds for frame in views[0].history[0]] == [0, 0, 0]


@pytest.mark.parametrize("kind", [{}, {"tty": False}, {"TERM": "dumb"}])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("size", [(80, 10), (0, 0), (3, 1), (3, 3), (7, 200)])
def test_any_terminal(on_terminal, size, encoding, kind):
    """Every frame fits, no text of a model is a command, and the text comes last."""
    columns, height = size if all(size) else (80, 24)
    for call in (partial(draw, NASTY), partial(draw_growing, "é\n" * 9), partial(draw, ["日"] * 2)):
        raw = on_terminal(call, *size, encoding, **kind)
        assert raw.endswith("the text\n") and "\x1b[2J" not in raw
        if kind:
            assert "\x1b" not in raw
            assert max(map(len, raw.splitlines()[:-1])) < columns
        else:
            frames_of(raw, columns, height)


# Through sample.py


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("checkpoint") / "d.pt"
    save_model(path, block_size=220, target_length=201, **CACHED)
    start = [sys.executable, "sample.py", f"--init_from={path}", "--device=cpu"]
    return [*start, "--prompt=é", "--show"]


def start_on_terminal(command: list[str], columns: int, height: int):
    """Return the process and the other end of its terminal."""
    end, own = pty.openpty()
    termios.tcsetwinsize(end, (height, columns))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), own)
    root = Path(__file__).parent.parent
    sizes = ("COLUMNS", "LINES")  # set in the processes of pytest-xdist: they hide the real size
    env = {k: v for k, v in os.environ.items() if k not in sizes} | {"TERM": "xterm"}
    process = subprocess.Popen(command, cwd=root, env=env, **streams)
    os.close(own)
    return process, end


def read(end: int, until: str = "\0") -> str:
    """Return what is written up to a text or the end."""
    raw = b""
    while until.encode() not in raw:
        assert select.select([end], [], [], 60)[0], f"waited for {until!r}, got {raw!r}"
        try:
            raw += os.read(end, 1 << 16)
        except OSError:  # on Linux: the other end is closed
            break
    return raw.decode("utf-8", errors="replace")


@pytest.mark.slow
def test_after_a_resize_the_next_frame_fits(flags):
    process, end = start_on_terminal([*flags, "--steps=8", "--pause=0.3"], 100, 20)
    read(end, "step 2 of 8")
    termios.tcsetwinsize(end, (9, 40))
    read(end, "step 6 of 8")  # older frames may still be in the buffer
    assert len(frames_of(read(end), 40, 9)) >= 2 and process.wait() == 0


@pytest.mark.slow
def test_an_interrupt_gives_the_screen_back(flags):
    process, end = start_on_terminal([*flags, "--steps=50", "--pause=0.2"], 80, 24)
    read(end, "step 2 of 50")
    process.send_signal(signal.SIGINT)
    rest = read(end)
    assert process.wait() == 130 and rest.count(LEAVE) == 1 and "step 50" not in rest
