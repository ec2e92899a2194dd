"""Measure code: pass@k by unit tests, and the share that parses.

    python -m eval.code --init_from=out/run/ckpt.pt --source=mbpp.jsonl --samples=80 --k=1,10,80 \\
        --run_code
    python -m eval.code --predictions=answers.json --source=mbpp.jsonl --run_code
    python -m eval.code --reference --source=mbpp.jsonl

Without --source: the held-out pairs of the checkpoint's data set. Those of mini_code have unit
tests, others are not run. Programs of a model run only with --run_code, in eval/sandbox.py. pass@k
is estimated from all samples (Codex, arXiv 2107.03374).
"""

import itertools
import sys
from collections import Counter
from dataclasses import dataclass

from configurator import require, run, setting
from data import mbpp, mini
from data.syntax import parse_python
from eval import common, sandbox
from eval.common import TaskConfig, TaskRun
from eval.metrics import Metric, mean, pass_at_k

INVALID = "\ufffd"  # the tokenizer decodes an invalid byte to this


@dataclass
class CodeConfig(TaskConfig):
    samples: int = setting(1, "programs per problem", minimum=1, maximum=common.MAX_SAMPLES)
    k: str = setting("1", "the k of pass@k, such as 1,10,80")
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
    """Return the problems with id, prefix, target and, if they have any, tests."""
    if cfg.source:
        return [e for e in mbpp.read(cfg.source) if e["split"] == "test"]
    found = common.held_out(cfg.data, "code")
    if common.is_mini(common.open_pairs(cfg.data)):
        found = [example | {"tests": mini.code_tests(example)} for example in found]
    return found


def parses(program: str) -> bool:
    """Return whether a text that is not blank is a Python program. Nothing is run."""
    blank = not program.strip() or INVALID in program
    return not blank and parse_python(program + "\n") is not None


def score(samples: list, asked: list[dict], ks: list[int]) -> tuple[dict[str, Metric], dict]:
    """Return means over problems, and how many samples had each outcome of the sandbox.

    The means: pass@k if there are tests, and the share that parses.
    """
    n = len(samples[0])
    metrics = {}
    outcomes = Counter()
    if "tests" in asked[0]:
        jobs = {}  # equal samples of a problem run once
        for i, example in enumerate(asked):
            jobs |= {(i, text): (text, example["tests"]) for text in samples[i]}
        found = dict(zip(jobs, sandbox.run_many(list(jobs.values()))))
        statuses = [[found[i, text] for text in texts] for i, texts in enumerate(samples)]
        outcomes.update(itertools.chain(*statuses))
        for k in ks:
            passed = [row.count("passed") for row in statuses]
            metrics[f"pass@{k}"] = mean([pass_at_k(n, c, k) for c in passed])
    parsed = [sum(map(parses, texts)) / n for texts in samples]
    return metrics | {"parse": mean(parsed)}, dict(outcomes.most_common())


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
        fault = f"--samples={cfg.samples} at temperature 0 are equal; try --temperature=0.8"
        require(differ, fault)
    samples, cost = task.samples(cfg.samples)
    n = len(samples[0])
    require(cfg.ks[-1] <= n, f"pass@{cfg.ks[-1]} needs more samples of each problem, got {n}")
    metrics, outcomes = score(samples, task.examples, cfg.ks)
    notes = "".join(f"\n{status}: {count}" for status, count in outcomes.items())
    return task.report(samples, metrics, {"samples": n, "outcomes": outcomes} | cost, notes)


if __name__ == "__main__":
    run(main, CodeConfig)
