"""The folder of a run: its lock, checkpoints and log, and the signals that end it.

ckpt.pt, ckpt.1.pt   the newest checkpoint and the one before; best.pt: the lowest validation loss
log.jsonl            one JSON line per step
lock                 exists while a run uses the folder, and names it
"""

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from infra.checkpoint import CorruptCheckpoint, backup_path, load, write_atomically


@contextlib.contextmanager
def lock_dir(out: Path) -> Iterator[None]:
    """Hold the folder for this process. Raises ValueError, with the holder, if it is in use."""
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "lock"
    with open(path, "a+", encoding="utf-8", errors="backslashreplace") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            hint = "wait, or choose another --out_dir"
            raise ValueError(f"{out} is in use by {holder}; {hint}") from None
        except (ImportError, OSError):  # Windows, some network file systems
            print(f"{path}: this system cannot lock files; start one run only in this folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}: {' '.join(sys.argv)[:300]}")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if created and not any(out.iterdir()):
                out.rmdir()


def checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    newest = out / "ckpt.pt"
    return [path for path in (newest, backup_path(newest)) if path.exists()]


def latest_checkpoint(out: Path) -> tuple[Path, dict]:
    """Return (path, fields) of the newest intact checkpoint, or raise CorruptCheckpoint."""
    newest, *backups = checkpoints(out)
    try:
        return newest, load(newest)
    except CorruptCheckpoint as error:
        if not backups:
            raise CorruptCheckpoint(f"{error}, or start over with --overwrite") from None
        state = load(backups[0])
        os.replace(newest, newest.with_name("ckpt.pt.damaged"))  # or it would become the backup
        print(f"{error}; renamed to ckpt.pt.damaged, resuming from {backups[0]}")
        return backups[0], state


def clear(out: Path) -> None:
    """Remove what an overwritten run left next to its ckpt.pt."""
    for path in [*checkpoints(out)[1:], *out.glob("best.pt"), *out.glob("*.damaged")]:
        path.unlink()


class Log:
    """JSON lines, one per step. A resumed run drops the lines after its checkpoint.

    enabled: False in processes that must not write. tensorboard: write its event files too.
    """

    def __init__(self, path: Path, first_step: int, enabled: bool = True, tensorboard=False):
        entries = []
        for line in path.read_bytes().splitlines() if first_step and path.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # half a line
                entry = json.loads(line)
                if entry["step"] <= first_step:
                    entries.append(entry)
        self.last = entries[-1] if entries else {}
        self.file = None
        self.board = _open_board(path.parent, first_step) if enabled and tensorboard else None
        if enabled:
            text = "".join(json.dumps(entry) + "\n" for entry in entries)
            write_atomically(path, lambda file: file.write(text.encode()))
            self.file = open(path, "a", buffering=1)  # each line is written at once

    def write(self, entry: dict) -> None:
        """Append one line. Raises OSError if it cannot be written."""
        self.last = entry
        if self.file is not None:
            self.file.write(json.dumps(entry) + "\n")
        for name, value in entry.items() if self.board else ():
            if isinstance(value, int | float):
                self.board.add_scalar(name, value, entry["step"])
            elif isinstance(value, str):
                self.board.add_text(name, value, entry["step"])

    def sync(self) -> None:
        """Flush to disk. Call it before a checkpoint, so that no saved step lacks its line."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    @staticmethod
    def line(entry: dict) -> str:
        """Return the progress line of an evaluation."""
        by_rate = entry.get("val_loss_by_rate", {})
        rates = "".join(f" {rate}:{value:.3f}" for rate, value in by_rate.items())
        names = [f"L({k + 1})" for k in range(16)] if by_rate else ["loss"]
        terms = " + ".join(f"{n} {term:.4f}" for n, term in zip(names, entry["terms"]))
        return f"step {entry['step']:6d} | {terms} | val {names[0]} {entry['val_loss']:.4f}{rates}"


def _open_board(folder: Path, first_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs: python -m pip install tensorboard") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)


class StopSignals:
    """Let Ctrl-C and SIGTERM finish the step and save. A second signal stops at once.

    torchrun sends each Ctrl-C once more, so a second signal is ignored there.
    """

    requested = 0  # the signal number

    def __enter__(self):
        stop_signals = (signal.SIGINT, signal.SIGTERM)
        self.previous = {n: signal.signal(n, self._request) for n in stop_signals}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number, frame):
        if self.requested and "RANK" not in os.environ:
            raise KeyboardInterrupt
        if not self.requested:
            print("finishing the step; a second signal stops at once, unsaved", file=sys.stderr)
        self.requested = self.requested or number
