"""data/squad.py: the official format in, question and context -> first answer out, no context on both sides."""

import gzip
import json
from pathlib import Path

import pytest

from data import squad
from data.loader import open_set

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "squad"
real = pytest.mark.skipif(not REAL.exists(), reason="SQuAD is not in ../shared/data/squad")


def question(i, *answers):
    return {"id": f"q{i}", "question": f"Who {i}?", "answers": [{"text": a, "answer_start": 0} for a in answers]}


def dump(*paragraphs, version="1.1", title="T"):
    return {"version": version, "data": [{"title": title, "paragraphs": list(paragraphs)}]}


GOOD = dump(
    {"context": "Ann saw\nBob.", "qas": [question(1, "Ann", "Ann saw"), question(2, "Bob")]},
    {"context": "Été.", "qas": [question(3, "Été")]},
)


def write(path, content):
    raw = content if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def texts(folder, split):
    data = open_set(folder, split)
    return [data.text(i) for i in range(len(data))]


def test_a_question_becomes_prompt_and_first_answer(tmp_path):
    first, second, third = squad.read(write(tmp_path / "s.json.gz", GOOD))
    assert first == {
        "id": "q1",
        "title": "T",
        "question": "Who 1?",
        "context": "Ann saw\nBob.",
        "answers": ["Ann", "Ann saw"],
        "prefix": "question: Who 1? context: Ann saw\nBob.",
        "target": "Ann",
    }
    assert [e["target"] for e in (second, third)] == ["Bob", "Été"]
    assert all(squad.prompt({**e, "answers": None, "target": None}) == e["prefix"] for e in (first, second, third))


def test_of_a_single_file_no_context_is_on_both_sides(tmp_path):
    paragraphs = [{"context": f"Text {i // 2}.", "qas": [question(i, f"{i}")]} for i in range(200)]  # each one twice
    path = write(tmp_path / "s.json", dump(*paragraphs))
    squad.main([f"--source={path}", f"--out={tmp_path}", "--target_length=8", "--block_size=64"])
    train, valid = (texts(tmp_path / "squad", split) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted((e["prefix"], e["target"]) for e in squad.read(path))
    contexts = [{prefix.split("context: ")[1] for prefix, _ in part} for part in (train, valid)]
    assert not contexts[0] & contexts[1] and 4 <= len(contexts[1]) <= 18


def test_two_files_are_the_two_splits_and_what_is_too_long_is_counted(tmp_path, capsys):
    long = dump({"context": "c" * 90, "qas": [question(9, "c")]}, {"context": "Short.", "qas": [question(8, "Short")]})
    train, valid = write(tmp_path / "t.json", GOOD), write(tmp_path / "v.json", long)
    argv = [f"--source={train}", f"--valid_source={valid}", "--name=q", f"--out={tmp_path}"]
    squad.main([*argv, "--target_length=8", "--block_size=60"])
    assert texts(tmp_path / "q", "train") == [(e["prefix"], e["target"]) for e in squad.read(train)]
    assert texts(tmp_path / "q", "valid") == [("question: Who 8? context: Short.", "Short")]
    meta = open_set(tmp_path / "q", "valid").meta
    assert meta["too_long"] == {"train": 0, "valid": 1} and meta["command"].startswith("python -m data.squad --source=")
    assert "1 of 2 held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, message",
    [
        (dump(version="v2.0"), "SQuAD version 'v2.0', this reads '1.1'"),
        ({"data": []}, "SQuAD version None"),
        (dump(), "no questions in it"),
        (json.dumps(GOOD).encode()[:-9], "not JSON, or broken off"),
        (b"[" * 100_000, "not JSON, or broken off"),
        ([GOOD], "wants 'data', a list"),
        (
            dump({"context": "c", "qas": [question(1)]}),
            r"paragraphs\[0\].qas\[0\]: a question without answers",
        ),
        (dump({"context": "c", "qas": [question(1, "c"), question(1, "c")]}), r"qas\[1\]: id 'q1' is there twice"),
        (dump({"context": "c", "qas": [{"id": 3}]}), r"qas\[0\]: wants 'answers', a list"),
        (dump({"context": 7, "qas": []}), r"paragraphs\[0\]: wants 'context', text, got 7"),
        (dump("text"), r"paragraphs\[0\]: wants 'context', text"),
        (dump({"context": "c", "qas": [question(1, None)]}), r"qas\[0\].answers: wants 'text', text, got None"),
        (b"caf\xe9", "not UTF-8"),
        (b"", "empty"),
    ],
)
def test_bad_files_are_one_clear_line_and_nothing_is_written(tmp_path, content, message):
    path = write(tmp_path / "s.json", content)
    with pytest.raises(ValueError, match=message) as error:
        squad.main([f"--source={path}", f"--out={tmp_path / 'out'}"])
    assert "\n" not in str(error.value) and str(error.value).startswith(path)
    assert not (tmp_path / "out").exists()


def test_a_single_paragraph_cannot_be_split(tmp_path):
    path = write(tmp_path / "s.json", dump({"context": "c", "qas": [question(1, "c")]}))
    with pytest.raises(ValueError, match="leaves no example for (train|valid)"):
        squad.main([f"--source={path}", f"--out={tmp_path}"])
    with pytest.raises(ValueError, match="held_out must be between"):
        squad.main([f"--source={path}", f"--out={tmp_path}", "--held_out=1"])


@real
def test_the_real_files_hold_what_their_description_says():
    """Counts: the dev set less its last ten articles, and a part of the train set, counted when they were made."""
    dev, train = (squad.read(str(REAL / f"{name}-v1.1.json.gz")) for name in ("dev", "train-subset"))
    assert len(dev) == 8582 and sum(len(e["answers"]) for e in dev) == 27471
    assert len({e["title"] for e in dev}) == 38 and len({e["context"] for e in dev}) <= 1646
    assert len(train) == 4000 and len({e["context"] for e in train}) == 800
    assert all(answer in e["prefix"] for e in dev + train for answer in e["answers"])
