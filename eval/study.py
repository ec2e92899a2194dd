"""Studies: tables whose cells are chains of commands, from pretraining to evaluation.

A job is one cell with one seed. Its recipe is the list of its commands with all their settings.
Each result is one line of a JSON-lines file. A job is skipped if its line has the same recipe.
The folder of a model has a hash of the recipe so far in its name. So jobs share models, a killed
training resumes, and a model with other settings is never reused.
"""

import gzip
import hashlib
import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from configurator import require
from data.loader import OUT, build_if_missing
from eval.common import read_lines, write_lines
from infra.checkpoint import load, write_atomically

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Stage:
    """One command of a recipe, without the paths of its checkpoints."""

    name: str
    argv: tuple[str, ...]  # a script or -m module, then flags
    source: "Stage | None" = None  # the stage whose checkpoint it starts from

    @property
    def recipe(self) -> list[str]:
        earlier = self.source.recipe if self.source else []
        return [*earlier, " ".join(self.argv)]

    @property
    def folder(self) -> str:
        digest = hashlib.sha256(json.dumps(self.recipe).encode()).hexdigest()
        return f"{self.name}-{digest[:8]}"

    def command(self, out: Path) -> list[str]:
        """Return the arguments for Python, with paths below `out`."""
        argv = list(self.argv)
        if self.source:
            argv.append(f"--init_from={out / self.source.folder / 'ckpt.pt'}")
        if argv[0] == "-m":
            return [*argv, f"--json={out / self.folder}.json"]
        argv += [f"--out_dir={out / self.folder}"]
        argv += ["--init_from=resume"] if argv[0] == "train.py" else ["--check", "--overwrite"]
        return [str(ROOT / argv[0]), *argv[1:]]


def stage(name: str, command: str, source: Stage | None = None) -> Stage:
    return Stage(name, tuple(shlex.split(command)), source)


class Job(NamedTuple):
    name: str  # of its line in the JSON-lines file
    stage: Stage  # the evaluation


# What is trained

TASKS = {  # data set -> the evaluation of a model that was fine-tuned on it
    "mini_translation": "eval.translation --n=500 --items=false",
    "mini_qa": "eval.qa --n=500 --items=false",
    "mini_code": "eval.code --n=500 --items=false --run_code",
}
NETWORK = "--n_layer=3 --n_embd=96"  # flags of every model from scratch
AR_STEPS = 600
N = 200  # steps of adaptation
TUNE_STEPS = 200
SCRATCH_STEPS = 300  # diffusion pretraining of Table 1
SAMPLED_ITEMS = 200  # of Table 3: an item costs up to 160 network calls there


# Rows of the tables

# The paper's WMT14 En-Fr BLEU, SQuAD F1 and MBPP pass@80, size Base. Its N is 10K and 100K of 1M
# steps. Its diffusion model has as many steps as its AR model, which is twice the FLOPs.
PAPER_1 = {  # architecture, objective
    ("encoder_decoder", "prefix_lm"): "27.6, 75.8, 0.0",
    ("decoder_only", "prefix_lm"): "29.8, 77.4, 12.2",
    ("encoder_decoder", "span_corruption"): "28.7, 78.2, 0.0",
    ("decoder_only", "span_corruption"): "29.1, 80.6, 11.1",
}
PAPER_2 = {
    "AR": "33.27, 68.11, 5.5",
    "diffusion, equal FLOPs": "29.83, 77.41, 12.2",
    "AR2Diff_0": "29.62, 64.77, 1.1",
    "AR2Diff_N": "29.41, 68.12, 4.4",
    "AR2Diff_2N": "29.92, 71.87, 7.7",
}
PAPER_3 = {  # steps, samples; without BLEU
    (5, 8): "77.41, 5.5",
    (10, 8): "77.41, 12.2",
    (20, 8): "77.72, 16.7",
    (10, 4): "77.51, 11.1",
    (10, 16): "77.13, 13.3",
}
SCRATCH = (
    "--paradigm=diffusion --prefix_attention=bidirectional --target_attention=bidirectional"
    " --self_conditioning"
)
PAPER_SETTINGS = "--prefix_attention=joint --shift=false --self_conditioning=false"
SAMPLER = "--steps=10 --candidates=1"


