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

import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial

from configurator import group, require, run, setting, validate
from data import mbpp, mini
from data.python_code import parses as parses_function
from data.sources import read_json_lines
from data.syntax import parse_python
from eval import common, sandbox
from eval.common import EvalConfig, TaskConfig, TaskRun
from eval.metrics import Metric, edit_similarity, mean, pass_at_k

INVALID = "\ufffd"  # the tokenizer decodes an invalid byte to this


@dataclass
class CodeConfig:
    run: EvalConfig = group(EvalConfig)
    task: TaskConfig = group(TaskConfig)
    samples: int = setting(1, "programs per problem", minimum=1, maximum=common.MAX_SAMPLES)
    k: str = setting("1", "the k of pass@k, such as 1,10,80")
    split: str = setting("test", "of MBPP's task ids", choices=("all", *mbpp.SPLITS))
    run_code: bool = setting(False, "run the programs of a model in the sandbox")

    def __post_init__(self):
        validate(self)
        ks = self.k.split(",")
        whole = all(k.isdecimal() and int(k) for k in ks)
        require(whole, f"k must be whole numbers from 1, such as 1,10,80; got {self.k!r}")
        self.ks = sorted(set(map(int, ks)))


def examples(cfg: CodeConfig) -> list[dict]:
    """Return the problems with id, prefix, target, continues and, if they have any, tests.

    continues: a completion continues the prefix (HumanEval, python_pairs), else it is a program.
    """
    if cfg.task.source:
        found = [e for e in mbpp.read(cfg.task.source) if cfg.split in ("all", e["split"])]
        return [e | {"continues": mbpp.program(e, "") != ""} for e in found]
    found = common.held_out(cfg.task.data, "code")
    is_mini = common.is_mini(common.open_pairs(cfg.task.data))
    for example in found:
        if is_mini:
            example["tests"] = mini.code_tests(example)
        body = parse_python(example["target"] + "\n") is None
        example["continues"] = body and is_python(example["prefix"], example["target"])
    return found


def program(completion: str, example: dict) -> str:
    return example["prefix"] + completion if example["continues"] else completion


def is_python(prefix: str, body: str) -> bool:
    """Return whether prefix and body are one function with a body. Nothing is run."""
    return INVALID not in body and parses_function(prefix, body)


def parses(completion: str, example: dict) -> bool:
    """Return whether a completion that is not blank makes a Python program. Nothing is run."""
    if example["continues"] and "tests" not in example:  # the body of one function
        return is_python(example["prefix"], completion)
    blank = not completion.strip() or INVALID in completion
    return not blank and parse_python(program(completion, example) + "\n") is not None


def score(samples: list[list[str]], asked: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Return counts per problem, and how many samples had each outcome of the sandbox."""
    items = []
    for texts, example in zip(samples, asked):
        similar = sum(edit_similarity(text, example["target"]) for text in texts)
        item = {"samples": len(texts), "edit_similarity": similar / len(texts)}
        item["parsed"] = sum(parses(text, example) for text in texts)
        items.append(item | {"completions": texts})
    if "tests" not in asked[0]:
        return items, {}
    jobs = {}  # equal samples of a problem run once
    for i, example in enumerate(asked):
        jobs |= {(i, text): (program(text, example), example["tests"]) for text in samples[i]}
    outcomes = dict(zip(jobs, sandbox.run_many(list(jobs.values()))))
    statuses = Counter()
    for i, texts in enumerate(samples):
        items[i]["passed"] = sum(outcomes[i, text] == "passed" for text in texts)
        statuses.update(outcomes[i, text] for text in texts)
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
    some = ", ".join(f"task {task} has {n}" for n, task in sorted(counts.items()))
    fault = f"{path}: give the same number of completions for each task; {some}"
    require(len(counts) == 1, fault)
    return [found[example["id"]] for example in asked]


def answers(task: TaskRun) -> tuple[list[list[str]], dict]:
    """Return the samples of each problem, and the mean cost."""
    n = task.cfg.samples
    if task.cfg.task.predictions:
        return read_predictions(task.cfg.task.predictions, task.examples), {}
    _check_k(task.cfg.ks, n)
    if task.cfg.task.reference:
        return [[example["target"]] * n for example in task.examples], {}
    sampler = task.generator.sampler
    candidates = getattr(sampler, "candidates", 0)
    differ = candidates or n == 1 or sampler.temperature > 0
    require(differ, f"--samples={n} at temperature 0 are equal; try --temperature=0.8")
    samples, cost = task.generate(n)
    return samples, cost | {"best_of": candidates or 1}


def _check_k(ks: list[int], n: int) -> None:
    require(ks[-1] <= n, f"pass@{ks[-1]} needs --samples={ks[-1]} or more, got {n}")


def main(argv: list[str]) -> dict:
    task = TaskRun("code", argv, CodeConfig, examples)
    cfg = task.cfg
    if "tests" in task.examples[0] and not cfg.task.reference:
        place = sandbox.isolation()
        require(cfg.run_code, f"pass@k runs programs of a model: allow it with --run_code; {place}")
        print(f"--run_code: each program has its own process; {place}", file=sys.stderr)
    samples, cost = answers(task)
    _check_k(cfg.ks, len(samples[0]))
    items, statuses = score(samples, task.examples)
    notes = "".join(f"\n{status}: {n}" for status, n in statuses.items())
    extra = {"samples": len(samples[0]), "outcomes": statuses} | cost
    return task.report(items, partial(metrics_of, ks=cfg.ks), extra, notes)


if __name__ == "__main__":
    run(main, CodeConfig)
