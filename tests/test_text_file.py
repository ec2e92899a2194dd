"""data/text_file.py: a user's own text, and what is said when it is not usable."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import text_file
from data.loader import open_set

LINES = "".join(f"line {i} of a small book\n" for i in range(200))


def write_jsonl(path: Path, items: list) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def build(tmp_path, *argv):
    text_file.main([*argv, "--name=mine", f"--out={tmp_path / 'out'}"])
    return [open_set(tmp_path / "out" / "mine", split) for split in ("train", "valid")]


def decoded(data) -> str:
    return data.tokenizer.decode(data.tokens)


def test_text_becomes_a_stream_whose_end_is_held_out(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    train, valid = build(tmp_path, f"--input={tmp_path}/a.txt", "--block_size=64", "--target_length=32")
    assert (train.target_length, train.block_size) == (32, 64)
    assert decoded(train).rstrip() + "\n" + decoded(valid).rstrip() == LINES.rstrip()
    assert 0.08 < len(valid) / (len(train) + len(valid)) < 0.12
    assert decoded(valid).startswith("line")  # cut where a line ends


def test_several_files_each_give_their_share_to_both_splits(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    with gzip.open(tmp_path / "b.txt.gz", "wt") as f:
        f.write(LINES.replace("line", "Zeile"))
    inputs = f"--input={tmp_path}/a.txt", f"--input={tmp_path}/b.txt.gz"
    for data in build(tmp_path, *inputs, "--held_out=0.5", "--target_length=16", "--block_size=32"):
        assert "line" in decoded(data) and "Zeile" in decoded(data)


def test_windows_line_ends_and_a_byte_order_mark_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())
    train, _ = build(tmp_path, f"--input={tmp_path}/a.txt")
    assert decoded(train).startswith("line 0") and "\r" not in decoded(train)


def test_pairs_keep_their_text_and_share_no_prefix(tmp_path):
    items = [{"prefix": f"q{i // 2}", "target": f"answer é {i}"} for i in range(60)]
    train, valid = build(tmp_path, f"--input={write_jsonl(tmp_path / 'p.jsonl', items)}")
    texts = [{data.text(i) for i in range(len(data))} for data in (train, valid)]
    assert texts[0] | texts[1] == {(i["prefix"], i["target"]) for i in items}
    assert not {p for p, _ in texts[0]} & {p for p, _ in texts[1]}
    assert len(valid) == 6
    assert train.target_length == len("answer é 10".encode()) + 1
    assert train.block_size == 3 + train.target_length


def test_gzipped_pairs_and_two_pairs_are_enough(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prefix": "a", "target": "b"}, {"prefix": "c", "target": "d"}])
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [len(data) for data in build(tmp_path, f"--input={path}.gz")] == [1, 1]


GOOD = {"prefix": "p", "target": "t"}


@pytest.mark.parametrize(
    "name, content, flags, message",
    [
        ("none.txt", None, [], "none.txt: no such file"),
        ("a.txt", b"", [], "a.txt: empty"),
        ("a.txt", b" \n\n", [], "a.txt: empty"),
        ("a.txt", b"caf\xe9", [], "a.txt: not UTF-8 text .byte 3"),
        ("a.txt.gz", b"plain", [], "a.txt.gz: cannot be read"),
        ("a.txt", b"short", [], "train has .* fewer than block_size=256"),
        ("p.jsonl", [GOOD, {"prefix": "p"}], [], "p.jsonl, line 2: wants"),
        ("p.jsonl", [GOOD, {"prefix": "p", "target": 3}], [], "p.jsonl, line 2: wants"),
        ("p.jsonl", [GOOD, "text"], [], "p.jsonl, line 2: wants"),
        ("p.jsonl", b'{"prefix": "p", "target": "t"}\n\n{oops', [], "p.jsonl, line 3: not JSON"),
        ("p.jsonl", b'{"prefix": "p", "target": "\\ud800"}', [], "p.jsonl, line 1: text is not valid Unicode"),
        ("p.jsonl", [GOOD, GOOD], [], "two different prefixes"),
        ("p.jsonl", [GOOD, {"prefix": "q", "target": "long"}], ["--target_length=4"], "line 2: target has 4 tokens"),
        ("p.jsonl", [GOOD, {"prefix": "long", "target": "t"}], ["--block_size=4"], "line 2: prefix has 4 tokens"),
        ("a.txt", LINES.encode(), ["--tokenizer=gtp2"], "did you mean 'gpt2'"),
        ("a.txt", LINES.encode(), ["--held_out=1"], "held_out must be between"),
        ("a.txt", LINES.encode(), ["--target_length=256"], "target_length < block_size"),
        ("a.txt", LINES.encode(), ["--input=b.jsonl"], "one kind at a time"),
    ],
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(tmp_path, name, content, flags, message):
    if isinstance(content, list):
        write_jsonl(tmp_path / name, content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        build(tmp_path, f"--input={tmp_path / name}", *flags)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("argv", [[], ["--input=a.txt"], ["--input=a.txt", "--name=../up"]])
def test_input_and_a_plain_name_must_be_given(argv):
    with pytest.raises(ValueError, match="--input=FILE|--name=NAME"):
        text_file.main(argv)


@pytest.mark.slow  # starts Python, 3 s
def test_the_command_exits_with_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "data.text_file", f"--input={tmp_path}/no.txt", "--name=x", f"--out={tmp_path}"]
    root = Path(text_file.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path}/no.txt: no such file\n"
