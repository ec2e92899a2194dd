"""eval/code.py: unit tests, draws and pass@k, and that nothing a model wrote runs unasked."""

import json
import re
from pathlib import Path

import pytest
import torch

from checkpoint import save
from data import mbpp, mini
from data.loader import write_pairs
from data.tokenizer import get_tokenizer
from eval import code, sandbox
from eval.metrics import pass_at_k
from model import ModelConfig, Transformer

BYTES = get_tokenizer("bytes")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=88, target_length=41)
DIFFUSION = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
MBPP = Path(__file__).parent.parent.parent / "shared" / "data" / "mbpp" / "mbpp.jsonl"
PROBLEMS = [
    ("Double a number.", "def f(x):\r\n    return 2 * x", ["assert f(2) == 4", "assert f(0) == 0"]),
    ("Add one.", "def g(x):\n    return x + 1", ["assert g(2) == 3"]),
]
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def twice(x):\n",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "twice",
}
RIGHT, WRONG = ["def f(x): return x + x", "def g(x): return x + 1"], ["def f(x): return 3", "def g(x):"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Files of both formats, sets of mini_code and of function bodies, and a random checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("code")
    rows = [
        {"task_id": 11 + i, "text": text, "code": source, "test_list": tests, "test_setup_code": ""}
        for i, (text, source, tests) in enumerate(PROBLEMS)
    ]
    rows.append(rows[0] | {"task_id": 601})
    (folder / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "human.jsonl").write_text(json.dumps(HUMANEVAL) + "\n")
    items = [(item["prefix"], item["target"]) for item in mini.examples("mini_code", "valid")[:3]]
    bodies = [('def h(x):\n    """T."""\n', "    return x"), ('def k(x):\n    """T."""\n', "    x += 1\n    return x")]
    for name, texts in (("mini_code", items), ("bodies", bodies)):
        pairs = [(BYTES.encode(prefix), BYTES.encode(target)) for prefix, target in texts]
        write_pairs(folder / name, {"train": pairs, "valid": pairs}, "bytes", 41, 88)
    for kind, config in (("ar", {}), ("diffusion", DIFFUSION)):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**TINY | config)).eval()
        save(folder / f"{kind}.pt", model, 7, "bytes", train_config={"data": str(folder / "bodies")})
    return folder


