"""Sentences and their translations, from two files or from lines of source<TAB>target.

    python -m data.parallel [--source=multi30k|tatoeba] [--tokenizer=gpt2]
    python -m data.parallel --source=train.en --target=train.fr --valid_source=val.en \\
        --valid_target=val.fr

Without a held-out file, some sentences are held out by a hash of the source, so no source is in
both splits, whatever its translations, case and punctuation.

multi30k: English to French captions (Elliott et al. 2016, 1605.00459; 2017, 1710.07177).
tatoeba: short English to French sentences (manythings.org/anki).
The paper's WMT14 (statmt.org/wmt14) needs its unpacked files as --source and --target.
"""

from dataclasses import dataclass
from itertools import zip_longest

from configurator import configure, require, run, setting
from data.sources import SetConfig, is_held_out, local, read_lines, write_set

FLICKR = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
CHECKSUMS = {
    f"{FLICKR}/train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    f"{FLICKR}/train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    f"{FLICKR}/val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    f"{FLICKR}/val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
}
# (source, target) of the training file, and of the held-out file.
NAMED = {
    "multi30k": (
        (f"{FLICKR}/train.en.gz", f"{FLICKR}/train.fr.gz"),
        (f"{FLICKR}/val.en.gz", f"{FLICKR}/val.fr.gz"),
    ),
    "tatoeba": (("https://www.manythings.org/anki/fra-eng.zip", ""), None),
}
HELD_OUT = 0.05


@dataclass
class ParallelConfig(SetConfig):
    source: str = setting("multi30k", "multi30k, tatoeba, or a file", path=True)
    target: str = setting("", "the translations; default: after a tab in source", path=True)
    valid_source: str = setting("", "the same, held out", path=True)
    valid_target: str = setting("", "the same, held out", path=True)
    held_out: float = setting(HELD_OUT, "without valid_source: its share", above=0, maximum=0.9)
    task_prefix: str = setting("", "text before each source, such as 'translate to French: '")
    reverse_prefix: str = setting("", "add each pair the other way round, after this text")
    name: str = setting("", "the folder out/name; default: the source's name, or parallel")

    def __post_init__(self):
        self.name = self.name or (self.source if self.source in NAMED else "parallel")
        super().__post_init__()
        if self.source in NAMED and (self.target or self.valid_source):
            raise ValueError(f"--source={self.source} has its own files; drop the other files")


def read(source: str, target: str = "", task_prefix: str = "") -> list[dict]:
    """Return an example for every line, empty lines too: id, source, prefix, target."""
    source = local(source, CHECKSUMS)
    target = local(target, CHECKSUMS)
    examples = []
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
        examples.append(example | {"target": translation.strip()})
    require(examples, f"{source}: empty")
    return examples


def both_ways(examples: list[dict], reverse_prefix: str) -> list[dict]:
    """Return each example, followed by the same pair from target to source."""
    found = []
    for example in examples:
        source = example["target"]
        back = {"source": source, "prefix": reverse_prefix + source, "target": example["source"]}
        found += [example, back]
    return found


def main(argv: list[str]) -> None:
    cfg = configure(ParallelConfig, argv)
    held_out = (cfg.valid_source, cfg.valid_target) if cfg.valid_source else None
    files, held_out = NAMED.get(cfg.source, ((cfg.source, cfg.target), held_out))
    train = read(*files, cfg.task_prefix)
    if held_out:
        valid = read(*held_out, cfg.task_prefix)
    else:
        valid = [e for e in train if is_held_out(e["source"], cfg.held_out)]
        train = [e for e in train if not is_held_out(e["source"], cfg.held_out)]
    splits = {"train": train, "valid": valid}
    if cfg.reverse_prefix:
        splits = {name: both_ways(pairs, cfg.reverse_prefix) for name, pairs in splits.items()}
    write_set(cfg, splits, ["data.parallel", *argv], task_prefix=cfg.task_prefix)


if __name__ == "__main__":
    run(main, ParallelConfig)
