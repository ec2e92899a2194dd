"""run_folder.py: one run a folder, the newest whole checkpoint, a log of whole lines."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from atomic import Damaged, read_state, write_state
from run_folder import Log, StopSignals, checkpoints, clear, inexact, locked, newest

# The lock


def hold(out, held):
    with locked(out):
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


def test_a_second_run_is_told_who_is_at_work(holder, tmp_path):
    with pytest.raises(ValueError, match=f"a is in use by process {holder.pid} on .* since .*; wait for it, or name"):
        with locked(tmp_path / "a"):
            pass


def test_a_killed_run_frees_its_folder(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "a" / "lock").exists()  # the file stays, the lock does not
    with locked(tmp_path / "a"):
        assert f"process {os.getpid()} " in (tmp_path / "a" / "lock").read_text()
    assert not (tmp_path / "a" / "lock").exists()


def test_a_lock_is_free_again_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path / "a"):
            raise KeyError
    assert not (tmp_path / "a").exists()  # made for the lock, and empty: nothing is left


def test_a_folder_with_something_in_it_stays(tmp_path):
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "log.jsonl").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["log.jsonl"]


def test_a_lock_file_that_its_holder_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    """Between open and flock the other run ended, and took the file with it: to hold that one would hold nothing."""
    import fcntl

    flock, path = fcntl.flock, tmp_path / "a" / "lock"
    removed = []

    def late(file, how):
        if not removed:
            path.unlink()
            removed.append(path)
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path / "a"):
        assert path.exists() and removed


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    import fcntl

    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with locked(tmp_path / "a"):
        pass
    assert "cannot be locked (Operation not supported); nothing keeps a second run out" in capsys.readouterr().out


# Checkpoints


@pytest.fixture
def three(tmp_path):
    """ckpt.pt at step 30, ckpt.1.pt at 20, ckpt.2.pt at 10."""
    for step in (10, 20, 30):
        write_state(tmp_path / "ckpt.pt", {"step": step}, keep=3)
    return tmp_path


def test_the_newest_comes_first(three):
    (three / "ckpt.x.pt").touch()
    assert [path.name for path in checkpoints(three)] == ["ckpt.pt", "ckpt.1.pt", "ckpt.2.pt"]
    assert newest(three, read_state) == (three / "ckpt.pt", {"step": 30})


def damage(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_damaged_one_is_put_aside_and_the_one_before_taken(three, capsys):
    damage(three / "ckpt.pt")
    damage(three / "ckpt.1.pt")
    assert newest(three, read_state) == (three / "ckpt.2.pt", {"step": 10})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("put aside as ckpt." in line and "going on from" in line for line in said)
    assert [p.name for p in checkpoints(three)] == ["ckpt.2.pt"]
    assert (three / "ckpt.pt.damaged").exists() and (three / "ckpt.1.pt.damaged").exists()


def test_a_newest_one_that_is_gone_is_made_up_for(three):
    (three / "ckpt.pt").unlink()
    assert newest(three, read_state) == (three / "ckpt.1.pt", {"step": 20})


def test_where_all_are_damaged_nothing_is_touched(three):
    for path in checkpoints(three):
        damage(path)
    with pytest.raises(Damaged, match="no other is whole in .*: start over with --overwrite"):
        newest(three, read_state)
    assert len(checkpoints(three)) == 3


def test_another_error_than_damage_is_not_passed_over(three):
    """A file of a later format is no reason to go back two hundred steps."""
    torch.save({"step": 1}, three / "ckpt.pt")

    def read(path):
        raise ValueError(f"{path}: checkpoint format 2")

    with pytest.raises(ValueError, match="ckpt.pt: checkpoint format 2"):
        newest(three, read)


def test_an_overwritten_run_leaves_only_what_is_overwritten_next(three):
    for name in ("best.pt", "ckpt.pt.damaged", "bad_batch.json", "notes.txt"):
        (three / name).touch()
    clear(three)
    assert sorted(p.name for p in three.iterdir()) == ["ckpt.pt", "notes.txt"]


# The log


def test_a_torn_last_line_is_dropped_with_a_line(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    log = Log(path, 5)
    log.write({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert "1 line is torn and dropped" in capsys.readouterr().out


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[" * 100_000, b"[1]", b"{}", b'{"step": "2"}', b"\x00", b"nul"])
def test_a_line_that_is_none_costs_no_other(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    Log(path, 5)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_line_is_with_the_system_at_once(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    log.write({"step": 1})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'
    log.sync()


def test_a_log_that_is_removed_stops_the_run(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(OSError, match="log.jsonl: it has been removed"):
        log.write({"step": 1})


def test_a_log_on_a_full_disk_stops_the_run():
    log = object.__new__(Log)
    log.path, log.file = "log.jsonl", open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError, match="log.jsonl: not written .No space left"):
        log.write({"step": 1})


def test_only_the_leader_writes(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    log = Log(path, 1, writes=False)
    log.write({"step": 2, "loss": 1.0})
    log.sync()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"st' and log.last == {"step": 2, "loss": 1.0}


# What is no longer exact


def test_what_changes_the_last_bits_is_named():
    before = {"device": "cpu", "processes": 1, "threads": 2, "dropout": 0.0, "grad_accum_steps": 1}
    assert inexact(before, before) == ""
    now = before | {"processes": 2}
    assert inexact(before, now) == "from here on equal to rounding, not to the last bit: processes 1 -> 2"
    line = inexact(before | {"dropout": 0.1}, now | {"dropout": 0.1, "device": "cuda"})
    assert "and dropout draws other units: device cpu -> cuda, processes 1 -> 2" in line
    assert inexact({"dropout": 0.0}, now) == ""  # an old checkpoint does not say where it was made


# Signals


def test_a_second_signal_changes_nothing_where_torchrun_repeats_it():
    with StopSignals(patient=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == signal.SIGINT
    with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
