"""Few steps: which training makes a handful of steps as good as 50, and what a sampler that stops by itself saves.

    python -m runs.few_steps              # half an hour on 2 cores, two jobs at a time; the same command again goes on
    python -m runs.few_steps --table      # only print the tables of what is there

The AR model and the rows "ours" are those of runs.study, which are trained if they are missing. Each other way of
training is one change to its second and third stage.
"""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configurator import configure, run
from data.loader import build_if_missing
from eval.common import markdown, wilson
from runs.jobs import Job, plain
from runs.study import SIZES, Plan, StudyConfig, ar_of, run_jobs, table_2


@dataclass
class FewStepsConfig(StudyConfig):
    seeds: int = 3  # of early exit; ways of training take the first two
    results: str = "results/few_steps"
    study: str = "results/study"  # what is there of runs.study is not evaluated again


STEPS = (2, 4, 10, 50)
# Label -> (settings of the conversion, flags of both stages after it).
WAYS = {
    "one pass: L(1) alone": ({"self_conditioning": "false"}, ["--unroll_steps=1"]),
    "three passes": ({}, ["--unroll_steps=3"]),
    "self-conditioning for half of the rows": ({}, ["--self_conditioning_prob=0.5"]),
    "unroll by sampling (SUNDAE)": ({}, ["--unroll_temperature=1.0"]),
    "rates toward noise: root of u": ({}, ["--rate_exponent=0.5"]),
    "half of the rows from noise alone": ({}, ["--full_noise_prob=0.5"]),
    "the sampler's own path: half from noise, unroll at 0.2": (
        {},
        ["--full_noise_prob=0.5", "--unroll_temperature=0.2"],
    ),
    "the sampler's own path, three passes": (
        {},
        ["--full_noise_prob=0.5", "--unroll_temperature=0.2", "--unroll_steps=3"],
    ),
}
# Rows of the study's main table that the ways are compared with.
OURS = {"ours: two passes, argmax": "AR2Diff_N", "ours without self-conditioning": "AR2Diff_N, no self-conditioning"}
WAY_TASKS = {"mini_translation": (1, 2), "mini_code": (1,)}  # task -> seeds
# How a text is sampled when nothing tells it to stop, and the samplers that stop where an answer stands still.
FIXED = "resample, temperature 0.2, 50 steps"
EXITS = {
    FIXED: ["--steps=50"],
    "resample, temperature 0.2, 10 steps": ["--steps=10"],
    "resample, temperature 0, until it stands still": ["--steps=50", "--temperature=0"],
    "argmax_unrolled, until it stands still": ["--steps=50", "--sampler=argmax_unrolled"],
    "entropy_bound, until it stands still and is sure": ["--steps=50", "--sampler=entropy_bound"],
    "confidence, from half of the steps on": ["--steps=50", "--sampler=confidence"],
}
EXIT_TASKS = {"mini_translation": "exact_match", "mini_qa": "exact_match", "mini_code": "pass@1"}


def jobs_of(seed: int, cfg: FewStepsConfig) -> list[Job]:
    """What is to be trained and evaluated with one seed."""
    size = SIZES["mini"]
    plan = Plan("mini", size, seed, StudyConfig(out=cfg.out, results=cfg.study, scale=cfg.scale))
    tuned = table_2(plan)  # jobs that are not done run only where they are needed
    ours = [job for job in plan.jobs if not job.name.endswith("_eval")]
    plan.jobs, plan.cfg = [], StudyConfig(out=cfg.out, results=cfg.results, scale=cfg.scale)
    for task in (task for task, seeds in WAY_TASKS.items() if seed in seeds):
        for label, row in OURS.items():
            for steps in STEPS:
                plan.judge(f"{plain(label)}_{steps}", task, tuned[row][task], f"--steps={steps}", "--candidates=1")
    _ways(plan, seed)
    for task in EXIT_TASKS:
        for label, sampler in EXITS.items():
            plan.judge(f"exit_{plain(label)}", task, tuned["AR2Diff_N"][task], *sampler, "--candidates=1", "--n=200")
    return ours + plan.jobs


