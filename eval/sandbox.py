"""Runs programs that a model wrote, with their tests, each in a process of its own; pass@k of eval/code.py counts them.

What a program gets: a fresh interpreter with the standard library and nothing else, an empty folder to write to, an
empty environment, no input, no open descriptors but the pipes of its judge, and Limits. As root it runs as a user that
nothing else runs as. On Linux, where the system allows it, it has no network, sees no other process and cannot write
outside its folder; isolation() says in a sentence what holds here. Whatever it starts is killed with it.

A program passes if its judge, another process, reads a random password that comes with the tests and is sent back after
the last of them. Status 0 is no pass, nor is leaving early in any way. What a program replaced in modules is put back
before its tests run, and they reach it only then.

This keeps accidents and lazy cheats from harm. It is no wall against an attacker: a kernel bug, or files that everyone
may read, are open to it. And as tests of any kind in one process, these can be fooled by a program that means to:

- an answer whose __eq__ says yes to all, or that defines the names its tests use (its own abs, say)
- code of the program that runs while the tests do, be it the function under test, a signal handler, a finalizer, an
  audit hook or, where Limits.processes allows it, a thread: it can read the tests and the password from frames and the
  pipe, and patch what they use
- a change inside a class or function of the standard library (names in modules are put back, what they name is not)
- ctypes, which can write anywhere in the process

So look at what passed before you believe a surprising number.
"""

import ast
import marshal
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from eval.sandbox_child import pack

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = (
    60  # for an interpreter to start on a busy machine; what takes longer is an error of ours, not a verdict
)
CLIP = 200  # characters of Outcome.detail


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 30.0  # wall clock, program and tests together
    cpu_seconds: int = 8  # stays fair on a busy machine, so it is the one to be hit; one gold answer of MBPP takes 2.5
    memory_mb: int = 1024  # MiB of address space, of each process
    output_bytes: int = 1 << 20  # standard output and standard error together
    file_bytes: int = 1 << 24  # of one file; of all together where the folder is in memory (see isolation)
    processes: int = 1  # and threads, itself included; more only where they can be counted apart from the user's

    def __post_init__(self):
        for name, value in vars(self).items():
            whole = type(value) is int or name == "seconds" and type(value) is float
            if not whole or not 0 < value < 1 << 40:
                kind = "" if name == "seconds" else "whole "
                raise ValueError(f"{name} must be a positive {kind}number, got {value!r}")


class Outcome(NamedTuple):
    """What became of a program."""

    passed: bool
    status: str  # passed | failed | not_python | timeout | memory | output | exit | killed
    detail: str  # one line of at most CLIP characters: what it said last, or why it ended


def run_tests(program: str, tests: str, limits: Limits = Limits()) -> Outcome:  # noqa: B008  (frozen)
    """Run the program, then the tests in its names; passed if they end without raising.

    Statuses: failed (it or a test raised), not_python, timeout (wall clock or CPU), memory, output (too much of it),
    exit (left before its tests ended), killed (by a signal). Raises ValueError where the tests are empty or no Python,
    OSError where the sandbox itself does not start.
    """
    modules = check_tests(tests)
    if not isinstance(program, str):
        raise ValueError(f"a program must be text, got {type(program).__name__}")
    return (_judged if hasattr(os, "fork") else _timed)(program, tests, modules, limits)[0]


def run_many(
    jobs: Sequence[tuple[str, str]],
    limits: Limits = Limits(),  # noqa: B008
    workers: int = 0,
    progress: bool = True,
) -> list[Outcome]:
    """The outcome of each (program, tests), in order; workers at a time, 0 for as many as there are cores.

    Raises as run_tests does, and then starts no more programs.
    """
    for number, (_, tests) in enumerate(jobs):
        try:
            check_tests(tests)
        except ValueError as error:
            raise ValueError(f"program {number}: {error}") from None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers or cores) as pool:
        futures = [pool.submit(run_tests, *job, limits) for job in jobs]
        off = None if progress else True  # None: drawn on a terminal only
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), unit="program", leave=False, disable=off):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def isolation() -> str:
    """One sentence on what holds programs back on this machine, found out by starting one."""
    if not hasattr(os, "fork"):
        return (
            "sandbox: only a clock here, as this system has no fork and no limits; programs run as you, with your "
            "files and network (use Linux, or WSL on Windows)"
        )
    facts = _judged("", "pass", [], Limits())[1]
    user = next((fact[5:] for fact in facts if fact.startswith("user=")), None)
    parts = [f"as an unused user ({user})" if user else f"as your own user ({os.getuid()})"]
    if "namespaces" in facts:
        parts.append("without network, seeing no other process (own namespaces)")
    else:
        network = "without network or signals to others (system calls refused)" if "filter" in facts else "WITH network"
        parts.append(f"{network}, as no namespace can be had here")
    if "readonly" not in facts:
        parts.append(f"able to write where {'everyone' if user else 'you'} may")
    elif "memory_folder" in facts:
        parts.append("able to write only to an empty folder in memory")
    missing = [fact[3:] for fact in facts if fact.startswith("no_")] + ["AS"] * (sys.platform == "darwin")
    parts.append(f"limits that the system refuses: {', '.join(missing)}" if missing else "all limits set")
    return f"sandbox: programs run {', '.join(parts)}"


