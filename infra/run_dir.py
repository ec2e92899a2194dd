"""What a run leaves in its folder and how it ends: the lock, the checkpoints, the log, the signals.

ckpt.pt, ckpt.1.pt, ..  the newest checkpoint and those before it; best.pt: of the lowest held-out loss
log.jsonl               one line per step
lock                    while a run is at work: whose it is; the system frees it however the process ends
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from atomic import Damaged, history, remove, write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# What a resumed run may be given anew; any other change would make it a different run.
MAY_CHANGE = {
    "max_steps",
    "resume",
    "init_from",
    "out_dir",
    "overwrite",
    "plan",
    "device",
    "dtype",
    "compile",
    "gradient_checkpointing",
    "grad_accum_steps",
    "parallel",
    "patience",
    "keep",
}
MAY_CHANGE |= {"log_interval", "eval_interval", "eval_batches", "sample_interval", "save_interval"}
# What may change too, but not without a change in the last bits, because sums are taken in another order.
ROUNDING = ("device", "processor", "processes", "threads", "torch", "grad_accum_steps", "dtype", "compile", "parallel")


def inexact(before: dict, now: dict) -> str:
    """What a resumed run does otherwise than bit for bit: one line, or "" where nothing is different.

    before, now: settings, and the facts of `made_on`; what an old checkpoint does not say is not compared.
    """
    other = [name for name in ROUNDING if name in before and name in now and before[name] != now[name]]
    if not other:
        return ""
    dropout = now["dropout"] and {"processes", "grad_accum_steps", "device"} & set(other)
    also = ", and dropout draws other units" if dropout else ""
    changed = [f"{name} {before[name]} -> {now[name]}" for name in other]
    return f"from here on equal to rounding, not to the last bit{also}: {', '.join(changed)}"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold out_dir for this process. Raises ValueError, with who has it, where another run is at work there.

    A folder that was made for this and is empty in the end goes again: a refused command leaves nothing behind.
    """
    there = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "lock"
    file = _take(path)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is held, so that nobody else's goes
            file.close()
        if not there:
            with contextlib.suppress(OSError):
                out.rmdir()


def _take(path: Path):
    if fcntl is None:
        print(f"{path}: no file locks on this system; nothing keeps a second run out of this folder")
        return None
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(500).strip() or "another process"
            file.close()
            raise ValueError(f"{path.parent} is in use by {holder}; wait for it, or name another --out_dir") from None
        except OSError as error:  # a file system that has none
            file.close()
            print(f"{path}: cannot be locked ({error.strerror}); nothing keeps a second run out of this folder")
            return None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its holder has just removed it: what is held is no name any more
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}: {' '.join(sys.argv)[:300]}\n")
    file.flush()
    return file


def checkpoints(out: Path) -> list[Path]:
    """What there is of a run, the newest first."""
    numbers = sorted(int(p.suffixes[0][1:]) for p in out.glob("ckpt.*.pt") if p.suffixes[0][1:].isdecimal())
    return [path for path in (history(out / "ckpt.pt", n) for n in [0, *numbers]) if path.exists()]


def newest(out: Path, read: Callable[[Path], dict]) -> tuple[Path, dict]:
    """(path, read(path)) of the newest checkpoint that is whole. A damaged one is named, put aside and passed over.

    Raises Damaged where none is whole. There must be one.
    """
    damaged = []
    for path in checkpoints(out):
        try:
            state = read(path)
        except Damaged as error:
            damaged.append((path, error))
            continue
        for bad, error in damaged:  # out of the way of the next one, which would push the good ones out
            os.replace(bad, bad.with_name(bad.name + ".damaged"))
            print(f"{error}; put aside as {bad.name}.damaged, going on from {path}")
        return path, state
    first = damaged[0][1]
    raise Damaged(f"{first}; no other is whole in {out}: start over with --overwrite")


def clear(out: Path) -> None:
    """Take away what an overwritten run left beside its ckpt.pt, so that nothing of it is taken for the new one's."""
    for path in [*checkpoints(out)[1:], *out.glob("best.pt"), *out.glob("*.damaged"), *out.glob("bad_batch.json")]:
        remove(path)


class Log:
    """JSON lines beside the checkpoint. A resumed run drops the lines after its checkpoint: they are written again.

    writes: False in the processes that do not lead.
    """

    def __init__(self, path: Path, first: int, writes: bool = True):
        kept, bad = [], 0
        for line in path.read_bytes().splitlines() if first and path.exists() else []:
            entry = _entry(line)
            bad += entry is None
            if entry is not None and entry["step"] <= first:
                kept.append(entry)
        self.path, self.last, self.file = path, kept[-1] if kept else {}, None
        if not writes:
            return
        if bad:  # the last line of a killed run may be torn
            print(f"{path}: {bad} {'line is' if bad == 1 else 'lines are'} torn and dropped")
        write_atomically(path, lambda file: file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode()))
        self.file = open(path, "ab", buffering=0)  # a line is with the system before the next step begins

    def write(self, entry: dict) -> None:
        """Append one line. Raises OSError where it cannot be written, or where the file is gone."""
        self.last = entry
        if self.file is None:
            return
        line = (json.dumps(entry) + "\n").encode()
        try:
            written = self.file.write(line)
        except OSError as error:
            raise OSError(f"{self.path}: not written ({error.strerror})") from None
        if written < len(line):
            raise OSError(f"{self.path}: not written (no space left)")
        if os.fstat(self.file.fileno()).st_nlink == 0:
            raise OSError(f"{self.path}: it has been removed while the run was at work")

    def sync(self) -> None:
        """On the disk: before a checkpoint is, so that no step of it is without its line."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    @staticmethod
    def line(entry: dict) -> str:
        rates = "".join(f" {rate}:{value:.3f}" for rate, value in entry.get("val_loss_by_rate", {}).items())
        ar = f" | AR {entry['val_ar_loss']:.4f}" if "val_ar_loss" in entry else ""
        return f"step {entry['step']:6d} | loss {entry['loss']:.4f} | held-out {entry['val_loss']:.4f}{rates}{ar}"


def _entry(line: bytes) -> dict | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and type(entry.get("step")) is int else None


class StopSignals:
    """Ctrl-C and SIGTERM finish the step, save and stop; a second one stops at once.

    patient: a second one changes nothing. Under torchrun Ctrl-C comes twice, from the terminal and from torchrun.
    """

    asked = 0

    def __init__(self, patient: bool = False):
        self.patient = patient

    def __enter__(self):
        self.before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        except ValueError:
            pass  # not the main thread: whoever called us decides about signals
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked and not self.patient:
            raise KeyboardInterrupt
        self.asked = self.asked or number
