"""Measure code: pass@k by unit tests, and the share that parses.

    python -m eval.code --init_from=out/run/ckpt.pt --source=mbpp.jsonl --samples=80 --k=1,10,80 \\
        --run_code
    python -m eval.code --predictions=answers.json --source=mbpp.jsonl --run_code
    python -m eval.code --reference --source=mbpp.jsonl --split=all

Without --source: the held-out pairs of the checkpoint's data set. Those of mini_code have unit
tests, others are not run. Programs of a model run only with --run_code, in eval/sandbox.py. pass@k
is estimated from all samples (Codex, arXiv 2107.03374).
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial

from configurator import require, run, setting
from data import mbpp, mini
from data.python_code import parses as parses_function
from data.syntax import parse_python
from eval import common, sandbox
from eval.common import TaskConfig, TaskRun
from eval.metrics import Metric, mean, pass_at_k

INVALID = "\ufffd"  # the tokenizer decodes an invalid byte to this


@dataclass
class CodeConfig(TaskConfig):
    samples: int = setting(1, "programs per problem", minimum=1, maximum=common.MAX_SAMPLES)
    k: str = setting("1", "the k of pass@k, such as 1,10,80")
    split: str = setting("test", "of MBPP's task ids", choices=("all", *mbpp.SPLITS))
    run_code: bool = setting(False, "run the programs of a model in the sandbox")

    def __post_init__(self):
        super().__post_init__()
        ks = self.k.split(",")
        whole = all(k.isdecimal() and int(k) for k in ks)
        require(whole, f"k must be whole numbers from 1, such as 1,10,80; got {self.k!r}")
        self.ks = sorted(set(map(int, ks)))
        k = self.ks[-1]
        enough = self.predictions or k <= self.samples
        require(enough, f"pass@{k} needs --samples={k} or more, got {self.samples}")


def examples(cfg: CodeConfig) -> list[dict]:
    """Return the problems with id, prefix, target, continues and, if they have any, tests.

    continues: a completion continues the prefix (python_pairs), else it is a program.
    """
    if cfg.source:
        found = [e for e in mbpp.read(cfg.source) if cfg.split in ("all", e["split"])]
        return [e | {"continues": False} for e in found]
    found = common.held_out(cfg.data, "code")
    is_mini = common.is_mini(common.open_pairs(cfg.data))
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
        parsed = sum(parses(text, example) for text in texts)
        items.append({"samples": len(texts), "parsed": parsed, "completions": texts})
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


def metrics_of(items: list[dict], asked: list[dict], ks: list[int]) -> dict[str, Metric]:
    """Return means over problems: pass@k if there are tests, and the share that parses."""
    metrics = {}
    for k in ks if "tests" in asked[0] else ():
        values = [pass_at_k(item["samples"], item["passed"], k) for item in items]
        metrics[f"pass@{k}"] = mean(values)
    return metrics | {"parse": mean([item["parsed"] / item["samples"] for item in items])}


def main(argv: list[str]) -> dict:
    task = TaskRun("code", argv, CodeConfig, examples)
    cfg = task.cfg
    if "tests" in task.examples[0] and not cfg.reference:
        place = sandbox.isolation()
        require(cfg.run_code, f"pass@k runs programs of a model: allow it with --run_code; {place}")
        print(f"--run_code: each program has its own process; {place}", file=sys.stderr)
    if task.generator and cfg.samples > 1:
        sampler = task.generator.sampler
        differ = hasattr(sampler, "steps") or sampler.temperature > 0
        require(
            differ, f"--samples={cfg.samples} at temperature 0 are equal; try --temperature=0.8"
        )
    samples, cost = task.samples(cfg.samples)
    n = len(samples[0])
    require(cfg.ks[-1] <= n, f"pass@{cfg.ks[-1]} needs more samples of each problem, got {n}")
    items, statuses = score(samples, task.examples)
    notes = "".join(f"\n{status}: {n}" for status, n in statuses.items())
    extra = {"samples": n, "outcomes": statuses} | cost
    return task.report(items, extra, partial(metrics_of, ks=cfg.ks), notes)


if __name__ == "__main__":
    run(main, CodeConfig)
