"""Whatever is typed or lies on the disk: an error is one line, no file is damaged, nothing hangs.

Every case goes through a command's main(argv), in this process; a hundred through the shell. Allowed are an end in good
order, and the errors that configurator.run turns into one line. The numbers are small here; with -m slow they add up to
more than 10,000.
"""

import copy
import io
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_train import DIFFUSION, ROOT, TINY, make_set

import ar2diff
import sample
import train
from checkpoint import load
from configurator import one_line
from device import pick_device
from model import ModelConfig
from run_folder import Log

FEW, MANY = 15, 1500  # cases of each kind, in the fast run and in the slow one
SHELL = 100
SECONDS = 20  # a case that takes longer hangs


def fuzz(*strategies):
    """The test twice: with few cases, and with many, marked slow. Seeded, so that a failure comes back."""

    def decorate(test):
        quiet = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        few = settings(max_examples=FEW, **quiet)(given(st.data())(lambda place, data: test(place, data)))
        many = settings(max_examples=MANY, **quiet)(given(st.data())(lambda place, data: test(place, data)))

        @pytest.mark.parametrize(
            "run", [few, pytest.param(many, marks=[pytest.mark.slow, pytest.mark.long])], ids=["few", "many"]
        )
        def both(run, place):
            run(place)

        both.__doc__ = test.__doc__
        return both

    return decorate


