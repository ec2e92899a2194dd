"""sample.py: what it prints, what it refuses, and how the canvas is drawn. Checkpoints are random weights."""

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import autoregressive
import diffusion
import sample
from checkpoint import save
from data.tokenizer import get_tokenizer
from model import ModelConfig, Transformer

ROOT = Path(sample.__file__).parent
BYTES = get_tokenizer("bytes")
PAD = BYTES.pad_id
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=24, target_length=12)
DIFFUSION = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Paths: ar, diffusion, frozen (AR can read it, too), shifted (with everything a diffusion model can have)."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    kinds = {
        "ar": {},
        "diffusion": DIFFUSION,
        "frozen": DIFFUSION | dict(prefix_attention="bidirectional", shift=True, self_conditioning=True),
        "shifted": DIFFUSION | dict(prefix_attention="causal", shift=True, lookahead=True, self_conditioning=True),
    }
    for name, settings in kinds.items():
        torch.manual_seed(0)
        paths[name] = str(folder / f"{name}.pt")
        save(paths[name], Transformer(ModelConfig(**TINY | settings)), 0, "bytes")
    return paths


@pytest.fixture
def generate(checkpoints, capsys):
    """generate("ar", "--prompt=x", ...) -> (stdout, stderr)."""

    def call(name, *flags):
        sample.main([f"--init_from={checkpoints[name]}", "--device=cpu", *flags])
        return tuple(capsys.readouterr())

    return call


def samples(stdout: str) -> list[str]:
    return [part.split("\n", 1)[1] for part in re.split("^--- sample ", stdout, flags=re.MULTILINE)[1:]]


@pytest.mark.parametrize("name", ["ar", "diffusion", "shifted"])
def test_one_seed_gives_one_text(generate, name):
    flags = ["--prompt=abc", "--temperature=1.0"]
    first, again, other = generate(name, *flags), generate(name, *flags), generate(name, *flags, "--seed=2")
    assert first[0] == again[0] and first[0] != other[0]
    assert first[0].endswith("\n") and "abc" not in first[0] and "--- sample" not in first[0]


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_more_samples_leave_the_first_as_it_was(generate, name):
    flags = ["--prompt=abc", "--temperature=1.0"]
    one, three = generate(name, *flags)[0], samples(generate(name, *flags, "--num_samples=3")[0])
    assert three[0] == one and len(set(three)) == 3


def test_greedy_samples_of_an_ar_model_are_alike_and_it_says_so(generate):
    stdout, stderr = generate("ar", "--prompt=abc", "--num_samples=2")
    assert len(set(samples(stdout))) == 1 and "temperature 0 is greedy" in stderr


def test_bfloat16_is_used_where_asked(generate):
    closing = [generate("ar", "--prompt=abc", f"--dtype={dtype}")[1] for dtype in ("float32", "bfloat16")]
    a, b = (float(re.search(r"score ([\d.]+)", line)[1]) for line in closing)
    assert a != b and a == pytest.approx(b, rel=0.02)


@pytest.mark.parametrize("steps, candidates", [(3, 2), (5, 1)])
def test_calls_printed_are_steps_times_candidates(generate, steps, candidates):
    flags = ["--prompt=abc", "--temperature=1.0", f"--steps={steps}", f"--candidates={candidates}"]
    assert f" {steps * candidates} network calls |" in generate("diffusion", *flags)[1]
    stdout, stderr = generate("diffusion", *flags, "--num_samples=2", "--show")
    assert f" {steps * candidates} network calls a sample |" in stderr
    assert f"step {steps} of {steps} | {steps * candidates} network calls" in stdout


def test_infill_keeps_the_given_text(generate):
    for name in ("diffusion", "shifted"):
        for flags in ([], ["--prompt=abc"], ["--sampler=confidence"]):
            stdout, _ = generate(name, "--infill=ab[[3]]cd", "--candidates=2", *flags)
            assert re.fullmatch(r"ab.{0,3}cd\n", stdout, re.DOTALL), stdout


def test_one_diffusion_checkpoint_is_decoded_in_three_ways(generate):
    """Left to right and by speculation it says the same; by diffusion something else."""
    ar, ar_line = generate("frozen", "--prompt=hello", "--sampler=ar")
    found, line = generate("frozen", "--prompt=hello", "--sampler=speculative", "--draft_steps=3")
    assert found == ar != generate("frozen", "--prompt=hello")[0]
    calls = [int(re.search(r"(\d+) network calls", text)[1]) for text in (ar_line, line)]
    assert calls[0] == 11 and calls[1] % 2 == 0 and 4 <= calls[1] <= 24  # 3 + 1, then 1 + 1 a round
    shown, _ = generate("frozen", "--prompt=hello", "--sampler=speculative", "--show")
    assert shown.endswith(found) and "step 2 of ? | 2 network calls" in shown
    warm = [generate("frozen", "--prompt=a", "--sampler=speculative", f"--temperature={t}")[0] for t in (0, 1.5)]
    assert warm[0] != warm[1]


