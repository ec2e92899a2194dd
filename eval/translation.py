"""Measure translation: BLEU and chrF by sacrebleu, and exact match.

    python -m eval.translation --init_from=out/run/ckpt.pt --source=a.en.gz --target_source=a.fr.gz
    python -m eval.translation --predictions=answers.txt --source=a.en.gz --target_source=a.fr.gz

Without --source: the held-out pairs of the checkpoint's data set. A file of predictions has one
line per example. A line break in a translation becomes a space before it is scored.
"""

import re
from dataclasses import dataclass
from functools import partial

from configurator import group, run, setting, validate
from data import parallel
from data.sources import read_lines
from eval.common import EvalConfig, TaskConfig, TaskRun, held_out
from eval.metrics import Metric, mean, sacrebleu_scorers, translation_metrics


@dataclass
class TranslationConfig:
    run: EvalConfig = group(EvalConfig)
    task: TaskConfig = group(TaskConfig)
    target_source: str = setting("", "translations; default: after a tab in source", path=True)
    task_prefix: str = setting("", "text before each sentence of source, as in training")

    def __post_init__(self):
        validate(self)
        for name in ("target_source", "task_prefix"):
            if getattr(self, name) and not self.task.source:
                raise ValueError(f"--{name} needs --source=FILE")


def examples(cfg: TranslationConfig) -> list[dict]:
    """Return the examples with id, prefix and target."""
    if cfg.task.source:
        return parallel.read(cfg.task.source, cfg.target_source, cfg.task_prefix)
    return held_out(cfg.task.data, "translation")


def one_line(text: str) -> str:
    """Replace each line break by a space and strip the ends."""
    return re.sub(r"\r\n|\r|\n", " ", text).strip()


def score(predictions: list[str], asked: list[dict]) -> dict[str, Metric]:
    """Return BLEU, chrF (points) and exact match (share)."""
    ours = [one_line(text) for text in predictions]
    references = [one_line(example["target"]) for example in asked]
    equal = [a == b for a, b in zip(ours, references)]
    return translation_metrics(ours, references) | {"exact_match": mean(equal)}


def read_predictions(path: str, asked: list[dict]) -> list[str]:
    lines = list(read_lines(path))
    if len(lines) != len(asked):
        counts = f"{len(lines)} lines for {len(asked)} examples"
        raise ValueError(f"{path}: {counts}; write one translation per line")
    return lines


def main(argv: list[str]) -> dict:
    sacrebleu_scorers()  # if it is missing, fail before hours of work
    task = TaskRun("translation", argv, TranslationConfig, examples)
    predictions, cost = task.texts(read_predictions)
    task.save("".join(f"{one_line(text)}\n" for text in predictions))
    compare = partial(score, asked=task.examples)
    metrics = compare(predictions)
    signatures = {name: metrics[name].signature for name in ("bleu", "chrf")}
    notes = "".join(f"\n{name}: {signature}" for name, signature in signatures.items())
    return task.report(predictions, compare, {"signatures": signatures} | cost, notes)


if __name__ == "__main__":
    run(main, TranslationConfig)
