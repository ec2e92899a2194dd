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
from pathlib import Path

import pytest
import torch

from data.tokenizer import get_tokenizer
from infra.checkpoint import save
from model import ModelConfig, Transformer
from view.cells import printable, spans, width
from view.terminal import ENTER, LEAVE, TerminalView, lay_out

ROOT = Path(__file__).parent.parent
BYTES = get_tokenizer("bytes")
PAD = BYTES.pad_id
NASTY = ["x\n" * 50, "q" * 100, "\x1b[2J" + "w" * 96, "\té日本😀" + "\n" * 40 + "\x9b" * 23]


def logits_of(ids: list[int], p: float = 0.999) -> torch.Tensor:
    """Return logits (1, S, V) that give each token the probability p, all others the rest."""
    V = BYTES.vocab_size
    logits = torch.full((1, len(ids), V), (1 - p) / (V - 1)).log()
    return logits.scatter(2, torch.tensor([ids])[..., None], torch.tensor(p).log().item())


def draw(texts: list[str], p: float = 0.999, fixed=(), candidates: int = 1) -> TerminalView:
    """Draw texts as if the network gave them; the first one is noise."""
    length = len(texts[0].encode())
    canvases = [[*text.encode(), *[PAD] * length][:length] for text in texts]
    fixed = [i in fixed for i in range(length)]
    with TerminalView(BYTES, False, len(texts) - 1, candidates, fixed, 0) as view:
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


def lines_of(capsys) -> list[str]:
    """Return the lines on stdout without the speed, which is never the same."""
    out = capsys.readouterr().out
    return [re.sub(r" \| [\d,]+ tokens/s", "", line) for line in out.splitlines()]


# Plain lines


def test_plain_lines_mark_what_changed(capsys):
    draw(["qqqq", "héy", "hé\n", "hé\n"])
    assert lines_of(capsys) == [
        "step 0 of 3 | 0 network calls | noise", "qqqq", "~~~~",
        "step 1 of 3 | 1 network calls | 100% changed", "héy", "^^^",
        "step 2 of 3 | 2 network calls | 25% changed", "hé↵", "  ^",
        "step 3 of 3 | 3 network calls | 0% changed",
        "settled | █▃ | 1 of 4 changed their mind",
    ]  # fmt: skip


def test_digits_count_changes_of_mind(capsys):
    draw(["xxx", "abc", "aac", "abd", "acd"])
    shown = lines_of(capsys)
    assert shown[shown.index("abd") + 1] == " ^^" and shown[shown.index("acd") + 1] == " ^1"
    assert shown[-1] == "settled | █ ██| 2 of 3 changed their mind"


def test_a_text_that_grows(capsys):
    assert draw_growing("hi").calls == 3
    assert lines_of(capsys) == [
        "step 1 of 4 | 1 network calls | 1 tokens", "h", "^",
        "step 2 of 4 | 2 network calls | 2 tokens", "hi", " ^",
        "step 3 of 4 | 3 network calls | 2 tokens", "hi░", "  ^",
    ]  # fmt: skip


def test_a_given_token_is_never_noise_and_an_improbable_one_is(capsys):
    draw(["abc", "ade"], p=0.003, fixed=[0])  # a guess among 288 tokens: 0.0035
    assert lines_of(capsys)[1:3] == ["abc", " ~~"]
    draw(["abc", "ade"], p=0.004, fixed=[0])
    assert lines_of(capsys)[-3:] == ["ade", " ^^", "settled | █| 0 of 2 changed their mind"]


def test_a_converged_row_is_not_drawn_but_its_candidates_are_counted(capsys):
    view = draw(["ab"], candidates=3)
    capsys.readouterr()
    logits = logits_of([97, 98]).repeat(6, 1, 1)
    rows = torch.tensor([-1, 1, 2, 3, 4, -1])  # rows 3 to 5 belong to the next prompt
    view(1, torch.tensor([[97, 98]] * 6), logits, rows)
    assert lines_of(capsys) == [] and view.calls == 2


# Characters


def test_tokens_that_form_one_character_are_one_cell():
    found = spans([*"é€😀".encode(), 0xC3, PAD, 0xA9, BYTES.mask_id], BYTES)
    assert [text for text, _, _ in found] == ["é", "€", "😀", "·", "░", "·", "▁"]
    assert [end - start for _, start, end in found] == [2, 3, 4, 1, 1, 1, 1]


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 79])
def test_lines_fit_and_lose_no_character(columns):
    text = "日a本\n" * 3 + "\n\nx"
    lines = lay_out([(char, "", " ") for char in text], columns, True)
    assert max(sum(width(char) for char, _, _ in line) for line in lines) <= columns
    shown = "".join(char for line in lines for char, _, _ in line)
    assert shown == re.sub("[日本]", "·" if columns == 1 else r"\g<0>", text.replace("\n", "↵"))


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

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def on_terminal(monkeypatch):
    """on_terminal(f, ...) returns what f(...) writes to a terminal of 80 x 10."""
    for name, value in {"COLUMNS": "80", "LINES": "10", "TERM": "xterm", "NO_COLOR": ""}.items():
        monkeypatch.setenv(name, value)

    def call(f, *args, **kwargs):
        with redirect_stdout(Stream()) as stream:
            f(*args, **kwargs)
        return stream.text()

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
    raw = on_terminal(draw, ["a\n" * 20, "q" * 40, "w" * 38 + "é", "é" + "w" * 38], candidates=64)
    frames = frames_of(raw)
    assert len(frames) == 4 and frames[-1][0] == "é" + "w" * 38 and ENTER in raw
    after = re.sub(r"\x1b\[[\d;]*m", "", raw.split(LEAVE)[1]).splitlines()
    assert after[0] == "é" + "w" * 38 and after[-2].startswith("step 3 of 3 | 192 network calls | ")
    assert re.match(
        r"settled \|.{4}\| \d+ of 40 changed their mind \| candidate 1 of 64", after[-1]
    )