def test_template_is_slots_then_fixed_pads():
    m = ModelConfig(**TINY | DIFFUSION)
    assert sample.parse_template("ab[[2]]c[[1]]", BYTES, m) == [97, 98, -1, -1, 99, -1] + [PAD] * 5
    assert sample.parse_template("[[1], 2][[3]]", BYTES, m) == [*b"[[1], 2]", -1, -1, -1]


def test_a_text_on_a_terminal_has_no_commands_and_keeps_its_letters():
    assert sample._harmless("a\x1b[2J\r\x9b\t e\u0301\u05d0\n") == "a·[2J··\t e\u0301\u05d0\n"


def test_a_pad_ends_a_text_but_not_a_template():
    ids = [97, PAD, 98, PAD]
    assert sample._without_pads(ids, PAD, infilled=False) == [97]
    assert sample._without_pads(ids, PAD, infilled=True) == [97, 98]


def test_prompt_comes_from_flag_file_or_stdin_without_its_last_newline(tmp_path, monkeypatch):
    (tmp_path / "p").write_bytes("né\n\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"piped\r\n")))
    assert sample.read_prompt({"prompt": "x\n"}) == "x\n"
    assert sample.read_prompt({"prompt_file": str(tmp_path / "p")}) == "né\n"
    assert sample.read_prompt({"infill": "[[1]]"}) == ""  # and stdin is left alone
    assert sample.read_prompt({}) == "piped"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"dash")))
    assert sample.read_prompt({"prompt_file": "-"}) == "dash"


REFUSED = [
    ("ar", ["--prompt=a", "--steps=3"], "unknown setting 'steps' for an AR checkpoint"),
    ("diffusion", ["--prompt=a", "--top_k=3"], "unknown setting 'top_k' for a diffusion checkpoint"),
    ("ar", ["--prompt=a", "--stepz=3"], "did you mean 'steps'"),
    ("ar", ["--prompt=a", "--shift"], "shift=False, but shift=True is asked for; a model's settings are fixed"),
    ("diffusion", ["--prompt=a", "--noise=mask"], "noise=uniform, but noise=mask"),
    ("diffusion", ["--prompt=a", "--target_length=9"], "target_length=12, but target_length=9"),
    ("ar", ["--prompt=a", "--infill=[[2]]"], "infill needs a diffusion checkpoint"),
    ("ar", ["--prompt="], "the prompt is empty"),
    ("frozen", ["--prompt=a", "--sampler=speculatve"], "did you mean 'speculative'?"),
    ("ar", ["--prompt=a", "--sampler=speculative"], "speculation drafts with a diffusion model"),
    ("diffusion", ["--prompt=a", "--sampler=speculative"], "this model's is joint"),
    ("shifted", ["--prompt=a", "--sampler=speculative"], "lookahead"),
    (
        "frozen",
        ["--prompt=a", "--sampler=speculative", "--steps=3"],
        "for sampler=speculative and a diffusion checkpoint",
    ),
    ("frozen", ["--infill=[[2]]", "--sampler=ar"], "infill needs a sampler that fills gaps; sampler=ar and"),
    ("ar", ["--prompt=" + "a" * 13], "13 tokens and the target 12, the model's block_size is 24: a prompt of"),
    ("ar", ["--prompt=a\udcff"], "lone surrogate at character 1"),
    ("ar", ["--prompt=a", "--prompt_file=b"], "not both"),
    ("ar", ["--prompt=a", "--num_samples=0"], "num_samples must be 1 or more, got 0"),
    ("ar", ["--prompt=a", "--pause=-1"], "pause must be 0 to 60"),
    ("ar", ["--prompt=a", "--dtype=int8"], "dtype must be one of"),
    ("ar", ["--prompt=a", "--device=gpu"], "device 'gpu' is not there"),
    ("diffusion", ["--infill=a[[x]]"], "[[x]] is no number of slots"),
    ("diffusion", ["--infill=a[[0]]"], "[[0]] is no number of slots"),
    ("diffusion", ["--infill=a[[-1]]"], "[[-1]] is no number of slots"),
    ("diffusion", ["--infill=a"], "has no [[n]]"),
    ("diffusion", ["--infill="], "has no [[n]]"),
    ("diffusion", ["--infill=ab[[10]]"], "takes 12 slots, the model's target has 11"),
    ("diffusion", ["--prompt=" + "a" * 13, "--infill=[[1]]"], "a prompt of at most 12 tokens fits"),
]


