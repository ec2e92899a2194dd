"""data/mbpp.py: prompts that are Python, references that pass their own tests, splits of the MBPP paper."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data import mbpp
from data.loader import open_set
from data.syntax import parse_python

REAL = Path(__file__).parent.parent.parent / "shared" / "data" / "mbpp" / "mbpp.jsonl"
real = pytest.mark.skipif(not REAL.exists(), reason="MBPP is not in ../shared/data/mbpp")

TASK = {
    "text": "Write a function to double a number. ",
    "code": "def double(x):\r\n\treturn 2 * x\r",
    "task_id": 511,
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4 ", "assert double(SMALL) == 0", "assert double(-1) == -2"],
    "challenge_test_list": [],
}
SETUP = TASK | {"task_id": 601, "test_setup_code": "SMALL = 0\r\nBIG = 9"}
HUMAN = {
    "task_id": "HumanEval/0",
    "prompt": 'def half(x):\n    """ Half of x. """\n',
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
    "entry_point": "half",
}


def write(path, items):
    raw = items if isinstance(items, bytes) else "".join(json.dumps(item) + "\n" for item in items).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def outcomes(jobs) -> list[bool]:
    """Which (program, tests) pass: all in one process of its own, with 10 s for each."""
    runner = (
        "import contextlib, io, json, signal, sys\n"
        "jobs = json.load(sys.stdin)\n"
        "passed = []\n"
        "for program, tests in jobs:\n"
        "    signal.alarm(10)\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(io.StringIO()):\n"
        "            names = {}\n"
        "            exec(program, names)\n"
        "            exec(tests, names)\n"
        "        passed.append(True)\n"
        "    except Exception:\n"
        "        passed.append(False)\n"
        "print(json.dumps(passed))\n"
    )
    jobs = json.dumps(jobs)
    done = subprocess.run([sys.executable, "-c", runner], input=jobs, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_task_becomes_a_docstring_and_a_function(tmp_path):
    plain, with_setup = mbpp.read(write(tmp_path / "m.jsonl.gz", [TASK, SETUP]))
    assert plain["prefix"] == (
        '"""\nWrite a function to double a number.\nassert double(2) == 4\nassert double(SMALL) == 0\n'
        'assert double(-1) == -2\n"""\n'
    )
    assert plain["target"] == "def double(x):\n\treturn 2 * x"
    assert (plain["id"], plain["task_id"], plain["split"]) == ("511", 511, "validation")
    assert with_setup["tests"].startswith("SMALL = 0\nBIG = 9\nassert double(2)")
    assert with_setup["tests"] == "SMALL = 0\nBIG = 9\n" + plain["tests"]
    assert with_setup["prefix"] == plain["prefix"]  # the setup is the tests' business
    assert mbpp.program(plain, "x = 1") == "x = 1"


def test_setup_code_is_what_lets_the_tests_pass(tmp_path):
    examples = mbpp.read(write(tmp_path / "m.jsonl", [TASK, SETUP]))
    assert outcomes([(mbpp.program(e, e["target"]), e["tests"]) for e in examples]) == [False, True]


def test_a_humaneval_completion_continues_its_prompt(tmp_path):
    (example,) = mbpp.read(write(tmp_path / "HumanEval.jsonl.gz", [HUMAN]))
    assert (example["id"], example["split"], example["prefix"]) == ("HumanEval/0", "test", HUMAN["prompt"])
    completions = [example["target"], "    return x\n", ""]
    assert outcomes([(mbpp.program(example, c), example["tests"]) for c in completions]) == [True, False, False]
    assert outcomes([(HUMAN["canonical_solution"], example["tests"])]) == [False]


def test_splits_are_those_of_the_mbpp_paper(tmp_path):
    ids = [1, 10, 11, 510, 511, 600, 601, 974]
    examples = mbpp.read(write(tmp_path / "m.jsonl", [TASK | {"task_id": i} for i in ids]))
    assert [e["split"] for e in examples] == sorted(
        ["few-shot", "test", "validation", "train"] * 2, key=list(mbpp.SPLITS).index
    )
    assert {split: len(ids) for split, ids in mbpp.SPLITS.items()} == {
        "few-shot": 10,
        "test": 500,
        "validation": 90,
        "train": 374,
    }


