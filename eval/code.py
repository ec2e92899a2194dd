"""Measure code: pass@k by unit tests, the share that parses, the similarity to the reference.

    python -m eval.code --init_from=out/run/ckpt.pt --source=mbpp.jsonl --samples=80 --k=1,10,80 \\
        --run_code
    python -m eval.code --predictions=answers.jsonl --source=HumanEval.jsonl.gz --run_code
    python -m eval.code --reference --source=mbpp.jsonl --split=all

Without --source: the held-out pairs of the checkpoint's data set. Those of mini_code have unit
tests, others are not run. Predictions are lines of {"task_id": .., "completion": ..} in JSON,
several per task if there are several samples. Programs of a model run only with --run_code, in
eval/sandbox.py. pass@k is estimated from all samples (Codex, arXiv 2107.03374).
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial

from configurator import group, run, setting, validate
from data import mbpp, mini
from data.sources import read_json_lines
from data.syntax import parse_python
from eval import common, sandbox
from eval.common import EvalConfig, TaskConfig, TaskRun
from eval.metrics import Metric, edit_similarity, mean, pass_at_k
from eval.python_code import INVALID, is_python

MAX_EXAMPLES = 1 << 20  # the key of a sample has 32 bits: 20 for the example
MAX_SAMPLES = 1 << 12  # and 12 for its number


@dataclass
class CodeConfig:
    run: EvalConfig = group(EvalConfig)
    task: TaskConfig = group(TaskConfig)
    samples: int = setting(1, "generated programs per problem", minimum=1, maximum=MAX_SAMPLES)
    k: str = setting("1", "the k of pass@k, such as 1,10,80")
    split: str = setting("test", "of MBPP's task ids", choices=("all", *mbpp.SPLITS))
    run_code: bool = setting(False, "run the programs of a model in the sandbox")

    def __post_init__(self):
        validate(self)
        parts = self.k.split(",")
        if not all(k.isdecimal() and int(k) for k in parts):
            raise ValueError(f"k must be whole numbers from 1, such as 1,10,80; got {self.k!r}")
        self.ks = sorted(set(map(int, parts)))


def examples(cfg: CodeConfig) -> list[dict]:
    """Return the problems with id, prefix, target, continues and, if they have any, tests.

    continues: a completion continues the prefix (HumanEval, python_pairs), else it is a program.
    """
    if cfg.task.source:
        found = [e for e in mbpp.read(cfg.task.source) if cfg.split in ("all", e["split"])]
        if not found:
            raise ValueError(f"{cfg.task.source} has no tasks of the split {cfg.split}")
        return [e | {"continues": mbpp.program(e, "") != ""} for e in found]
    found = common.held_out(cfg.task.data, "code")
    is_mini = common.is_mini(common.open_pairs(cfg.task.data))
    for example in found:
        if is_mini:
            example["tests"] = mini.code_tests(example)
        body = not _is_program(example["target"])
        example["continues"] = body and is_python(example["prefix"], example["target"])
    return found


def program(completion: str, example: dict) -> str:
    return example["prefix"] + completion if example["continues"] else completion


def parses(completion: str, example: dict) -> bool:
    """Return whether a completion that is not blank makes a Python program. Nothing is run."""
    if example["continues"] and "tests" not in example:  # the body of one function
        return is_python(example["prefix"], completion)
    blank = not completion.strip() or INVALID in completion
    return not blank and _is_program(program(completion, example))


def _is_program(text: str) -> bool:
    return parse_python(text + "\n") is not None


def score(samples: list[list[str]], asked: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Return counts per problem, and how many samples had each outcome of the sandbox."""
    items = []
    for texts, example in zip(samples, asked):
        similar = sum(edit_similarity(text, example["target"]) for text in texts)
        parsed = sum(parses(text, example) for text in texts)
        item = {"samples": len(texts), "parsed": parsed, "edit_similarity": similar / len(texts)}
        items.append(item)
    if "tests" not in asked[0]:
        return items, {}
    jobs = {}  # equal samples of a problem run once
    for i, example in enumerate(asked):
        jobs |= {(i, text): (program(text, example), example["tests"]) for text in samples[i]}
    outcomes = dict(zip(jobs, sandbox.run_many(list(jobs.values()))))
    statuses = Counter()
    for i, texts in enumerate(samples):
        items[i]["passed"] = sum(outcomes[i, text].passed for text in texts)
        statuses.update(outcomes[i, text].status for text in texts)
    return items, dict(statuses.most_common())