@pytest.mark.parametrize("name, flags, message", REFUSED)
def test_bad_input_is_refused_in_one_line(generate, name, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        generate(name, *flags)
    assert "\n" not in str(refused.value)


def test_a_model_without_targets_cannot_sample():
    with pytest.raises(ValueError, match="x.pt has target_length=0: it was never trained"):
        sample.sampler_config({}, ModelConfig(), "x.pt")


def test_undecodable_prompt_file_is_named_with_the_place(tmp_path):
    (tmp_path / "p").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="p is not UTF-8 text: byte 0xff at 2"):
        sample.read_prompt({"prompt_file": str(tmp_path / "p")})


def test_an_agreeing_model_setting_is_no_conflict(generate):
    generate("diffusion", "--prompt=a", "--target_length=12", "--paradigm=diffusion")


def command(*flags, stdin=b""):
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "sample.py", *flags], input=stdin, capture_output=True, cwd=ROOT, env=env)


def test_as_a_command_errors_are_one_line_and_status_2(checkpoints, tmp_path):
    torn = tmp_path / "torn.pt"
    torn.write_bytes(Path(checkpoints["ar"]).read_bytes()[:2000])
    for flag, message in [(f"--init_from={torn}", "truncated"), ("--prompt_file=nowhere", "nowhere: No such file")]:
        done = command(f"--init_from={checkpoints['ar']}", flag)
        stderr = done.stderr.decode()
        assert done.returncode == 2 and done.stdout == b"", stderr
        assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1


def test_as_a_command_a_pipe_gets_the_text_alone_and_show_has_no_escape_codes(checkpoints, generate):
    flags = ["--infill=ab[[2]]c", "--candidates=2", "--steps=4", "--show"]
    done = command(f"--init_from={checkpoints['diffusion']}", *flags)
    stdout = done.stdout.decode()
    assert done.returncode == 0 and "\x1b[" not in stdout and "\r" not in stdout
    assert "step 4 of 4 | 8 network calls" in stdout
    assert stdout.endswith(generate("diffusion", *flags[:-1])[0])
    assert done.stderr.count(b"\n") == 1 and b"tokens/s" in done.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def sure(text: str) -> torch.Tensor:
    """Logits (1, S, V) of a network that is certain of the text."""
    logits = torch.zeros(1, len(text.encode()), BYTES.vocab_size)
    return logits.scatter(2, torch.tensor([[*text.encode()]])[..., None], 20.0)


def draw(canvases: list[str], given=None, **settings):
    """Show after it has been handed the canvases, each as if the network were certain of it; the first is noise."""
    length = len(canvases[0].encode())
    m = ModelConfig(**DIFFUSION, target_length=length + 1)
    show = sample.Show(BYTES, diffusion.SamplerConfig(steps=max(len(canvases) - 1, 1), **settings), m, given, 0.0)
    for step, text in enumerate(canvases):
        show(step, torch.tensor([[*text.encode()]]), sure(text) if step else None, torch.arange(1))
    return show


def test_plain_drawing_marks_what_changed(capsys):
    draw(["qqqq", "héy", "hé\n", "hé\n"], candidates=1)
    assert capsys.readouterr().out.splitlines() == [
        "step 0 of 3 | 0 network calls | noise", "qqqq", "~~~~",
        "step 1 of 3 | 1 network calls | 100% changed", "héy", "^^^",
        "step 2 of 3 | 2 network calls | 25% changed", "hé↵", "  ^",
        "step 3 of 3 | 3 network calls | 0% changed",
    ]  # fmt: skip


def test_a_given_token_is_never_noise_and_a_token_below_chance_is(capsys):
    show = draw(["abc"], given=[97, -1, -1], candidates=1)
    assert capsys.readouterr().out.splitlines()[1:] == ["abc", " ~~"]
    show(1, torch.tensor([[97, 100, 101]]), sure("xdx"), torch.arange(1))
    assert capsys.readouterr().out.splitlines()[1:] == ["ade", " ^~"]


def test_kinds_go_from_noise_over_changed_and_fresh_to_settled():
    show = sample.Show(BYTES, diffusion.SamplerConfig(), ModelConfig(**DIFFUSION, target_length=2), None, 0.0)
    seen = [show._compare([token], [token == 1])[1][0] for token in (1, 2, 2, 2, 3)]
    assert seen == ["noise", "changed", "fresh", "settled", "changed"]


def test_a_row_that_left_is_not_drawn_but_its_candidates_count(capsys):
    show = draw(["ab", "cd"], candidates=3)
    show(2, torch.zeros(2, 2, dtype=torch.long), sure("ab"), torch.tensor([1, 4]))  # row 4 belongs to the next prompt
    assert "step 2" not in capsys.readouterr().out and show.calls == 2


