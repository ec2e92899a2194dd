"""Sentences and their translations, from two files or from lines of source<TAB>target.

    python -m data.parallel [--source=multi30k|tatoeba] [--tokenizer=gpt2]
    python -m data.parallel --source=train.en --target=train.fr --valid_source=val.en --valid_target=val.fr
    python -m data.parallel --source=fra-eng.zip --name=tatoeba

    A dog runs.  ->  Un chien court.

Files may be gzipped, tabbed lines may be in a .zip. Fields after the second are not read. Without a
held-out file, some sentences are held out by a hash of the source. So no source is in both splits,
whatever its translations, case and punctuation.

multi30k: English to French captions (Elliott et al. 2016, 1605.00459; 2017, 1710.07177).
tatoeba: short sentences with several translations each (manythings.org/anki).
"""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from configurator import configure, run, setting
from data.sources import SetConfig, is_held_out, local, read_lines, write_set

MULTI30K = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
TATOEBA = "https://www.manythings.org/anki/fra-eng.zip"
# fmt: off
CHECKSUMS = {
    f"{MULTI30K}/{name}.gz": sha256
    for name, sha256 in {
        "train.en": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
        "train.fr": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
        "val.en": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
        "val.fr": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
        "test_2016_flickr.en": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
        "test_2016_flickr.fr": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
    }.items()
}
# fmt: on
# Files of a bare --source=NAME: source, target, valid_source, valid_target.
NAMED = {
    "multi30k": [f"{MULTI30K}/{name}.gz" for name in ("train.en", "train.fr", "val.en", "val.fr")],
    "tatoeba": [TATOEBA, "", "", ""],
}


@dataclass
class ParallelConfig(SetConfig):
    source: str = setting("multi30k", "multi30k, tatoeba, or a file", path=True)
    target: str = setting("", "the translations; default: after a tab in source", path=True)
    valid_source: str = setting("", "the same, held out", path=True)
    valid_target: str = setting("", "the same, held out", path=True)
    held_out: float = setting(
        0.05, "share of the sources, without held-out files", above=0, maximum=0.9
    )
    task_prefix: str = setting(
        "", "text before each source, as T5's 'translate English to French: '"
    )
    name: str = setting("", "the folder out/name; default: multi30k, tatoeba or parallel")

    def __post_init__(self):
        self.name = self.name or (self.source if self.source in NAMED else "parallel")
        super().__post_init__()
        if self.valid_target and not self.valid_source:
            raise ValueError("--valid_target needs --valid_source")
        if self.source in NAMED and (self.target or self.valid_source):
            raise ValueError(f"--source={self.source} has its own files; drop the other files")

    def files(self) -> list[str]:
        own = [self.source, self.target, self.valid_source, self.valid_target]
        return NAMED.get(self.source, own)


def read(source: str, target: str = "", task_prefix: str = "") -> list[dict]:
    """Return an example for every line, empty lines too: id, source, prefix, target."""
    return list(stream(source, target, task_prefix))


def stream(source: str, target: str, task_prefix: str) -> Iterator[dict]:
    """Yield the same, so no file has to fit into memory."""
    path = local(source, CHECKSUMS)
    if not target:
        return examples(_tabbed(path), task_prefix)
    other = local(target, CHECKSUMS)
    return examples(zip_lines(read_lines(path), read_lines(other), (path, other)), task_prefix)


def zip_lines(
    source: Iterable[str], target: Iterable[str], names: tuple[str, str]
) -> Iterator[tuple[str, str]]:
    """Yield (source, target) line by line. Raises ValueError if the files differ in length."""
    sides = [iter(source), iter(target)]
    missing = object()
    n = 0
    while True:
        pair = [next(side, missing) for side in sides]
        if missing in pair:
            break
        yield tuple(pair)
        n += 1
    counts = [n + (x is not missing) + sum(1 for _ in side) for x, side in zip(pair, sides)]
    if counts[0] != counts[1]:
        fault = f"{names[0]} has {counts[0]} lines, {names[1]} has {counts[1]}"
        raise ValueError(f"{fault}; line i must translate line i")
    if not n:
        raise ValueError(f"{names[0]}: empty")


def examples(pairs: Iterable[tuple[str, str]], task_prefix: str) -> Iterator[dict]:
    for number, (source, target) in enumerate(pairs, start=1):
        source = source.strip()
        prefix = task_prefix + source
        yield {"id": str(number), "source": source, "prefix": prefix, "target": target.strip()}


def _tabbed(path: str) -> Iterator[tuple[str, str]]:
    number = 0
    for number, line in enumerate(read_lines(path), start=1):
        source, tab, rest = line.partition("\t")
        if not tab:
            raise ValueError(f"{path}, line {number}: no tab; give --target=FILE or tabbed lines")
        yield source, rest.split("\t")[0]
    if not number:
        raise ValueError(f"{path}: empty")


def main(argv: list[str]) -> None:
    cfg = configure(ParallelConfig, argv)
    source, target, valid_source, valid_target = cfg.files()
    train = stream(source, target, cfg.task_prefix)
    if valid_source:
        valid = stream(valid_source, valid_target, cfg.task_prefix)
    else:  # the file is read twice, so that it need not fit into memory
        valid = stream(source, target, cfg.task_prefix)
        train = (e for e in train if not is_held_out(e["source"], cfg.held_out))
        valid = (e for e in valid if is_held_out(e["source"], cfg.held_out))
    command = shlex.join(["python", "-m", "data.parallel", *argv])
    write_set(cfg, train, valid, command, task_prefix=cfg.task_prefix)


if __name__ == "__main__":
    run(main, ParallelConfig)