def check_tests(tests: str) -> list[str]:
    """Modules that tests import, and names that may be some. Raises ValueError where they are empty or no Python."""
    try:
        tree = ast.parse(tests)
    except TypeError:
        raise ValueError(f"the tests must be text, got {type(tests).__name__}") from None
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


def _judged(program: str, tests: str, modules: list[str], limits: Limits) -> tuple[Outcome, list[str]]:
    """The outcome, and the judge's words on what is in force."""
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        argv = [str(value) for value in astuple(limits)]
        with _start(argv, folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
            late = False
            try:
                job = marshal.dumps((program, tests, modules))
                out, trouble = child.communicate(job, timeout=limits.seconds + START_SECONDS)
            except subprocess.TimeoutExpired:
                late = True
            finally:
                if child.returncode is None:
                    os.killpg(child.pid, signal.SIGKILL)
            if late:
                out, trouble = child.communicate()
    finally:
        _remove(folder)
    first, _, rest = out.decode(errors="replace").partition("\n")
    status, _, detail = rest.partition("\n")
    if trouble or not first.startswith("ready"):  # ours, not the program's, which cannot write there
        said = _line(trouble.decode(errors="replace").strip().rpartition("\n")[2])
        raise OSError(f"the sandbox does not work here: {said or f'it said nothing for {START_SECONDS} s'}")
    if not status:  # the program, as our own user, killed or stopped its judge, and may have outlived it
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        status, detail = ("timeout", "stopped its judge") if late else ("killed", "took its judge with it")
    return Outcome(status == "passed", status, _line(detail)), first.split()[1:]


def _timed(program: str, tests: str, modules: list[str], limits: Limits) -> tuple[Outcome, list[str]]:
    """The same where there is nothing but a clock (Windows). The tests wait in the pipe while the program runs."""
    passwords = [secrets.token_hex() for _ in range(2)]
    folder = tempfile.mkdtemp(prefix="program-")
    try:
        with tempfile.TemporaryFile() as answer:
            with _start(["play"], folder, stdout=answer, stderr=subprocess.DEVNULL) as child:
                late = False
                try:
                    job = pack((program, modules, passwords[0])) + pack((tests, passwords[1]))
                    child.communicate(job, timeout=limits.seconds)
                except subprocess.TimeoutExpired:
                    late = True
                finally:
                    child.kill()
            answer.seek(0)
            text = answer.read(1 << 16).decode(errors="replace")
    finally:
        _remove(folder)
    if text == f"{passwords[0]}\n{passwords[1]}\n":
        return Outcome(True, "passed", ""), []
    status, _, detail = text.removeprefix(f"{passwords[0]}\n").partition(" ")
    if late:
        status, detail = "timeout", f"ran for {limits.seconds:g} s"
    elif status not in ("failed", "memory", "exit", "not_python"):
        status, detail = "exit", f"left with status {child.returncode} before its tests ended"
    return Outcome(False, status, _line(detail)), []


def _start(argv: list[str], folder: str, **files) -> subprocess.Popen:
    """Start the child in a session of its own, with nothing of our environment but what an interpreter may need."""
    env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    # One order of sets, so one verdict per program; and what it prints never makes it fail.
    env |= {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    command = [sys.executable, "-s", "-S", "-B", str(CHILD), *argv]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, cwd=folder, env=env, start_new_session=True, close_fds=True, **files
    )


def _remove(folder: str) -> None:
    """Remove a folder whatever a program made of it: no permissions, or folders too deep for a recursion or a path."""
    found = [folder]
    try:
        for path in found:  # grows meanwhile
            os.chmod(path, 0o700)
            for entry in list(os.scandir(path)):
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)
                    found.append(os.path.join(folder, secrets.token_hex()))
                    os.rename(entry.path, found[-1])  # up to the top
                else:
                    os.unlink(entry.path)
        for path in reversed(found):
            os.rmdir(path)
    except OSError:  # it renamed or replaced the folder: what is left is litter among temporary files
        pass


def _line(text: str) -> str:
    """Text as one printable line of at most CLIP characters."""
    line = "".join(c if c.isprintable() else " " for c in text).strip()
    return line if len(line) <= CLIP else line[: CLIP - 3] + "..."
