"""Any terminal, folder and environment: the work is done, and nothing is written elsewhere."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Child
from test_train import SHORT

import ar2diff
import sample
import train
from configurator import run
from data import text_file
from data.loader import write_pairs
from infra.checkpoint import load

ROOT = Path(__file__).parent.parent
TEXTS = [f"é–✓{i} 日本".encode() for i in range(20)]  # no character set but Unicode has them all
TRAIN = [*SHORT, "--eval_interval=1", "--sample_interval=1", "--data=set é", "--overwrite"]
COMMANDS = {
    "train": (train.main, [*TRAIN, "--out_dir=made é"]),
    "ar2diff": (ar2diff.main, ["--init_from=run/ckpt.pt", "--out_dir=made é", "--data=set é"]),
    "sample": (sample.main, ["--init_from=run/ckpt.pt", "--prompt=✓", "--num_samples=4"]),
}
COMMANDS["show"] = (sample.main, [*COMMANDS["sample"][1], "--show", "--pause=0"])


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("Läufe und so")
    pairs = [(list(text), list(text)) for text in TEXTS]
    write_pairs(folder / "set é", {"train": pairs, "valid": pairs}, "bytes", 24, 48)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*TRAIN, "--out_dir=run"])
        yield folder


KEPT = []  # a stream that nothing refers to closes its file


def replace_streams(how: str) -> None:
    """Do what Python does at its start with the streams it is given."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        KEPT.append(getattr(sys, name))
        if how == "closed":
            os.close(number)
            setattr(sys, name, None)
            continue
        raw = open(number, "wb", closefd=False)
        setattr(sys, name, io.TextIOWrapper(raw, encoding=how, line_buffering=True))


@pytest.mark.parametrize("how", ["ascii", "cp1252", "closed"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_works_with_any_stream(name, how, desk, tmp_path):
    main, argv = COMMANDS[name]
    shutil.rmtree(desk / "made é", ignore_errors=True)

    def work():
        replace_streams(how)
        sys.argv = [name, *argv]
        run(main)

    child = Child(work, tmp_path / "output")
    assert child.wait() == 0, (tmp_path / "output").read_text()
    assert "Traceback" not in (tmp_path / "output").read_text("utf-8", "replace")
    if name in ("train", "ar2diff"):
        assert load(desk / "made é" / "ckpt.pt")["step"] == (6 if name == "train" else 0)


def test_the_name_of_a_folder_need_not_be_utf8(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"L\xe4ufe")
    folder.mkdir()
    (folder / "a.txt").write_text("a line\n" * 99)
    argv = [f"--input={folder}/a.txt", "--name=lines", f"--out={folder}", "--held_out=0.2"]
    text_file.main([*argv, "--target_length=8", "--block_size=32"])
    command = shlex.split(json.loads((folder / "lines" / "meta.json").read_text())["command"])
    assert command[3:7] == argv
    argv = [*SHORT, f"--data={folder}/lines", f"--out_dir={folder}/run"]
    monkeypatch.setattr(sys, "argv", ["train.py", *argv])
    run(train.main)
    assert load(folder / "run" / "ckpt.pt")["step"] == 6


@pytest.mark.slow  # starts Python 5 times
def test_in_a_shell_without_home_the_checkout_stays_as_it_is(tmp_path):
    """The checkout is read-only, so the data set is built where the command runs."""
    checkout = tmp_path / "checkout é"
    for pattern in ("*.py", "infra/*.py", "data/*.py", "extras/*.py", "view/*.*"):
        for path in ROOT.glob(pattern):
            copy = checkout / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy).chmod(0o444)
    files = sorted(checkout.rglob("*"))
    for path in [checkout, *filter(Path.is_dir, files)]:
        path.chmod(0o555)
    here = tmp_path / "Läufe und so"
    here.mkdir()
    tiny = f"{' '.join(SHORT)} --data=toy_copy"
    lines = [
        f"train.py {tiny} --out_dir='ein Lauf' --sample_interval=1",
        "ar2diff.py --init_from='ein Lauf/ckpt.pt' --out_dir=Größe >&-",
        f"train.py {tiny} --init_from=Größe/ckpt.pt --out_dir=zwei <&- >&- 2>&-",
        "sample.py --init_from=zwei/ckpt.pt --prompt=abc 2>&-",
    ]
    env = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "ascii"}
    env["OMP_NUM_THREADS"] = "1"
    for line in lines:
        script = f"{sys.executable} '{checkout}'/{line}"
        done = subprocess.run(["bash", "-c", script], cwd=here, env=env, capture_output=True)
        assert done.returncode == 0 and b"Traceback" not in done.stdout + done.stderr, done
    assert load(here / "zwei" / "ckpt.pt")["step"] == 6
    assert sorted(checkout.rglob("*")) == files
