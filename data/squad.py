"""SQuAD v1.1: answer a question with words of a paragraph (Rajpurkar et al. 2016, 1606.05250).

    python -m data.squad [--tokenizer=gpt2] [--block_size=512]
    python -m data.squad --source=train-v1.1.json --valid_source=dev-v1.1.json

    Ann read the book.\\nQuestion: Who read it?\\nAnswer:  ->   Ann

The question comes after the paragraph. The target is the first answer. By default the official
files are downloaded.
"""

from dataclasses import dataclass

from configurator import configure, require, run, setting
from data.sources import SetConfig, local, parse_json, read_text, write_set

SITE = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
TRAIN = f"{SITE}/train-v1.1.json"
DEV = f"{SITE}/dev-v1.1.json"
CHECKSUMS = {
    TRAIN: "3527663986b8295af4f7fcdff1ba1ff3f72d07d61a20f487cb238a6ef92fd955",
    DEV: "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
}


@dataclass
class SquadConfig(SetConfig):
    source: str = setting(TRAIN, "the training file, or its URL", path=True)
    valid_source: str = setting(DEV, "the held-out file, or its URL", path=True)
    name: str = setting("squad", "the data set becomes the folder out/name")
    # 24 tokens hold 99% of the answers in GPT-2's tokens.
    target_length: int = setting(25, "tokens with separator; 0: 99% fit", minimum=2, zero_ok=True)


def read(source: str) -> list[dict]:
    """Return the questions of a file: id, title, context, question, answers, prefix, target."""
    path = local(source, CHECKSUMS)
    content = parse_json(read_text(path), path)
    examples = {}
    try:
        items = (
            (article["title"], paragraph["context"], item)
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for item in paragraph["qas"]
        )
        for title, context, item in items:
            example = {"id": item["id"], "title": title, "context": context}
            example["question"] = item["question"]
            answers = [answer["text"] for answer in item["answers"]]
            for text in (*example.values(), *answers):
                if not isinstance(text, str):
                    raise TypeError(f"expected text, got {str(text)[:40]}")
            require(item["id"] not in examples, f"{path}: id {item['id']!r} occurs twice")
            prefix = f"{context}\nQuestion: {item['question']}\nAnswer:"
            pair = {"prefix": prefix, "target": f" {answers[0]}"}
            examples[item["id"]] = example | {"answers": answers} | pair
    except (KeyError, TypeError, IndexError) as error:
        fault = f"not SQuAD 1.1 after question {len(examples)} ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {fault}") from None
    require(examples, f"{path}: has no questions")
    return list(examples.values())


def main(argv: list[str]) -> None:
    cfg = configure(SquadConfig, argv)
    splits = {"train": read(cfg.source), "valid": read(cfg.valid_source)}
    write_set(cfg, splits, ["data.squad", *argv])


if __name__ == "__main__":
    run(main, SquadConfig)