@contextmanager
def time_limit():
    def over(*_):
        raise AssertionError(f"hangs: {SECONDS} s are over")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_one_line(main, argv: list[str]) -> str:
    """What the command said as it ended: "" in good order, else the one line of its error."""
    try:
        with time_limit(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            main(argv)
    except (ValueError, OSError) as error:
        said = one_line(error)
        assert said and "\n" not in said, f"{argv}: {said!r}"
        return said
    except SystemExit as error:
        return f"exit status {error.code}"
    return ""


class Place:
    """A data set, a finished run of two steps and a diffusion checkpoint, and their bytes, which nothing may change."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, make_set(folder / "set", n=30)
        self.argv = [*TINY, f"--data={self.data}", "--max_steps=2"]
        train.main([*self.argv, f"--out_dir={folder / 'run'}", "--save_interval=1"])
        train.main([*self.argv, f"--out_dir={folder / 'diffusion'}", *DIFFUSION, "--max_steps=1"])
        self.state = load(folder / "run" / "ckpt.pt")
        self.bytes = {path: path.read_bytes() for path in self.files()}

    def files(self) -> list[Path]:
        names = ("set", "run", "diffusion")
        return sorted(path for name in names for path in (self.folder / name).rglob("*") if path.is_file())

    def is_as_it_was(self) -> bool:
        return {path: path.read_bytes() for path in self.files()} == self.bytes

    def scratch(self, name: str = "scratch") -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    speed = train.measured_flops
    train.measured_flops = lambda *_: 1e12
    yield Place(tmp_path_factory.mktemp("fuzz"))
    train.measured_flops = speed


# What a setting may be given: right, wrong by type, out of range, or noise. Sizes are either absurd or tiny: one that
# fits into the memory of a large machine would be made here.
SIZES = st.sampled_from([-(10**30), -7, -1, 0, 1, 2, 3, 5, 8, 2**63, 10**19, 10**30])
WORDS = st.sampled_from(
    ["", "ar", "diffusion", "causal", "bidirectional", "joint", "mask", "nan", "inf", "-inf", "1e400"]
)
VALUES = st.one_of(SIZES.map(str), WORDS, st.floats().map(str), st.text(max_size=12), st.booleans().map(str))
NAMES = st.sampled_from(sorted(f.name for f in fields(train.TrainConfig)))
# Not drawn: they would train for as long as is asked, or write where they please.
LEFT_OUT = {"max_steps", "out_dir", "data", "eval_batches", "patience", "compile"}


def flags(names) -> st.SearchStrategy:
    name = names.filter(lambda name: name not in LEFT_OUT) | st.text(max_size=8)
    named = st.tuples(name, VALUES).map(lambda pair: f"--{pair[0]}={pair[1]}")
    return st.lists(named | name.map(lambda name: f"--{name}") | st.text(max_size=8), min_size=1, max_size=4)


def harmless(argv: list[str]) -> list[str]:
    """Without settings that mean hours of work or another folder, and without paths that are there."""
    kept = [arg for arg in argv if arg.lstrip("-").partition("=")[0] not in LEFT_OUT]
    return [arg for arg in kept if "\0" not in arg and not (not arg.startswith("--") and Path(arg or ".").exists())]


@fuzz()
def test_flags_of_training(place, data):
    """One step, where they are all right."""
    argv = harmless(data.draw(flags(NAMES)))
    out = place.scratch("flags")
    is_one_line(train.main, [*place.argv, "--max_steps=1", f"--out_dir={out}", "--overwrite", *argv])
    assert place.is_as_it_was()


@fuzz()
def test_flags_of_a_resumed_run(place, data):
    """The run is at its last step: it may be refused or have nothing to do, and its files stay as they are."""
    argv = harmless(data.draw(flags(NAMES)))
    argv = [arg for arg in argv if not arg.startswith("--overwrite")]
    log = place.folder / "run" / "log.jsonl"
    is_one_line(train.main, [f"--out_dir={place.folder / 'run'}", *argv, "--init_from=resume"])
    assert log.read_bytes() == place.bytes[log] and place.is_as_it_was()


@fuzz()
def test_config_files(place, data):
    """Assignments of anything, and text that is no Python."""
    python = st.sampled_from(
        ["[]", "{}", "None", "lambda: 0", "1/0", "b'x'", "object()", "float('nan')", "'joint'", "-1"]
    )
    line = st.tuples(NAMES.filter(lambda name: name not in LEFT_OUT) | st.text(max_size=6), python | VALUES.map(repr))
    text = data.draw(st.lists(line.map(" = ".join) | st.text(max_size=20), max_size=4).map("\n".join))
    path = place.scratch() / "config.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    out = place.scratch("configs")
    is_one_line(train.main, [*place.argv, str(path), "--max_steps=1", f"--out_dir={out}", "--overwrite"])
    assert place.is_as_it_was()


def damaged(data, whole: bytes) -> bytes:
    """A file that was cut, overwritten in places or made longer."""
    rng, content = random.Random(data.draw(st.integers(0, 2**32))), bytearray(whole)
    kind = data.draw(st.sampled_from(["cut", "flip", "noise", "insert", "zeros"]))
    at = rng.randrange(len(content) + 1)
    if kind == "cut":
        return bytes(content[:at])
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 8))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "noise":
        content[at : at + 64] = rng.randbytes(64)
    elif kind == "insert":
        content[at:at] = rng.randbytes(rng.randrange(1, 100))
    else:
        content[at : at + rng.randrange(1, 4096)] = b""
    return bytes(content)


@fuzz()
def test_damaged_checkpoints(place, data):
    """Read by every command that reads one; also such as have no seal, as the first ones had none."""
    name = data.draw(st.sampled_from(["run", "diffusion"]))
    whole = place.bytes[place.folder / name / "ckpt.pt"]
    if data.draw(st.booleans()):
        buffer = io.BytesIO()
        torch.save(load(place.folder / name / "ckpt.pt"), buffer)
        whole = buffer.getvalue()
    path = place.scratch() / "damaged.pt"
    path.write_bytes(damaged(data, whole))
    out = place.scratch("read")
    commands = {
        sample.main: ["--prompt=ab"],
        ar2diff.main: [f"--out_dir={out}", "--overwrite", "--prefix_attention=causal"],
        train.main: [*place.argv, "--max_steps=1", f"--out_dir={out}", "--overwrite"],
    }
    main = data.draw(st.sampled_from(list(commands)))
    is_one_line(main, [f"--init_from={path}", *commands[main]])
    assert place.is_as_it_was()


PLAIN = st.recursive(
    st.none() | st.booleans() | SIZES.filter(lambda n: abs(n) < 2**63) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@fuzz()
def test_checkpoints_whose_fields_are_anything(place, data):
    """Readable files of the right format, with one field missing or of another kind, inside or outside."""
    state = copy.deepcopy(place.state)
    inside = data.draw(st.sampled_from(["", "", "model_config", "train_config", "made_on", "model"]))
    part = state[inside] if inside else state
    key = data.draw(st.sampled_from(sorted(part)))
    change = data.draw(st.sampled_from(["drop", "plain", "tensor", "add"]))
    if change == "drop":
        del part[key]
    elif change == "add":
        part[data.draw(st.text(max_size=5))] = data.draw(PLAIN)
    else:
        part[key] = data.draw(PLAIN) if change == "plain" else torch.zeros(data.draw(st.integers(0, 3)))
    folder = place.scratch("fields")
    torch.save(state, folder / "ckpt.pt")
    (folder / "log.jsonl").unlink(missing_ok=True)
    source = f"--init_from={folder / 'ckpt.pt'}"
    commands = {
        sample.main: [source, "--prompt=ab"],
        ar2diff.main: [source, f"--out_dir={place.scratch('fields_out')}", "--overwrite"],
        train.main: [f"--out_dir={folder}", "--init_from=resume", "--device=cpu"],
    }
    main = data.draw(st.sampled_from(list(commands)))
    is_one_line(main, commands[main])
    assert place.is_as_it_was()


@fuzz()
def test_log_lines_of_a_run_that_goes_on(place, data):
    """Whatever a log holds, it is whole lines of the steps before afterwards."""
    path = place.scratch("logs") / "log.jsonl"
    line = st.binary(max_size=12) | PLAIN.map(json.dumps).map(str.encode)
    entry = st.fixed_dictionaries({"step": SIZES}).map(json.dumps).map(str.encode)
    path.write_bytes(b"\n".join(data.draw(st.lists(line | entry, max_size=6))))
    with time_limit(), redirect_stdout(io.StringIO()):
        Log(path, 3).write({"step": 4})
    steps = [json.loads(kept)["step"] for kept in path.read_bytes().splitlines()]
    assert steps[-1] == 4 and all(step <= 3 for step in steps[:-1])


@pytest.mark.slow
@pytest.mark.long  # four minutes
def test_a_hundred_through_the_shell(place):
    """What is said and the exit status: 0 or 2, and one line of error. Five minutes: Python starts a hundred times."""
    rng = random.Random(0)
    names, values = (
        sorted(f.name for f in fields(train.TrainConfig)),
        ["", "-1", "0", "x", "nan", "9" * 30, "True", "joint"],
    )
    names = [name for name in names if name not in LEFT_OUT]
    whole = place.bytes[place.folder / "run" / "ckpt.pt"]
    for k in range(SHELL):
        argv = [*place.argv, "--max_steps=1", f"--out_dir={place.scratch('shell')}", "--overwrite"]
        if k % 2:
            argv += [f"--{rng.choice(names)}={rng.choice(values)}" for _ in range(rng.randint(1, 3))]
        else:
            path = place.scratch() / "shell.pt"
            path.write_bytes(whole[: rng.randrange(len(whole))])
            argv += [f"--init_from={path}"]
        done = subprocess.run(
            [sys.executable, "train.py", *argv],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,  # a busy machine takes minutes to start Python
        )
        assert done.returncode in (0, 2) and "Traceback" not in done.stderr, (argv, done.stderr)
        assert done.returncode == 0 or done.stderr.splitlines()[-1].startswith("error: "), (argv, done.stderr)
        assert place.is_as_it_was()


def test_the_names_that_are_drawn_are_the_settings_there_are():
    """So that a new setting is fuzzed from its first day."""
    assert {f.name for f in fields(ModelConfig)} < {f.name for f in fields(train.TrainConfig)}
    assert LEFT_OUT < {f.name for f in fields(train.TrainConfig)} and pick_device("cpu").type == "cpu"
