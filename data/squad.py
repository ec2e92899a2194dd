"""SQuAD v1.1: answer a question with words of a paragraph (Rajpurkar et al. 2016, 1606.05250).

    python -m data.squad [--source=FOLDER] [--tokenizer=gpt2] [--block_size=512]
    python -m data.squad --source=train-v1.1.json --valid_source=dev-v1.1.json

    Ann read the book.\\nQuestion: Who read it?\\nAnswer:  ->   Ann

The question comes after the paragraph, so that a paragraph is read first and can be cached. The
target is the first answer. By default the official files are downloaded. A folder holds a train and
a dev file. Of a single file, some paragraphs are held out.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from configurator import configure, run, setting
from data.sources import SetConfig, is_held_out, local, parse_json, read_text, write_set

SITE = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
TRAIN = f"{SITE}/train-v1.1.json"
DEV = f"{SITE}/dev-v1.1.json"
CHECKSUMS = {
    TRAIN: "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    DEV: "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
}


@dataclass
class SquadConfig(SetConfig):
    source: str = setting(TRAIN, "the training file, or a folder with train* and dev*", path=True)
    valid_source: str = setting("", "the held-out file", path=True)
    held_out: float = setting(0.1, "share of the paragraphs of a single file", above=0, maximum=0.9)
    name: str = setting("squad", "the data set becomes the folder out/name")
    target_length: int = setting(
        25,
        "tokens with separator; longer answers are left out; 0: 99% fit",
        minimum=2,
        zero_ok=True,
    )


def find_files(source: str, valid_source: str = "") -> tuple[str, str]:
    """Return the training and the held-out file. The second is "" if there is none."""
    if source == TRAIN:
        return TRAIN, valid_source or DEV
    folder = Path(source)
    if not folder.is_dir():
        return source, valid_source
    found = [sorted(folder.glob(f"{split}*.json*")) for split in ("train", "dev")]
    if not all(found):
        raise ValueError(f"{source}: must hold train*.json and dev*.json (or .json.gz)")
    return str(found[0][0]), valid_source or str(found[1][0])


def read(source: str) -> list[dict]:
    """Return the questions of a file: id, title, context, question, answers, prefix, target.

    Raises ValueError that names the place of a fault.
    """
    path = local(source, CHECKSUMS)
    content = parse_json(read_text(path), path)
    examples = {}
    articles = _get(content, "data", list, path)
    version = content.get("version")
    if version != "1.1":
        raise ValueError(f"{path}: SQuAD version {version!r}, must be '1.1' (train-v1.1.json)")
    for a, article in enumerate(articles):
        place = f"{path}, data[{a}]"
        title = _get(article, "title", str, place)
        for p, paragraph in enumerate(_get(article, "paragraphs", list, place)):
            inner = f"{place}.paragraphs[{p}]"
            context = _get(paragraph, "context", str, inner)
            for q, item in enumerate(_get(paragraph, "qas", list, inner)):
                example = {"title": title, "context": context}
                example |= _question(item, context, f"{inner}.qas[{q}]")
                if example["id"] in examples:
                    raise ValueError(f"{inner}.qas[{q}]: id {example['id']!r} occurs twice")
                examples[example["id"]] = example
    if not examples:
        raise ValueError(f"{path}: has no questions")
    return list(examples.values())


def prompt(context: str, question: str) -> str:
    return f"{context}\nQuestion: {question}\nAnswer:"


def _question(item: dict, context: str, place: str) -> dict:
    question = _get(item, "question", str, place)
    answers = _get(item, "answers", list, place)
    texts = [_get(answer, "text", str, f"{place}.answers") for answer in answers]
    if not texts:
        raise ValueError(f"{place}: a question without answers")
    return {
        "id": _get(item, "id", str, place),
        "question": question,
        "answers": texts,
        "prefix": prompt(context, question),
        "target": f" {texts[0]}",
    }


def _get(item: dict, key: str, kind: type, place: str):
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"{place}: {key!r} must be a {kind.__name__}, got {str(value)[:60]}")
    return value


def main(argv: list[str]) -> None:
    cfg = configure(SquadConfig, argv)
    source, valid_source = find_files(cfg.source, cfg.valid_source)
    train = read(source)
    if valid_source:
        valid = read(valid_source)
    else:
        valid = [e for e in train if is_held_out(e["context"], cfg.held_out)]
        train = [e for e in train if not is_held_out(e["context"], cfg.held_out)]
    write_set(cfg, train, valid, shlex.join(["python", "-m", "data.squad", *argv]))


if __name__ == "__main__":
    run(main, SquadConfig)
