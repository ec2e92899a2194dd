"""How well a model writes code: pass@k by unit tests, how much of it is Python, and how near it is to the reference.

    python -m eval.code --init_from=out/run/ckpt.pt --source=mbpp.jsonl --samples=80 --k=1,10,80 --run_code
    python -m eval.code --predictions=answers.jsonl --source=HumanEval.jsonl.gz --run_code
    python -m eval.code --reference --source=mbpp.jsonl --split=all

Without --source: the held-out pairs of the set the checkpoint was trained on; mini_code has unit tests, others, such as
python_pairs, are not run. Predictions are lines of {"task_id": .., "completion": ..} in JSON, several for a task being
several draws. Programs that a model wrote run only with --run_code, in eval/sandbox.py; it prints what that does.

pass@k is estimated from all draws (Codex, arXiv 2107.03374). Edit similarity is difflib's ratio, in Python's library.
"""

import json
from collections import Counter
from dataclasses import dataclass

from configurator import run
from data import mbpp, mini
from data.syntax import parse_python
from data.text_file import read_text
from eval import sandbox
from eval.common import (
    Job,
    TaskConfig,
    check_ids,
    choose,
    cost,
    generate_kept,
    held_out,
    is_mini,
    jobs_of,
    open_task,
    read_items,
    report,
    write_text,
)
from eval.metrics import Metric, edit_similarity, mean, pass_at_k
from eval.python_code import BROKEN, is_python

MAX_EXAMPLES = 1 << 20  # a draw is keyed by example and number in one word of 32 bits ...
MAX_SAMPLES = 1 << 12  # ... which these two fill


@dataclass
class CodeConfig(TaskConfig):
    samples: int = 1  # draws per problem; with predictions so many as the file has
    k: str = "1"  # the k of pass@k, such as 1,10,80
    split: str = "test"  # of MBPP's task_ids: few-shot | test | validation | train | all
    run_code: bool = False  # run the programs that a model wrote; without it they are only parsed and compared

    def __post_init__(self):
        super().__post_init__()
        if not self.k.replace(",", "").isdecimal() or min(self.ks) < 1:
            raise ValueError(f"k wants whole numbers from 1, such as 1,10,80; got {self.k!r}")
        if not 1 <= self.samples <= MAX_SAMPLES:
            raise ValueError(f"samples must be 1 to {MAX_SAMPLES}, got {self.samples}")
        if self.split not in ("all", *mbpp.SPLITS):
            raise ValueError(f"split must be all or one of {', '.join(mbpp.SPLITS)}; got {self.split!r}")

    @property
    def ks(self) -> list[int]:
        return sorted({int(k) for k in self.k.split(",") if k})


def examples(cfg: CodeConfig) -> list[dict]:
    """The problems with id, prefix, target, continues and, if they have any, tests: of cfg.source, or held-out pairs.

    continues: whether a completion goes on from the prefix, as in HumanEval and python_pairs, or is a program itself.
    """
    if cfg.source:
        found = [e for e in mbpp.read(cfg.source) if cfg.split in ("all", e["split"])]
        if not found:
            raise ValueError(f"{cfg.source} has no tasks of the split {cfg.split}")
        return [e | {"continues": mbpp.program(e, "") != ""} for e in found]
    found = held_out(cfg.data, "code")
    if is_mini(cfg.data):
        found = [e | {"tests": mini.code_tests(e)} for e in found]
    return [e | {"continues": not _is_program(e["target"]) and is_python(e["prefix"], e["target"])} for e in found]


def prompt(example: dict) -> str:
    """What the model reads."""
    return example["prefix"]


def program(prediction: str, example: dict) -> str:
    """The source that the prediction makes, behind which the tests run."""
    return example["prefix"] + prediction if example["continues"] else prediction


def score(prediction: str, example: dict) -> tuple[bool, float]:
    """(whether it parses as Python, edit similarity to the reference). Nothing is run. A blank text never parses."""
    return _parses(prediction, example), edit_similarity(prediction, example["target"])


def _parses(prediction: str, example: dict) -> bool:
    if example["continues"] and "tests" not in example:  # a body: one function with it, as eval.python_code counts
        return is_python(example["prefix"], prediction)
    return bool(prediction.strip()) and BROKEN not in prediction and _is_program(program(prediction, example))


def _is_program(text: str) -> bool:
    return parse_python(text + "\n") is not None


def run_programs(draws: list[list[str]], asked: list[dict]) -> list[list[sandbox.Outcome]]:
    """What the tests of each problem say to each of its draws. Equal draws of a problem run once."""
    jobs = {(i, text): (program(text, e), e["tests"]) for i, e in enumerate(asked) for text in draws[i]}
    outcomes = dict(zip(jobs, sandbox.run_many(list(jobs.values()), sandbox.Limits())))
    return [[outcomes[i, text] for text in texts] for i, texts in enumerate(draws)]


