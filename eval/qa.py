"""Measure question answering: exact match and F1 of SQuAD v1.1.

    python -m eval.qa --init_from=out/run/ckpt.pt --source=dev-v1.1.json
    python -m eval.qa --predictions=answers.json --source=dev-v1.1.json

Without --source: the held-out pairs of the checkpoint's data set, each with its target as the only
answer. Predictions are as for SQuAD's own script. No prompt holds the answer's length.
"""

from configurator import run
from data import squad
from eval.common import TaskConfig, TaskRun, held_out
from eval.metrics import Metric, answer_exact_match, answer_f1, mean


def examples(cfg: TaskConfig) -> list[dict]:
    """Return the questions with id, prefix, target and answers."""
    if cfg.source:
        return squad.read(cfg.source)
    pairs = held_out(cfg.data, "qa")
    return [example | {"answers": [example["target"]]} for example in pairs]


def score(predictions: list[str], asked: list[dict]) -> dict[str, Metric]:
    """Return exact match and F1, each the best over the answers of a question."""
    pairs = [(text, example["answers"]) for text, example in zip(predictions, asked)]
    return {
        "exact_match": mean([answer_exact_match(*pair) for pair in pairs]),
        "f1": mean([answer_f1(*pair) for pair in pairs]),
    }


def main(argv: list[str]) -> dict:
    task = TaskRun("qa", argv, TaskConfig, examples)
    answers, cost = task.texts()
    return task.report(answers, score(answers, task.examples), cost)


if __name__ == "__main__":
    run(main, TaskConfig)