def screen_after(raw: str, columns: int, height: int) -> list[str]:
    """What a terminal shows: cursor up, erase line, erase below, scrolling. Fails on a line that would wrap."""
    screen, row, column = [""] * height, 0, 0
    for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|[^\x1b]", raw):
        if part.endswith("A") and part[0] == "\x1b":
            row = row - int(part[2:-1])
            assert row >= 0, "the cursor was sent above the screen: the frame was higher than the terminal"
        elif part == "\x1b[K":
            screen[row] = screen[row][:column]
        elif part == "\x1b[J":
            screen[row:] = [screen[row][:column]] + [""] * (height - row - 1)
        elif part == "\n":
            row, column = row + 1, 0
            if row == height:
                screen, row = screen[1:] + [""], row - 1
        elif part == "\r":
            column = 0
        elif part[0] != "\x1b":
            assert column < columns, "a line is wider than the terminal"
            screen[row] = screen[row][:column].ljust(column) + part + screen[row][column + 1 :]
            column += 1
    return screen


@pytest.fixture
def on_terminal(monkeypatch):
    """on_terminal(f, ...): what f(...) writes to a terminal of 80 x 10."""
    for name, value in {"COLUMNS": "80", "LINES": "10", "TERM": "xterm", "NO_COLOR": ""}.items():
        monkeypatch.setenv(name, value)

    def call(f, *args, **kwargs):
        with redirect_stdout(Terminal()) as terminal:
            f(*args, **kwargs)
        return terminal.getvalue()

    return call


def test_in_place_drawing_leaves_the_last_frame_on_an_80_column_terminal(on_terminal):
    canvases = ["x\n" * 50, "q" * 100, "\x1b[2J" + "w" * 94 + "\n\n", "\t" + "é" * 40 + "\n" + "z" * 18]
    raw = on_terminal(draw, canvases, candidates=64)
    shown = [line for line in screen_after(raw, 80, 10) if line]
    status = "step 3 of 3 | 3 network calls | 100% changed | candidate 1 of 64, best not known"
    assert shown == ["·" + "é" * 40 + "↵", "z" * 18, status[:79]]
    assert "\x1b[2J" not in raw  # what the model writes is no command to the terminal


def test_in_place_drawing_colours_by_kind(on_terminal):
    frames = on_terminal(draw, ["ab", "cb", "cd", "cd", "cd"], candidates=1).split("\x1b[J")
    assert "\x1b[2mab\x1b[0m" in frames[0]
    assert "\x1b[1;33mc\x1b[0m\x1b[0mb\x1b[0m" in frames[1]
    assert "\x1b[0mc\x1b[0m\x1b[1;33md\x1b[0m" in frames[2]
    assert "\x1b[2;32mcd\x1b[0m" in frames[4]


@pytest.mark.parametrize("variable, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_terminals_without_colour_get_plain_lines(on_terminal, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    drawn = on_terminal(draw, ["ab", "cb"], candidates=1)
    assert "\x1b" not in drawn and drawn.endswith("\ncb\n^\n")


def test_an_ar_text_grows(on_terminal, generate):
    frames = on_terminal(generate, "ar", "--prompt=abc", "--show", "--pause=0", "--temperature=1.0").split("\x1b[J")
    assert "step 1 of 11 | 1 network calls | 1 tokens" in frames[0]
    assert "step 2 of 11 | 2 network calls | 2 tokens" in frames[1]


def test_the_pause_is_not_counted_as_time_of_the_network(on_terminal, checkpoints, capsys):
    flags = [f"--init_from={checkpoints['diffusion']}", "--prompt=a", "--show", "--steps=4", "--candidates=1"]
    on_terminal(sample.main, [*flags, "--pause=0.1"])  # five frames
    assert float(re.search(r"in ([\d.]+) s", capsys.readouterr().err)[1]) < 0.4


def test_tokens_that_make_one_character_are_one_cell():
    ids = [*"é€😀".encode(), 0xC3, PAD, 0xA9, BYTES.mask_id]
    texts = [text for text, _ in sample.cells(ids, ["fresh"] * len(ids), BYTES)]
    assert texts == ["é", "€", "😀", "·", "░", "·", "▁"]


def test_wide_characters_take_two_columns():
    lines = sample.lay_out([("日本", "changed"), ("a", "fresh")], 4, True)
    assert ["".join(char for char, _ in line) for line in lines] == ["日本", "a"]
    assert sample.plain_lines(lines) == ["日本", "^^^^"]


def test_a_setting_of_both_paradigms_has_one_type():
    """One parser reads all settings before the checkpoint says which paradigm it is."""
    both = [{f.name: type(f.default) for f in fields(c.SamplerConfig)} for c in (autoregressive, diffusion)]
    assert {"temperature"} == {name for name in both[0] if name in both[1] and both[0][name] is both[1][name]}
