"""The view of sample.py --show: what is drawn, and what a real pseudo-terminal gets of it."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from contextlib import redirect_stdout

import pytest
import torch

import sample
from checkpoint import save
from data.tokenizer import get_tokenizer
from model import ModelConfig, Transformer
from view import cells, terminal
from view.terminal import Look, Show, Slot

BYTES = get_tokenizer("bytes")
PAD = BYTES.pad_id
DIFFUSION = dict(paradigm="diffusion", prefix_attention="bidirectional", target_attention="bidirectional", shift=True)


def sure(text: str, chance: float = 0.999) -> torch.Tensor:
    """Logits (1, S, V) of a network that gives the text that chance, all other bytes the rest."""
    V, ids = BYTES.vocab_size, torch.tensor([[*text.encode()]])
    logits = torch.full((1, ids.shape[1], V), (1 - chance) / (V - 1)).log()
    return logits.scatter(2, ids[..., None], torch.tensor(chance).log().item())


def draw(canvases: list, chance: float = 0.999, given=None, candidates: int = 1) -> Show:
    """Show after it has been handed the canvases, each as if the network found it so likely; the first is noise."""
    with Show(BYTES, False, max(len(canvases) - 1, 1), candidates, given) as show:
        for step, text in enumerate(canvases):
            show(step, torch.tensor([[*text.encode()]]), sure(text, chance) if step else None, torch.arange(1))
    return show


def said(capsys) -> list[str]:
    """The lines, without the speed, which is never the same."""
    return [re.sub(r" \| [\d,]+ tokens/s", "", line) for line in capsys.readouterr().out.splitlines()]


# Plain lines


def test_plain_drawing_marks_what_changed_and_says_in_the_end_what_settled_when(capsys):
    draw(["qqqq", "héy", "hé\n", "hé\n"])
    assert said(capsys) == [
        "step 0 of 3 | 0 network calls | noise", "qqqq", "~~~~",
        "step 1 of 3 | 1 network calls | 100% changed", "héy", "^^^",
        "step 2 of 3 | 2 network calls | 25% changed", "hé↵", "  ^",
        "step 3 of 3 | 3 network calls | 0% changed",
        "settled at step 1: 3, 2: 1 | 1 of 4 changed their mind",
    ]  # fmt: skip


def test_a_token_is_marked_by_how_often_it_has_changed_its_mind(capsys):
    draw(["xxx", "abc", "aac", "abd", "acd"])
    shown = said(capsys)
    assert shown[shown.index("step 3 of 4 | 3 network calls | 67% changed") :][:3][1:] == ["abd", " ^^"]
    assert shown[shown.index("step 4 of 4 | 4 network calls | 33% changed") :][:3][1:] == ["acd", " ^1"]
    assert [Look("sure", False, n).mark for n in (0, 1, 9, 10)] == [" ", "1", "9", "+"]
    assert shown[-1] == "settled at step 1: 1, 3: 1, 4: 1 | 2 of 3 changed their mind"


def test_a_given_token_is_never_noise_and_a_token_below_chance_is(capsys):
    with Show(BYTES, False, 1, given=[True, False, False]) as show:
        show(0, torch.tensor([[97, 98, 99]]), None, torch.arange(1))
        assert capsys.readouterr().out.splitlines()[1:] == ["abc", " ~~"]
        show(1, torch.tensor([[97, 100, 101]]), sure("xdx"), torch.arange(1))
        assert capsys.readouterr().out.splitlines()[1:] == ["ade", " ^~"]
    assert capsys.readouterr().out == "settled at step 1: 2 | 0 of 2 changed their mind\n"


def test_how_sure_is_four_kinds(capsys):
    show = draw(["a", "b"])
    for chance, kind in ((0.001, "noise"), (0.3, "doubtful"), (0.6, "likely"), (0.95, "sure")):
        assert show._look([Slot(98, chance)]).sure == kind
    assert show._look([Slot(98, 0.95), Slot(99, 0.3)]).sure == "doubtful"  # half a letter is as sure as the other half
    assert show._look([Slot(98, fixed=True)]).sure == "sure"


def test_a_row_that_left_is_not_drawn_but_its_candidates_count(capsys):
    with Show(BYTES, False, 3, 3) as show:
        show(0, torch.tensor([[97, 98]] * 6), None, torch.arange(6))
        show(1, torch.tensor([[97, 98]] * 6), sure("ab").repeat(6, 1, 1), torch.arange(6))
        capsys.readouterr()
        show(2, torch.zeros(2, 2, dtype=torch.long), sure("ab"), torch.tensor([1, 4]))  # row 4 is the next prompt's
    (last,) = capsys.readouterr().out.splitlines()
    assert last.startswith("settled at step 0: 2") and last.endswith("candidate 1 of 3, best not known")
    assert show.calls == 4


def test_block_by_block_the_blocks_that_are_finished_stand_before(capsys):
    with Show(BYTES, False, 1) as show:
        for block in ("ab", "cd"):
            show(0, torch.tensor([[120, 121]]), None, torch.arange(1))
            show(1, torch.tensor([[*block.encode()]]), sure(block), torch.arange(1))
    shown = said(capsys)
    assert "block 2, step 0 of 1 | 1 network calls | noise" in shown and "abxy" in shown
    assert shown[-3:-1] == ["abcd", "  ^^"] and shown[-1].startswith("settled at step 1: 2, 3: 2")


def test_tokens_that_make_one_character_are_one_cell():
    ids = [*"é€😀".encode(), 0xC3, PAD, 0xA9, BYTES.mask_id]
    found = cells.spans(ids, BYTES)
    assert [text for text, _, _ in found] == ["é", "€", "😀", "·", "░", "·", "▁"]
    assert [end - first for _, first, end in found] == [2, 3, 4, 1, 1, 1, 1]


def test_wide_characters_take_two_columns():
    look = Look("sure", True, 0)
    lines = terminal.lay_out([("日本", look), ("a", look._replace(changed=False))], 4, True)
    assert ["".join(char for char, _ in line) for line in lines] == ["日本", "a"]
    assert terminal.plain_lines(lines) == ["日本", "^^^^"]


def test_a_text_on_a_terminal_has_no_commands_and_keeps_its_letters():
    assert cells.harmless("a\x1b[2J\r\x9b\t e\u0301\u05d0\n") == "a·[2J··\t e\u0301\u05d0\n"


# In place: what a screen shows


class Screen:
    """What a terminal of columns x height shows, from the codes that are used; a line that would wrap fails."""

    def __init__(self, columns: int, height: int):
        self.columns, self.height = columns, height
        self.main, self.other, self.saved = [""] * height, None, (0, 0)
        self.row = self.column = 0
        self.cursor, self.style, self.styles = True, "0", set()

    @property
    def rows(self) -> list[str]:
        return self.main if self.other is None else self.other

    def feed(self, raw: str) -> "Screen":
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", raw):
            self._one(part)
        return self

    def _one(self, part: str) -> None:
        rows = self.rows
        if part == "\x1b[?1049h":
            self.other, self.saved, self.row, self.column = [""] * self.height, (self.row, self.column), 0, 0
        elif part == "\x1b[?1049l":
            self.other, (self.row, self.column) = None, self.saved
        elif part in ("\x1b[?25l", "\x1b[?25h"):
            self.cursor = part.endswith("h")
        elif part == "\x1b[H":
            self.row = self.column = 0
        elif part == "\x1b[K":
            rows[self.row] = rows[self.row][: self.column]
        elif part == "\x1b[J":
            rows[self.row :] = [rows[self.row][: self.column]] + [""] * (self.height - self.row - 1)
        elif part.endswith("m") and part[0] == "\x1b":
            self.style = part[2:-1]
            self.styles.add(self.style)
        elif part == "\n":
            if self.row == self.height - 1:
                assert self.other is None, "the frame is higher than the terminal"
                rows[:] = rows[1:] + [""]
            else:
                self.row += 1
        elif part == "\r":
            self.column = 0
        else:
            assert part[0] != "\x1b", f"unknown code {part!r}"
            assert self.column < self.columns, "a line is wider than the terminal"
            rows[self.row] = rows[self.row][: self.column].ljust(self.column) + part + rows[self.row][self.column + 1 :]
            self.column += 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """on_terminal(f, ...): what f(...) writes to a terminal of 80 x 10, a newline as the driver passes it on."""
    for name, value in {"COLUMNS": "80", "LINES": "10", "TERM": "xterm", "NO_COLOR": ""}.items():
        monkeypatch.setenv(name, value)

    def call(f, *args, **kwargs):
        with redirect_stdout(Terminal()) as written:
            f(*args, **kwargs)
        return re.sub("\r?\n", "\r\n", written.getvalue())

    return call


def test_a_frame_takes_the_place_of_the_one_before_and_the_last_one_stays(on_terminal):
    canvases = ["x\n" * 50, "q" * 100, "\x1b[2J" + "w" * 94 + "\n\n", "\t" + "é" * 40 + "\n" + "z" * 18]
    raw = on_terminal(draw, canvases, candidates=64)
    assert "\x1b[2J" not in raw  # what the model writes is no command to the terminal
    frames = raw.split(terminal.LEAVE)[0].split("\x1b[H")[1:]
    assert len(frames) == 4
    live = Screen(80, 10).feed(raw.split(terminal.LEAVE)[0])
    assert live.rows[0].startswith("·" + "é" * 40) and not live.cursor
    assert live.rows[-1] == "" or live.rows[-1].startswith("settled")
    after = Screen(80, 10).feed(raw)
    assert after.other is None and after.cursor and after.style == "0"
    shown = [line for line in after.rows if line.strip()]
    assert shown[0] == "·" + "é" * 40 + "↵" and "z" * 18 in shown
    assert shown[-2].startswith("step 3 of 3 | 3 network calls | 100% changed")
    assert re.match(r"settled \|[ ▁-█]{4}\| \d+ of 100 changed their mind \| candidate 1 of 64", shown[-1])


def test_colour_says_how_sure_and_bold_what_is_new(on_terminal):
    frames = [on_terminal(draw, ["ab", "cb", "cd", "cd"], chance) for chance in (0.999, 0.6, 0.3)]
    for raw, code in zip(frames, ("32", "33", "31")):
        noise, first, second, third = raw.split(terminal.LEAVE)[0].split("\x1b[H")[1:]
        assert "\x1b[2mab\x1b[0m" in noise
        assert f"\x1b[{code};1;4mc\x1b[0m\x1b[{code}mb\x1b[0m" in first
        assert f"\x1b[{code}mc\x1b[0m\x1b[{code};1;4md\x1b[0m" in second and f"\x1b[{code}mcd\x1b[0m" in third


def test_the_marks_stand_under_the_text_while_there_is_room(on_terminal):
    def last_frame(lines: int) -> list[str]:
        text = ["xy" + "\nx" * lines, "ab" + "\na" * lines, "cb" + "\na" * lines, "cb" + "\na" * lines]
        return Screen(80, 10).feed(on_terminal(draw, text).split(terminal.LEAVE)[0]).rows

    assert last_frame(2)[:3] == ["cb↵", "1", "a↵"]
    assert last_frame(7)[:2] == ["cb↵", "a↵"]  # eight lines of text, status and summary: full


@pytest.mark.parametrize("colour", [True, False])
def test_the_part_with_the_last_change_is_shown_where_not_all_fits(on_terminal, monkeypatch, colour):
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    text = ["\n".join("abcdefghijklmnopqrst")] * 3
    text[2] = text[1].replace("m", "M")
    rows = Screen(80, 10).feed(on_terminal(draw, ["?" * 39, *text]).split(terminal.LEAVE)[0]).rows
    assert any(row.startswith("M") for row in rows) == colour or any("^" in row for row in rows)
    assert rows[-1].startswith("settled") and rows[-2].startswith("step 3")


def test_without_colour_the_marks_say_it(on_terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    raw = on_terminal(draw, ["ab", "cb"])
    assert not re.search(r"\x1b\[[\d;]*[1-9]m", raw)  # no style is ever set
    assert Screen(80, 10).feed(raw.split(terminal.LEAVE)[0]).rows[:2] == ["cb", "^"]


def test_a_dumb_terminal_gets_plain_lines(on_terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    drawn = on_terminal(draw, ["ab", "cb"])
    assert "\x1b" not in drawn and "\r\ncb\r\n^\r\n" in drawn


def test_an_error_gives_the_screen_back_and_draws_nothing_more(on_terminal):
    def fails():
        with pytest.raises(ValueError), Show(BYTES, False, 1) as show:
            show(0, torch.tensor([[97]]), None, torch.arange(1))
            raise ValueError

    assert on_terminal(fails).endswith(terminal.LEAVE)


# Through a pseudo-terminal


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "d.pt"
    model = Transformer(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=220, target_length=201, **DIFFUSION))
    save(path, model, 0, "bytes")
    return str(path)


class Pty:
    """sample.main in a child process on a terminal of its own."""

    def __init__(self, *flags: str, columns: int = 80, height: int = 24, **environment: str):
        self.raw = b""
        self.pid, self.end = pty.fork()
        if self.pid == 0:
            status = 1
            try:
                self._child(flags, environment)
                status = 0
            except KeyboardInterrupt:
                status = 130
            except SystemExit as left:
                status = left.code
            finally:
                sys.stdout.flush()
                os._exit(status)
        self.resize(columns, height)

    @staticmethod
    def _child(flags, environment) -> None:
        torch.set_num_threads(1)  # the threads of the parent are not here
        os.environ |= {"TERM": "xterm"} | environment
        for name in {"COLUMNS", "LINES", "NO_COLOR"} - environment.keys():
            os.environ.pop(name, None)
        for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
            stream = open(number, mode, encoding="utf-8", closefd=False, buffering=1)  # pytest has its own
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sample.main(list(flags))

    def resize(self, columns: int, height: int) -> None:
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", height, columns, 0, 0))

    def read(self, until: str | None = None, seconds: float = 60) -> str:
        """What has come, up to a text or the end."""
        stop = time.monotonic() + seconds
        while until is None or until.encode() not in self.raw:
            ready, _, _ = select.select([self.end], [], [], max(stop - time.monotonic(), 0))
            assert ready, f"waited for {until!r}; got {self.raw[-500:]!r}"
            try:
                new = os.read(self.end, 1 << 16)
            except OSError:  # Linux says so when the other end is closed
                new = b""
            if not new:
                break
            self.raw += new
        return self.raw.decode("utf-8", errors="replace")

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def flags_of(checkpoint: str, *more: str) -> list[str]:
    return [f"--init_from={checkpoint}", "--device=cpu", "--prompt=ab", "--show", "--candidates=1", *more]


def test_80_columns_are_enough(checkpoint):
    child = Pty(*flags_of(checkpoint, "--steps=5", "--pause=0.01"))
    raw = child.read()
    assert child.status() == 0
    live, *_ = raw.split(terminal.LEAVE)
    screen = Screen(80, 24).feed(live)  # a line that is too wide fails here
    assert any(row.startswith("step 5 of 5 | 5 network calls") for row in screen.rows)
    assert {"2"} <= screen.styles
    end = raw.index("changed their mind", raw.index(terminal.LEAVE))  # then comes the text, as it is
    after = Screen(80, 24).feed(raw[:end])
    assert after.other is None and after.cursor and after.style in ("", "0")
    assert any("tokens/s" in row for row in after.rows)


def test_no_colour_is_a_live_view_without_colours(checkpoint):
    child = Pty(*flags_of(checkpoint, "--steps=3", "--pause=0"), NO_COLOR="1")
    raw = child.read()
    assert child.status() == 0 and terminal.ENTER in raw
    assert set(re.findall(r"\x1b\[([\d;]*)m", raw)) <= {"0", ""}
    assert any("~" in row or "^" in row for row in Screen(80, 24).feed(raw.split(terminal.LEAVE)[0]).rows)


def test_after_a_resize_the_next_frame_fits(checkpoint):
    child = Pty(*flags_of(checkpoint, "--steps=6", "--pause=0.3"), columns=100, height=20)
    before = child.read("step 2 of 6")
    child.resize(40, 9)
    child.read("step 4 of 6")
    raw = child.read()
    assert child.status() == 0
    later = raw[raw.index("step 4 of 6") :]
    frames = later.split("\x1b[H")[1:]  # those that began after the change
    screen = Screen(40, 9)
    for frame in frames:
        screen.feed(terminal.ENTER + "\x1b[H" + frame.split(terminal.LEAVE)[0])
    assert len(frames) >= 2 and "step 6 of 6" in " ".join(screen.rows)
    assert max(len(re.sub(r"\x1b\[[\d;]*[a-zA-Z]", "", line)) for line in before.split("\r\n")) > 40


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_leaves_the_terminal_as_it_was(checkpoint, number, status):
    child = Pty(*flags_of(checkpoint, "--steps=50", "--pause=0.2"))
    child.read("step 2 of 50")
    if number == signal.SIGINT:
        os.write(child.end, b"\x03")  # as the key does it: the terminal makes the signal
    else:
        os.kill(child.pid, number)
    raw = child.read()
    assert child.status() == status and terminal.LEAVE in raw
    screen = Screen(80, 24).feed(raw)
    assert screen.other is None and screen.cursor and screen.style in ("", "0")
    assert "step 50" not in raw


def test_the_pause_is_not_counted_as_time_of_the_network(on_terminal, checkpoint, capsys):
    flags = flags_of(checkpoint, "--steps=4", "--pause=0.1")
    on_terminal(sample.main, flags)  # five frames
    assert float(re.search(r"in ([\d.]+) s", capsys.readouterr().err)[1]) < 0.4
