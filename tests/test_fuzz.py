"""Random flags, configs and damaged files: an error is one line, and no file is changed.

Every case goes through main(argv) of a command. With -m long they add up to about 10,000.
"""

import copy
import json
import random
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fuzzing import anything, error_of, few_or_many, repeat
from hypothesis import strategies as st
from processes import TINY, make_copy_set

import ar2diff
import sample
import train
from configurator import all_fields
from infra.checkpoint import load
from infra.run_dir import Log

SHORT = [*TINY, "--eval_interval=100", "--eval_batches=1", "--sample_interval=0", "--max_steps=1"]
DIFFUSION = "--paradigm=diffusion --prefix_attention=joint --target_attention=bidirectional"
NAMES = st.sampled_from(sorted(all_fields(train.TrainConfig)))
# Not drawn: they would train for as long as is asked, or write where they please.
LEFT_OUT = {"max_steps", "out_dir", "data", "eval_batches", "compile", "init_from"}
# Sizes are absurd or tiny, because one that fits into the memory would be allocated.
SIZES = st.sampled_from([-(10**30), -7, -1, 0, 1, 2, 3, 5, 8, 2**63, 10**19, 10**30])
WORDS = ["", "ar", "diffusion", "causal", "joint", "mask", "nan", "inf", "-inf", "1e400", "True"]
VALUES = SIZES.map(str) | st.sampled_from(WORDS) | st.floats().map(str) | st.text(max_size=12)
PLAIN = anything(SIZES.filter(lambda n: abs(n) < 2**63))


def fuzz(test):
    """The test with few cases and with many."""

    @few_or_many(15, 1500)
    def both(n, place):
        repeat(n, lambda data: test(place, data), st.data())

    return both


class Place:
    """A data set, a finished run and a diffusion checkpoint. Nothing may change their bytes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.argv = [*SHORT, f"--data={make_copy_set(folder / 'set')}"]
        train.main([*self.argv, f"--out_dir={folder / 'run'}"])
        train.main([*self.argv, *DIFFUSION.split(), f"--out_dir={folder / 'diffusion'}"])
        self.before = self.content()

    def content(self) -> dict[Path, bytes]:
        paths = [p for name in ("set", "run", "diffusion") for p in (self.folder / name).rglob("*")]
        return {path: path.read_bytes() for path in paths if path.is_file()}

    def scratch(self, name: str = "scratch") -> Path:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return folder

    def check(self, main, argv: list[str]) -> None:
        """Run a command. It ends well or with one line of error, and changes none of our files."""
        with suppress(SystemExit):
            error_of(main, argv)
        assert self.content() == self.before, argv


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("fuzz"))


@fuzz
def test_flags_of_a_new_and_of_a_resumed_run(place, data):
    name = NAMES | st.text(max_size=8)
    named = st.tuples(name, VALUES).map("=".join) | name
    argv = [f"--{text}" for text in data.draw(st.lists(named, min_size=1, max_size=4))]
    argv = [arg for arg in argv if "\0" not in arg and arg[2:].partition("=")[0] not in LEFT_OUT]
    out = f"--out_dir={place.scratch('flags')}"
    place.check(train.main, [*place.argv, out, "--overwrite", *argv])
    argv = [arg for arg in argv if not arg.startswith("--overwrite")]
    out = f"--out_dir={place.folder / 'run'}"
    place.check(train.main, [out, "--max_steps=1", *argv, "--init_from=resume"])


@fuzz
def test_config_files(place, data):
    """Assignments of anything, and text that is no Python."""
    python = st.sampled_from(["[]", "None", "lambda: 0", "1/0", "b'x'", "object()", "-1"])
    name = NAMES.filter(lambda name: name not in LEFT_OUT) | st.text(max_size=6)
    line = st.tuples(name, python | VALUES.map(repr)).map(" = ".join) | st.text(max_size=20)
    path = place.scratch() / "config.py"
    text = "\n".join(data.draw(st.lists(line, max_size=4)))
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    out = f"--out_dir={place.scratch('configs')}"
    place.check(train.main, [str(path), *place.argv, out, "--overwrite"])


def damaged(rng: random.Random, whole: bytes) -> bytes:
    """A file that was cut, overwritten in places or made longer."""
    content = bytearray(whole)
    at = rng.randrange(len(content))
    kind = rng.choice(["cut", "flip", "noise", "insert", "drop"])
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    else:
        length = {"cut": len(content), "noise": 64, "insert": 0, "drop": rng.randrange(4096)}[kind]
        content[at : at + length] = rng.randbytes(64 if kind in ("noise", "insert") else 0)
    return bytes(content)


def read_by_a_command(place, data, path: Path) -> None:
    source, out = f"--init_from={path}", f"--out_dir={place.scratch('read')}"
    commands = [
        (sample.main, [source, "--prompt=ab"]),
        (ar2diff.main, [source, out, "--overwrite", "--prefix_attention=causal"]),
        (train.main, [source, *place.argv, out, "--overwrite"]),
    ]
    place.check(*data.draw(st.sampled_from(commands)))


@fuzz
def test_damaged_checkpoints(place, data):
    run = data.draw(st.sampled_from(["run", "diffusion"]))
    whole = place.before[place.folder / run / "ckpt.pt"]
    path = place.scratch() / "damaged.pt"
    path.write_bytes(damaged(random.Random(data.draw(st.integers(0, 2**32))), whole))
    read_by_a_command(place, data, path)


@fuzz
def test_checkpoints_whose_fields_are_anything(place, data):
    """Readable files of the right format, with one field missing or of another kind."""
    state = copy.deepcopy(load(place.folder / "run" / "ckpt.pt"))
    inside = data.draw(st.sampled_from(["", "model_config", "train_config", "model"]))
    part = state[inside] if inside else state
    key = data.draw(st.sampled_from(sorted(part)) | st.text(max_size=5))
    if data.draw(st.booleans()):
        part.pop(key, None)
    else:
        part[key] = data.draw(PLAIN | st.just(torch.zeros(2)))
    path = place.scratch() / "fields.pt"
    torch.save(state, path)
    read_by_a_command(place, data, path)


@fuzz
def test_log_lines_of_a_resumed_run(place, data):
    """Whatever a log holds, then it holds whole lines of the steps before."""
    path = place.scratch() / "log.jsonl"
    line = st.binary(max_size=12) | PLAIN.map(json.dumps).map(str.encode)
    entry = st.fixed_dictionaries({"step": SIZES}).map(json.dumps).map(str.encode)
    path.write_bytes(b"\n".join(data.draw(st.lists(line | entry, max_size=6))))
    Log(path, 3).write({"step": 4})
    steps = [json.loads(kept)["step"] for kept in path.read_bytes().splitlines()]
    assert steps[-1] == 4 and all(step <= 3 for step in steps[:-1])
