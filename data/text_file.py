"""Build a data set from your own text.

    python -m data.text_file --input=book.txt --input=notes.txt --name=mine [--tokenizer=gpt2]
    python -m data.text_file --input=pairs.jsonl --name=mine

Text becomes a stream. Lines of JSON with the fields "prefix" and "target" (.jsonl) become pairs.
Both may be gzipped. Of text, the end of every file is held out; of pairs, some of the prefixes, so
that no prefix is in both splits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from configurator import configure, run, setting
from data.sources import SetConfig, hash_number, read_json_lines, read_text, write_set, write_texts

JSON_LINES = (".jsonl", ".ndjson", ".json")  # a .json file is never meant as plain text


@dataclass
class TextFileConfig(SetConfig):
    input: str = setting("", "a .txt or .jsonl file; repeat --input for several files", path=True)
    held_out: float = setting(0.1, "share of the text or of the prefixes", above=0, maximum=0.9)


def split_text(text: str, held_out: float) -> tuple[str, str]:
    """Return (train, valid). The end is held out, from a line or a word on if one begins nearby."""
    n = round(len(text) * held_out)
    cut = len(text) - n
    for separator in ("\n", " "):
        nearby = text.rfind(separator, max(cut - n // 2, 0), cut) + 1
        if nearby:
            return text[:nearby], text[nearby:]
    return text[:cut], text[cut:]


def read_pairs(path: str) -> Iterator[dict]:
    for number, item in read_json_lines(path):
        where = f"{path}, line {number}"
        sides = [item.get(s) if isinstance(item, dict) else None for s in ("prefix", "target")]
        if not all(isinstance(side, str) for side in sides):
            wanted = '{"prefix": text, "target": text}'
            raise ValueError(f"{where}: must be {wanted}, got {str(item)[:60]}")
        yield {"prefix": sides[0], "target": sides[1], "where": where}


def split_pairs(items: list[dict], held_out: float) -> dict[str, list[dict]]:
    """Return the pairs by split. Prefixes are held out by their hash: at least one, never all."""
    usable = [item for item in items if item["target"]]
    prefixes = sorted({item["prefix"] for item in usable}, key=hash_number)
    if len(prefixes) < 2:
        fault = f"up to {items[-1]['where']}, only {len(prefixes)} prefixes with a target"
        raise ValueError(f"{fault}; at least 2 are needed, one to train on and one to hold out")
    n = round(held_out * len(prefixes))
    chosen = set(prefixes[: min(max(1, n), len(prefixes) - 1)])
    train = [item for item in items if not item["target"] or item["prefix"] not in chosen]
    return {"train": train, "valid": [item for item in usable if item["prefix"] in chosen]}


def main(argv: list[str]) -> None:
    cfg = configure(TextFileConfig, argv)
    inputs = [arg.removeprefix("--input=") for arg in argv if arg.startswith("--input=")]
    inputs = inputs or [cfg.input]  # a config file gives one
    if not all(inputs):
        raise ValueError("no input: give --input=FILE (.txt or .jsonl)")
    command = ["data.text_file", *argv]
    kinds = {path.lower().removesuffix(".gz").endswith(JSON_LINES) for path in inputs}
    if len(kinds) > 1:
        raise ValueError("--input: give text files or .jsonl files, not both")
    if kinds == {True}:
        items = [item for path in inputs for item in read_pairs(path)]
        write_set(cfg, split_pairs(items, cfg.held_out), command, fit=100)
    else:
        parts = [split_text(read_text(path), cfg.held_out) for path in inputs]
        write_texts(cfg, dict(zip(("train", "valid"), zip(*parts))), command)


if __name__ == "__main__":
    run(main, TextFileConfig)