@pytest.mark.parametrize("p, code", [(0.999, "32"), (0.6, "33"), (0.3, "31")])
def test_colour_shows_the_probability_and_bold_what_is_new(on_terminal, p, code):
    noise, first, second, third = on_terminal(draw, ["ab", "cb", "cd", "cd"], p).split("\x1b[H")[1:]
    assert "\x1b[2ma\x1b[0m\x1b[2mb\x1b[0m" in noise
    assert f"\x1b[{code};1;4mc\x1b[0m\x1b[{code}mb\x1b[0m" in first
    assert f"\x1b[{code}mc\x1b[0m\x1b[{code};1;4md\x1b[0m" in second
    assert f"\x1b[{code}mc\x1b[0m\x1b[{code}md\x1b[0m" in third


@pytest.mark.parametrize("colour", [True, False])
def test_the_part_with_the_last_change_is_shown(on_terminal, monkeypatch, colour):
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    text = "\n".join("abcdefghijklmnopqrst")
    raw = on_terminal(draw, ["?" * 39, text, text, text.replace("m", "M")])
    rows = frames_of(raw)[-1]
    assert "M↵" in rows and rows[-2].startswith("step 3") and rows[-1].startswith("settled")
    assert ("^" in rows) == (not colour) == (not re.search(r"\x1b\[[\d;]*[1-9]m", raw))


def test_a_dumb_terminal_gets_plain_lines(on_terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    drawn = on_terminal(draw, ["ab", "cb"])
    assert "\x1b" not in drawn and "\ncb\n^\n" in drawn


# Any terminal, any stream: the view never raises and never prevents the text


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("size", [(80, 10), (0, 0), (1, 1), (2, 3), (3, 1), (7, 200)])
def test_any_size_and_encoding(on_terminal, monkeypatch, size, encoding, tty):
    monkeypatch.setenv("COLUMNS", str(size[0]))
    monkeypatch.setenv("LINES", str(size[1]))
    columns, height = size if all(size) else (80, 24)
    for call in (lambda: draw(NASTY), lambda: draw_growing("é\n" * 9), lambda: draw(["日"] * 2)):
        with redirect_stdout(Stream(encoding, tty)) as stream:
            call()
            print("the text")
        raw = stream.text()
        assert raw.endswith("the text\n") and "\x1b[2J" not in raw
        if tty:
            frames_of(raw, columns, height)
        assert tty or max(map(len, raw.splitlines()[:-1])) < max(columns, 2)


def broken_pipe():
    read_end, write_end = os.pipe()
    os.close(read_end)
    return io.TextIOWrapper(open(write_end, "wb", buffering=0), write_through=True)


def closed_stream():
    stream = Stream()
    stream.close()
    return stream


@pytest.mark.parametrize("make", [broken_pipe, closed_stream, lambda: None])
def test_a_stream_that_cannot_be_written(monkeypatch, make):
    monkeypatch.setattr(sys, "stdout", make())
    assert draw(["ab", "cd", "ce"]).calls == 2 and draw_growing("xy").calls == 3


# Through sample.py


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "d.pt"
    both = dict(prefix_attention="bidirectional", target_attention="bidirectional")
    shape = dict(n_layer=1, n_head=2, n_embd=16, block_size=220, target_length=201)
    save(path, Transformer(ModelConfig(paradigm="diffusion", **both, **shape)), 0, "bytes")
    return [
        sys.executable,
        "sample.py",
        f"--init_from={path}",
        "--device=cpu",
        "--prompt=é",
        "--show",
    ]


def start_on_terminal(command: list[str], columns: int, height: int):
    """Return the process and the other end of its terminal."""
    end, own = pty.openpty()
    termios.tcsetwinsize(end, (height, columns))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), own)
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TERM": "xterm"}, **streams)
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
    process, end = start_on_terminal([*flags, "--steps=6", "--pause=0.3"], 100, 20)
    raw = read(end, "step 2 of 6")
    termios.tcsetwinsize(end, (9, 40))
    raw += read(end, "step 4 of 6")
    rest = read(end)
    assert process.wait() == 0
    assert len(frames_of(rest, 40, 9)) >= 2
    seconds = float(re.search(r"in ([\d.]+) s", rest)[1])
    assert seconds < 1.8  # the pauses are not counted as time of the network


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_gives_the_screen_back(flags, number, status):
    process, end = start_on_terminal([*flags, "--steps=50", "--pause=0.2"], 80, 24)
    read(end, "step 2 of 50")
    process.send_signal(number)
    rest = read(end)
    assert process.wait() == status and rest.count(LEAVE) == 1 and "step 50" not in rest


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["", ">&-", "2>&-", ">&- 2>&-", "| head -c 30"])
def test_sample_ends_well_on_any_stream(flags, streams):
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {' '.join(flags)} --steps=3 {streams}"], cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("tokens/s (" in done.stderr) == ("2>&-" not in streams)
    if streams in ("", "2>&-"):  # the text follows the drawing
        assert "step 3 of 3" in done.stdout
        assert not done.stdout.splitlines()[-1].startswith("settled")
