"""SQuAD v1.1: a question about a paragraph, answered with words of the paragraph (Rajpurkar et al. 2016, 1606.05250).

    python -m data.squad [--source=train-v1.1.json --valid_source=dev-v1.1.json] [--tokenizer=gpt2] [--block_size=512]

    question: Who read it? context: Ann read the book.  ->  Ann

The prompt is T5's (Raffel et al. 2020, 1910.10683, appendix D), whose lineage the paper stands in; the paper itself
does not say how it writes SQuAD as text. The target is the first answer. Without flags the official files are fetched;
of a single file some paragraphs are held out, chosen by a hash, so that no context is on both sides. .json.gz is fine.

A prompt that is too long is left out of the set and counted. It is never cut around the answer: at test time nobody
knows where that is.
"""

import json
from dataclasses import dataclass

from configurator import configure, run
from data.sources import Download, SetConfig, is_held_out, local, write_set
from data.text_file import read_text

SITE = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
TRAIN = Download(
    f"{SITE}/train-v1.1.json", 30_288_272, "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955"
)
DEV = Download(f"{SITE}/dev-v1.1.json", 4_854_279, "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9")
VERSION = "1.1"
KINDS = {str: "text", list: "a list", dict: "an object"}


@dataclass
class SquadConfig(SetConfig):
    source: str = TRAIN.url  # the training file
    valid_source: str = ""  # the held-out file; "": the official one beside the official training file
    held_out: float = 0.1  # share of the paragraphs, where source is all there is
    name: str = "squad"

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")


def read(source: str) -> list[dict]:
    """The questions of a SQuAD v1.1 file in its order: id, title, context, question, answers, prefix, target.

    Raises ValueError, one line that names the place, for another version, a truncated file or a faulty question.
    """
    path = local(source, (TRAIN, DEV))
    try:
        whole = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON, or broken off ({error})") from None
    articles, version = _get(whole, "data", list, path), whole.get("version")
    if version != VERSION:
        raise ValueError(f"{path}: SQuAD version {version!r}, this reads {VERSION!r} (train-v1.1.json, dev-v1.1.json)")
    found = {}
    for a, article in enumerate(articles):
        title = _get(article, "title", str, f"{path}, data[{a}]")
        for p, paragraph in enumerate(_get(article, "paragraphs", list, f"{path}, data[{a}]")):
            place = f"{path}, data[{a}].paragraphs[{p}]"
            context = _get(paragraph, "context", str, place)
            for q, item in enumerate(_get(paragraph, "qas", list, place)):
                example = _example(item, f"{place}.qas[{q}]") | {"title": title, "context": context}
                if example["id"] in found:
                    raise ValueError(f"{place}.qas[{q}]: id {example['id']!r} is there twice")
                found[example["id"]] = example | {"prefix": prompt(example), "target": example["answers"][0]}
    if not found:
        raise ValueError(f"{path}: no questions in it")
    return list(found.values())


def prompt(example: dict) -> str:
    """What the model reads: question and context, never the answer."""
    return f"question: {example['question']} context: {example['context']}"


def _example(item: dict, place: str) -> dict:
    answers = [_get(answer, "text", str, f"{place}.answers") for answer in _get(item, "answers", list, place)]
    if not answers:
        raise ValueError(f"{place}: a question without answers; SQuAD {VERSION} has none")
    return {"id": _get(item, "id", str, place), "question": _get(item, "question", str, place), "answers": answers}


def _get(item: dict, key: str, kind: type, place: str):
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{place}: wants {key!r}, {KINDS[kind]}, got {str(value)[:60]}")
    return value


def main(argv: list[str]) -> None:
    cfg = configure(SquadConfig, argv)
    examples = read(cfg.source)
    valid_source = cfg.valid_source or (DEV.url if cfg.source == TRAIN.url else "")
    if valid_source:
        train, valid = examples, read(valid_source)
    else:
        train, valid = [], []
        for example in examples:
            (valid if is_held_out(example["context"], cfg.held_out) else train).append(example)
    write_set(cfg, train, valid, f"python -m data.squad {' '.join(argv)}".rstrip())


if __name__ == "__main__":
    run(main)
