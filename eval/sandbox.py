"""Run programs that a model wrote, with their tests, each in a process of its own.

A program gets a fresh interpreter with the standard library, an empty folder, no environment, no
input, no second process or thread, and Limits. As root it runs as an unused user. On Linux, if the
system allows it, it has no network, sees no other process and writes only to its folder.
isolation() tells what holds on this machine.

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
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 60  # for an interpreter on a busy machine
CLIP = 200  # characters of Outcome.detail


@dataclass(frozen=True)
class Limits:
    """The resources of one program."""

    seconds: float = 30.0  # wall clock, program and tests together
    cpu_seconds: int = 8  # does not depend on other processes; MBPP's slowest reference takes 2.5
    memory_mb: int = 1024  # MiB of address space
    output_bytes: int = 1 << 20  # standard output and standard error together
    file_bytes: int = 1 << 24  # of one file, and of the folder if it is in memory


DEFAULT = Limits()


class Outcome(NamedTuple):
    """The verdict on a program."""

    passed: bool
    status: str  # passed | failed | not_python | timeout | memory | output | exit | killed
    detail: str  # one line: the error or the last line of output


def run_tests(program: str, tests: str, limits: Limits = DEFAULT) -> Outcome:
    """Run the program, then the tests in its names.

    Statuses: failed (it or a test raised), not_python, timeout (wall clock or CPU), memory, output
    (too much), exit (before its tests ended), killed (by a signal). Raises ValueError for bad
    tests, OSError if the sandbox itself does not work.
    """
    return _run(program, tests, imports_of(tests), limits)[0]


def run_many(jobs: Sequence[tuple[str, str]], limits=DEFAULT, workers: int = 0) -> list[Outcome]:
    """Return the outcome of each (program, tests), in order. workers: 0 for one a core."""
    if not workers:
        affinity = getattr(os, "sched_getaffinity", None)  # Linux
        workers = len(affinity(0)) if affinity else os.cpu_count() or 1
    programs, tests = zip(*jobs) if jobs else ((), ())
    with ThreadPoolExecutor(workers) as pool:
        outcomes = pool.map(run_tests, programs, tests, repeat(limits))
        return list(tqdm(outcomes, total=len(jobs), unit="program", leave=False, disable=None))


def isolation() -> str:
    """Run an empty program and return one sentence on its restrictions."""
    facts = _run("", "pass", [], DEFAULT)[1]
    user = next((f"an unused user ({fact[5:]})" for fact in facts if fact.startswith("user=")), "")
    refused = ", ".join(fact[3:] for fact in facts if fact.startswith("no_"))
    hidden = "namespaces" in facts
    parts = [
        f"as {user or f'your own user ({os.getuid()})'}",
        "without network" if hidden or "filter" in facts else "WITH network",
        f"seeing {'no other process (own namespaces)' if hidden else 'other processes'}",
        "writing only to an empty folder in memory"
        if "sealed" in facts
        else f"writing where {'everyone' if user else 'you'} may",
        f"without the limits {refused}" if refused else "with all limits",
    ]
    return f"sandbox: programs run {', '.join(parts)}"


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


def _run(program: str, tests: str, modules: list, limits: Limits) -> tuple[Outcome, list[str]]:
    """Return the outcome and the restrictions in force."""
    if not hasattr(os, "fork"):
        raise ValueError("programs can only be contained on Linux or macOS; use WSL on Windows")
    command = [sys.executable, "-s", "-S", "-B", str(CHILD), *map(str, astuple(limits))]
    # PYTHONHASHSEED: sets have one order, so a program has one verdict.
    env = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    env |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    job = marshal.dumps((program, tests, modules))
    timeout = limits.seconds + START_SECONDS
    parent = tempfile.mkdtemp(prefix="program-")  # the program cannot replace a folder in it
    try:
        os.chmod(parent, 0o711)
        folder = os.path.join(parent, "folder")
        os.mkdir(folder)
        options = dict(cwd=folder, env=env, start_new_session=True, capture_output=True)
        done = subprocess.run(command, input=job, timeout=timeout, **options)
    except subprocess.TimeoutExpired as expired:  # the judge is dead
        done = expired
    finally:
        _remove(parent)
    errors = (done.stderr or b"").decode(errors="replace").strip()
    first, _, rest = (done.stdout or b"").decode(errors="replace").partition("\n")
    status, _, detail = rest.partition("\n")
    if errors or not first.startswith("ready"):  # the program cannot write there
        reason = errors.rpartition("\n")[2] or f"no answer within {START_SECONDS} s"
        raise OSError(f"the sandbox does not work here: {reason}")
    detail = "".join(c if c.isprintable() else " " for c in detail).strip()[:CLIP]
    status = status or "killed"
    return Outcome(status == "passed", status, detail), first.split()[1:]


def _remove(folder: str) -> None:
    """Remove a folder, also if a program took permissions away or nested thousands of folders."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
