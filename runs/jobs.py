"""Jobs that need one another, a few at a time: the study and the quickstart are lists of them."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Job:
    """Commands that run one after the other, once every job of `after` that is in the list has ended well."""

    name: str
    commands: list[list[str]]  # arguments for Python
    after: list[str] = field(default_factory=list)
    done: Callable[[], bool] = lambda: False  # True: nothing to do, an earlier run did it
    state: str = "waiting"  # waiting | running | done | failed


def work(jobs: list[Job], logs: Path, lanes: int = 2, threads: int = 1, show: bool = False) -> None:
    """Run the jobs in order of the list, `lanes` at a time, `threads` cores each; output goes to logs/NAME.log.

    threads=0: as many as each command takes by itself. show: also print each command as it starts and the last line it
    wrote. Raises ValueError where a job fails; what does not depend on it is still done.
    """
    lock, by_name = threading.Condition(), {job.name: job for job in jobs}
    logs.mkdir(parents=True, exist_ok=True)
    cores = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if threads}
    environment, begun = {**os.environ, **cores}, time.time()

    def pick() -> Job | None:
        for job in jobs:
            needs = [by_name[name].state for name in job.after if name in by_name]
            if job.state == "waiting" and "failed" in needs:
                job.state = "failed"
            if job.state == "waiting" and all(state == "done" for state in needs):
                return job
        return None

    def do(job: Job) -> bool:
        path, ok, start = logs / (job.name.replace("/", "_") + ".log"), True, time.time()
        with open(path, "a", encoding="utf-8") as log:
            for argv in job.commands if not job.done() else []:
                if show and argv[0] != "-c":
                    print(f"$ python {' '.join(argv)}", flush=True)
                print(f"$ python {' '.join(argv)}", file=log, flush=True)
                ok = ok and subprocess.call([sys.executable, *argv], stdout=log, stderr=log, env=environment) == 0
        left, ended = sum(other.state == "waiting" for other in jobs), sum(other.state == "done" for other in jobs) + 1
        minutes = (time.time() - begun) / 60
        how = f"done in {time.time() - start:3.0f} s" if ok else f"FAILED, see {path}"
        said = path.read_text(encoding="utf-8").strip().rsplit("\n", 1)[-1][:100] if show and ok else f"{left} left"
        said += "" if show else f", about {minutes / ended * left:.0f} min"
        print(f"{minutes:5.1f} min  {job.name:<40} {how}  {said}", flush=True)
        return ok

    def lane() -> None:
        while True:
            with lock:
                while (job := pick()) is None and any(other.state == "running" for other in jobs):
                    lock.wait(1)
                if job is None:
                    return
                job.state = "running"
            ok = do(job)
            with lock:
                job.state = "done" if ok else "failed"
                lock.notify_all()

    workers = [threading.Thread(target=lane) for _ in range(lanes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    failed = [job.name for job in jobs if job.state == "failed"]
    if failed:
        raise ValueError(f"{len(failed)} jobs failed or wait for one that did: {', '.join(failed[:6])}; see {logs}")


def plain(text: str) -> str:
    """A row's name as it stands in file names."""
    return "".join(c if c.isalnum() else "_" for c in text.lower()).strip("_")


def at_step(folder: Path, steps: int) -> bool:
    """Whether the training in folder has come to that step."""
    log = folder / "log.jsonl"
    if not (folder / "ckpt.pt").exists() or not log.exists():
        return False
    lines = log.read_text(encoding="utf-8").splitlines()
    return bool(lines) and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= steps


def copy_once(source: Path, target: Path) -> list[str]:
    """The command that copies a run once, so that the copy can go on and the original stay."""
    a, b = source.as_posix(), target.as_posix()
    return [
        "-c",
        f"import os, shutil; os.path.exists('{b}/ckpt.pt') or shutil.copytree('{a}', '{b}', dirs_exist_ok=True)",
    ]
