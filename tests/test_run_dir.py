"""infra/run_dir.py: one run per folder, the newest intact checkpoint, a log of whole lines."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from eval_models import tiny_model

from infra.checkpoint import CorruptCheckpoint, load, save
from infra.run_dir import Log, StopSignals, checkpoints, clear, latest_checkpoint, lock_dir


def hold(out, held):
    with lock_dir(out):
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/a."""
    fork = multiprocessing.get_context("fork")
    held = fork.Event()
    process = fork.Process(target=hold, args=(tmp_path / "a", held))
    process.start()
    assert held.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_run_is_refused_until_the_first_is_gone(holder, tmp_path):
    with pytest.raises(ValueError, match=f"a is in use by process {holder.pid} on .*; wait, or"):
        with lock_dir(tmp_path / "a"):
            pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    lock = tmp_path / "a" / "lock"
    assert lock.exists()  # the file stays, the lock does not
    with lock_dir(tmp_path / "a"):
        assert f"process {os.getpid()} " in lock.read_text()
    assert not lock.exists()


def test_a_lock_leaves_nothing_behind_except_results(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), lock_dir(tmp_path / "a"):
            raise KeyError
    assert not (tmp_path / "a").exists()
    with lock_dir(tmp_path / "a"):
        (tmp_path / "a" / "log.jsonl").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["log.jsonl"]


@pytest.fixture
def two(tmp_path):
    """ckpt.pt at step 20, ckpt.1.pt at step 10."""
    for step in (10, 20):
        save(tmp_path / "ckpt.pt", tiny_model(), step, "bytes", keep_last=2)
    return tmp_path


def step_of_latest(out) -> int:
    path, state = latest_checkpoint(out)
    assert load(path)["step"] == state["step"]
    return state["step"]


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_the_newest_intact_checkpoint_is_found(two, capsys):
    assert [path.name for path in checkpoints(two)] == ["ckpt.pt", "ckpt.1.pt"]
    assert step_of_latest(two) == 20
    damage(two / "ckpt.pt")
    assert step_of_latest(two) == 10
    assert "renamed to ckpt.pt.damaged, resuming from" in capsys.readouterr().out
    assert [p.name for p in checkpoints(two)] == ["ckpt.1.pt"]
    assert step_of_latest(two) == 10
    torch.save({"format": 99}, two / "ckpt.pt")  # a later format is no reason to go back
    with pytest.raises(ValueError, match="ckpt.pt: checkpoint format 99"):
        latest_checkpoint(two)
    (two / "ckpt.pt").unlink()
    damage(two / "ckpt.1.pt")
    with pytest.raises(CorruptCheckpoint, match="ckpt.1.pt: damaged.*--overwrite"):
        latest_checkpoint(two)
    assert (two / "ckpt.1.pt").exists()


def test_an_overwritten_run_leaves_only_what_is_overwritten_next(two):
    for name in ("best.pt", "ckpt.pt.damaged", "notes.txt"):
        (two / name).touch()
    clear(two)
    assert sorted(p.name for p in two.iterdir()) == ["ckpt.pt", "notes.txt"]


@pytest.mark.parametrize("line", [b'{"step": 3, "lo', b"\xff\xfe", b"[1]", b'{"step": "2"}'])
def test_a_resumed_log_keeps_the_whole_lines_up_to_its_step(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
    log = Log(path, 2)
    assert log.last == {"step": 2}
    log.write({"step": 3, "loss": 0.5})
    log.sync()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'
    assert Log(path, 0).last == {} and path.read_bytes() == b""


def test_a_log_that_cannot_be_written_stops_the_run(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    log.file = open("/dev/full", "a", buffering=1)
    with pytest.raises(OSError, match="No space left"):
        log.write({"step": 2})


def test_only_the_main_process_writes(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    log = Log(path, 1, enabled=False)
    log.write({"step": 2, "loss": 1.0})
    log.sync()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"st'
    assert log.last == {"step": 2, "loss": 1.0}


def test_a_second_signal_stops_at_once_except_under_torchrun(monkeypatch):
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setenv("RANK", "0")
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGINT
