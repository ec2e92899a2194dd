"""eval/code.py: unit tests, samples and pass@k, and that nothing a model wrote runs unasked."""

import json
import re
from pathlib import Path

import pytest
from eval_models import KINDS, save_model, save_pairs

from data import mini
from eval import code, sandbox

PROBLEMS = [
    ("Double it.", "def f(x):\r\n    return 2 * x", ["assert f(2) == 4", "assert f(0) == 0"]),
    ("Add one.", "def g(x):\n    return x + 1", ["assert g(2) == 3"]),
]
RIGHT = ["def f(x): return x + x", "def g(x): return x + 1"]
WRONG = ["def f(x): return 3", "def g(x):"]
HEAD = 'def h(x):\n    """T."""\n'


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A file of MBPP, sets of mini_code and of bodies, a random checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("code")
    rows = [
        {"task_id": 11 + i, "text": text, "code": source, "test_list": tests, "test_setup_code": ""}
        for i, (text, source, tests) in enumerate(PROBLEMS)
    ]
    rows.append(rows[0] | {"task_id": 601})
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [(item["prefix"], item["target"]) for item in mini.examples("mini_code", "valid")[:3]]
    bodies = [(HEAD, "    return x"), (HEAD.replace("h", "k"), "    x += 1\n    return x")]
    save_pairs(folder / "mini_code", items, 41, 88, command="python -m data.mini")
    save_pairs(folder / "bodies", bodies, 41, 88)
    for kind, config in KINDS.items():
        sizes = dict(block_size=88, target_length=41)
        save_model(folder / f"{kind}.pt", folder / "bodies", **sizes, **config)
    return folder


def completions(path: Path, *samples: list[str], first: int = 11) -> Path:
    """A file of predictions: for each sample a list of the completions of all problems."""
    path.write_text(json.dumps({first + i: texts for i, texts in enumerate(zip(*samples))}))
    return path


# Programs and their tests


def test_pass_at_k_is_estimated_from_all_samples_of_a_problem(place, tmp_path, capsys):
    """f: 2 of 3 samples pass, g: 1 of 3. So pass@1 is 1/2, pass@2 (1 + 2/3) / 2, pass@3 1."""
    path = completions(tmp_path / "p.json", RIGHT, [RIGHT[0], WRONG[1]], WRONG)
    argv = [f"--source={place / 'mbpp.jsonl'}", f"--predictions={path}", "--run_code"]
    result = code.main([*argv, "--k=1,2,3", f"--json={tmp_path / 'a.json'}"])
    assert [result[f"pass@{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 2, 5 / 6, 1])
    assert result["pass@3_interval_by"] == "wilson"
    assert result["pass@2_interval_by"] == "bootstrap"
    assert (result["n"], result["samples"], result["parse"]) == (2, 3, pytest.approx(4 / 6))
    assert result["outcomes"] == {"passed": 3, "not_python": 2, "failed": 1}
    items = json.loads((tmp_path / "a.json").read_text())["items"]
    assert items == json.loads(path.read_text())  # so they can be scored again
    assert "--run_code: each program has" in capsys.readouterr().err


def test_references_pass_without_leave_and_empty_programs_fail(place, tmp_path):
    source = f"--source={place / 'mbpp.jsonl'}"
    result = code.main(["--reference", source])
    assert [result[key] for key in ("pass@1", "parse", "n")] == [1, 1, 2]
    empty = completions(tmp_path / "p.json", ["", ""])
    result = code.main([source, f"--predictions={empty}", "--run_code"])
    assert [result[key] for key in ("pass@1", "parse", "n")] == [0, 0, 2]
    result = code.main(["--reference", f"--data={place / 'mini_code'}"])
    assert (result["pass@1"], result["n"], result["outcomes"]) == (1, 3, {"passed": 3})


@pytest.mark.parametrize(
    "program, parses",
    [
        ("def f(x):\n    return x", True),
        ("x = 1 # '\\d'", True),
        ("def f(x):\n    return (", False),
        ("", False),
        ("  \n", False),
        ("x = '\ufffd'", False),
        ("  x = 1", False),
        ("x = 1\0", False),
        ("x = " + "(" * 5000, False),
    ],
)
def test_only_python_with_something_in_it_parses(program, parses):
    assert code.parses(program) is parses


# What a model writes


class Ran(Exception):
    pass


def test_no_program_of_a_model_or_a_file_runs_without_leave(place, tmp_path, monkeypatch):
    def run_many(*args, **rest):
        raise Ran

    monkeypatch.setattr(sandbox, "run_many", run_many)
    monkeypatch.setattr(sandbox, "isolation", lambda: "in a box")
    path = completions(tmp_path / "p.json", RIGHT)
    given = [f"--source={place / 'mbpp.jsonl'}", f"--predictions={path}"]
    made = [f"--init_from={place / 'ar.pt'}", f"--data={place / 'mini_code'}"]
    for argv in (given, made):
        with pytest.raises(ValueError, match="allow it with --run_code; in a box"):
            code.main(argv)
        with pytest.raises(Ran):
            code.main([*argv, "--run_code"])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_differ_and_do_not_depend_on_how_many_there_are(place, tmp_path, kind):
    path = tmp_path / "a.json"
    argv = [f"--init_from={place / kind}.pt", f"--json={path}", "--temperature=1.0"]
    argv += ["--steps=2", "--candidates=2"] if kind == "diffusion" else []
    found = {}
    for samples in (2, 3):
        result = code.main([*argv, f"--samples={samples}", f"--k=1,{samples}"])
        found[samples] = json.loads(path.read_text())["items"]
        assert "pass@1" not in result and result["samples"] == samples
    for i in "01":
        assert found[3][i][:2] == found[2][i] and len(set(found[3][i])) == 3


def test_programs_without_tests_are_parsed(place, tmp_path):
    path = completions(tmp_path / "p.json", ["x = 1", "x = ("], first=0)
    result = code.main([f"--data={place / 'bodies'}", f"--predictions={path}"])
    assert result["parse"] == 0.5 and "pass@1" not in result


# Bad input


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--samples=4"], "--samples=4 at temperature 0 are equal"),
        (["--samples=2", "--k=1,3"], "pass@3 needs --samples=3 or more, got 2"),
        (["--k=ten"], "k must be whole numbers from 1"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(place, monkeypatch, argv, says):
    monkeypatch.chdir(place)
    with pytest.raises(ValueError, match=re.escape(says)):
        code.main(["--init_from=ar.pt", *argv])


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"11": "a"}', "1 predictions for 2 examples, as {id: text}; missing or unknown: 12"),
        ('{"11": "a", "12": ["b", "c"]}', "12 must be a text, or a list of as many texts as 11"),
        ('{"11": 3, "12": "b"}', "11 must be a text"),
        ('{"11": [], "12": []}', "11 must be a text"),
        ('["a", "b"]', "0 predictions for 2 examples"),
        ("[" * 100_000, "not readable as JSON"),
    ],
)
def test_a_bad_file_of_predictions_is_one_line(place, tmp_path, text, says):
    path = tmp_path / "p.json"
    path.write_text(text)
    argv = [f"--source={place / 'mbpp.jsonl'}", f"--predictions={path}", "--run_code"]
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        code.main(argv)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