def turn(job: Job) -> int:
    """Where a job stands in line: early exit and what it needs of the study, then ways of training, code last."""
    way = "/few_" in job.name or (job.name.endswith("_eval") and "_exit_" not in job.name)
    return way + (way and "mini_code" in job.name)


def _ways(plan: Plan, seed: int) -> None:
    size, tasks = plan.size, [task for task, seeds in WAY_TASKS.items() if seed in seeds]
    for label, (settings, flags) in WAYS.items() if tasks else ():
        name = f"few_{plain(label)}"
        start = plan.convert(f"{name}_start", settings, ar_of("mini", seed, plan.cfg))
        stage_2 = ["--schedule=constant", f"--anneal_steps={size.N // 2}", *flags]
        adapted = plan.train(f"{name}_adapt", size.pretrain, size.N, *stage_2, source=start)
        for task in tasks:
            tuned = plan.train(f"{name}_{task}", task, size.tuning(task), *flags, source=adapted)
            for steps in STEPS:
                plan.judge(f"{plain(label)}_{steps}", task, tuned, f"--steps={steps}", "--candidates=1")


def ways_table(folder: Path) -> str:
    """Ways of training x steps: exact match of translation by seed, pass@1 of code."""
    rows = []
    for label in [*OURS, *WAYS]:
        cells = [label]
        for task, seeds in WAY_TASKS.items():
            for seed in seeds:
                for steps in STEPS:
                    found = _load(folder, [seed], task, f"{plain(label)}_{steps}")
                    cells += [f"{100 * result[EXIT_TASKS[task]]:.1f}" for result in found] or ["-"]
        rows.append(cells)
    names = {"mini_translation": "translation", "mini_code": "code"}
    columns = [
        f"{names[task]} {steps}" + (f", seed {seed}" if len(seeds) > 1 else "")
        for task, seeds in WAY_TASKS.items()
        for seed in seeds
        for steps in STEPS
    ]
    return markdown(["training, % exact by steps", *columns], rows)


def exit_table(folder: Path) -> str:
    """Samplers x tasks: share of right texts, pooled over seeds with Wilson's 95% interval, and calls a text."""
    rows, bases = [], {}
    for label in EXITS:
        cells = [label]
        for task, metric in EXIT_TASKS.items():
            found = _load(folder, range(1, 10), task, f"exit_{plain(label)}")
            if not found:
                cells += ["-", "-"]
                continue
            n = sum(result["n"] for result in found)
            hits = sum(round(result[metric] * result["n"]) for result in found)
            low, high = wilson(hits, n)
            calls = statistics.mean(result["calls_per_sample"] for result in found)
            fewer = bases.setdefault(task, calls) / calls
            cells += [f"{100 * hits / n:.1f} ({100 * low:.1f} to {100 * high:.1f})", f"{calls:.2f} ({fewer:.1f}x)"]
        rows.append(cells)
    names = ["translation EM %", "QA EM %", "code pass@1 %"]
    return markdown(["sampler", *(cell for name in names for cell in (name, "calls (fewer)"))], rows)


def _load(folder: Path, seeds: Iterable[int], task: str, name: str) -> list[dict]:
    paths = [folder / f"mini_{seed}_{task}_{name}.json" for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def main(argv: list[str]) -> None:
    """Run what is missing, then print both tables."""
    cfg = configure(FewStepsConfig, argv)
    if not cfg.table:
        build_if_missing(Path(SIZES["mini"].folder) / SIZES["mini"].pretrain)
        jobs = [job for seed in range(1, cfg.seeds + 1) for job in jobs_of(seed, cfg)]
        run_jobs(sorted(jobs, key=turn), cfg)
    folder = Path(cfg.results)
    print(f"{ways_table(folder)}\n\n{exit_table(folder)}")


if __name__ == "__main__":
    run(main)
