"""Random and damaged data: an error is one line, and what a builder writes opens in a training."""

import json

from data_files import write
from fuzzing import anything, error_of, few_or_many, repeat
from hypothesis import strategies as st

from data import text_file
from data.loader import open_dataset, write_pairs, write_stream
from data.objectives import ObjectiveConfig

NAME = "--name=set"
OBJECTIVES = ("auto", "prefix_lm", "span_corruption")
both = few_or_many(40, 2000)


def train_on(folder) -> None:
    """What a training does with a data set. Only span_corruption may be refused, as too small."""
    for objective in OBJECTIVES:
        for split in ("train", "valid"):
            try:
                data = open_dataset(folder, split, ObjectiveConfig(objective=objective))
            except ValueError as error:
                assert objective == "span_corruption" and "too small" in str(error)
                continue
            for step in range(4):
                batch = data.batch(0, step, 3)
                assert batch.target.shape == (3, data.target_length)
                assert batch.prefix.shape[1] + data.target_length <= data.block_size


SIDE = st.text(max_size=8) | st.sampled_from(["", "a", "\r\n", "\u2028", "é" * 20])
PAIRS = st.lists(st.fixed_dictionaries({"prefix": SIDE, "target": SIDE}), min_size=1, max_size=12)
PIECE = st.text(max_size=20) | st.sampled_from(["\n", "\r\n", "\r", " " * 50, "word " * 20])
TEXT = st.lists(PIECE, max_size=12).map(lambda pieces: "\ufeff" + "".join(pieces))


@both
def test_what_is_built_opens_in_a_training(n, tmp_path):
    def check(content, target_length, block_size):
        path = write(tmp_path / ("a.txt" if isinstance(content, str) else "a.jsonl"), content)
        sizes = [f"--target_length={target_length}", f"--block_size={block_size}"]
        if not error_of(text_file.main, [f"--input={path}", f"--out={tmp_path}", *sizes, NAME]):
            train_on(tmp_path / "set")

    sizes = (st.sampled_from([0, 2, 3, 9]), st.sampled_from([0, 4, 12, 40]))
    repeat(2 * n, check, PAIRS | TEXT, *sizes)


@both
def test_lines_of_anything_are_refused_in_one_line(n, tmp_path):
    bad = ["[" * 100_000, '{"prefix": "\\ud800", "target": "b"}', "1" * 5000, '{"a"', "\x00"]
    line = st.dictionaries(st.sampled_from(["prefix", "target", "x"]), anything()).map(json.dumps)
    line |= st.text(max_size=10) | st.sampled_from(bad)

    def check(lines):
        raw = "\n".join(lines).encode("utf-8", "surrogatepass")
        argv = [f"--input={write(tmp_path / 'pairs.jsonl', raw)}", f"--out={tmp_path}", NAME]
        assert error_of(text_file.main, argv) or (tmp_path / "set" / "meta.json").exists()

    repeat(n, check, st.lists(line, max_size=5))


@both
def test_damaged_data_sets_are_refused_in_one_line(n, tmp_path):
    """meta.json with anything in it, and files that were cut or overwritten."""
    pairs = [([97 + i], [98, 99]) for i in range(20)]
    write_pairs(tmp_path / "pairs", {"train": pairs}, "bytes", 5, 12)
    write_stream(tmp_path / "stream", {"train": [[97] * 300]}, "bytes", 8, 20)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}

    def use(folder, objective):
        data = open_dataset(folder, "train", ObjectiveConfig(objective=objective))
        for step in range(3):
            data.batch(0, step, 4)

    def check(path, key, value, drop, noise, at, objective):
        meta = json.loads(whole[path.with_name("meta.json")])
        if path.name == "meta.json":
            part = meta["splits"]["train"] if key in ("tokens", "pairs") else meta
            part[key] = value
            if drop:
                del part[key]
            path.write_text(json.dumps(meta))
        else:
            path.write_bytes(whole[path][:at] + noise + (b"" if drop else whole[path][at:]))
        error_of(use, path.parent, objective)
        path.write_bytes(whole[path])

    keys = ["format", "kind", "tokenizer", "dtype", "splits", "target_length", "block_size"]
    keys = st.sampled_from([*keys, "sha256", "tokens", "pairs"]) | st.text(max_size=5)
    place = st.integers(0, 200)
    parts = (st.sampled_from(files), keys, anything() | st.just(10**30), st.booleans())
    repeat(n, check, *parts, st.binary(max_size=9), place, st.sampled_from(OBJECTIVES))
