"""Build a data set from your own text.

    python -m data.text_file --input=book.txt --input=notes.txt --name=mine [--tokenizer=gpt2]
    python -m data.text_file --input=pairs.jsonl --name=mine

Text becomes a stream. Lines of JSON (.jsonl) with the field "text" do too, with the fields "prefix"
and "target" they become pairs. All may be gzipped. Of every text, the end is held out; of pairs,
some of the prefixes, so that no prefix is in both splits.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from configurator import configure, require, run, setting
from data import sources
from data.sources import SetConfig, hash_number, read_json_lines, read_text, write_set, write_texts


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


def read_items(path: str) -> Iterator[dict]:
    """Yield {"text"}, or {"prefix", "target", "where"}. A file that is no JSON is one text."""
    if not sources.has_json(path):
        yield {"text": read_text(path)}
        return
    for number, item in read_json_lines(path):
        where = f"{path}, line {number}"
        fields = item if isinstance(item, dict) else {}
        names = ["prefix", "target"] if "prefix" in fields else ["text"]
        if not all(isinstance(fields.get(name), str) for name in names):
            wanted = '{"text": text} or {"prefix": text, "target": text}'
            raise ValueError(f"{where}: must be {wanted}, got {str(item)[:60]}")
        yield {name: fields[name] for name in names} | {"where": where}


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
    require(all(inputs), "no input: give --input=FILE (.txt or .jsonl)")
    command = ["data.text_file", *argv]
    items = [item for path in inputs for item in read_items(path)]
    texts = [item["text"] for item in items if "text" in item]
    require(len(texts) in (0, len(items)), "--input: give texts or pairs, not both")
    if texts:
        parts = [split_text(text.replace("\r\n", "\n"), cfg.held_out) for text in texts]
        write_texts(cfg, dict(zip(("train", "valid"), zip(*parts))), command)
    else:
        write_set(cfg, split_pairs(items, cfg.held_out), command, fit=100)


if __name__ == "__main__":
    run(main, TextFileConfig)
