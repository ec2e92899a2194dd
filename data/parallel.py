"""Sentences and their translations, from two parallel files or from lines of source<TAB>target.

    python -m data.parallel [--source=multi30k|tatoeba] [--tokenizer=gpt2]
    python -m data.parallel --source=train.en.gz --target=train.fr.gz --valid_source=val.en.gz --valid_target=val.fr.gz
    python -m data.parallel --source=fra-eng.zip --name=tatoeba

    A dog runs.  ->  Un chien court.

Line i of one file translates line i of the other. Files may be gzipped; lines of source<TAB>target may stand in a .zip,
and further fields, such as Tatoeba's attribution, are not read. Without a held-out file some sentences are held out, by
a hash of the source sentence, so that none is on both sides, whatever its translations, case and punctuation.

multi30k: captions of images, English to French (Elliott et al. 2016, 1605.00459; 2017, 1710.07177). tatoeba: short
sentences with several translations each, English to French (manythings.org/anki).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from configurator import configure, run
from data.sources import Download, SetConfig, is_held_out, local, read_lines, write_set

MULTI30K_SITE = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
MULTI30K = {
    "train.en": Download(
        f"{MULTI30K_SITE}/train.en.gz", 568_929, "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f"
    ),
    "train.fr": Download(
        f"{MULTI30K_SITE}/train.fr.gz", 604_242, "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c"
    ),
    "val.en": Download(
        f"{MULTI30K_SITE}/val.en.gz", 21_650, "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28"
    ),
    "val.fr": Download(
        f"{MULTI30K_SITE}/val.fr.gz", 23_001, "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9"
    ),
    "test_2016_flickr.en": Download(
        f"{MULTI30K_SITE}/test_2016_flickr.en.gz",
        21_077,
        "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    ),
    "test_2016_flickr.fr": Download(
        f"{MULTI30K_SITE}/test_2016_flickr.fr.gz",
        22_310,
        "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
    ),
}
TATOEBA = Download("https://www.manythings.org/anki/fra-eng.zip")  # grows every few months
NAMED = {
    "multi30k": {
        "source": MULTI30K["train.en"].url,
        "target": MULTI30K["train.fr"].url,
        "valid_source": MULTI30K["val.en"].url,
        "valid_target": MULTI30K["val.fr"].url,
    },
    "tatoeba": {"source": TATOEBA.url},
}  # what a bare --source=NAME stands for


@dataclass
class ParallelConfig(SetConfig):
    source: str = "multi30k"  # multi30k | tatoeba | a file of sentences, or of source<TAB>target
    target: str = ""  # the file of translations; "": source has them behind a tab
    valid_source: str = ""  # the same two, held out
    valid_target: str = ""
    held_out: float = 0.05  # share of the source sentences, where no held-out file is given
    task_prefix: str = ""  # text before each sentence, such as T5's "translate English to French: "
    name: str = ""  # by default the name of the source, or else "parallel"

    def __post_init__(self):
        self.name = self.name or (self.source if self.source in NAMED else "parallel")
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {self.held_out}")
        if self.valid_target and not self.valid_source:
            raise ValueError("--valid_target needs --valid_source")
        if self.source in NAMED and (self.target or self.valid_source):
            raise ValueError(f"--source={self.source} has its own files; drop the other files, or name all of them")


def read(source: str, target: str = "", task_prefix: str = "") -> list[dict]:
    """Every line as an example: id (the line number), source, task_prefix, prefix, target.

    Nothing is dropped, also not an empty line, so that line i stays line i. Raises ValueError as `stream` does.
    """
    return list(stream(source, target, task_prefix))


def stream(source: str, target: str = "", task_prefix: str = "") -> Iterator[dict]:
    """The same, one at a time: no file need fit into memory.

    Raises ValueError for files of different lengths, an empty one, a line without a tab, or bytes that are not UTF-8.
    """
    path = local(source, MULTI30K.values())
    if target:
        other = local(target, MULTI30K.values())
        pairs = zip_lines(read_lines(path), read_lines(other), (path, other))
    else:
        pairs = _tabbed(path)
    yield from examples(pairs, task_prefix)


def zip_lines(source: Iterable[str], target: Iterable[str], names: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """(source, target) line by line. Raises ValueError that tells both counts if they differ, or if both are empty."""
    source, target, n = iter(source), iter(target), 0
    for n, a in enumerate(source, start=1):
        b = next(target, None)
        if b is None:
            counts = (n + sum(1 for _ in source), n - 1)
            break
        yield a, b
    else:
        counts = (n, n + sum(1 for _ in target))
    if counts[0] != counts[1]:
        raise ValueError(f"{names[0]} has {counts[0]} lines, {names[1]} {counts[1]}: line i must translate line i")
    if not n:
        raise ValueError(f"{names[0]}: empty")


def examples(pairs: Iterable[tuple[str, str]], task_prefix: str) -> Iterator[dict]:
    """An example of each pair, spaces at the ends taken off."""
    for number, (source, target) in enumerate(pairs, start=1):
        example = {"id": str(number), "source": source.strip(), "task_prefix": task_prefix, "target": target.strip()}
        yield example | {"prefix": prompt(example)}


def prompt(example: dict) -> str:
    """What the model reads. The paper fine-tunes each task on its own and names no prompt: the sentence alone."""
    return example["task_prefix"] + example["source"]


def _tabbed(path: str) -> Iterator[tuple[str, str]]:
    number = 0
    for number, line in enumerate(read_lines(path), start=1):
        source, tab, rest = line.partition("\t")
        if not tab:
            raise ValueError(f"{path}, line {number}: no tab; wants source<TAB>target, or give --target=FILE")
        yield source, rest.split("\t")[0]
    if not number:
        raise ValueError(f"{path}: empty")


def main(argv: list[str]) -> None:
    cfg = configure(ParallelConfig, argv)
    files = NAMED.get(cfg.source) or vars(cfg)
    source, target, *valid = (files.get(k, "") for k in ("source", "target", "valid_source", "valid_target"))
    train = stream(source, target, cfg.task_prefix)
    if valid[0]:
        valid = stream(*valid, cfg.task_prefix)
    else:  # read twice rather than kept
        train = (e for e in train if not is_held_out(e["source"], cfg.held_out))
        valid = (e for e in stream(source, target, cfg.task_prefix) if is_held_out(e["source"], cfg.held_out))
    command = f"python -m data.parallel {' '.join(argv)}".rstrip()
    write_set(cfg, train, valid, command, task_prefix=cfg.task_prefix)


if __name__ == "__main__":
    run(main)