def metrics_of(items: list[dict], ks: list[int]) -> dict[str, Metric]:
    """Return means over problems: pass@k if there are tests, the share that parses, similarity."""
    metrics = {}
    if "passed" in items[0]:
        for k in ks:
            values = [pass_at_k(item["samples"], item["passed"], k) for item in items]
            metrics[f"pass@{k}"] = mean(values)
    metrics["parse"] = mean([item["parsed"] / item["samples"] for item in items])
    return metrics | {"edit_similarity": mean([item["edit_similarity"] for item in items])}


def read_predictions(path: str, asked: list[dict]) -> list[list[str]]:
    """Return the completions of each problem, the same number for each."""
    found: dict[str, list[str]] = {}
    for number, row in read_json_lines(path):
        completion = row.get("completion") if isinstance(row, dict) else None
        if not isinstance(completion, str) or not isinstance(row.get("task_id"), int | str):
            fields = '{"task_id": number or text, "completion": text}'
            raise ValueError(f"{path}, line {number}: must be {fields}")
        found.setdefault(str(row["task_id"]), []).append(completion)
    common.check_ids(path, found, asked)
    counts = {len(texts): task for task, texts in found.items()}
    if len(counts) > 1:
        some = ", ".join(f"task {task} has {n}" for n, task in sorted(counts.items()))
        raise ValueError(f"{path}: give the same number of completions for each task; {some}")
    return [found[example["id"]] for example in asked]


def write_predictions(path: str, samples: list[list[str]], asked: list[dict]) -> None:
    """Write the file that read_predictions and HumanEval's own script read."""
    ids = [example.get("task_id", example["id"]) for example in asked]
    rows = [{"task_id": i, "completion": t} for i, texts in zip(ids, samples) for t in texts]
    common.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def generate(task: TaskRun) -> tuple[list[list[str]], dict]:
    """Return the generated samples of each problem, and the cost.

    A sample depends on the problem and its own number, not on how many there are.
    """
    numbers = range(task.cfg.samples)
    sampler = task.generator.sampler
    candidates = getattr(sampler, "candidates", 0)
    if not candidates and len(numbers) > 1 and sampler.temperature == 0:
        equal = f"--samples={len(numbers)} at temperature 0 are equal"
        raise ValueError(f"{equal}; try --temperature=0.8")
    jobs = []
    for job in task.jobs():
        for n in numbers:
            example = job.example + n * MAX_EXAMPLES
            jobs.append(job._replace(key=f"{job.key}#{n}", example=example))
    texts, cost = task.generator.answers(jobs)
    ids = [example["id"] for example in task.examples]
    samples = [[texts.get(f"{i}#{n}", "") for n in numbers] for i in ids]
    return samples, cost | {"best_of": candidates or 1}


def main(argv: list[str]) -> dict:
    task = TaskRun("code", argv, CodeConfig, examples)
    cfg = task.cfg
    asked = task.examples
    if not cfg.task.predictions:
        _check_k(cfg.ks, cfg.samples)
    _check_run(cfg, "tests" in asked[0])
    cost = {}
    if task.generator:
        samples, cost = generate(task)
    elif cfg.task.reference:
        samples = [[example["target"]] * cfg.samples for example in asked]
    else:
        samples = read_predictions(cfg.task.predictions, asked)
        _check_k(cfg.ks, len(samples[0]))
    if cfg.task.save:
        write_predictions(cfg.task.save, samples, asked)
    items, statuses = score(samples, asked)
    empty = sum(not text.strip() for texts in samples for text in texts)
    extra = {"samples": len(samples[0]), "empty": empty, "outcomes": statuses}
    notes = "".join(f"\n{status}: {n}" for status, n in statuses.items())
    return task.report(items, partial(metrics_of, ks=cfg.ks), extra | cost, notes)


def _check_k(ks: list[int], samples: int) -> None:
    if max(ks) > samples:
        raise ValueError(f"pass@{max(ks)} needs --samples={max(ks)} or more, got {samples}")


def _check_run(cfg: CodeConfig, has_tests: bool) -> None:
    """Print what will be run. Raises ValueError if programs of a model may not run."""
    if has_tests and not cfg.run_code and not cfg.task.reference:
        reason = "pass@k runs programs that a model wrote"
        raise ValueError(f"{reason}: allow it with --run_code; {sandbox.isolation()}")
    if has_tests and cfg.run_code:
        note = f"--run_code: each program has its own process; {sandbox.isolation()}"
        print(note, file=sys.stderr)


if __name__ == "__main__":
    run(main, CodeConfig)
