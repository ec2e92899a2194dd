"""The fault campaign: runs are killed and hindered in many ways, and must end with the weights of one left alone.

    python -m eval.faults --quick                        # every kind once or twice: a minute
    python -m eval.faults --out=results/faults.json      # more than 200 kills, every other fault five times

A trial starts processes forked from this one, which have torch loaded: a Python started anew takes a hundred times as
long as the few steps that are trained. A kill is SIGKILL. It comes at a moment that is drawn: before or after a call of
the part that is meant (a step, an evaluation, ..), between two pieces of a file that is being written, or at any time.
The campaign goes on where it was broken off: what is done stands in WORK/trials.jsonl.
"""

import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._dynamo  # what optimizers and DDP import late, a second each time: forks find it there

import ar2diff
import atomic
import heldout
import run_folder
import train
from checkpoint import load
from configurator import configure, run
from data import loader, toy
from eval.common import environment, write_json


@dataclass
class FaultsConfig:
    quick: bool = False  # every kind once, two kills a place
    seed: int = 0
    work: str = "out/faults"  # where the runs take place; a campaign that was broken off goes on from it
    out: str = ""  # the table as JSON; empty: nowhere


TINY = [
    *("--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=4", "--max_steps=12"),
    *("--warmup_steps=2", "--log_interval=1", "--eval_interval=3", "--eval_batches=2", "--save_interval=2"),
    *("--sample_interval=6", "--patience=60", "--dropout=0.1", "--paradigm=diffusion", "--prefix_attention=joint"),
    *("--target_attention=bidirectional", "--self_conditioning", "--grad_accum_steps=2"),
]
PASSING = ("tokens_per_s", "mfu", "seconds")  # what a log line says of the machine and not of the run
# Where a kill is meant to hit: kills of the whole campaign, processes.
PLACES = {
    "step": (45, 1),
    "evaluation": (30, 1),
    "checkpoint write": (45, 1),
    "any moment": (30, 1),
    "conversion": (15, 1),
    "data preparation": (15, 1),
    "step, 2 processes": (15, 2),
    "evaluation, 2 processes": (10, 2),
    "checkpoint write, 2 processes": (15, 2),
}
KILLS_A_LIFE = 5  # a run is killed so often before it may end and is compared


# Processes


