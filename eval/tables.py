"""Run a study and print its tables: the numbers of the paper (arXiv 2401.17181) next to ours.

    python -m eval.tables --scale=mini           # two CPU cores, 3 hours; run it again to resume
    python -m eval.tables --scale=real           # 12 hours; the raw files are in out/real/sources
    python -m eval.tables --scale=real --quick   # every job for 20 steps, to test that it starts
    python -m eval.tables --quickstart           # the evaluations of quickstart.sh

mini: three generated tasks. real: SQuAD, Multi30k and MBPP, see eval/real.py. A cell is the mean
over training seeds, with the lowest and highest in brackets.
"""

import importlib
import itertools
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from configurator import configure, require, run, setting
from eval import real, study
from eval.common import Settings, environment, markdown, read_lines, write_lines, write_text
from eval.study import Runner, plain, read_results


class Column(NamedTuple):
    title: str
    jobs: str  # their name in the JSON-lines file, with a seed and a row
    metric: str


TRANSLATION = "mini_{}_mini_translation_{}"
MINI_COLUMNS = [
    Column("translation EM %", TRANSLATION, "exact_match"),
    Column("BLEU", TRANSLATION, "bleu"),
    Column("QA F1 %", "mini_{}_mini_qa_{}", "f1"),
    Column("code pass@1 %", "mini_{}_mini_code_{}", "pass@1"),
]
REAL_METRICS = {
    "squad": {"f1": "SQuAD F1 %", "exact_match": "EM %"},
    "multi30k": {"bleu": "Multi30k BLEU", "chrf": "chrF"},
    "mbpp": {"pass@1": "MBPP pass@1 %", "pass@10": "pass@10 %", "parse": "programs that parse %"},
}
CURVES = ("squad", "multi30k")  # tasks that are judged with other steps, candidates and samplers
# A metric that is not here is a share, shown in percent.
FACTORS = {"bleu": 1, "chrf": 1, "calls_per_sample": 1, "seconds_per_sample": 1000}
PAPER = "paper: BLEU, F1, pass@80"
QUICKSTART = {
    "ar_finetune": "AR",
    "scratch_finetune": "diffusion from scratch, 300 steps",
    "longer_finetune": "diffusion from scratch, FLOPs of AR + adaptation",
    "zero_finetune": "AR2Diff_0",
    "ar2diff_3_finetune": "AR2Diff_300",
}


@dataclass
class TablesConfig(Settings):
    scale: str = setting("mini", "what is trained", choices=("mini", "real"))
    quickstart: bool = setting(False, "the table of quickstart.sh, from out/quickstart/")
    seeds: int = setting(3, "training seeds, from 1", minimum=1, maximum=9)
    lanes: int = setting(2, "jobs at a time", minimum=1)
    quick: bool = setting(False, "20 steps of training, 10 items, one seed; results stay in out/")


# Cells

Lines = dict[str, dict]  # job -> its line


def cell(lines: Lines, column: Column, row: str) -> str:
    """Return "91.2 (89.0 to 93.1)": the mean over seeds, the lowest and the highest."""
    names = [column.jobs.format(seed, plain(row)) for seed in range(1, 10)]
    factor = FACTORS.get(column.metric, 100)
    found = [factor * lines[name][column.metric] for name in names if name in lines]
    if not found:
        return "-"
    mean = statistics.mean(found)
    digits = 1 if mean >= 10 or mean == 0 else 2
    low, middle, high = (f"{number:.{digits}f}" for number in (min(found), mean, max(found)))
    return middle if low == high else f"{middle} ({low} to {high})"


def ends(line: dict, metric: str) -> str:
    factor = FACTORS.get(metric, 100)
    return " to ".join(f"{factor * end:.1f}" for end in line[f"{metric}_interval"])


def grid(heads: list[str], rows: dict[tuple, str], lines: Lines, columns: list[Column]) -> str:
    """Return a table of the rows with a result: first cells of a row -> its name in job names."""
    body = []
    for first, row in rows.items():
        cells = [cell(lines, column, row) for column in columns]
        if set(cells) != {"-"}:
            body.append([*first, *cells])
    return markdown([*heads, *(column.title for column in columns)], body)


def real_columns(task: str, row: str = "{}", end: str = "") -> list[Column]:
    """Return the metrics of a real task, the most telling one first, and the calls."""
    titles = REAL_METRICS[task] | {"calls_per_sample": "network calls"}
    jobs = f"real_{{}}_{task}_{row}{end}"
    return [Column(title, jobs, metric) for metric, title in titles.items()]


# Tables


def table_1(lines: Lines) -> str:
    """Architecture x objective, diffusion from scratch."""
    rows = {(*names, paper): "_".join(["table1", *names]) for names, paper in study.PAPER_1.items()}
    return grid(["architecture", "objective", PAPER], rows, lines, MINI_COLUMNS)


def table_2(lines: Lines) -> str:
    """AR, diffusion, AR2Diff by N."""
    costs = [
        Column("calls", TRANSLATION, "calls_per_sample"),
        Column("ms a text", TRANSLATION, "seconds_per_sample"),
    ]
    rows = {(label, study.PAPER_2.get(label, "")): label for label in study.ROWS}
    return grid(["row", PAPER], rows, lines, MINI_COLUMNS + costs)


