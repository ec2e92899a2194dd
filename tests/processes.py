"""Forked processes and a small data set for tests. A fork has torch loaded: it starts at once."""

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it late, 2 s for each child

from configurator import run
from data.loader import write_pairs

TINY = "--device=cpu --n_layer=1 --n_head=2 --n_embd=16 --batch_size=4 --log_interval=1".split()


def same(a, b) -> bool:
    """Compare bit for bit, also inside lists and dicts."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def make_copy_set(folder: Path, n: int = 60, target_length: int = 6) -> Path:
    """Write a data set: copy 1 to 5 letters out of four."""
    choose = random.Random(0)
    texts = [[97 + choose.randrange(4) for _ in range(1 + i % 5)] for i in range(n)]
    pairs = [(text, text) for text in texts]
    splits = {"train": pairs[10:], "valid": pairs[:10]}
    write_pairs(folder, splits, "bytes", target_length, 5 + target_length)
    return folder


class Child:
    """A fork that calls work() like a command: output to a file, an error is one line, status 2."""

    def __init__(self, work: Callable[[], object], output: Path, **env: str):
        sys.stdout.flush()
        sys.stderr.flush()
        self.output = output
        self.pid = os.fork()
        if self.pid == 0:
            self._become(work, env)

    def _become(self, work, env) -> None:
        status = 1
        try:
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = os.fdopen(1, "w", buffering=1)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            sys.argv = ["test"]
            os.environ.update(env)
            run(lambda _: work())
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # a fork must never return into pytest
            traceback.print_exc()
        finally:
            os._exit(status)

    def wait(self, seconds: float = 120) -> int:
        """Return the exit status, negative for a signal. A child that hangs is killed: -1000."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return -1000


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(processes: int, work: Callable[[int], object], folder: Path) -> list[Child]:
    """Start work(rank) in connected processes; rank r writes to folder/output_r."""
    port = free_port()
    children = []
    for rank in range(processes):
        env = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        output = folder / f"output_{rank}"
        output.unlink(missing_ok=True)
        env = env if processes > 1 else {}
        children.append(Child(lambda rank=rank: work(rank), output, **env))
    return children