class Child:
    """A forked process that runs work() as a command runs: its output goes to a file, its errors are one line."""

    def __init__(self, work: Callable[[], object], said: Path, **env: str):
        sys.stdout.flush()
        sys.stderr.flush()
        self.said = said
        self.pid = os.fork()
        if self.pid == 0:
            self._become(work, env)

    def _become(self, work, env) -> None:
        code = 1
        try:
            file = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            os.environ.update(env)
            run(lambda _: work())
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:  # a fork must not go on as its parent
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, seconds: float = 300) -> int:
        """Its exit status, negative for a signal. A process that hangs is killed and gives -1000."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return -1000


class Ticks:
    """Counts calls in a child and does something at one of them."""

    def __init__(self, at: int, action: Callable[[], object], count_file: Path | None = None):
        self.at, self.action, self.n, self.count_file = at, action, 0, count_file

    def tick(self) -> None:
        self.n += 1
        if self.count_file is not None:
            self.count_file.write_text(str(self.n))
        if self.n == self.at:
            self.action()

    def around(self, owner, name: str) -> None:
        """A tick before and a tick after each call of owner.name."""
        call = getattr(owner, name)

        def watched(*args, **named):
            self.tick()
            found = call(*args, **named)
            self.tick()
            return found

        setattr(owner, name, watched)

    def in_pieces(self) -> None:
        """A tick between pieces of a file that torch.save writes, each with the system before the tick."""
        save = torch.save

        def torn(state, file):
            whole = io.BytesIO()
            save(state, whole)
            data = whole.getvalue()
            for start in range(0, len(data), len(data) // 6 + 1):
                file.write(data[start : start + len(data) // 6 + 1])
                file.flush()
                self.tick()

        torch.save = torn


def watch(place: str, ticks: Ticks) -> None:
    """Let the ticks of a place be counted in this process."""
    kind = place.split(",")[0]
    calls = {
        "step": [(torch.Tensor, "backward"), (torch.optim.AdamW, "step"), (run_folder.Log, "write")],
        "evaluation": [(train, "evaluate"), (train, "sample_line"), (heldout, "draws_for")],
        "checkpoint write": [(os, "fsync"), (os, "replace"), (os, "link"), (atomic, "put_in_place")],
        "conversion": [(ar2diff, "load_model"), (ar2diff, "adapt"), (ar2diff, "save"), (os, "fsync"), (os, "replace")],
        "data preparation": [(loader._Writer, "file"), (loader._Writer, "_ordinary"), (os, "rename"), (os, "rmdir")],
    }[kind]
    for owner, name in calls:
        ticks.around(owner, name)
    if kind in ("checkpoint write", "conversion"):
        ticks.in_pieces()


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


# One campaign


class Bench:
    """The folders of a campaign, what is left alone there to compare with, and how a run is started."""

    def __init__(self, work: Path):
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.data, self.whole, self.ticks = work / "set", {}, {}
        self.patience = 0  # seconds; 0: what TINY says, enough for a machine that is busy otherwise

    def prepare(self) -> None:
        """The data, and a run of each kind that nothing happens to."""
        rng = random.Random(0)
        texts = [[97 + rng.randrange(4) for _ in range(1 + i % 5)] for i in range(60)]
        pairs = [(text, text) for text in texts]
        loader.write_pairs(self.data, {"train": pairs[10:], "valid": pairs[:10]}, "bytes", 6, 11)
        for place, (_, processes) in PLACES.items():
            if place != "any moment":
                out, count = self.fresh(f"whole {place}"), self.work / "count"
                codes = self.start(place, out, processes, Ticks(-1, kill_self, count))
                if any(codes):
                    raise ValueError(f"a run that nothing happens to fails: {self.said(out)[-300:]}")
                self.ticks[place] = int(count.read_text())
                self.whole[place] = self.result(place, out)
        begun = time.monotonic()
        self.start("any moment", self.fresh("whole any moment"), 1)
        self.seconds = time.monotonic() - begun
        self.whole["any moment"] = self.whole["step"]

    def fresh(self, name: str) -> Path:
        folder = self.work / name.replace(",", "").replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def said(self, folder: Path) -> str:
        return "".join(path.read_text(errors="replace") for path in sorted(folder.glob("said*")))

    def train(self, folder: Path, *flags: str) -> None:
        train.measured_flops = lambda *_: 1e12  # five matmuls, longer than the run
        patience = [f"--patience={self.patience}"] if self.patience else []
        argv = [*TINY, f"--data={self.data}", f"--out_dir={folder / 'run'}", "--init_from=resume", *patience, *flags]
        train.main(argv)

    def work_of(self, place: str, folder: Path) -> Callable[[], object]:
        """What a child does for a place."""
        if place == "conversion":
            source = self.work / "whole_ar" / "run" / "ckpt.pt"
            if not source.exists():
                ar = ["--paradigm=ar", "--prefix_attention=causal", "--target_attention=causal"]
                ar += ["--self_conditioning=false", "--max_steps=2"]
                Child(lambda: self.train(source.parent.parent, *ar), folder / "said_ar").wait()
            return lambda: ar2diff.main([f"--init_from={source}", f"--out_dir={folder / 'run'}", "--overwrite"])
        if place == "data preparation":
            return lambda: prepare_toy(folder)
        return lambda: self.train(folder)

    def begin(self, place: str, folder: Path, processes: int, ticks: Ticks | None = None, victim: int = 0) -> list:
        """Start a place's work, with ticks in one of the processes: the children."""
        work, children, port = self.work_of(place, folder), [], free_port()
        for rank in range(processes):
            env = {}
            if processes > 1:
                env = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
                env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

            def watched(rank=rank):
                if ticks is not None and rank == victim:
                    watch(place, ticks)
                work()

            children.append(Child(watched, folder / f"said_{rank}", **env))
        return children

    def start(self, *args) -> list[int]:
        """The same to its end: the exit statuses."""
        return [child.wait() for child in self.begin(*args)]

    def result(self, place: str, folder: Path) -> object:
        """What a finished life left, to be compared bit for bit."""
        if place == "data preparation":
            return {p.name: p.read_bytes() for p in sorted((folder / "run").rglob("*")) if p.is_file()}
        state = load(folder / "run" / "ckpt.pt")
        if place == "conversion":
            return {name: state[name] for name in ("model", "model_config", "step", "converted_from")}
        log = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
        kept = [{key: value for key, value in entry.items() if key not in PASSING} for entry in log]
        return [state[name] for name in ("model", "optimizer", "best_loss", "step")] + [kept]

    def finish(self, place: str, folder: Path, processes: int = 1) -> str:
        """Let the run end, and compare: "" or what is wrong."""
        codes = self.start(place, folder, processes)
        if any(codes):
            return f"lost: exit status {codes}: {self.said(folder)[-300:]}"
        if "Traceback" in self.said(folder):
            return "a traceback reached the user"
        return "" if same(self.result(place, folder), self.whole[place]) else "changed: not the undisturbed run's bits"

    def life(self, place: str, processes: int, kills: int, name: str, rng: random.Random) -> dict:
        """A run that is killed a few times and then left to end."""
        folder, hit, wrong = self.fresh(name), 0, ""
        while hit < kills and not wrong:
            if place == "any moment":
                child = Child(self.work_of(place, folder), folder / "said_0")
                time.sleep(rng.random() * self.seconds)
                os.kill(child.pid, signal.SIGKILL)
                codes = [child.wait()]
            else:
                ticks = Ticks(rng.randint(1, max(self.ticks[place] // 2, 2)), kill_self)
                # Only the leader writes checkpoints.
                victim = 0 if place.startswith("checkpoint") else rng.randrange(processes)
                codes = self.start(place, folder, processes, ticks, victim)
                if processes > 1 and codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (2, 0):
                    wrong = f"the other process ended with {codes[1 - victim]}: {self.said(folder)[-300:]}"
            hit += -signal.SIGKILL in codes
            if -signal.SIGKILL not in codes:
                if any(codes):
                    wrong = f"lost: exit status {codes}: {self.said(folder)[-300:]}"
                break  # it came to its end before the moment that was drawn
        return {"kills": hit, "wrong": wrong or self.finish(place, folder, processes)}


def prepare_toy(folder: Path) -> None:
    os.chdir(folder)  # a set says of itself by which command it was made
    toy.N_STRINGS = 200
    toy.main(["--out=run"])
    for half in [*Path("run").glob(".*.tmp"), *Path("run").glob(".*.old")]:  # of killed ones: their names hold a pid
        shutil.rmtree(half)


def same(a, b) -> bool:
    """Bit for bit, in nested dicts and lists of tensors and plain values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Other faults: each happens to a run at a moment that is drawn, says one line, and the run goes on to the same end


def hindered(bench: Bench, folder: Path, rng: random.Random, hook: Callable, code: int, says: str) -> str:
    """A run with hook() in it from a drawn backward pass on, which must end with that code and line; then its end."""
    ticks = Ticks(rng.randint(8, 60), hook)
    codes = bench.start("step", folder, 1, ticks)
    said = bench.said(folder)
    if codes != [code] or says not in said or "Traceback" in said:
        return f"exit status {codes}, wanted {code} and {says!r}: {said[-300:]}"
    return bench.finish("step", folder)


def disk_full(bench, folder, rng):
    limit = rng.randint(20_000, 100_000)  # bytes: the system refuses what is written beyond

    def hook():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return hindered(bench, folder, rng, hook, 2, "not written")


def permission_denied(bench, folder, rng):
    def hook():
        if os.getuid() == 0:
            os.setuid(65534)  # nobody: root may write anywhere
        else:
            (folder / "run").chmod(0o555)

    found = hindered(bench, folder, rng, hook, 2, "Permission denied")
    (folder / "run").chmod(0o755)
    return found


def folder_gone(bench, folder, rng):
    return hindered(bench, folder, rng, lambda: shutil.rmtree(folder / "run"), 2, "error: ")


def sigterm(bench, folder, rng):
    return hindered(bench, folder, rng, lambda: os.kill(os.getpid(), signal.SIGTERM), 143, "stopped by SIGTERM at step")


def ctrl_c(bench, folder, rng):
    return hindered(bench, folder, rng, lambda: os.kill(os.getpid(), signal.SIGINT), 130, "stopped by SIGINT at step")


def out_of_memory(bench, folder, rng):
    return hindered(bench, folder, rng, lambda: torch.empty(1 << 60), 2, "--grad_accum_steps=4 (the same run")


def no_number(bench, folder, rng):
    def hook():
        backward = torch.Tensor.backward
        torch.Tensor.backward = lambda term, *rest: backward(term * float("nan"), *rest)

    found = hindered(bench, folder, rng, hook, 2, "bad_batch.json the batch and how to replay it")
    return found or ("" if (folder / "run" / "bad_batch.json").exists() else "no bad_batch.json")


def half_way(bench: Bench, folder: Path, rng: random.Random) -> None:
    """A run that was killed after its second checkpoint or later."""
    bench.start("step", folder, 1, Ticks(rng.randint(45, 80), kill_self))


def truncated(bench, folder, rng):
    half_way(bench, folder, rng)
    last = folder / "run" / "ckpt.pt"
    os.truncate(last, rng.randrange(last.stat().st_size))
    wrong = bench.finish("step", folder)
    return wrong or ("" if "put aside as ckpt.pt.damaged" in bench.said(folder) else "nothing was said")


def bit_flipped(bench, folder, rng):
    half_way(bench, folder, rng)
    last = folder / "run" / "ckpt.pt"
    data = bytearray(last.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    last.write_bytes(data)
    wrong = bench.finish("step", folder)
    return wrong or ("" if "put aside as ckpt.pt.damaged" in bench.said(folder) else "nothing was said")


def torn_log(bench, folder, rng):
    half_way(bench, folder, rng)
    log = folder / "run" / "log.jsonl"
    with open(log, "a") as file:
        file.write('{"step": 99, "lo'[: rng.randint(1, 16)])
    return bench.finish("step", folder)


def data_changed(bench, folder, rng):
    half_way(bench, folder, rng)
    meta = bench.data / "meta.json"
    before = meta.read_text()
    meta.write_text(before.replace(json.loads(before)["sha256"], f"{rng.getrandbits(256):064x}"))
    codes, said = bench.start("step", folder, 1), bench.said(folder)
    meta.write_text(before)
    if codes != [2] or "has changed since" not in said:
        return f"exit status {codes}: {said[-300:]}"
    return bench.finish("step", folder)


def two_in_one_folder(bench, folder, rng):
    """The first is at work, and held at a moment that is drawn; the second must be refused, and the first not care."""
    held, go = folder / "held", folder / "go"

    def hook():
        held.touch()
        while not go.exists():
            time.sleep(0.01)

    first = bench.begin("step", folder, 1, Ticks(rng.randint(1, 60), hook))[0]
    while not held.exists():
        time.sleep(0.01)
    codes, said = bench.start("step", folder, 1), bench.said(folder)
    go.touch()
    code = first.wait()
    if codes != [2] or f"is in use by process {first.pid} on" not in said or code:
        return f"exit status {codes}, of the first {code}: {said[-300:]}"
    return bench.finish("step", folder)


def lock_of_the_dead(bench, folder, rng):
    half_way(bench, folder, rng)
    if not (folder / "run" / "lock").exists():
        return "the killed run left no lock"
    return bench.finish("step", folder)


def one_of_two(bench: Bench, folder: Path, rng: random.Random, hook: Callable, words: tuple[str, ...]) -> str:
    """Two processes, and something happens to one: the other must end by itself and name it."""
    place, victim, begun = "step, 2 processes", rng.randrange(2), time.monotonic()
    bench.patience = 5
    children = bench.begin(place, folder, 2, Ticks(rng.randint(8, 60), hook), victim)
    bench.patience = 0
    code = children[1 - victim].wait()
    seconds = time.monotonic() - begun
    os.kill(children[victim].pid, signal.SIGKILL)
    children[victim].wait()
    said = (folder / f"said_{1 - victim}").read_text()
    if code != 2 or not any(word.format(victim) in said for word in words) or "Traceback" in said:
        return f"exit status {code} after {seconds:.0f} s: {said[-300:]}"
    return bench.finish(place, folder, 2)


def dead_process(bench, folder, rng):
    words = ("process {0} (", "torchrun's store does not answer")  # with number 0 goes the store, if torchrun has none
    return one_of_two(bench, folder, rng, kill_self, words)


def stopped_process(bench, folder, rng):
    words = ("process {0} (", "torchrun's store does not answer")
    return one_of_two(bench, folder, rng, lambda: os.kill(os.getpid(), signal.SIGSTOP), words)


def hung_process(bench, folder, rng):
    return one_of_two(bench, folder, rng, lambda: time.sleep(1000), ("process {0} (",))


FAULTS = {
    "disk full, half-way through a file": disk_full,
    "permission denied": permission_denied,
    "out_dir removed": folder_gone,
    "SIGTERM": sigterm,
    "Ctrl-C": ctrl_c,
    "out of memory": out_of_memory,
    "loss that is no number": no_number,
    "checkpoint truncated": truncated,
    "checkpoint with one bit flipped": bit_flipped,
    "last log line torn": torn_log,
    "data changed": data_changed,
    "second run in one out_dir": two_in_one_folder,
    "lock of a killed run": lock_of_the_dead,
    "one of two processes dead": dead_process,
    "one of two processes stopped": stopped_process,
    "one of two processes hung": hung_process,
}


def main(argv: list[str]) -> dict:
    """Run what is not done yet, print the table, write the JSON; exits with status 1 where something was wrong."""
    cfg = configure(FaultsConfig, argv)
    torch.set_num_threads(1)  # forks share no threads, and one thread is enough for these sizes
    work, begun, made_on = Path(cfg.work).absolute(), time.monotonic(), environment()
    bench, journal = Bench(work), work / ("quick.jsonl" if cfg.quick else "trials.jsonl")
    bench.prepare()
    lines = journal.read_text().splitlines() if journal.exists() and not cfg.quick else []
    trials = [trial for trial in map(json.loads, lines) if trial["seed"] == cfg.seed]
    done = {(trial["fault"], trial["number"]) for trial in trials}
    if cfg.quick:
        journal.write_text("")

    def record(fault, number, **found):
        trials.append({"fault": fault, "number": number, "seed": cfg.seed, "commit": made_on["commit"], **found})
        with open(journal, "a") as file:
            file.write(json.dumps(trials[-1]) + "\n")

    for fault, number, trial in plan(cfg.quick):
        if (fault, number) not in done:
            rng, since = random.Random(f"{cfg.seed} {fault} {number}"), time.monotonic()
            found = trial(bench, rng, trials)
            if found is not None:
                record(fault, number, seconds=round(time.monotonic() - since, 2), **found)
            if found is not None and found["wrong"]:
                print(f"{fault}, trial {number}: {found['wrong']}", flush=True)
    table = summary(trials)
    print_table(table)
    kills, wrong = sum(row["kills"] for row in table), sum(row["lost_or_changed"] for row in table)
    seconds = time.monotonic() - begun
    print(f"{kills} kills, {len(trials)} runs, {wrong} lost or changed, {seconds:.0f} s now")
    result = {"kills": kills, "lost_or_changed": wrong, "table": table, "seconds_this_time": round(seconds, 1)}
    result |= {"command": " ".join(["python -m eval.faults", *argv]), "seed": cfg.seed, **made_on}
    result["commit"] = ", ".join(sorted({trial["commit"] for trial in trials}))
    if cfg.out:
        write_json(cfg.out, result)
    if wrong:
        raise SystemExit(1)
    return result


def plan(quick: bool):
    """(fault, number, trial(bench, rng, trials) -> what came of it) in their order."""
    for place, (kills, processes) in PLACES.items():
        wanted = 2 if quick else kills

        def lives(bench, rng, trials, place=place, processes=processes, wanted=wanted):
            had = sum(trial["kills"] for trial in trials if trial["fault"] == f"kill: {place}")
            if had >= wanted:
                return None
            return bench.life(place, processes, min(KILLS_A_LIFE, wanted - had), f"life {place}", rng)

        for number in range(wanted):  # a life may end with fewer kills than it could have had, never mind
            yield f"kill: {place}", number, lives
    for fault, happens in FAULTS.items():
        for number in range(1 if quick else 5):

            def one(bench, rng, _, fault=fault, happens=happens):
                return {"kills": 0, "wrong": happens(bench, bench.fresh(f"fault {fault}"), rng)}

            yield fault, number, one


def summary(trials: list[dict]) -> list[dict]:
    """One row for each fault, in the order of the trials."""
    rows = {}
    for trial in trials:
        row = rows.setdefault(
            trial["fault"], {"fault": trial["fault"], "runs": 0, "kills": 0, "lost_or_changed": 0, "seconds": 0.0}
        )
        row["runs"] += 1
        row["kills"] += trial["kills"]
        row["lost_or_changed"] += bool(trial["wrong"])
        row["seconds"] = round(row["seconds"] + trial["seconds"], 2)
    return list(rows.values())


def print_table(rows: list[dict]) -> None:
    print(f"{'fault':<38}{'runs':>6}{'kills':>7}{'lost or changed':>17}{'seconds':>9}")
    for row in rows:
        print(f"{row['fault']:<38}{row['runs']:>6}{row['kills']:>7}{row['lost_or_changed']:>17}{row['seconds']:>9.1f}")


if __name__ == "__main__":
    run(main)
