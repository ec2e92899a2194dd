"""Train a byte-pair encoding on your own text: a small vocabulary for a small model.

    python -m data.bpe --source=stdlib --n_ordinary=2000 --out=out/tokenizer.json
    python -m data.bpe --pairs=fra-eng.zip --n_ordinary=8000 --out=out/en_fr.json
    python -m data.python_code --tokenizer=out/tokenizer.json

The `tokenizers` package trains it on the training part of the text. Ids are merge ranks,
as in GPT-2, so tiktoken is enough to use the file.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from configurator import configure, run, setting
from data.parallel import HELD_OUT, read
from data.python_code import read_corpus
from data.sources import OutConfig, is_held_out, read_text
from data.text_file import split_text
from data.tokenizer import BYTE_LEVEL, FILE, padded_size, reserved_tokens, tokenizer_from_json
from infra.checkpoint import write_atomically


@dataclass
class BpeConfig(OutConfig):
    source: str = setting("stdlib", "stdlib, or a text file or a folder of code", path=True)
    pairs: str = setting("", "instead: lines of source<TAB>target, as data.parallel", path=True)
    n_ordinary: int = setting(2000, "ids: 256 bytes and merges", minimum=256, maximum=100_000)
    held_out: float = setting(0.1, "share of a text file that is not read", minimum=0, maximum=0.9)
    out: str = setting(f"out/{FILE}", "the .json file to write", path=True)


def train(texts: list[str], n_ordinary: int) -> str:
    """Return a tokenizer.json. It has fewer than n_ordinary ids if the text has too few pairs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=n_ordinary, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    size = len(content["model"]["vocab"])
    content["added_tokens"] = reserved_tokens(size, padded_size(size))
    content["decoder"] = BYTE_LEVEL
    return json.dumps(content, ensure_ascii=False)


def main(argv: list[str]) -> None:
    cfg = configure(BpeConfig, argv)
    if cfg.pairs:
        pairs = [e for e in read(cfg.pairs) if not is_held_out(e["source"], HELD_OUT)]
        texts = [text for e in pairs for text in (e["source"], e["target"])]
    elif Path(cfg.source).is_file():
        texts = [split_text(read_text(cfg.source), cfg.held_out)[0]]
    else:
        texts = read_corpus(cfg.source)[0]["train"]
    text = train(texts, cfg.n_ordinary)
    tokenizer = tokenizer_from_json(text, cfg.out)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cfg.out, lambda file: file.write(text.encode()))
    print(f"{cfg.out}: {tokenizer.name}, {tokenizer.vocab_size:,} ids")


if __name__ == "__main__":
    run(main, BpeConfig)