def table_3(lines: Lines) -> str:
    """Steps x samples: the paper's diffusion model, our AR2Diff_N. All samples cost calls."""
    rows = {}
    for (steps, samples), paper in study.PAPER_3.items():
        rows[f"{steps}", f"{samples}", f"{steps * samples}", paper] = f"table3_{steps}_{samples}"
    heads = ["steps", "samples", "calls", "paper: F1, pass@80"]
    return grid(heads, rows, lines, MINI_COLUMNS)


def labels(lines: Lines, end: str = "") -> dict[tuple[str], str]:
    """Return label -> name in the job names, of the lines with a label."""
    first = TRANSLATION.format(1, "")
    found = {}
    for job, line in lines.items():
        if "row" in line and job.startswith(first) and job.endswith(end):
            found[line["row"],] = job.removeprefix(first).removesuffix(end)
    return found


def recipes_table(lines: Lines, main: Lines) -> str:
    """Recipes of adaptation. The last column decodes the adapted weights as an AR model."""
    columns = [
        Column("translation EM %", TRANSLATION, "exact_match"),
        Column("EM %, decoded as AR", f"{TRANSLATION}_left_to_right", "exact_match"),
    ]
    rows = labels(lines) | {("default (Table 2)",): "AR2Diff_N"}
    return grid(["recipe"], rows, main | lines, columns)


def few_steps_table(lines: Lines) -> str:
    """Ways of training x denoising steps: exact match of translation."""
    names = {f"{steps} steps": f"{TRANSLATION}_{steps}" for steps in (2, 4, 10, 50)}
    columns = [Column(title, jobs, "exact_match") for title, jobs in names.items()]
    return grid(["training: EM % of translation"], labels(lines, end="_10"), lines, columns)


def quickstart_table(lines: Lines) -> str:
    rows = []
    for job, label in QUICKSTART.items():
        result = lines[job]
        interval = "{:.1%} to {:.1%}".format(*result["interval"])
        cost = f"{1000 * result['seconds_per_sample']:.1f}"
        calls = f"{result['calls_per_sample']:.1f}"
        rows.append([label, f"{result['exact_match']:.1%}", interval, calls, cost])
    heads = ["pretraining, then the same fine-tuning", "exact match", "95% interval"]
    return markdown([*heads, "network calls", "ms a text"], rows)


def faults_table(results: Path) -> str:
    """Kills and other faults, and how many runs they changed."""
    found = json.loads((results / "faults.json").read_text(encoding="utf-8"))["table"]
    rows = []
    for label, killed in (("killed at a random moment", True), ("other faults", False)):
        group = [row for row in found if bool(row["kills"]) == killed]
        sums = [sum(row[name] for row in group) for name in ("runs", "kills", "lost_or_changed")]
        rows.append([label, *map(str, sums)])
    return markdown(["fault", "runs", "kills", "lost or changed"], rows)


def smollm2_table(lines: Lines) -> str:
    """Return SmolLM2-135M on SQuAD, one row per line."""
    rows = []
    for line in lines.values():
        f1, exact = (f"{100 * line[name]:.1f}" for name in ("f1", "exact_match"))
        calls = f"{line['calls_per_sample']:.1f}"
        rows.append([line["job"], f1, ends(line, "f1"), exact, calls])
    return markdown(["row", "F1 %", "95% interval", "EM %", "network calls"], rows)


# Row -> its name in a task where that is another
REAL_ROWS = {
    "AR": {},
    "diffusion from scratch, equal FLOPs": {"multi30k": "diffusion, equal FLOPs"},
    "AR2Diff_0": {},
    "AR2Diff_N": {"squad": "AR2Diff_0.1M", "mbpp": "AR2Diff_0.1M"},
    real.FIRST: {},
}


def real_table(lines: Lines) -> str:
    """Return the main rows of the real tasks that have run."""
    tasks = [task for task in REAL_METRICS if f"real_1_{task}_ar" in lines]
    body = []
    for label, names in REAL_ROWS.items():
        cells = []
        for task in tasks:
            first, *_, last = real_columns(task)
            score, calls = (cell(lines, c, names.get(task, label)) for c in (first, last))
            cells.append(score if score == "-" else f"{score} in {calls}")
        if set(cells) != {"-"}:
            body.append([label, *cells])
    heads = [f"{real_columns(task)[0].title} in calls" for task in tasks]
    return markdown(["row", *heads], body)


def real_task_table(task: str, lines: Lines) -> str:
    """Return each row of a task that has run: metrics, calls, the interval of the first seed."""
    columns = real_columns(task)
    body = []
    for row in real.TASKS[task].rows(1):
        if line := lines.get(columns[0].jobs.format(1, plain(row))):
            interval = ends(line, columns[0].metric)
            body.append([row, *(cell(lines, c, row) for c in columns), interval])
    heads = ["row", *(column.title for column in columns), "95% interval, seed 1"]
    return markdown(heads, body)