SANITIZED = {"source_file": "x", "task_id": 2, "prompt": "p", "code": "c", "test_imports": [], "test_list": ["a"]}


@pytest.mark.parametrize(
    "items, message",
    [
        ([TASK, SANITIZED], "line 2: has source_file, .*sanitized-mbpp"),
        ([{"prefix": "p", "target": "t"}], "line 1: has prefix, target; MBPP has task_id, .*HumanEval task_id"),
        ([["text"]], "line 1: has no fields; MBPP has"),
        ([TASK | {"task_id": 975}], "line 1: task_id 975 is none of MBPP's 1 to 974"),
        ([TASK | {"task_id": "7"}], "line 1: 'task_id' wants int"),
        ([TASK | {"test_list": []}], "line 1: 'test_list' wants at least one"),
        ([TASK | {"test_list": [3]}], "line 1: 'test_list' wants at least one"),
        ([TASK, TASK], "line 2: task_id 511 is there twice"),
        ([TASK, HUMAN], "tasks of both MBPP and HumanEval"),
        ([HUMAN], "HumanEval has no training tasks"),
        ([TASK], "leaves no example for train"),
        (json.dumps(TASK).encode() + b'\n{"text": "broken', "line 2: not a line of JSON"),
        (json.dumps([SANITIZED], indent=1).encode(), "line 1: not a line of JSON"),
        (b"", "empty"),
    ],
)
def test_other_formats_and_faulty_lines_are_refused_by_name(tmp_path, items, message):
    path = write(tmp_path / "m.jsonl", items)
    with pytest.raises(ValueError, match=message) as error:
        mbpp.main([f"--source={path}", f"--out={tmp_path / 'out'}"])
    assert "\n" not in str(error.value) and str(error.value).startswith(path)
    assert not (tmp_path / "out").exists()


@real
def test_the_set_is_train_and_validation_and_says_what_the_file_lacks(tmp_path, capsys):
    mbpp.main([f"--source={REAL}", f"--out={tmp_path}", "--target_length=3000", "--block_size=5000"])
    examples = mbpp.read(str(REAL))
    for split, name in (("train", "train"), ("valid", "validation")):
        data = open_set(tmp_path / "mbpp", split)
        given = [(e["prefix"], e["target"]) for e in examples if e["split"] == name]
        assert [data.text(i) for i in range(len(data))] == given
    assert Counter(e["split"] for e in examples) == {"few-shot": 10, "test": 400, "validation": 90, "train": 374}
    assert data.meta["too_long"] == {"train": 0, "valid": 0} and data.meta["tasks"]["train"] == 374
    assert "test 400 of 500, validation 90 of 90, train 374 of 374" in capsys.readouterr().out


@real
def test_every_real_prompt_is_a_docstring_and_every_reference_is_python():
    examples = mbpp.read(str(REAL))
    for e in examples:
        (docstring,) = parse_python(e["prefix"]).body
        assert docstring.value.value.strip().split("\n")[0] == e["text"] and e["prefix"].count("assert") >= 3
        assert parse_python(e["prefix"] + e["target"])
        assert "\r" not in e["prefix"] + e["target"] + e["tests"]


@real
def test_references_pass_their_own_tests_and_no_other():
    examples = [e for e in mbpp.read(str(REAL)) if e["split"] == "validation"]
    examples += [e for e in mbpp.read(str(REAL)) if e["task_id"] in (367, 927)]  # the two with setup code
    own = [(mbpp.program(e, e["target"]), e["tests"]) for e in examples]
    other = [(a, b) for (a, _), (_, b) in zip(own, own[1:])]
    passed = outcomes(own + other)
    assert all(passed[: len(own)]) and not any(passed[len(own) :])
