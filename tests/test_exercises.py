"""The graders of docs/exercises pass the solutions and fail the handouts and near misses."""

from pathlib import Path

import pytest

from docs.exercises.grade import EXERCISES, bound_of, grade, main

ROOT = Path(__file__).parent.parent
SOLUTIONS = ROOT / "tests" / "solutions"


@pytest.mark.parametrize("name", EXERCISES)
def test_a_solution_passes_and_the_handout_fails(name):
    checks = grade(name, SOLUTIONS / f"{name}.py")
    assert len(checks) > 1 and all(passed for _, passed in checks), checks
    handout = grade(name, ROOT / "docs" / "exercises" / f"{name}.py")
    assert not all(passed for _, passed in handout)


# One mistake in each: (exercise, text of the solution, its replacement, the check that must fail).
NEAR_MISSES = [
    ("sampler", "best[..., 0] - best[..., 1]", "best[..., 0]", "step 2 of 4"),
    ("sampler", "(step + 1)", "step", "step 1 of 4"),
    ("sampler", "output=output", "output=likeliest", "a given slot"),
    ("sampler", "(~state.editable, -math.inf)", "(~state.editable, 2.0)", "and is not counted"),
    ("noise", "right=True", "right=False", "at 0 and almost 1"),
    ("noise", "token == model_cfg.n_ordinary", "token == -1", "pad"),
    ("noise", "uniform.double() * cdf[-1]", "uniform.double() * (cdf[-1] - 1)", "each token"),
    ("bound", "0.75 if seen else 0.25", "0.25 if seen else 0.75", "L(1) is"),
    ("bound", "return", "return 1 / 0 +", "predictor runs: ZeroDivisionError"),
]


@pytest.mark.parametrize("name, right, wrong, check", NEAR_MISSES)
def test_a_near_miss_fails_the_right_check(tmp_path, name, right, wrong, check):
    text = (SOLUTIONS / f"{name}.py").read_text()
    assert right in text
    (tmp_path / "a.py").write_text(text.replace(right, wrong))
    failed = [text for text, passed in grade(name, tmp_path / "a.py") if not passed]
    assert any(text.startswith(check) for text in failed), failed


def test_the_command_and_its_status(capsys):
    main(["bound", str(SOLUTIONS / "bound.py")])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.startswith("ok    ") for line in lines)
    with pytest.raises(SystemExit) as end:
        main(["sampler"])
    assert end.value.code == 1 and capsys.readouterr().out.startswith("FAIL  margin runs: NotImpl")
    for argv, message in (([], "sampler, noise"), (["samplr"], "did you"), (["bound", "x"], "x")):
        with pytest.raises(ValueError, match=message):
            main(argv)


def test_the_bound_without_knowledge_is_the_entropy():
    """With T = 1 the only step starts from pure noise, where p = 1/2 is right."""
    assert bound_of([0.5, 0.5], T=1) == pytest.approx(0.6931471805599453)