class Row(NamedTuple):
    """How a fine-tuned model is made from the AR model, or from scratch."""

    times: float = 0  # steps of adaptation, or of diffusion from scratch, in N
    convert: str = ""  # flags of the conversion
    adapt: str = ""  # flags of the adaptation
    start: str = "converted"  # converted | ar | scratch


def fine_tuned(seed: int, row: Row, task: str) -> Stage:
    """Return the last training of a row."""

    def train(name: str, data: str, steps: int, flags: str, source: Stage | None = None) -> Stage:
        settings = f"--data={OUT}/{data} --max_steps={steps} --seed={seed}"
        return stage(name, f"train.py {settings} {flags}", source)

    steps = round(row.times * N)
    adapt = f"--schedule=constant {row.adapt}"
    if row.start == "scratch":
        model = train("scratch", "mini", steps, f"{NETWORK} {SCRATCH} {adapt}")
    else:
        model = train("ar", "mini", AR_STEPS, f"{NETWORK} --schedule=constant")
    if row.start == "converted":
        model = stage("convert", f"ar2diff.py {row.convert}", model)
        if row.times:
            model = train("adapt", "mini", steps, adapt, model)
    return train(task, task, TUNE_STEPS, "", model)


def judge(seed: int, row: Row, task: str, sampler: str = SAMPLER) -> Stage:
    """Return the evaluation of a row. AR decodes greedily."""
    flags = "" if row.start == "ar" else sampler
    return stage("eval", f"-m {TASKS[task]} --seed=0 {flags}", fine_tuned(seed, row, task))


def plain(text: str) -> str:
    """Return a row's name as it is written in job names."""
    return "".join(c if c.isalnum() else "_" for c in text.lower()).strip("_")


OPEN = f"--anneal_steps={N // 2}"
# Table 2. A diffusion step costs the FLOPs of two AR steps.
ROWS = {
    "AR": Row(start="ar"),
    "diffusion, N steps": Row(1, start="scratch"),
    "diffusion, equal FLOPs": Row(1 + AR_STEPS / 2 / N, start="scratch"),
    "AR2Diff_0": Row(),
    "AR2Diff_N": Row(1, adapt=OPEN),
    "AR2Diff_2N": Row(2, adapt=OPEN),
    "AR2Diff_N, no self-conditioning": Row(1, "--self_conditioning=false", OPEN),
    "AR2Diff_N (paper's settings)": Row(1, PAPER_SETTINGS),
}


def prepare() -> None:
    """Build the data sets that are missing."""
    for data in ("mini", *TASKS):
        build_if_missing(Path(OUT) / data)


def jobs(seeds: int) -> Iterator[Job]:
    """Yield the jobs of the paper's Tables 2, 3 and 1."""
    for seed, task in itertools.product(range(1, seeds + 1), TASKS):
        name = f"mini_{seed}_{task}"
        for label, row in ROWS.items():
            yield Job(f"{name}_{plain(label)}", judge(seed, row, task))
        for steps, samples in PAPER_3:
            sampler = f"--steps={steps} --candidates={samples} --n={SAMPLED_ITEMS}"
            judged = judge(seed, ROWS["AR2Diff_N"], task, sampler)
            yield Job(f"{name}_table3_{steps}_{samples}", judged)
        for arch, objective in PAPER_1:
            flags = f"--arch={arch} --objective={objective}"
            row = Row(SCRATCH_STEPS / N, adapt=flags, start="scratch")
            yield Job(f"{name}_table1_{arch}_{objective}", judge(seed, row, task))


QUICK = {  # more flags of a command, to test that it starts
    "train.py": "--max_steps=20 --batch_size=2 --grad_accum_steps=1 --eval_batches=1",
    "eval.translation": "--n=10",
    "eval.qa": "--n=10",
    "eval.code": "--n=10 --samples=1 --k=1",
}