def items_of(draws: list[list[str]], asked: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """(of each problem: samples, parsed, edit_similarity and, with tests, passed; how often the sandbox said what)."""
    items, said = [], Counter()
    for texts, example in zip(draws, asked):
        scores = [score(text, example) for text in texts]
        parsed, similar = (sum(values) for values in zip(*scores))
        items.append({"samples": len(texts), "parsed": parsed, "edit_similarity": similar / len(texts)})
    if "tests" in asked[0]:
        for item, outcomes in zip(items, run_programs(draws, asked)):
            item["passed"] = sum(outcome.passed for outcome in outcomes)
            said.update(outcome.status for outcome in outcomes)
    return items, dict(said.most_common())


def metrics_of(items: list[dict], ks: list[int]) -> dict[str, Metric]:
    """{"pass@k" for each k if there are tests, "parse", "edit_similarity"}, each a mean over the problems."""
    found = {}
    if "passed" in items[0]:
        found = {f"pass@{k}": mean([pass_at_k(i["samples"], i["passed"], k) for i in items]) for k in ks}
    found["parse"] = mean([i["parsed"] / i["samples"] for i in items])
    return found | {"edit_similarity": mean([i["edit_similarity"] for i in items])}


def read_predictions(path: str, asked: list[dict]) -> list[list[str]]:
    """The completions of each problem, as many for each. Raises ValueError that names the line or the task."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            task, completion = str(row["task_id"]), row["completion"]
        except (json.JSONDecodeError, TypeError, KeyError):
            raise ValueError(f'{path}, line {number}: want {{"task_id": .., "completion": ..}} in JSON') from None
        if not isinstance(completion, str):
            raise ValueError(f"{path}, line {number}: the completion must be a text, got {str(completion)[:60]}")
        found.setdefault(task, []).append(completion)
    check_ids(path, found, [example["id"] for example in asked])
    most = max(len(texts) for texts in found.values())
    short = [f"{task} has {len(texts)}" for task, texts in found.items() if len(texts) < most]
    if short:
        raise ValueError(f"{path}: up to {most} completions a task, but task {short[0]}; want as many for each")
    return [found[example["id"]] for example in asked]


def write_predictions(path: str, draws: list[list[str]], asked: list[dict]) -> None:
    """What read_predictions and HumanEval's own script read."""
    rows = [
        {"task_id": example.get("task_id", example["id"]), "completion": text}
        for texts, example in zip(draws, asked)
        for text in texts
    ]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def draw_jobs(job: Job, samples: int) -> list[Job]:
    """The same prompt so many times, each with draws of its own, which do not depend on how many there are."""
    return [job._replace(key=f"{job.key}#{i}", example=job.example + i * MAX_EXAMPLES) for i in range(samples)]


def main(argv: list[str]) -> dict:
    """Evaluate as argv says; returns what the JSON line holds."""
    cfg, model, tokenizer, state = open_task(argv, CodeConfig)
    if not cfg.predictions:
        _check_k(cfg.ks, cfg.samples)
    asked, other, spent = choose(examples(cfg), cfg.n), None, {}
    theirs = read_items(cfg.against, "code", asked) if cfg.against else None
    _check_run(cfg, asked, is_ours=cfg.reference and (not cfg.against or theirs is not None))
    if cfg.against:
        theirs = theirs or items_of(read_predictions(cfg.against, asked), asked)[0]
        _check_k(cfg.ks, min(item["samples"] for item in theirs))
        other = metrics_of(theirs, cfg.ks)
    if model:
        _check_draws(cfg, model)
        jobs = [draw for job in jobs_of(asked, prompt, model, tokenizer) for draw in draw_jobs(job, cfg.samples)]
        made = generate_kept(model, tokenizer, jobs, cfg)
        keys = [[f"{example['id']}#{i}" for i in range(cfg.samples)] for example in asked]
        draws = [[made[key].text if key in made else "" for key in row] for row in keys]
        spent = cost(made.values()) | {"best_of": getattr(cfg, "candidates", 1)}
    elif cfg.reference:
        draws = [[example["target"]] * cfg.samples for example in asked]
    else:
        draws = read_predictions(cfg.predictions, asked)
        _check_k(cfg.ks, len(draws[0]))
    if cfg.save:
        write_predictions(cfg.save, draws, asked)
    items, said = items_of(draws, asked)
    extra = {"samples": len(draws[0]), "empty": sum(not text.strip() for texts in draws for text in texts)}
    extra |= {"outcomes": said, **spent}
    return report("code", argv, cfg, state, asked, items, metrics_of(items, cfg.ks), other, extra)


def _check_k(ks: list[int], samples: int) -> None:
    if max(ks) > samples:
        raise ValueError(f"pass@{max(ks)} needs as many draws of a problem, there are {samples}; set --samples or --k")


def _check_run(cfg: CodeConfig, asked: list[dict], is_ours: bool) -> None:
    """Say what will be run, or raise ValueError where it may not be. is_ours: only references are to run."""
    if "tests" not in asked[0]:
        print("these problems have no unit tests, so nothing is run: parse rate and edit similarity only")
    elif cfg.run_code:
        print(f"--run_code: each program is run, in a process of its own, then its unit tests; {sandbox.isolation()}")
    elif not is_ours:
        raise ValueError(f"pass@k runs programs that a model wrote: allow it with --run_code; {sandbox.isolation()}")


def _check_draws(cfg, model) -> None:
    """Say what a draw is. Raises ValueError where all of a problem would be the same."""
    if model.cfg.paradigm == "ar":
        if cfg.samples > 1 and cfg.temperature == 0:
            raise ValueError(f"--samples={cfg.samples} at temperature 0 are equal draws; give --temperature=0.8, say")
        kind = f"a sample at temperature {cfg.temperature}" if cfg.temperature else "the greedy answer"
    else:
        best = f"the best of {cfg.candidates} canvases by model score, so pass@k sees {cfg.candidates} times as many"
        kind = best if cfg.candidates > 1 else "one canvas"
    print(f"{cfg.samples} draws per problem, each {kind}")


if __name__ == "__main__":
    run(main)