def completions(path: Path, *draws: list[str], first: int = 11) -> Path:
    """A file of predictions: one list of the completions of all problems for each draw."""
    rows = [{"task_id": first + i, "completion": text} for texts in draws for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# programs and their tests


def test_pass_at_k_is_estimated_from_all_draws_of_a_problem(place, tmp_path, capsys):
    """f: 2 of 3 draws pass, g: 1 of 3. So pass@1 is 1/2, pass@2 (1 + 2/3) / 2, pass@3 1."""
    draws = [RIGHT, [RIGHT[0], WRONG[1]], WRONG]
    path = completions(tmp_path / "p.jsonl", *draws)
    argv = [f"--source={place / 'mbpp.jsonl'}", f"--predictions={path}", "--run_code", "--k=1,2,3"]
    result = code.main([*argv, f"--json={tmp_path / 'a.json'}"])
    assert [result[f"pass@{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 2, 5 / 6, 1])
    assert result["pass@2"] == pytest.approx((pass_at_k(3, 2, 2) + pass_at_k(3, 1, 2)) / 2)
    assert result["pass@3_interval_by"] == "wilson" and result["pass@2_interval_by"] == "bootstrap"
    assert (result["n"], result["samples"], result["parse"]) == (2, 3, pytest.approx(4 / 6))
    assert result["outcomes"] == {"passed": 3, "not_python": 2, "failed": 1}
    items = json.loads((tmp_path / "a.json").read_text())["items"]
    assert {i: (item["samples"], item["passed"], item["parsed"]) for i, item in items.items()} == {
        "11": (3, 2, 3),
        "12": (3, 1, 1),
    }
    assert "--run_code: each program is run" in capsys.readouterr().out
    best = completions(tmp_path / "best.jsonl", RIGHT, RIGHT, RIGHT)
    for other in (path, tmp_path / "a.json"):
        found = code.main([argv[0], f"--predictions={best}", *argv[2:], f"--against={other}"])["against"]
        assert found["pass@1"]["difference"] == pytest.approx(1 / 2) and found["pass@3"]["difference"] == 0


def test_references_pass_and_need_no_leave_to_run_and_nothing_fails(place, tmp_path):
    result = code.main(["--reference", f"--source={place / 'mbpp.jsonl'}", "--split=all"])
    assert (result["pass@1"], result["parse"], result["edit_similarity"], result["n"]) == (1, 1, 1, 3)
    empty = completions(tmp_path / "p.jsonl", ["", ""])
    result = code.main([f"--source={place / 'mbpp.jsonl'}", f"--predictions={empty}", "--run_code"])
    assert (result["pass@1"], result["parse"], result["empty"], result["n"]) == (0, 0, 2, 2)


@pytest.mark.skipif(not MBPP.exists(), reason="needs ../shared/data/mbpp")
def test_real_references_score_all_and_empty_programs_none(tmp_path):
    """Some of them; python -m eval.code --reference --split=all runs all 874."""
    argv = [f"--source={MBPP}", "--split=all", "--n=12"]
    assert code.main([*argv, "--reference", f"--save={tmp_path / 'p.jsonl'}"])["pass@1"] == 1
    rows = [json.loads(line) | {"completion": ""} for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert code.main([*argv, f"--predictions={tmp_path / 'p.jsonl'}", "--run_code"])["pass@1"] == 0


def test_a_completion_of_humaneval_goes_on_from_its_prompt(place, tmp_path):
    source = f"--source={place / 'human.jsonl'}"
    assert code.main([source, "--reference", f"--save={tmp_path / 'p.jsonl'}"])["pass@1"] == 1
    row = json.loads((tmp_path / "p.jsonl").read_text())
    assert row == {"task_id": "HumanEval/0", "completion": HUMANEVAL["canonical_solution"]}
    for completion, share in (("    return x + x", 1), ("def twice(x): return 2 * x", 0), ("", 0)):
        (tmp_path / "p.jsonl").write_text(json.dumps(row | {"completion": completion}))
        assert code.main([source, f"--predictions={tmp_path / 'p.jsonl'}", "--run_code"])["pass@1"] == share


def test_a_program_is_put_together_as_its_data_set_says(place):
    for name in ("mbpp.jsonl", "human.jsonl"):
        for example in code.examples(code.CodeConfig(source=str(place / name))):
            assert code.program("    pass", example) == mbpp.program(example, "    pass")
            assert code.prompt(example) == mbpp.prompt(example)
    found = code.examples(code.CodeConfig(data=str(place / "bodies")))
    assert code.program(found[0]["target"], found[0]) == 'def h(x):\n    """T."""\n    return x'
    found = code.examples(code.CodeConfig(data=str(place / "mini_code")))
    assert code.program(found[0]["target"], found[0]) == found[0]["target"]


@pytest.mark.parametrize(
    "prediction, parses",
    [("    return x", True), ("    return (", False), ("", False), ("  \n", False), ("    return '\ufffd'", False)]
    + [("return x", False), ("    pass\0", False), ("    return " + "(" * 5000, False)],
)
def test_only_python_with_something_in_it_parses(prediction, parses):
    example = {"prefix": 'def h(x):\n    """T."""\n', "target": "    return x", "continues": True}
    assert code.score(prediction, example)[0] is parses


# mini_code


def test_references_of_mini_code_pass_their_tests_and_equal_programs_and_no_others():
    """Tests come from the sentence; here programs are told apart by what they do to numbers from -20 to 20."""

    def run(source):
        scope = {}
        exec(source, scope)  # noqa: S102  our own generated text, not a model's
        return scope

    def does(target):
        f, numbers = run(target)["f"], range(-20, 21)
        return f(numbers) if "(a)" in target else [f(x) for x in numbers]

    def passes(target, example):
        try:
            exec(mini.code_tests(example), run(target))  # noqa: S102
            return True
        except (AssertionError, TypeError):
            return False

    items = mini.examples("mini_code", "valid")
    assert all(passes(item["target"], item) for item in items)
    for item in items[:20]:
        for other in items[20:80]:
            same = other["target"][4:8] == item["target"][4:8] and does(other["target"]) == does(item["target"])
            assert passes(other["target"], item) == same, (item, other)


def test_mini_code_is_scored_by_running_it(place):
    result = code.main(["--reference", f"--data={place / 'mini_code'}"])
    assert (result["pass@1"], result["n"], result["outcomes"]) == (1, 3, {"passed": 3})


# what a model writes


class Ran(Exception):
    pass


def test_no_program_of_a_model_or_a_file_runs_without_leave(place, tmp_path, monkeypatch):
    def run_many(*args, **rest):
        raise Ran

    monkeypatch.setattr(sandbox, "run_many", run_many)
    monkeypatch.setattr(sandbox, "isolation", lambda: "in a box")
    given = [f"--source={place / 'mbpp.jsonl'}", f"--predictions={completions(tmp_path / 'p.jsonl', RIGHT)}"]
    made = [f"--init_from={place / 'ar.pt'}", f"--data={place / 'mini_code'}"]
    for argv in (given, made):
        with pytest.raises(ValueError, match="allow it with --run_code; in a box"):
            code.main(argv)
        with pytest.raises(Ran):
            code.main([*argv, "--run_code"])
    against = ["--reference", given[0], f"--against={tmp_path / 'p.jsonl'}"]
    with pytest.raises(ValueError, match="allow it with --run_code"):
        code.main(against)
    with pytest.raises(Ran):
        code.main([*against, "--run_code"])


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_draws_differ_and_do_not_depend_on_how_many_there_are(place, tmp_path, kind, capsys):
    argv = [f"--init_from={place / kind}.pt", f"--save={tmp_path / 'p.jsonl'}", "--temperature=1.0"]
    argv += ["--steps=2", "--candidates=2"] if kind == "diffusion" else []
    found = {}
    for samples in (2, 3):
        result = code.main([*argv, f"--samples={samples}", f"--k=1,{samples}"])
        rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
        found[samples] = [[row["completion"] for row in rows if row["task_id"] == i] for i in ("0", "1")]
        assert not any(key.startswith("pass") for key in result) and result["samples"] == samples
    out = capsys.readouterr().out
    assert "have no unit tests, so nothing is run" in out
    for two, three in zip(found[2], found[3]):
        assert three[:2] == two and len(set(three)) == 3
    if kind == "diffusion":
        assert (result["calls_per_sample"], result["best_of"]) == (4, 2)
        assert "3 draws per problem, each the best of 2 canvases by model score" in out
    else:
        assert result["best_of"] == 1 and "3 draws per problem, each a sample at temperature 1.0" in out


def test_bodies_are_scored_by_parsing_and_likeness(place, tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"task_id": "0", "completion": "    return x"}, {"task_id": "1", "completion": "    return"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = code.main([f"--data={place / 'bodies'}", f"--predictions={path}"])
    assert result["parse"] == 1 and "pass@1" not in result
    assert result["edit_similarity"] == pytest.approx((1 + 2 * 10 / (10 + 23)) / 2)  # all of "    return" is there


# bad input


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--samples=4"], "--samples=4 at temperature 0 are equal draws"),
        (["--samples=2", "--temperature=1.0", "--k=1,3"], "pass@3 needs as many draws of a problem, there are 2"),
        (["--samples=0"], "samples must be 1 to 4096"),
        (["--k=0"], "k wants whole numbers from 1"),
        (["--k=ten"], "k wants whole numbers from 1"),
        (["--k="], "k wants whole numbers from 1"),
        (["--split=tset"], "split must be all or one of"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(place, argv, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        code.main([f"--init_from={place / 'ar.pt'}", *argv])


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"task_id": 11, "completion": "a"}\n', "1 predictions for 2 examples; none for 12"),
        ("".join(f'{{"task_id": {i}, "completion": "a"}}\n' for i in (11, 12, 13)), "also one for 13"),
        ('{"task_id": 11, "completion": "a"}\n{"task_id": 12, "comple', "line 2: want"),
        ('{"task_id": 11}\n', 'line 1: want {"task_id": .., "completion": ..}'),
        ('["a"]\n', "line 1: want"),
        ('{"task_id": 11, "completion": 3}\n', "line 1: the completion must be a text"),
        (
            '{"task_id": 11, "completion": "a"}\n' * 2 + '{"task_id": 12, "completion": "a"}',
            "task 12 has 1; want as many",
        ),
        (b'{"task_id": 11, "completion": "\xe9"}', "not UTF-8"),
        ("", "empty"),
    ],
)
def test_a_bad_file_of_predictions_is_one_line(place, tmp_path, text, says):
    (tmp_path / "p.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        code.main([f"--source={place / 'mbpp.jsonl'}", f"--predictions={tmp_path / 'p.jsonl'}", "--run_code"])
    assert str(error.value).startswith(str(tmp_path / "p.jsonl")) and "\n" not in str(error.value)


def test_a_split_that_is_not_in_the_file_is_refused(place):
    with pytest.raises(ValueError, match="has no tasks of the split validation"):
        code.main(["--reference", f"--source={place / 'mbpp.jsonl'}", "--split=validation"])
