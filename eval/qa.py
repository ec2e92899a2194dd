"""How well a model answers questions about a paragraph: exact match and F1 of SQuAD v1.1.

    python -m eval.qa --init_from=out/run/ckpt.pt --source=dev-v1.1.json
    python -m eval.qa --predictions=answers.json --source=dev-v1.1.json

Without --source: the held-out pairs of the set the checkpoint was trained on, with the target as the only answer.
Predictions are {id: answer} in JSON, as SQuAD's own script reads them. Shares are in [0, 1]; that script says percent.
The length of the answer is never given away; what a diffusion model would score if it were is --oracle_length.
"""

import json
from dataclasses import dataclass

import diffusion
from configurator import run
from data import squad
from data.text_file import read_text
from eval.common import (
    TaskConfig,
    check_ids,
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
from eval.metrics import Metric, answer_exact_match, answer_f1, mean
from sample import decoder_of


@dataclass
class QaConfig(TaskConfig):
    oracle_length: bool = False  # diffusion: once more, with the slots behind the first answer given as pad


def examples(cfg: QaConfig) -> list[dict]:
    """The questions with id, prefix, target and answers: those of cfg.source, or held-out pairs."""
    found = squad.read(cfg.source) if cfg.source else held_out(cfg.data, "qa")
    return [{"answers": [example["target"]]} | example for example in found]


def prompt(example: dict) -> str:
    """What the model reads."""
    return example["prefix"]


def score(prediction: str, example: dict) -> tuple[bool, float]:
    """(exact match, F1), each the best over the answers of the example."""
    return answer_exact_match(prediction, example["answers"]), answer_f1(prediction, example["answers"])


def metrics_of(predictions: list[str], asked: list[dict], name: str = "") -> dict[str, Metric]:
    """{"exact_match", "f1"}, the keys with name in front."""
    scores = [score(prediction, example) for prediction, example in zip(predictions, asked)]
    return {f"{name}{key}": mean(values) for key, values in zip(("exact_match", "f1"), zip(*scores))}


def read_predictions(path: str, asked: list[dict]) -> list[str]:
    """The answers in the order of the questions. Raises ValueError for other ids than theirs, or anything else."""
    try:
        found = json.loads(read_text(path), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON, or broken off ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(answer, str) for answer in found.values()):
        raise ValueError(f"{path}: want one JSON object of {{id: answer}}, every answer a text")
    check_ids(path, found, [example["id"] for example in asked])
    return [found[example["id"]] for example in asked]


def _unique(path: str, pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{path}: more than one answer for {next(key for key in keys if keys.count(key) > 1)}")
    return found


def write_predictions(path: str, predictions: list[str], asked: list[dict]) -> None:
    """What read_predictions and SQuAD's own script read."""
    found = {example["id"]: prediction for prediction, example in zip(predictions, asked)}
    write_text(path, json.dumps(found) + "\n")


def main(argv: list[str]) -> dict:
    """Evaluate as argv says; returns what the JSON line holds."""
    cfg, model, tokenizer, state = open_task(argv, QaConfig)
    if cfg.oracle_length and (not model or decoder_of(model.cfg, getattr(cfg, "sampler", None)) is not diffusion):
        raise ValueError("--oracle_length needs a diffusion checkpoint that answers: only a canvas has a length")
    asked, other, spent, oracle = choose(examples(cfg), cfg.n), None, {}, {}
    if cfg.against:
        items = read_items(cfg.against, "qa", asked) or read_predictions(cfg.against, asked)
        other = metrics_of(items, asked)
    if model:
        jobs = jobs_of(asked, prompt, model, tokenizer)
        told = [_told(job, asked, tokenizer) for job in jobs] if cfg.oracle_length else []
        made = generate_kept(model, tokenizer, jobs + told, cfg)
        predictions, spent = _answers(made, asked), cost(made[job.key] for job in jobs)
        oracle = metrics_of(_answers(made, asked, ORACLE), asked, ORACLE) if told else {}
    elif cfg.reference:
        predictions = [example["target"] for example in asked]
    else:
        predictions = read_predictions(cfg.predictions, asked)
    if cfg.save:
        write_predictions(cfg.save, predictions, asked)
    extra = {"empty": sum(not prediction.strip() for prediction in predictions), **spent}
    return report("qa", argv, cfg, state, asked, predictions, metrics_of(predictions, asked) | oracle, other, extra)


ORACLE = "oracle_length_"


def _told(job, asked: list[dict], tokenizer):
    """The job with the length of the first answer given away."""
    length = len(tokenizer.encode(asked[job.example]["target"]))
    return job._replace(key=ORACLE + job.key, length=length)


def _answers(made: dict, asked: list[dict], name: str = "") -> list[str]:
    keys = [name + example["id"] for example in asked]
    return [made[key].text if key in made else "" for key in keys]


if __name__ == "__main__":
    run(main)
