"""A byte-pair encoding of your own text, as a tokenizer.json: small vocabularies for small models.

    python -m data.bpe --source=stdlib --n_ordinary=2000 --out=out/tokenizer.json
    python -m data.python_code --tokenizer=out/tokenizer.json

Trained by the `tokenizers` package on what data.python_code or data.text_file would train a model on, so that nothing
held out shapes the vocabulary. Ids are ranks, as in GPT-2's: the file is read by `tokenizers`, by transformers and, as
tokenizer_json.py does where neither is installed, by tiktoken.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from checkpoint import write_atomically
from configurator import configure, run
from data import tokenizer_json
from data.python_code import read_corpus
from data.text_file import read_text, split_text
from data.tokenizer import FILE, from_json

LARGEST = 100_000  # ids: ours are written as ranks by trying every cut of every token, which takes minutes beyond


@dataclass
class BpeConfig:
    source: str = "stdlib"  # stdlib | all | a folder of Python files, as in data.python_code | a text file
    n_ordinary: int = 2000  # ids for text: 256 bytes and the merges; some reserved ones are added to whole 128s
    held_out: float = 0.1  # of a text file: the share at its end that is not read, as in data.text_file
    out: str = f"out/{FILE}"  # the file to write

    def __post_init__(self):
        if not 256 <= self.n_ordinary <= LARGEST:
            raise ValueError(f"n_ordinary must be 256, the bytes, to {LARGEST:,}, got {self.n_ordinary}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be 0 or more and below 1, got {self.held_out}")
        if Path(self.out).suffix != ".json":
            raise ValueError(f"out must be the name of a .json file, as {FILE}; got {self.out!r}")


def train(texts: list[str], n_ordinary: int) -> list[bytes]:
    """The bytes of each id: 256 single ones, then the merges in the order in which they were found.

    There may be fewer than n_ordinary: a short text has no more pairs. Raises ValueError if `tokenizers` is missing.
    """
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError("a tokenizer is trained by tokenizers: pip install tokenizers") from None
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=n_ordinary, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator(texts, trainer)
    found = json.loads(learned.to_str()) | {"added_tokens": []}
    return tokenizer_json.pieces_of(found | {"pre_tokenizer": {"type": "ByteLevel"}}, "the trained tokenizer")


def main(argv: list[str]) -> None:
    cfg = configure(BpeConfig, argv)
    print(f"reading {cfg.source}, then counting pairs: half a minute for the standard library", flush=True)
    if Path(cfg.source).is_file() and Path(cfg.source).suffix != ".py":
        texts = [split_text(read_text(cfg.source), cfg.held_out)[0]]
    else:
        texts = read_corpus(cfg.source).files["train"]
    found = tokenizer_json.byte_level_json(train(texts, cfg.n_ordinary), {}, split_words=True)
    text = tokenizer_json.extended(found, tokenizer_json.padded_size(tokenizer_json.n_ids(found)))
    tokenizer = from_json(text, cfg.out)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cfg.out, lambda file: file.write(text.encode()))
    size, ids = sum(len(part.encode()) for part in texts), sum(len(tokenizer.encode(part)) for part in texts)
    print(f"{cfg.out}: {tokenizer.name}, {tokenizer.vocab_size:,} ids, {size / ids:.2f} bytes of its text a token")


if __name__ == "__main__":
    run(main)
