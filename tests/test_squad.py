"""data/squad.py: official files become pairs of context with question, and first answer."""

from pathlib import Path

import pytest
from data_files import texts, write

from data import squad
from data.loader import open_dataset

REAL = Path(__file__).parents[2] / "shared" / "data" / "squad"
real = pytest.mark.skipif(not REAL.exists(), reason="SQuAD is not in ../shared/data/squad")


def question(i, *answers):
    answers = [{"text": answer, "answer_start": 0} for answer in answers]
    return {"id": f"q{i}", "question": f"Who {i}?", "answers": answers}


def dump(*paragraphs):
    return {"data": [{"title": "T", "paragraphs": list(paragraphs)}]}


GOOD = dump(
    {"context": "Ann saw\nBob.", "qas": [question(1, "Ann", "Ann saw"), question(2, "Bob")]},
    {"context": "Été.", "qas": [question(3, "Été")]},
)


def sides(examples):
    return [(example["prefix"], example["target"]) for example in examples]


def test_the_question_comes_after_the_context(tmp_path):
    first, second, third = squad.read(write(tmp_path / "s.json.gz", GOOD))
    assert first == {
        "id": "q1",
        "title": "T",
        "question": "Who 1?",
        "context": "Ann saw\nBob.",
        "answers": ["Ann", "Ann saw"],
        "prefix": "Ann saw\nBob.\nQuestion: Who 1?\nAnswer:",
        "target": " Ann",
    }
    assert [e["target"] for e in (second, third)] == [" Bob", " Été"]


def test_two_files_are_the_two_splits_and_long_answers_are_left_out(tmp_path):
    valid = dump({"context": "c", "qas": [question(9, "c" * 24), question(8, "c" * 23)]})
    train = write(tmp_path / "train.json", GOOD)
    valid = write(tmp_path / "dev.json.gz", valid)
    squad.main([f"--source={train}", f"--valid_source={valid}", "--name=q", f"--out={tmp_path}"])
    assert texts(tmp_path / "q") == [sides(squad.read(train)), sides(squad.read(valid))[1:]]
    meta = open_dataset(tmp_path / "q", "valid").meta
    assert meta["target_length"] == 25 and meta["left_out"]["valid"]["too_long"] == 1


@real
def test_the_real_files_hold_what_their_description_says():
    """Counted when the files were made."""
    train, dev = (squad.read(str(next(REAL.glob(f"{name}*")))) for name in ("train", "dev"))
    assert len(dev) == 8582 and sum(len(e["answers"]) for e in dev) == 27471
    assert len({e["title"] for e in dev}) == 38 and len({e["context"] for e in dev}) <= 1646
    assert len(train) == 4000 and len({e["context"] for e in train}) == 800
    assert all(answer in e["prefix"] for e in dev + train for answer in e["answers"])
