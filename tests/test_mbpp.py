"""data/mbpp.py: prompts are Python, references pass their own tests, splits of the MBPP paper."""

from pathlib import Path

import pytest
from data_files import texts, write

from data import mbpp
from data.loader import open_dataset
from data.syntax import parse_python

REAL = Path(__file__).parents[2] / "shared" / "data" / "mbpp" / "mbpp.jsonl"
real = pytest.mark.skipif(not REAL.exists(), reason="MBPP is not in ../shared/data/mbpp")

TASK = {
    "text": "Write a function to double a number. ",
    "code": "def double(x):\r\n\treturn 2 * x\r",
    "task_id": 511,
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4 ", "assert double(SMALL) == 0"],
    "challenge_test_list": [],
}
SETUP = TASK | {"task_id": 601, "test_setup_code": "SMALL = 0\r\nBIG = 9"}


def test_a_task_becomes_a_docstring_and_a_function(tmp_path):
    plain, with_setup = mbpp.read(write(tmp_path / "m.jsonl.gz", [TASK, SETUP]))
    assert plain == {
        "id": "511",
        "task_id": 511,
        "split": "validation",
        "prefix": '"""\nWrite a function to double a number.\nassert double(2) == 4\n'
        'assert double(SMALL) == 0\n"""\n',
        "tests": "assert double(2) == 4\nassert double(SMALL) == 0\n",
        "target": "def double(x):\n\treturn 2 * x",
    }
    assert with_setup["tests"] == "SMALL = 0\nBIG = 9\n" + plain["tests"]
    assert with_setup["prefix"] == plain["prefix"]  # the setup is for the tests only


def test_splits_are_those_of_the_mbpp_paper(tmp_path):
    ids = [1, 10, 11, 510, 511, 600, 601, 974]
    examples = mbpp.read(write(tmp_path / "m.jsonl", [TASK | {"task_id": i} for i in ids]))
    order = ["few-shot", "few-shot", "test", "test", "validation", "validation", "train", "train"]
    assert [e["split"] for e in examples] == order
    assert [len(ids) for ids in mbpp.SPLITS.values()] == [10, 500, 90, 374]


@real
def test_the_real_set_holds_train_and_validation(tmp_path):
    sizes = ["--target_length=3000", "--block_size=5000"]
    mbpp.main([f"--source={REAL}", f"--out={tmp_path}", *sizes])
    examples = mbpp.read(str(REAL))
    given = [
        [(e["prefix"], e["target"]) for e in examples if e["split"] == name]
        for name in ("train", "validation")
    ]
    assert texts(tmp_path / "mbpp") == given
    counts = {"few-shot": 10, "test": 400, "validation": 90, "train": 374}
    assert open_dataset(tmp_path / "mbpp", "train").meta["tasks"] == counts
    for e in examples:
        (docstring,) = parse_python(e["prefix"]).body
        assert isinstance(docstring.value.value, str)
        assert parse_python(e["prefix"] + e["target"])
        assert "\r" not in e["prefix"] + e["target"] + e["tests"]
