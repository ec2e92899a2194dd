"""Run programs that a model wrote, with their tests, each in a process of its own.

A program gets a fresh interpreter with the standard library, an empty folder, no environment, no
input, no second process or thread, and Limits. As root it runs as an unused user. On Linux, if the
system allows it, it has no network, sees no other process and writes only to its folder.
isolation() lists what holds on this machine. macOS has only the limits, without that of memory.

A program passes if its judge, another process, reads a random password that comes with the tests
and is sent back after the last one. Names in modules that the program replaced are restored before
its tests run. This contains accidents and simple cheats, no attacker with a kernel bug, and it
hides no file that everyone may read. A program can fool tests that share its process by:

- an answer whose __eq__ is always true, or names that the tests use (its own abs)
- code that runs during the tests or inspects its caller: it can read tests and password from frames
- a change inside a class or function of the standard library, or ctypes

So look at the programs that passed before you believe a surprising number.
"""

import ast
import marshal
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

CHILD = Path(__file__).with_name("sandbox_child.py")
PROTECTIONS = ["own-namespaces", "read-only-files", "unused-user", "call-filter"]


class Limits(NamedTuple):
    """The resources of one program."""

    seconds: float = 30.0  # wall clock, program and tests together
    cpu_seconds: int = 8  # does not depend on other processes; MBPP's slowest reference takes 2.5
    memory_mb: int = 1024  # MiB of address space
    file_bytes: int = 1 << 24  # of one file, and of the folder if it is in memory


DEFAULT = Limits()


def run_tests(program: str, tests: str, limits: Limits = DEFAULT) -> str:
    """Run the program, then the tests in its names. Return its status.

    passed, failed (it or a test raised), not_python, timeout (wall clock or CPU), memory, exit
    (before its tests ended) or killed (by a signal). Raises ValueError for bad
    tests, OSError if the sandbox itself does not work.
    """
    return _run(program, tests, imports_of(tests), limits)[0]


def run_many(jobs: Sequence[tuple[str, str]], limits=DEFAULT, workers: int = 0) -> list[str]:
    """Return the status of each (program, tests), in order. workers: 0 for one a core."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    with ThreadPoolExecutor(workers or cores) as pool:
        statuses = pool.map(lambda job: run_tests(*job, limits), jobs)
        return list(tqdm(statuses, total=len(jobs), unit="program", leave=False, disable=None))


def isolation() -> str:
    """Run an empty program and return what confines it on this machine, and what does not.

    own-namespaces: no network, no other process in sight. read-only-files: except one folder in
    memory. call-filter: no network, no signals to other processes.
    """
    held = _run("", "pass", [], DEFAULT)[1]
    missing = [f"WITHOUT {name}" for name in PROTECTIONS if name not in held]
    return f"sandbox: {', '.join(held + missing)}"


def imports_of(tests: str) -> list[str]:
    """Return the modules that the tests import. Raises ValueError for empty or invalid tests."""
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests are no Python: {error}") from None
    if not tree.body:
        raise ValueError("the tests are empty, so every program would pass them")
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


def _run(program: str, tests: str, modules: list, limits: Limits) -> tuple[str, list[str]]:
    """Return the status and the restrictions in force."""
    if not hasattr(os, "fork"):
        raise ValueError("programs can only be contained on Linux or macOS; use WSL on Windows")
    seconds, *numbers = limits
    command = [sys.executable, "-s", "-S", "-B", str(CHILD), *map(str, numbers)]
    # PYTHONHASHSEED: sets have one order, so a program has one verdict.
    env = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    env |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    job = marshal.dumps((program, tests, modules))
    parent = tempfile.mkdtemp(prefix="program-")  # the program cannot replace a folder in it
    try:
        os.chmod(parent, 0o711)
        folder = os.path.join(parent, "folder")
        os.mkdir(folder)
        ready, status, errors = _judge(command, job, seconds, cwd=folder, env=env)
    finally:
        # Not shutil.rmtree: a program may take permissions away or nest thousands of folders.
        for cleaner in (["chmod", "-R", "u+rwx", parent], ["rm", "-rf", parent]):
            subprocess.run(cleaner, stderr=subprocess.DEVNULL, check=False)
    if errors or not ready.startswith("ready"):  # the program cannot write there
        reason = errors.strip().rpartition("\n")[2] or "no answer"
        raise OSError(f"the sandbox does not work here: {reason}")
    return status or "killed", ready.split()[1:]


def _judge(command: list[str], job: bytes, seconds: float, **place) -> list[str]:
    """Return the first line of the child, the status, and the faults of the child itself."""
    place |= dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, bufsize=0, start_new_session=True, **place) as child:
        try:
            ready = child.stdout.readline()
            status, errors = child.communicate(job, seconds)
        except subprocess.TimeoutExpired:
            status, errors = b"timeout", b""
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    return [text.decode(errors="replace") for text in (ready, status, errors)]
