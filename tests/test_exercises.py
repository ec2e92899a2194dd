"""The graders of docs/exercises fail on what is handed out and on near misses, and pass on what solves it."""

import re
from pathlib import Path

import pytest

from docs.exercises.grade import EXERCISES, bound_of, grade, main

ROOT = Path(__file__).parent.parent
HANDED_OUT, SOLUTIONS = ROOT / "docs" / "exercises", Path(__file__).parent / "solutions"


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_passes_and_what_is_handed_out_does_not(name):
    solved = grade(name, SOLUTIONS / f"{name}.py")
    assert solved and all(holds for _, holds in solved), [claim for claim, holds in solved if not holds]
    assert not all(holds for _, holds in grade(name, HANDED_OUT / f"{name}.py"))


# One thing wrong in each: (exercise, text of the solution, what stands there instead, the claim that must fail).
NEAR_MISSES = [
    ("sampler", "best[..., 0] - best[..., 1]", "best[..., 0]", "step 2 of 4"),
    ("sampler", "(step + 1)", "step", "step 1 of 4"),
    (
        "sampler",
        "answer = torch.where(state.free, likeliest, state.canvas)",
        "answer = likeliest",
        "a given slot stays",
    ),
    ("noise", "right=True", "right=False", "the ends"),
    ("noise", "torch.where(token == m.n_ordinary, m.pad_id, token)", "token", "pad is the id"),
    ("noise", "uniform.double() * cdf[-1]", "uniform.double() * (cdf[-1] - 1)", "each as often"),
    ("mask_schedule", "(column - row) * T + row", "row * T + column", "short edges come before"),
    ("mask_schedule", "round(share * len(row))", "int(share * len(row) / 2)", "at share 1"),
    ("crossover", "temperature=0.0, ", "", "16 tokens cost"),
    ("crossover", "steps=64", "steps=10", "256 tokens come out right"),
    ("crossover", "candidates=1", "candidates=8", "256 tokens cost"),
    ("bound", "0.75 if seen else 0.25", "0.25 if seen else 0.75", "L(1) is"),
]


@pytest.mark.parametrize("name, right, wrong, claim", NEAR_MISSES)
def test_a_near_miss_is_told_what_is_wrong(tmp_path, name, right, wrong, claim):
    text = (SOLUTIONS / f"{name}.py").read_text()
    assert right in text
    (tmp_path / "a.py").write_text(text.replace(right, wrong))
    failed = [said for said, holds in grade(name, tmp_path / "a.py") if not holds]
    assert any(said.startswith(claim) for said in failed), failed


def test_the_command_prints_claims_and_its_status_says_the_grade(tmp_path, capsys):
    main(["bound", f"--file={SOLUTIONS / 'bound.py'}"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("ok    ") for line in lines)
    with pytest.raises(SystemExit) as left:
        main(["sampler"])
    assert left.value.code == 1 and capsys.readouterr().out == "FAIL  margin is written\n"
    (tmp_path / "a.py").write_text("def predictor(seen):\n    return 1 / 0\n")
    with pytest.raises(SystemExit):
        main(["bound", f"--file={tmp_path / 'a.py'}"])
    assert "predictor runs: ZeroDivisionError" in capsys.readouterr().out


def test_what_cannot_be_graded_is_one_line(tmp_path):
    for argv, message in (
        ([], "name one exercise: sampler"),
        (["samplr"], "did you mean 'sampler'?"),
        (["bound", "--file=nowhere.py"], "nowhere.py: no such file"),
        (["bound", "--fil=x"], "did you mean 'file'?"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            main(argv)
    (tmp_path / "a.py").write_text("")
    assert grade("bound", tmp_path / "a.py") == [(f"{tmp_path / 'a.py'} has a function predictor", False)]


def test_the_bound_of_knowing_nothing_is_the_entropy():
    """p = 1/2 whatever is seen is right where all is noise, and nowhere else: the process gains nothing, loses nothing
    at T = 1, where only that is asked."""
    assert bound_of({0: 0.5, 1: 0.5}, T=1) == pytest.approx(0.6931471805599453)
