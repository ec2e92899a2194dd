"""data/text_file.py: a user's own text, and the errors if it is not usable."""

import json

import pytest
from data_files import texts, write

from data import text_file
from data.loader import open_dataset

LINES = "".join(f"line {i} of a small book\n" for i in range(200))


def build(tmp_path, *argv):
    """Build from the files and flags. Return both splits."""
    argv = [arg if arg.startswith("--") else f"--input={arg}" for arg in argv]
    text_file.main([*argv, "--name=mine", f"--out={tmp_path / 'out'}"])
    return [open_dataset(tmp_path / "out" / "mine", split) for split in ("train", "valid")]


def decoded(data) -> str:
    return data.tokenizer.decode(data.tokens)


def test_text_becomes_a_stream_and_its_end_is_held_out(tmp_path):
    argv = [write(tmp_path / "a.txt", LINES), "--block_size=64", "--target_length=32"]
    train, valid = build(tmp_path, *argv)
    assert (train.target_length, train.block_size) == (32, 64)
    assert decoded(train).rstrip() + "\n" + decoded(valid).rstrip() == LINES.rstrip()
    assert 0.08 < len(valid) / (len(train) + len(valid)) < 0.12
    assert decoded(valid).startswith("line")


@pytest.mark.parametrize(
    "text",
    [
        "My Book\n" + "once upon a time " * 3000,
        "x" * 50_000 + "\n",
        "\n".join(["a short line"] * 3000 + ["one long line " * 1500]),
    ],
    ids=["title and one line", "one line without spaces", "long last line"],
)
def test_about_a_tenth_is_held_out_whatever_the_lines(tmp_path, text):
    train, valid = build(tmp_path, write(tmp_path / "a.txt", text))
    assert 0.09 < len(valid) / (len(train) + len(valid)) < 0.16


def test_each_file_gives_its_share_to_both_splits(tmp_path):
    first = write(tmp_path / "a.txt", LINES)
    second = write(tmp_path / "b.txt.gz", LINES.replace("line", "Zeile"))
    for data in build(tmp_path, first, second, "--held_out=0.5"):
        assert "line" in decoded(data) and "Zeile" in decoded(data)


@pytest.mark.parametrize("name", ["p.jsonl", "P.JSONL", "p.json"])
def test_pairs_keep_their_text_and_share_no_prefix(tmp_path, name):
    items = [{"prefix": f"q{i // 2}", "target": f"answer é {i}"} for i in range(60)]
    empty = {"prefix": "q", "target": ""}  # left out and counted
    train, valid = build(tmp_path, write(tmp_path / name, [*items, empty]))
    assert train.meta["left_out"]["train"] == {"empty": 1, "too_long": 0}
    sides = texts(tmp_path / "out" / "mine")
    assert sorted(sum(sides, [])) == sorted(tuple(item.values()) for item in items)
    assert not {p for p, _ in sides[0]} & {p for p, _ in sides[1]}
    assert len(valid) == 6
    assert train.target_length == len("answer é 10".encode()) + 1
    assert train.block_size == 3 + train.target_length


def test_lines_with_a_text_are_a_stream_whose_texts_are_each_split(tmp_path):
    texts = [{"text": LINES, "title": "A"}, {"text": LINES.replace("line", "Zeile")}]
    path = write(tmp_path / "a.jsonl.gz", "".join(json.dumps(text) + "\n" for text in texts))
    for data in build(tmp_path, path, "--held_out=0.5"):
        assert "line" in decoded(data) and "Zeile" in decoded(data)
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"title": "b"}\n')
    with pytest.raises(ValueError, match="b.jsonl, line 2: must be .*'title': 'b'"):
        build(tmp_path, str(tmp_path / "b.jsonl"))
