"""Measure question answering: exact match and F1 of SQuAD v1.1.

    python -m eval.qa --init_from=out/run/ckpt.pt --source=dev-v1.1.json
    python -m eval.qa --predictions=answers.json --source=dev-v1.1.json

Without --source: the held-out pairs of the checkpoint's data set, each with its target as the only
answer. Predictions are {id: answer} in JSON, as SQuAD's own script reads them. The model is never
told the length of the answer.
"""

import json
from dataclasses import dataclass
from functools import partial

from configurator import group, run
from data import squad
from data.sources import parse_json, read_text
from eval.common import EvalConfig, TaskConfig, TaskRun, check_ids, held_out
from eval.metrics import Metric, answer_exact_match, answer_f1, mean


@dataclass
class QaConfig:
    run: EvalConfig = group(EvalConfig)
    task: TaskConfig = group(TaskConfig)


def examples(cfg: QaConfig) -> list[dict]:
    """Return the questions with id, prefix, target and answers."""
    if cfg.task.source:
        return squad.read(cfg.task.source)
    pairs = held_out(cfg.task.data, "qa")
    return [example | {"answers": [example["target"]]} for example in pairs]


def score(predictions: list[str], asked: list[dict]) -> dict[str, Metric]:
    """Return exact match and F1, each the best over the answers of a question."""
    pairs = [(text, example["answers"]) for text, example in zip(predictions, asked)]
    return {
        "exact_match": mean([answer_exact_match(*pair) for pair in pairs]),
        "f1": mean([answer_f1(*pair) for pair in pairs]),
    }


def read_predictions(path: str, asked: list[dict]) -> list[str]:
    """Return the answers in the order of the questions."""
    found = parse_json(read_text(path), path)
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise ValueError(f"{path}: must be one JSON object of {{id: answer}}, every answer a text")
    check_ids(path, found, asked)
    return [found[example["id"]] for example in asked]


def main(argv: list[str]) -> dict:
    task = TaskRun("qa", argv, QaConfig, examples)
    predictions, cost = task.texts(read_predictions)
    named = {example["id"]: text for example, text in zip(task.examples, predictions)}
    task.save(json.dumps(named, ensure_ascii=False, indent=0))
    return task.report(predictions, partial(score, asked=task.examples), cost)


if __name__ == "__main__":
    run(main, QaConfig)