def real_steps_table(lines: Lines) -> str:
    """Return the first metric of a task by steps and by candidates."""
    settings = {f"{n}, 1": f"_{n}" for n in real.STEPS}
    settings |= {f"10, {candidates}": f"_10_{candidates}" for candidates in real.CANDIDATES}
    body = []
    for task in CURVES:
        columns = [real_columns(task, end=end)[0] for end in settings.values()]
        for row in real.TASKS[task].curves:
            values = [cell(lines, column, row) for column in columns]
            if set(values) != {"-"}:
                body.append([f"{columns[0].title}, {row}", *values])
    return markdown(["steps, candidates", *settings], body)


def real_samplers_table(lines: Lines) -> str:
    """Return the first metric, and the calls of a text, by sampler and most steps."""
    rows = {("resample", f"{n}"): f"{n}" for n in real.SAMPLER_STEPS}
    for name, n in itertools.product(real.SAMPLERS, real.SAMPLER_STEPS):
        rows[name, f"{n}"] = f"{name}_{n}"
    columns = []
    for task in CURVES:
        score, *_, calls = real_columns(task, plain(real.TASKS[task].curves[0]), "_{}")
        columns += [score, calls._replace(title="calls")]
    return grid(["sampler", "most steps"], rows, lines, columns)


def of_files(table: Callable[..., str], *names: str) -> Callable[[Path], str]:
    """Return a table of lines as a function of the results folder."""
    return lambda results: table(*(read_results(results / f"{name}.jsonl") for name in names))


def measured(module: str, table: str, **wanted: str) -> Callable[[Path], str]:
    """Return a table, and the origins, of the wanted measurements of each file."""

    def make(results: Path) -> str:
        # Here, because these need extras/, which may be deleted.
        speed = importlib.import_module("eval.speed")
        make_table = getattr(importlib.import_module(f"eval.{module}"), table)
        lines = []
        for name, kinds in wanted.items():
            found = read_lines(results / f"{name}.jsonl")
            lines += [line for line in found if line["what"] in kinds.split()]
        return f"{make_table(lines)}\n\n{speed.origins(lines)}"

    return make


# Name in a page's marker -> the table of a results folder
TABLES: dict[str, Callable[[Path], str]] = {
    "quickstart": of_files(quickstart_table, "quickstart"),
    "table1": of_files(table_1, "study"),
    "table2": of_files(table_2, "study"),
    "table3": of_files(table_3, "study"),
    "recipes": of_files(recipes_table, "recipes", "study"),
    "few_steps": of_files(few_steps_table, "few_steps"),
    "real": of_files(real_table, "real"),
    "real_squad": of_files(partial(real_task_table, "squad"), "real"),
    "real_multi30k": of_files(partial(real_task_table, "multi30k"), "real"),
    "real_mbpp": of_files(partial(real_task_table, "mbpp"), "real"),
    "real_steps": of_files(real_steps_table, "real"),
    "real_samplers": of_files(real_samplers_table, "real"),
    "smollm2": of_files(smollm2_table, "smollm2"),
    "faults": faults_table,
    "drafts": measured("drafts", "tables", drafts="drafts_exact drafts_curve"),
    "decode": measured("speed", "decode_table", speed="decode"),
    "speed": measured(
        "speed", "lines_table", speed="train unroll loop", speed_smollm2="decode unroll memory"
    ),
}


def quickstart(out: Path) -> str:
    """Collect the evaluations of quickstart.sh into one file and one table."""
    lines = {}
    for path in sorted((out / "quickstart").glob("*.json")):
        lines[path.stem] = {"job": path.stem, **json.loads(path.read_text(encoding="utf-8"))}
    missing = [name for name in QUICKSTART if name not in lines]
    require(not missing, f"{out}/quickstart has no {', '.join(missing)}: run bash quickstart.sh")
    write_lines(out / "quickstart.jsonl", lines.values())
    where = environment()
    table = quickstart_table(lines)
    origin = f"{where['hardware']}, torch {where['torch']}, commit {where['commit']}"
    write_text(out / "quickstart.md", f"{table}\n\n{origin}\n")
    return table


# Scale -> the module of its jobs, the folder of its models, its results and its tables
SCALES = {
    "mini": (study, "out/tables", "study.jsonl", (table_2, table_1, table_3)),
    "real": (real, real.OUT, "real.jsonl", (real_table, real_steps_table)),
}


def main(argv: list[str]) -> None:
    """Run the jobs that are missing, then print the tables."""
    cfg = configure(TablesConfig, argv)
    if cfg.quickstart:
        print(quickstart(Path("out")))
        return
    module, models, name, tables = SCALES[cfg.scale]
    path = Path(models if cfg.quick else "results", name)
    module.prepare()
    jobs = list(module.jobs(1 if cfg.quick else cfg.seeds))
    jobs = list(map(study.quick, jobs)) if cfg.quick else jobs
    try:
        Runner(path, Path(models)).run(jobs, cfg.lanes)
    finally:  # a failed job does not hide the others
        print("\n\n".join(table(read_results(path)) for table in tables))


if __name__ == "__main__":
    run(main, TablesConfig)
