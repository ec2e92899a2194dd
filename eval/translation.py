"""Measure translation: BLEU and chrF by sacrebleu, and exact match.

    python -m eval.translation --init_from=out/run/ckpt.pt --source=a.en.gz --target_source=a.fr.gz
    python -m eval.translation --predictions=answers.json --source=a.en.gz --target_source=a.fr.gz

Without --source: the held-out pairs of the checkpoint's data set. The id of an example in a file is
its line number. A line break in a translation becomes a space before it is scored.
"""

import re
from dataclasses import dataclass

from configurator import require, run, setting
from data import parallel
from eval.common import TaskConfig, TaskRun, held_out
from eval.metrics import Metric, mean, translation_metrics


@dataclass
class TranslationConfig(TaskConfig):
    target_source: str = setting("", "translations; default: after a tab in source", path=True)
    task_prefix: str = setting("", "text before each sentence of source, as in training")

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_source", "task_prefix"):
            require(self.source or not getattr(self, name), f"--{name} needs --source=FILE")


def examples(cfg: TranslationConfig) -> list[dict]:
    """Return the examples with id, prefix and target."""
    if cfg.source:
        return parallel.read(cfg.source, cfg.target_source, cfg.task_prefix)
    return held_out(cfg.data, "translation")


def one_line(text: str) -> str:
    """Replace each line break by a space and strip the ends."""
    return re.sub(r"\r\n|\r|\n", " ", text).strip()


def score(predictions: list[str], asked: list[dict]) -> dict[str, Metric]:
    """Return BLEU, chrF (points) and exact match (share)."""
    ours = [one_line(text) for text in predictions]
    references = [one_line(example["target"]) for example in asked]
    equal = [a == b for a, b in zip(ours, references)]
    return translation_metrics(ours, references) | {"exact_match": mean(equal)}


def main(argv: list[str]) -> dict:
    translation_metrics([""], [""])  # if sacrebleu is missing, fail before hours of work
    task = TaskRun("translation", argv, TranslationConfig, examples)
    texts, cost = task.texts()
    return task.report(texts, score(texts, task.examples), cost)


if __name__ == "__main__":
    run(main, TranslationConfig)
