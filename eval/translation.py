"""How well a model translates: BLEU and chrF by sacrebleu, and the share of exact matches.

    python -m eval.translation --init_from=out/run/ckpt.pt --source=test.en.gz --target_source=test.fr.gz
    python -m eval.translation --predictions=answers.txt --source=test.en.gz --target_source=test.fr.gz

Without --source: the held-out pairs of the set the checkpoint was trained on. Predictions are one line an example, in
order. Prints a table, sacrebleu's signatures and one JSON line. A translation is one line: a line break in it becomes
a space before it is scored or saved, so sacrebleu's own command gives the same BLEU for the saved file.
"""

import re
from dataclasses import dataclass

from configurator import run
from data import parallel
from data.sources import read_lines
from eval.common import (
    TaskConfig,
    choose,
    cost,
    generate_kept,
    held_out,
    jobs_of,
    open_task,
    read_items,
    report,
    write_text,
)
from eval.metrics import Metric, mean, sacrebleu_scorers, translation_metrics


@dataclass
class TranslationConfig(TaskConfig):
    target_source: str = ""  # the file of the translations; "": source has them behind a tab
    task_prefix: str = ""  # text before each sentence of source, as the model was trained with it

    def __post_init__(self):
        super().__post_init__()
        for name in ("target_source", "task_prefix"):
            if getattr(self, name) and not self.source:
                raise ValueError(f"--{name} needs --source=FILE")


def examples(cfg: TranslationConfig) -> list[dict]:
    """What is to be translated, with id, prefix and target: the lines of cfg.source, or held-out pairs."""
    if cfg.source:
        return parallel.read(cfg.source, cfg.target_source, cfg.task_prefix)
    return held_out(cfg.data, "translation")


def prompt(example: dict) -> str:
    """What the model reads."""
    return example["prefix"]


def score(prediction: str, example: dict) -> bool:
    """Whether it is the reference, character by character. BLEU and chrF are of a whole set: see `metrics_of`."""
    return one_line(prediction) == one_line(example["target"])


def one_line(text: str) -> str:
    """The text with each line break a space, and none at the ends."""
    return re.sub(r"\r\n|\r|\n", " ", text).strip()


def metrics_of(predictions: list[str], asked: list[dict]) -> tuple[dict[str, Metric], dict[str, str]]:
    """({"bleu", "chrf": in points, "exact_match": share}, sacrebleu's signature of the first two)."""
    found, signatures = translation_metrics([one_line(p) for p in predictions], [one_line(e["target"]) for e in asked])
    return found | {"exact_match": mean([score(p, e) for p, e in zip(predictions, asked)])}, signatures


def read_predictions(path: str, n: int) -> list[str]:
    """One line an example. Raises ValueError for another number of lines than n, or for what is not UTF-8."""
    lines = list(read_lines(path))
    if len(lines) != n:
        raise ValueError(f"{path}: {len(lines)} lines for {n} examples; want one translation a line, and all of them")
    return lines


def write_predictions(path: str, predictions: list[str]) -> None:
    """What read_predictions reads."""
    write_text(path, "".join(one_line(prediction) + "\n" for prediction in predictions))


def main(argv: list[str]) -> dict:
    """Evaluate as argv says; returns what the JSON line holds."""
    cfg, model, tokenizer, state = open_task(argv, TranslationConfig)
    sacrebleu_scorers()  # what is missing is told before hours of work
    asked, other, spent = choose(examples(cfg), cfg.n), None, {}
    if cfg.against:
        items = read_items(cfg.against, "translation", asked) or read_predictions(cfg.against, len(asked))
        other, _ = metrics_of(items, asked)
    if model:
        made = generate_kept(model, tokenizer, jobs_of(asked, prompt, model, tokenizer), cfg)
        predictions, spent = [made[e["id"]].text if e["id"] in made else "" for e in asked], cost(made.values())
    elif cfg.reference:
        predictions = [e["target"] for e in asked]
    else:
        predictions = read_predictions(cfg.predictions, len(asked))
    if cfg.save:
        write_predictions(cfg.save, predictions)
    metrics, signatures = metrics_of(predictions, asked)
    for name, signature in signatures.items():
        print(f"{name}: {signature}")
    extra = {"signatures": signatures, "empty": sum(not p.strip() for p in predictions), **spent}
    return report("translation", argv, cfg, state, asked, predictions, metrics, other, extra)


if __name__ == "__main__":
    run(main)