def quick(job: Job) -> Job:
    """Return the job with 20 steps of training and 10 items."""

    def shorten(stage: Stage) -> Stage:
        program = stage.argv[1] if stage.argv[0] == "-m" else stage.argv[0]
        more = QUICK.get(program, "").split()
        return Stage(stage.name, (*stage.argv, *more), stage.source and shorten(stage.source))

    return Job(job.name, shorten(job.stage))


# Running


def read_results(path: Path) -> dict[str, dict]:
    """Return job -> line of a JSON-lines file; empty if there is no file."""
    lines = read_lines(path)
    for line in lines:
        fault = f'{path}: a line has no "job", {json.dumps(line)[:60]}; restore or delete it'
        require(isinstance(line, dict) and "job" in line, fault)
    return {line["job"]: line for line in lines}


def keep_weights(folder: Path) -> None:
    """Keep only the last weights of a finished training, a fifth of its disk space."""
    path = folder / "ckpt.pt"
    state = load(path)
    state.pop("optimizer", None)
    write_atomically(path, lambda file: torch.save(state, file))
    for name in ("best.pt", "ckpt.1.pt"):
        (folder / name).unlink(missing_ok=True)


def write_answers(path: Path, result: dict) -> None:
    """Move the items of a result to a file that --predictions of the evaluation reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(result.pop("items"), ensure_ascii=False, indent=0).encode()
    # Without a time, so that equal answers are equal files.
    write_atomically(path, lambda file: file.write(gzip.compress(content, mtime=0)))


class Runner:
    """Runs jobs, several at a time. Each finished job adds or replaces one line of `path`."""

    def __init__(self, path: Path, out: Path):
        self.path = path
        self.out = out
        self.locks: dict[str, threading.Lock] = {}  # by folder
        self.failed: set[str] = set()  # folders

    def run(self, jobs: list[Job], lanes: int) -> None:
        """Run every job whose line is missing or has another recipe."""
        lines = read_results(self.path)
        todo = [job for job in jobs if lines.get(job.name, {}).get("recipe") != job.stage.recipe]
        changed = [job.name for job in todo if job.name in lines]
        if changed:
            print(f"settings changed since the line was written, run again: {', '.join(changed)}")
        failed = []
        with ThreadPoolExecutor(lanes) as pool:
            running = {pool.submit(self._run_stage, job.stage): job for job in todo}
            try:
                for future in tqdm(as_completed(running), total=len(todo), unit="job"):
                    job = running[future]
                    if error := future.exception():
                        failed.append(f"{job.name} ({error})")
                    else:
                        self._add_line(job)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        require(not failed, f"{len(failed)} jobs failed; the first: {' '.join(sorted(failed)[:1])}")

    def _add_line(self, job: Job) -> None:
        result = json.loads((self.out / f"{job.stage.folder}.json").read_text(encoding="utf-8"))
        if "items" in result:
            write_answers(self.path.parent / "predictions" / f"{job.name}.json.gz", result)
        lines = read_results(self.path)
        lines[job.name] = {"job": job.name, "recipe": job.stage.recipe, **result}
        write_lines(self.path, lines.values())

    def _run_stage(self, stage: Stage) -> None:
        """Run a command and those before it, unless an earlier call finished it."""
        if stage.source:
            self._run_stage(stage.source)
        done = self.out / f"{stage.folder}.done"
        log = done.with_suffix(".log")
        with self.locks.setdefault(stage.folder, threading.Lock()):
            if not done.exists() and stage.folder not in self.failed:
                self.out.mkdir(parents=True, exist_ok=True)
                with open(log, "w", encoding="utf-8") as file:
                    status = call_python(stage.command(self.out), stdout=file, stderr=file)
                if status:
                    self.failed.add(stage.folder)
                else:
                    if stage.argv[0] == "train.py":
                        keep_weights(self.out / stage.folder)
                    done.touch()
        require(stage.folder not in self.failed, f"see {log}")


def call_python(argv: list[str], **streams) -> int:
    """Run Python with one thread and our modules. Return its exit status."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | one_thread
    return subprocess.call([sys.executable, *argv], env=environment, **streams)
