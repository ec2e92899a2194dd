"""Fault injection: a run that is killed or hindered ends bit for bit like an undisturbed one.

    PYTHONPATH=. python tests/test_faults.py results/faults.json 25    # runs of each kind

A run starts with --init_from=resume each time, is disturbed four times, and may then end.
"""

import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import TINY, Child, make_copy_set, same

import train
from infra.checkpoint import load, write_atomically
from infra.run_dir import checkpoints

pytestmark = pytest.mark.slow
SETTINGS = [*TINY, "--max_steps=12", "--warmup_steps=2", "--eval_interval=3", "--eval_batches=2"]
SETTINGS += ["--save_interval=2", "--sample_interval=6", "--dropout=0.1"]
SETTINGS += ["--paradigm=diffusion", "--prefix_attention=joint", "--target_attention=bidirectional"]
SETTINGS += ["--self_conditioning", "--grad_accum_steps=2", "--init_from=resume"]
TIMES = ("tokens_per_s", "mfu", "seconds")  # fields of the log that measure the machine
DISTURBANCES = 4


class Trial:
    """A run in its own folder. choose: a random.Random."""

    duration = 1.0  # seconds of an undisturbed run

    def __init__(self, folder: Path, data: Path, choose: random.Random):
        self.out = folder / "run"
        self.data = data
        self.choose = choose
        self.output = folder / "output"

    def start(self, prepare: Callable[[], object] = lambda: None) -> Child:
        def work():
            prepare()
            train.main([*SETTINGS, f"--data={self.data}", f"--out_dir={self.out}"])

        return Child(work, self.output)

    def result(self) -> list:
        """Return everything that must not change: log, weights, optimizer state."""
        lines = (self.out / "log.jsonl").read_text().splitlines()
        log = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
        states = [load(self.out / "ckpt.pt"), load(self.out / "best.pt")]
        for state in states:
            del state["train_config"]["out_dir"]
        return [log, *states]


def kill_at_any_moment(trial: Trial) -> bool:
    """Return whether the run was disturbed, like every fault."""
    child = trial.start()
    time.sleep(trial.choose.uniform(0, trial.duration / 3))
    os.kill(child.pid, signal.SIGKILL)
    return child.wait() == -signal.SIGKILL


def at_call(names: list[str], number: int, action: Callable) -> None:
    """Call action() before the number-th call of these functions of os."""
    count = [0]

    def count_calls(function):
        def counted(*args, **named):
            count[0] += 1
            if count[0] == number:
                action()
            return function(*args, **named)

        return counted

    for name in names:
        setattr(os, name, count_calls(getattr(os, name)))


def kill_during_a_write(trial: Trial) -> bool:
    """Between two system calls of write_atomically, or after half of the bytes."""
    number = trial.choose.randrange(1, 25)

    def kill_after_half(state, file):
        save(state, file)
        file.truncate(file.tell() // 2)
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare():
        if trial.choose.random() < 0.5:
            calls = ["replace", "link", "fsync", "unlink"]
            at_call(calls, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        else:
            at_call(["fsync"], number // 3, lambda: setattr(torch, "save", kill_after_half))

    save = torch.save
    return trial.start(prepare).wait() == -signal.SIGKILL


def fill_the_disk(trial: Trial) -> bool:
    """From some moment on no checkpoint can be written. The limit is above the output's size."""
    number = trial.choose.randrange(1, 12)
    limit = (trial.choose.randrange(30_000, 90_000), resource.RLIM_INFINITY)

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        at_call(["fsync"], number, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))

    status = trial.start(prepare).wait()
    assert status in (0, 2) and "Traceback" not in trial.output.read_text()
    return status == 2


def corrupt_the_newest_checkpoint(trial: Trial) -> bool:
    """Truncate it, or overwrite a part of it. The one before it stays."""
    kill_at_any_moment(trial)
    if len(checkpoints(trial.out)) < 2:
        return False
    path = trial.out / "ckpt.pt"
    content = bytearray(path.read_bytes())
    start = trial.choose.randrange(len(content))
    if trial.choose.random() < 0.5:
        content = content[:start]
    else:
        content[start : start + 5000] = trial.choose.randbytes(len(content[start : start + 5000]))
    path.write_bytes(content)
    return True


FAULTS = [kill_at_any_moment, kill_during_a_write, fill_the_disk, corrupt_the_newest_checkpoint]


def undisturbed(folder: Path) -> list:
    trial = Trial(folder, make_copy_set(folder / "data"), random.Random(0))
    since = time.monotonic()
    assert trial.start().wait() == 0, trial.output.read_text()
    Trial.duration = time.monotonic() - since
    return trial.result()


def disturb(fault: Callable, folder: Path, seed: int, expected: list) -> tuple[int, bool]:
    """Return how often a run was disturbed and whether it ended like the undisturbed one."""
    trial = Trial(folder, folder.parent / "data", random.Random(seed))
    count = sum(fault(trial) for _ in range(DISTURBANCES))
    return count, trial.start().wait() == 0 and same(trial.result(), expected)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return folder, undisturbed(folder)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_disturbed_run_ends_like_an_undisturbed_one(fault, seed, expected):
    folder, result = expected
    trial = folder / f"{fault.__name__}_{seed}"
    trial.mkdir()
    count, equal = disturb(fault, trial, seed, result)
    assert count and equal, (trial / "output").read_text()


def main(path: str, trials: str = "25") -> None:
    """Write how many runs of each kind were lost or changed."""
    from eval.common import environment  # commit, hardware, versions

    trials = int(trials)
    folder = Path(tempfile.mkdtemp())
    result = undisturbed(folder)
    table = []
    for fault in FAULTS:
        name = fault.__name__.replace("_", " ")
        row = {"fault": name, "runs": trials, "kills": 0, "disturbances": 0, "lost_or_changed": 0}
        for seed in range(trials):
            trial = folder / f"{fault.__name__}_{seed}"
            trial.mkdir()
            count, equal = disturb(fault, trial, seed, result)
            row["disturbances"] += count
            row["kills"] += count * name.startswith("kill")
            row["lost_or_changed"] += not equal
        table.append(row)
    command = f"PYTHONPATH=. python tests/test_faults.py {path} {trials}"
    result = {"table": table, "command": command, "seed": 0} | environment()
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
