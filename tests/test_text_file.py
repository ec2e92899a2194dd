"""data/text_file.py: a user's own text, and the errors if it is not usable."""

import gzip
import json

import pytest

from data import text_file
from data.loader import open_dataset

LINES = "".join(f"line {i} of a small book\n" for i in range(200))


def write(path, content):
    """Write bytes, text, or a list as lines of JSON."""
    if isinstance(content, list):
        content = "".join(json.dumps(item) + "\n" for item in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return f"--input={path}"


def build(tmp_path, *argv):
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
        "My Book\n" + "x" * 50_000,
        "x" * 50_000 + "\n",
        "\n".join(["a short line"] * 3000 + ["one long line " * 1500]),
        "\ufeff" + LINES.replace("\n", "\r"),
    ],
    ids=["title and one line", "no spaces", "one line", "long last line", "old Macintosh"],
)
def test_about_a_tenth_is_held_out_whatever_the_lines(tmp_path, text):
    train, valid = build(tmp_path, write(tmp_path / "a.txt", text))
    assert 0.09 < len(valid) / (len(train) + len(valid)) < 0.16


def test_each_file_gives_its_share_to_both_splits(tmp_path):
    first = write(tmp_path / "a.txt", LINES)
    second = write(tmp_path / "b.txt.gz", gzip.compress(LINES.replace("line", "Zeile").encode()))
    for data in build(tmp_path, first, second, "--held_out=0.5"):
        assert "line" in decoded(data) and "Zeile" in decoded(data)


def test_pairs_keep_their_text_and_share_no_prefix(tmp_path):
    items = [{"prefix": f"q{i // 2}", "target": f"answer é {i}"} for i in range(60)]
    train, valid = build(tmp_path, write(tmp_path / "p.jsonl", items))
    texts = [{data.text(i) for i in range(len(data))} for data in (train, valid)]
    assert texts[0] | texts[1] == {(i["prefix"], i["target"]) for i in items}
    assert not {p for p, _ in texts[0]} & {p for p, _ in texts[1]}
    assert len(valid) == 6
    assert train.target_length == len("answer é 10".encode()) + 1
    assert train.block_size == 3 + train.target_length


def test_two_gzipped_pairs_are_enough(tmp_path):
    lines = b'{"prefix": "a", "target": "b"}\r\n\r\n{"prefix": "c", "target": "d"}'
    path = write(tmp_path / "p.jsonl.gz", gzip.compress(lines))
    assert [len(data) for data in build(tmp_path, path)] == [1, 1]


def test_pairs_without_a_target_are_left_out_and_counted(tmp_path):
    items = [{"prefix": f"q{i}", "target": "yes" * (i % 3)} for i in range(30)]
    train, valid = build(tmp_path, write(tmp_path / "p.jsonl", items))
    assert len(train) + len(valid) == 20
    assert sum(counts["empty"] for counts in train.meta["left_out"].values()) == 10


GOOD = {"prefix": "p", "target": "t"}
HUGE = '{"prefix": "p", "target": "t"}\n{"prefix": "q", "target": "t", "n": ' + "9" * 5000 + "}"


@pytest.mark.parametrize(
    "name, content, flags, message",
    [
        ("none.txt", None, [], "none.txt: no such file"),
        ("a.txt", b" \n\n", [], "a.txt: empty"),
        ("a.txt", b"caf\xe9", [], "a.txt: not UTF-8 text .byte 3"),
        ("a.txt.gz", b"\x1f\x8bplain", [], "a.txt.gz: cannot be read"),
        ("a.txt", b"short", [], "train has .* fewer than block_size=256"),
        ("p.jsonl", [GOOD, {"prefix": "p"}], [], "p.jsonl, line 2: must be"),
        ("p.jsonl", [GOOD, "text"], [], "p.jsonl, line 2: must be"),
        ("p.jsonl", HUGE, [], "p.jsonl, line 2: not readable as JSON .*4300 digits"),
        ("p.jsonl", [GOOD, {"prefix": "q", "target": "\ud800"}], [], "surrogates not allowed.*'q'"),
        ("p.jsonl", [GOOD, GOOD], [], "p.jsonl, line 2, 1 prefix has a target"),
        ("p.jsonl", [GOOD, GOOD | {"prefix": "q"}], ["--block_size=1"], "no train pair fits"),
        ("a.txt", LINES, ["--tokenizer=gtp2"], "did you mean 'gpt2'"),
        ("a.txt", LINES, ["--held_out=1"], "held_out must be at most 0.9"),
        ("a.txt", LINES, ["--target_length=256"], "target_length < block_size"),
        ("a.txt", LINES, ["--input=b.jsonl"], "not both"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, name, content, flags, message):
    argv = [f"--input={tmp_path / name}" if content is None else write(tmp_path / name, content)]
    with pytest.raises(ValueError, match=message) as error:
        text_file.main([*argv, "--name=mine", f"--out={tmp_path / 'out'}", *flags])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_home_directory_a_space_and_an_umlaut(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", LINES)
    text_file.main(["--input=~/a.txt", "--name=mine ä", "--out=~/data sets"])
    assert len(open_dataset("~/data sets/mine ä", "train"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "data sets"]
