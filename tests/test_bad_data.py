"""Unusable files of every builder of data: one line names the fault, and nothing is written."""

import pytest
from data_files import write
from test_mbpp import TASK
from test_squad import dump, question
from test_text_file import LINES

from data import mbpp, parallel, squad, text_file

BUILDERS = {"en": parallel, "json": squad, "jsonl": mbpp, "txt": text_file, "jsonl.gz": text_file}
ASK = question(1, "c")
PAIR = {"prefix": "p", "target": "t"}
HUGE = '{"prefix": "p", "target": "t"}\n{"prefix": "q", "target": "t", "n": ' + "9" * 5000 + "}"
OTHER = {"source_file": "x", "task_id": 2, "prompt": "p", "code": "c", "test_list": ["a"]}


@pytest.mark.parametrize(
    ("name", "content", "flags", "message"),
    [
        ("a.en", "a\n" * 5, "--target=b.fr", "b.fr has 3 lines, the other has more; line i must"),
        ("a.en", b"ok\ncaf\xe9\n", "--target=b.fr", "a.en: not UTF-8 text .byte 6"),
        ("a.en", "a\n", "", "a.en, line 1: no tab; give --target=FILE"),
        ("a.en", "a\tb\na\tc\n", "", "no (train|valid) pair"),
        ("s.json", dump(), "", "s.json.* has no questions"),
        ("s.json", dump({"context": "c", "qas": [ASK, question(2)]}), "", "1.1 after question 1"),
        ("s.json", dump({"context": "c", "qas": [ASK] * 2}), "", "s.json.*id 'q1' occurs twice"),
        ("s.json", dump({"context": 7, "qas": [ASK]}), "", "s.json.*expected text, got 7"),
        ("m.jsonl", [TASK, OTHER], "", "m.jsonl, line 2: not a task of MBPP"),
        ("m.jsonl", [TASK | {"code": None}], "", "m.jsonl, line 1: not a task of MBPP"),
        ("m.jsonl", [TASK | {"task_id": 975}], "", "task_id must be 1 to 974, got 975"),
        ("m.jsonl", [TASK | {"test_list": "x"}], "", "line 1: .*test_list must be a list of tests"),
        ("m.jsonl", [TASK, TASK], "", "m.jsonl, line 2: .*task_id 511 occurs twice"),
        ("a.txt", LINES, "--input=none.txt", "none.txt: no such file"),
        ("a.txt", b" \n\n", "", "a.txt: empty"),
        ("a.txt", b"caf\xe9", "", "a.txt: not UTF-8 text .byte 3"),
        ("a.txt", b"short", "", "train has .* fewer than block_size=256"),
        ("a.txt", LINES, "--target_length=256", "target_length < block_size"),
        ("p.jsonl.gz", [PAIR], "--input=b.fr", "not both"),
        ("p.jsonl.gz", [PAIR, {"prefix": "p"}], "", "p.jsonl.gz, line 2: must be"),
        ("p.jsonl.gz", [PAIR, "text"], "", "p.jsonl.gz, line 2: must be"),
        ("p.jsonl.gz", [PAIR, {"prefix": "q", "target": "\ud800"}], "", "surrogates .*line 2"),
        ("p.jsonl.gz", [PAIR, PAIR], "", "line 2, only 1 prefixes with a target"),
        ("p.jsonl.gz", [PAIR, PAIR | {"prefix": "q"}], "--block_size=1", "no train pair fits"),
        ("p.jsonl.gz", [PAIR, PAIR | {"prefix": "q"}], "--name=../up", "a plain folder name"),
        ("p.jsonl.gz", HUGE, "", "p.jsonl.gz, line 2: not readable as JSON .*4300 digits"),
    ],
)
def test_bad_files_are_refused(name, content, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b.fr", "b\n" * 3)
    write(tmp_path / name, content)
    module = BUILDERS[name[2:]]
    flag = "input" if module is text_file else "source"
    with pytest.raises(ValueError, match=message) as error:
        module.main([f"--{flag}={name}", "--name=set", "--out=out", *flags.split()])
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/*"))
