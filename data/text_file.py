"""Your own text as a data set.

    python -m data.text_file --input=book.txt --input=notes.txt --name=mine [--tokenizer=gpt2]
    python -m data.text_file --input=pairs.jsonl --name=mine

Text files become a stream. Lines of JSON with the fields "prefix" and "target" (.jsonl) become pairs. Both may be
gzipped (.gz). Held out are, of text, the end of every file; of pairs, some prefixes, chosen by a hash, so that no
prefix is on both sides.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configurator import configure, run
from data.loader import OUT, join_documents, write_pairs, write_stream
from data.tokenizer import Tokenizer, get_tokenizer

STREAM_TARGET = 128  # tokens; what target_length=0 means for text
STREAM_BLOCK = 256  # tokens; what block_size=0 means for text


@dataclass
class TextFileConfig:
    input: str = ""  # a file; give --input several times for several
    name: str = ""  # the set becomes the folder out/name
    tokenizer: str = "bytes"  # bytes | gpt2 | the path of a tokenizer.json
    target_length: int = 0  # tokens, separator included; 0: 128 for text, the longest there is for pairs
    block_size: int = 0  # tokens, prefix and target; 0: 256 for text, the longest there is for pairs
    held_out: float = 0.1  # share of the text or of the pairs
    out: str = OUT  # the folder the set goes into

    def __post_init__(self):
        if not self.input:
            raise ValueError("which text? --input=FILE (.txt or .jsonl, .gz allowed)")
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"--name=NAME must be a plain folder name, got {self.name!r}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if self.target_length < 0 or self.target_length == 1 or self.block_size < 0:
            raise ValueError(
                f"target_length must be 0 or at least 2 and block_size 0 or more, got {self.target_length} and "
                f"{self.block_size}"
            )


def read_text(path: str) -> str:
    """The UTF-8 text of a file, gunzipped if it ends in .gz. Raises ValueError, naming the file, if there is none."""
    try:
        raw = gzip.decompress(Path(path).read_bytes()) if path.endswith(".gz") else Path(path).read_bytes()
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not text.strip():
        raise ValueError(f"{path}: empty")
    return text


def split_text(text: str, held_out: float) -> tuple[str, str]:
    """(train, valid): the end of the text is held out, cut where a line ends if it has lines."""
    cut = len(text) - round(len(text) * held_out)
    line_end = text.rfind("\n", 0, cut) + 1
    cut = line_end or cut
    return text[:cut], text[cut:]


def read_pairs(path: str, tokenizer: Tokenizer) -> Iterator[tuple[str, str, list[int], list[int]]]:
    """(where, prefix text, prefix ids, target ids) of every line of a JSONL file. ValueError names file and line."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from None
        sides = [item.get(field) if isinstance(item, dict) else None for field in ("prefix", "target")]
        if not all(isinstance(side, str) for side in sides):
            raise ValueError(f'{where}: wants {{"prefix": text, "target": text}}, got {line.strip()[:60]}')
        try:
            yield where, sides[0], *(tokenizer.encode(side) for side in sides)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def build_stream(inputs: list[str], cfg: TextFileConfig, command: str) -> dict:
    tokenizer = get_tokenizer(cfg.tokenizer)
    splits = {"train": [], "valid": []}
    for path in inputs:
        for split, part in zip(splits, split_text(read_text(path), cfg.held_out)):
            splits[split].append(part)
    return write_stream(
        Path(cfg.out) / cfg.name,
        {split: join_documents(parts, tokenizer) for split, parts in splits.items()},
        tokenizer_name=cfg.tokenizer,
        target_length=cfg.target_length or STREAM_TARGET,
        block_size=cfg.block_size or STREAM_BLOCK,
        command=command,
    )


def build_pairs(inputs: list[str], cfg: TextFileConfig, command: str) -> dict:
    tokenizer = get_tokenizer(cfg.tokenizer)
    items = [item for path in inputs for item in read_pairs(path, tokenizer)]
    target_length = cfg.target_length or max(len(target) for *_, target in items) + 1
    block_size = cfg.block_size or max(len(prefix) for _, _, prefix, _ in items) + target_length
    for where, _, prefix, target in items:  # the writer checks too, but it does not know the line
        if len(target) > target_length - 1:
            raise ValueError(
                f"{where}: target has {len(target)} tokens, target_length={target_length} takes {target_length - 1}"
            )
        if len(prefix) > block_size - target_length:
            raise ValueError(
                f"{where}: prefix has {len(prefix)} tokens, block_size={block_size} with target_length={target_length} "
                f"takes {block_size - target_length}"
            )
    held = _held_out(sorted({prefix for _, prefix, _, _ in items}), cfg.held_out, inputs)
    splits = {"train": [], "valid": []}
    for _, text, prefix, target in items:
        splits["valid" if text in held else "train"].append((prefix, target))
    return write_pairs(
        Path(cfg.out) / cfg.name,
        splits,
        tokenizer_name=cfg.tokenizer,
        target_length=target_length,
        block_size=block_size,
        command=command,
    )


def _held_out(prefixes: list[str], share: float, inputs: list[str]) -> set[str]:
    """At least one prefix, and never all, in the order of their hashes."""
    if len(prefixes) < 2:
        raise ValueError(
            f"{', '.join(inputs)}: wants at least two different prefixes, one to train on and one to hold out"
        )
    by_hash = sorted(prefixes, key=lambda text: hashlib.sha256(text.encode()).digest())
    return set(by_hash[: min(len(prefixes) - 1, max(1, round(share * len(prefixes))))])


def main(argv: list[str]) -> None:
    inputs = [arg.removeprefix("--input=") for arg in argv if arg.startswith("--input=")]
    cfg = configure(TextFileConfig, argv)
    inputs = inputs or [cfg.input]  # a config file gives one
    kinds = {path.removesuffix(".gz").endswith(".jsonl") for path in inputs}
    if len(kinds) > 1:
        raise ValueError("--input: text files make a stream and .jsonl files make pairs; give one kind at a time")
    build = build_pairs if kinds == {True} else build_stream
    meta = build(inputs, cfg, f"python -m data.text_file {' '.join(argv)}")
    counts = "; ".join(
        f"{split} " + ", ".join(f"{n:,} {what}" for what, n in count.items()) for split, count in meta["splits"].items()
    )
    print(
        f"{cfg.out}/{cfg.name}: {meta['kind']}, {counts}; tokenizer {meta['tokenizer']}, "
        f"target_length {meta['target_length']}, block_size {meta['block_size']}"
    )


if __name__ == "__main__":
    run(main)
