"""Sentences and their translations, from two files or from lines of source<TAB>target.

    python -m data.parallel [--source=multi30k|tatoeba|wmt14] [--tokenizer=gpt2]
    python -m data.parallel --source=train.en --target=train.fr --valid_source=val.en \\
        --valid_target=val.fr

Without a held-out file, some sentences are held out by a hash of the source, so no source is in
both splits, whatever its translations, case and punctuation.

multi30k: English to French captions (Elliott et al. 2016, 1605.00459; 2017, 1710.07177).
tatoeba: short English to French sentences (manythings.org/anki).
wmt14: the paper's task, 40 million pairs in archives of 4 GB (statmt.org/wmt14). Five corpora, held
out is newstest2013. To try it: --limit=100000 pairs of each corpus.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from configurator import configure, require, run, setting
from data.sources import SetConfig, is_held_out, local, read_lines, write_set

FLICKR = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
WMT = "https://www.statmt.org"
CHECKSUMS = {
    f"{FLICKR}/train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    f"{FLICKR}/train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    f"{FLICKR}/val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    f"{FLICKR}/val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
}
# Members of WMT14's archives, without the language.
WMT_TRAIN = [
    "wmt13/training-parallel-europarl-v7.tgz::training/europarl-v7.fr-en.{}",
    "wmt13/training-parallel-commoncrawl.tgz::commoncrawl.fr-en.{}",
    "wmt13/training-parallel-un.tgz::un/undoc.2000.fr-en.{}",
    "wmt14/training-parallel-nc-v9.tgz::training/news-commentary-v9.fr-en.{}",
    "wmt10/training-giga-fren.tar::giga-fren.release2.fixed.{}.gz",
]

HELD_OUT = 0.05


def _both(pattern: str) -> tuple[str, str]:
    return pattern.format("en"), pattern.format("fr")


# (source, target) of the training files, and of the held-out file.
NAMED = {
    "multi30k": ([_both(f"{FLICKR}/train.{{}}.gz")], _both(f"{FLICKR}/val.{{}}.gz")),
    "tatoeba": ([("https://www.manythings.org/anki/fra-eng.zip", "")], None),
    "wmt14": (
        [_both(f"{WMT}/{corpus}") for corpus in WMT_TRAIN],
        _both(f"{WMT}/wmt14/dev.tgz::dev/newstest2013.{{}}"),
    ),
}


@dataclass
class ParallelConfig(SetConfig):
    source: str = setting("multi30k", "multi30k, tatoeba, wmt14, or a file", path=True)
    target: str = setting("", "the translations; default: after a tab in source", path=True)
    valid_source: str = setting("", "the same, held out", path=True)
    valid_target: str = setting("", "the same, held out", path=True)
    held_out: float = setting(HELD_OUT, "without valid_source: its share", above=0, maximum=0.9)
    task_prefix: str = setting("", "text before each source, such as 'translate to French: '")
    reverse_prefix: str = setting("", "add each pair the other way round, after this text")
    limit: int = setting(0, "training pairs of each file, its first; 0: all", minimum=0)
    name: str = setting("", "the folder out/name; default: the source's name, or parallel")

    def __post_init__(self):
        self.name = self.name or (self.source if self.source in NAMED else "parallel")
        super().__post_init__()
        if self.source in NAMED and (self.target or self.valid_source):
            raise ValueError(f"--source={self.source} has its own files; drop the other files")


def read(source: str, target: str = "", task_prefix: str = "") -> list[dict]:
    """Return an example for every line, empty lines too: id, source, prefix, target."""
    return list(stream(source, target, task_prefix))


def stream(source: str, target: str, task_prefix: str) -> Iterator[dict]:
    """Yield the same, so no file has to fit into memory."""
    source = local(source, CHECKSUMS)
    target = local(target, CHECKSUMS)
    number = 0
    lines = zip_longest(read_lines(source), read_lines(target) if target else ())
    for number, (given, translation) in enumerate(lines, start=1):
        if not target:
            given, tab, rest = given.partition("\t")
            require(tab, f"{source}, line {number}: no tab; give --target=FILE or tabbed lines")
            translation = rest.split("\t")[0]
        if given is None or translation is None:
            fault = f"{source} or {target} has {number - 1} lines, the other has more"
            raise ValueError(f"{fault}; line i must translate line i")
        given = given.strip()
        example = {"id": str(number), "source": given, "prefix": task_prefix + given}
        yield example | {"target": translation.strip()}
    require(number, f"{source}: empty")


def both_ways(examples: Iterable[dict], reverse_prefix: str) -> Iterator[dict]:
    """Yield each example, then the same pair from target to source."""
    for example in examples:
        yield example
        source = example["target"]
        prefix = reverse_prefix + source
        yield {"source": source, "prefix": prefix, "target": example["source"]}


def main(argv: list[str]) -> None:
    cfg = configure(ParallelConfig, argv)
    held_out = (cfg.valid_source, cfg.valid_target) if cfg.valid_source else None
    files, held_out = NAMED.get(cfg.source, ([(cfg.source, cfg.target)], held_out))

    def training_pairs() -> Iterable[dict]:
        streams = (stream(*pair, cfg.task_prefix) for pair in files)
        return chain.from_iterable(islice(pairs, cfg.limit or None) for pairs in streams)

    train = training_pairs()
    if held_out:
        valid = stream(*held_out, cfg.task_prefix)
    else:  # the file is read twice, so that it need not fit into memory
        train = (e for e in train if not is_held_out(e["source"], cfg.held_out))
        valid = (e for e in training_pairs() if is_held_out(e["source"], cfg.held_out))
    splits = {"train": train, "valid": valid}
    if cfg.reverse_prefix:
        splits = {name: both_ways(pairs, cfg.reverse_prefix) for name, pairs in splits.items()}
    write_set(cfg, splits, ["data.parallel", *argv], task_prefix=cfg.task_prefix)


if __name__ == "__main__":
    run(main, ParallelConfig)
