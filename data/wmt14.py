"""WMT14 English to French, the paper's translation task, from the official archives (statmt.org/wmt14).

    python -m data.wmt14 --corpora=news-commentary --limit=100000     one archive of 80 MB, to try it
    python -m data.wmt14 --tokenizer=gpt2                              all: about 40 million pairs, 7 GB to fetch
    python -m data.wmt14 --source=FOLDER                               archives that are here already, or unpacked

Trained on are the five corpora, held out is newstest2013, and what the evaluation scores is newstest2014 (`read`).
Archives are read from front to back and never unpacked; 40 million pairs take an estimated 8 GB of memory with GPT-2's
tokens.
Nothing is filtered but pairs that are empty or too long; the paper says nothing of filters.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from configurator import configure, nearest, run
from data import parallel
from data.sources import Download, SetConfig, local, read_lines, write_set

SITE = "https://www.statmt.org"


class Corpus(NamedTuple):
    """Where a corpus is: an archive and the members of it with the English and the French sentences."""

    archive: Download
    english: str
    french: str


# Sizes and checksums: as far as TensorFlow Datasets and TensorFlow's translation tutorial published them.
TRAIN = {
    "europarl": Corpus(
        Download(
            f"{SITE}/wmt13/training-parallel-europarl-v7.tgz",
            657_632_379,
            "0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
        ),
        "training/europarl-v7.fr-en.en",
        "training/europarl-v7.fr-en.fr",
    ),
    "commoncrawl": Corpus(
        Download(
            f"{SITE}/wmt13/training-parallel-commoncrawl.tgz",
            918_311_367,
            "c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
        ),
        "commoncrawl.fr-en.en",
        "commoncrawl.fr-en.fr",
    ),
    "un": Corpus(
        Download(f"{SITE}/wmt13/training-parallel-un.tgz"),
        "un/undoc.2000.fr-en.en",
        "un/undoc.2000.fr-en.fr",
    ),
    "news-commentary": Corpus(
        Download(
            f"{SITE}/wmt14/training-parallel-nc-v9.tgz",
            80_418_416,
            "cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
        ),
        "training/news-commentary-v9.fr-en.en",
        "training/news-commentary-v9.fr-en.fr",
    ),
    "giga-fren": Corpus(
        Download(f"{SITE}/wmt10/training-giga-fren.tar", 2_595_102_720),
        "giga-fren.release2.fixed.en.gz",
        "giga-fren.release2.fixed.fr.gz",
    ),
}
NEWSTEST = {
    "valid": Corpus(Download(f"{SITE}/wmt14/dev.tgz"), "dev/newstest2013.en", "dev/newstest2013.fr"),
    "test": Corpus(
        Download(f"{SITE}/wmt14/test-full.tgz"),
        "test-full/newstest2014-fren-src.en.sgm",
        "test-full/newstest2014-fren-ref.fr.sgm",
    ),
}  # 3,000 and 3,003 sentences
KNOWN = [corpus.archive for corpus in (*TRAIN.values(), *NEWSTEST.values())]


@dataclass
class Wmt14Config(SetConfig):
    source: str = ""  # a folder with the archives or the files in them; "": fetch the archives
    corpora: str = ",".join(TRAIN)  # which of them to train on
    limit: int = 0  # pairs read of each corpus, its first; 0: all
    task_prefix: str = ""  # text before each sentence, such as T5's "translate English to French: "
    name: str = "wmt14"

    def __post_init__(self):
        super().__post_init__()
        for corpus in self.corpora.split(","):
            if corpus not in TRAIN:
                raise ValueError(f"corpora: no {corpus!r}{nearest(corpus, TRAIN)}")
        if self.limit < 0:
            raise ValueError(f"limit must be 0 or more, got {self.limit}")


def read(source: str = "", split: str = "test", task_prefix: str = "") -> list[dict]:
    """newstest2014 ("test") or newstest2013 ("valid") as data.parallel's examples; source as in the settings."""
    if split not in NEWSTEST:
        raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
    return list(stream(NEWSTEST[split], source, task_prefix))


def stream(corpus: Corpus, source: str, task_prefix: str) -> Iterator[dict]:
    """The examples of a corpus, one at a time. Raises ValueError as data.parallel's `stream` does."""
    sides = [_find(corpus.archive, member, source) for member in (corpus.english, corpus.french)]
    names = tuple(f"{path} ({member})" if member else path for path, member in sides)
    lines = [_sentences(path, member) for path, member in sides]
    return parallel.examples(parallel.zip_lines(*lines, names), task_prefix)


def prompt(example: dict) -> str:
    """What the model reads, as in data.parallel."""
    return parallel.prompt(example)


def _find(archive: Download, member: str, source: str) -> tuple[str, str]:
    """(file, member in it or "" if it is no archive) of one side of a corpus; fetched if there is no source."""
    if not source:
        return local(archive.url, KNOWN), member
    folder, file = Path(source), Path(member).name
    if not folder.is_dir():
        raise ValueError(f"--source={source}: no such folder; wants one with WMT14's archives or the files in them")
    for name in (file, file.removesuffix(".gz"), f"{file}.gz", Path(archive.url).name):
        for path in sorted(folder.rglob(name)):
            return str(path), member if name == Path(archive.url).name else ""
    raise ValueError(f"--source={source}: holds neither {Path(archive.url).name} nor {file}")


def _sentences(path: str, member: str) -> Iterable[str]:
    """The lines of a text file, or the segments of an .sgm file."""
    lines = read_lines(path, member)
    return _segments(lines, path) if ".sgm" in (member or path) else lines


def _segments(lines: Iterable[str], path: str) -> Iterator[str]:
    """One sentence a line: <seg id="1">A sentence.</seg>. Entities stay, as in sacrebleu, so that scores compare."""
    for number, line in enumerate(lines, start=1):
        if line.lstrip().startswith("<seg"):
            found = re.match(r"\s*<seg[^>]*>(.*)</seg>", line)
            if not found:
                raise ValueError(f"{path}, line {number}: a <seg> that does not end on its line")
            yield " ".join(found[1].split())


def main(argv: list[str]) -> None:
    cfg = configure(Wmt14Config, argv)
    corpora = (stream(TRAIN[name], cfg.source, cfg.task_prefix) for name in cfg.corpora.split(","))
    train = chain.from_iterable(islice(corpus, cfg.limit or None) for corpus in corpora)
    valid = stream(NEWSTEST["valid"], cfg.source, cfg.task_prefix)
    write_set(cfg, train, valid, f"python -m data.wmt14 {' '.join(argv)}".rstrip(), task_prefix=cfg.task_prefix)


if __name__ == "__main__":
    run(main)
