"""WMT14 English to French, the paper's translation task, from the official archives (statmt.org).

    python -m data.wmt14 --corpora=news-commentary --limit=100000     one archive of 80 MB
    python -m data.wmt14 --tokenizer=gpt2                              40 million pairs, 7 GB
    python -m data.wmt14 --source=FOLDER                               archives on your disk

Trains on five corpora and holds out newstest2013. `read` returns newstest2014 for the evaluation.
Archives are not unpacked. No pair is filtered, except empty ones and ones that are too long. For an
unpacked corpus use data.parallel.
"""

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from configurator import configure, run, setting, suggest
from data import parallel
from data.sources import SetConfig, local, read_lines, write_set

SITE = "https://www.statmt.org"
# fmt: off
# Corpus: (archive, its member without the language)
TRAIN = {
    "europarl": ("wmt13/training-parallel-europarl-v7.tgz", "training/europarl-v7.fr-en.{}"),
    "commoncrawl": ("wmt13/training-parallel-commoncrawl.tgz", "commoncrawl.fr-en.{}"),
    "un": ("wmt13/training-parallel-un.tgz", "un/undoc.2000.fr-en.{}"),
    "news-commentary": ("wmt14/training-parallel-nc-v9.tgz", "training/news-commentary-v9.fr-en.{}"),
    "giga-fren": ("wmt10/training-giga-fren.tar", "giga-fren.release2.fixed.{}.gz"),
}
NEWSTEST = {
    "valid": ("wmt14/dev.tgz", "dev/newstest2013.{}"),
    "test": ("wmt14/test-full.tgz", "test-full/newstest2014-fren-{}.sgm"),
}
CHECKSUMS = {  # as published by TensorFlow Datasets
    f"{SITE}/{TRAIN['europarl'][0]}": "0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
    f"{SITE}/{TRAIN['commoncrawl'][0]}": "c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
    f"{SITE}/{TRAIN['news-commentary'][0]}": "cb8953f292298e6877ae433c98912b927cb0766b303f4540512ddd286c748485",
}
# fmt: on


@dataclass
class Wmt14Config(SetConfig):
    source: str = setting("", "a folder with the archives; default: download them", path=True)
    corpora: str = setting(",".join(TRAIN), "which of them to train on")
    limit: int = setting(0, "pairs of each corpus, its first; 0: all", minimum=0)
    task_prefix: str = setting(
        "", "text before each source, as T5's 'translate English to French: '"
    )
    name: str = setting("wmt14", "the data set becomes the folder out/name")

    def __post_init__(self):
        super().__post_init__()
        for corpus in self.corpora.split(","):
            if corpus not in TRAIN:
                raise ValueError(f"corpora: unknown {corpus!r}{suggest(corpus, TRAIN)}")


def read(source: str = "", split: str = "test", task_prefix: str = "") -> list[dict]:
    """Return newstest2014 ("test") or newstest2013 ("valid") as examples of data.parallel."""
    return list(stream(NEWSTEST[split], source, task_prefix))


def stream(corpus: tuple[str, str], folder: str, task_prefix: str) -> Iterator[dict]:
    """Yield the examples of a corpus."""
    archive, member = corpus
    path = f"{SITE}/{archive}"
    if folder:
        found = sorted(Path(folder).rglob(Path(archive).name))
        if not found:
            raise ValueError(f"--source={folder}: has no {Path(archive).name}")
        path = str(found[0])
    path = local(path, CHECKSUMS)
    members = [member.format(language) for language in ("en", "fr")]
    if member.endswith(".sgm"):
        members = [member.format(side) for side in ("src.en", "ref.fr")]
    sides = [_sentences(path, member) for member in members]
    names = tuple(f"{path} ({member})" for member in members)
    return parallel.examples(parallel.zip_lines(*sides, names), task_prefix)


def _sentences(path: str, member: str) -> Iterable[str]:
    """Yield the lines of a text, or of an .sgm file the segments: <seg id="1">A sentence.</seg>.

    Entities stay as they are, as in sacrebleu, so that scores are comparable.
    """
    for line in read_lines(path, member):
        if not member.endswith(".sgm"):
            yield line
        elif line.lstrip().startswith("<seg"):
            segment = re.match(r"\s*<seg[^>]*>(.*)</seg>", line)
            if not segment:
                raise ValueError(f"{path} ({member}): a <seg> without its end on one line")
            yield " ".join(segment[1].split())


def main(argv: list[str]) -> None:
    cfg = configure(Wmt14Config, argv)
    corpora = [stream(TRAIN[n], cfg.source, cfg.task_prefix) for n in cfg.corpora.split(",")]
    train = chain.from_iterable(islice(corpus, cfg.limit or None) for corpus in corpora)
    valid = stream(NEWSTEST["valid"], cfg.source, cfg.task_prefix)
    command = shlex.join(["python", "-m", "data.wmt14", *argv])
    write_set(cfg, train, valid, command, task_prefix=cfg.task_prefix)


if __name__ == "__main__":
    run(main, Wmt14Config)
