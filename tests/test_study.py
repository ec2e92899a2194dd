"""eval/study.py: recipes, and jobs that run once, resume, or run again if a setting changes."""

import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from eval import study, tables
from eval.study import Job, Row, Runner, Stage, judge, read_results

ROOT = Path(__file__).parent.parent


def setting(line: str, name: str) -> str:
    return re.findall(rf"--{name}=(\S+)", line)[-1]


def test_every_job_has_its_line_with_this_recipe():
    """So the command that prints the tables runs nothing in a fresh clone."""
    lines = read_results(ROOT / "results/study.jsonl")
    for job in study.jobs(3):
        assert lines[job.name]["recipe"] == job.stage.recipe, job.name


def test_a_line_without_a_job_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    for line in ('{"recipe": []}', "[1]"):
        path.write_text('{"job": "a"}\n' + line)
        with pytest.raises(
            ValueError, match=r'a.jsonl: a line has no "job", .*; restore or delete'
        ):
            read_results(path)


def test_jobs_have_unique_names_and_recipes():
    jobs = list(study.jobs(2))
    assert max(Counter(job.name for job in jobs).values()) == 1
    assert len({job.stage.folder for job in jobs}) == len(jobs)


def test_jobs_share_models_up_to_the_first_difference():
    one = judge(1, Row(1), "mini_qa")
    other = judge(1, Row(1), "mini_code")
    seed = judge(2, Row(1), "mini_qa")
    assert one.source.folder != other.source.folder
    assert one.source.source.folder == other.source.source.folder
    assert seed.source.source.folder != one.source.source.folder
    names = [line.split()[0] for line in one.recipe]
    assert names == ["train.py", "ar2diff.py", "train.py", "train.py", "-m"]


def test_equal_flops_counts_two_passes_a_diffusion_step():
    """A AR steps and N diffusion steps of two passes cost as much as N + A / 2 diffusion steps."""
    row = study.ROWS["diffusion, equal FLOPs"]
    steps = int(setting(judge(1, row, "mini_qa").recipe[0], "max_steps"))
    assert 2 * steps == study.AR_STEPS + 2 * study.N


def test_the_quickstart_counts_flops_the_same_way_and_names_configs_that_exist():
    script = (ROOT / "quickstart.sh").read_text()
    names = re.findall(r"^  train \w+ (\w+)", script, flags=re.MULTILINE)
    configs = {name: runpy.run_path(str(ROOT / f"config/{name}.py")) for name in names}
    longer = int(setting(script, "max_steps"))
    ar, n = (configs[name]["max_steps"] for name in ("ar2diff_1_ar", "ar2diff_2_adapt"))
    assert 2 * longer == ar + 2 * n and n == configs["scratch_diffusion"]["max_steps"]


# Running: the commands are recorded, not run

ADD = Stage("add", ("train.py", "--max_steps=1"))
EVAL = Stage("eval", ("-m", "eval.x", "--n=1"), ADD)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the commands. One with --fail fails, an evaluation writes its JSON."""
    found = []

    def call(argv, **_):
        target = Path(argv[-1].split("=")[1] if "--json" in argv[-1] else argv[-2].split("=")[1])
        found.append(target.name.split("-")[0])
        if target.suffix == ".json":
            target.write_text(json.dumps({"right": len(found)}))
        return 3 if "--fail" in argv else 0

    monkeypatch.setattr(study.subprocess, "call", call)
    monkeypatch.setattr(study, "keep_weights", lambda folder: found.append("kept"))
    return found


def run(folder: Path, *jobs: Job, lanes: int = 2) -> dict:
    Runner(folder / "a.jsonl", folder / "out").run(list(jobs), lanes)
    return read_results(folder / "a.jsonl")


def test_a_shared_stage_runs_once_and_every_job_gets_its_line(tmp_path, ran):
    other = Stage("eval", ("-m", "eval.x", "--n=2"), ADD)
    lines = run(tmp_path, Job("a", EVAL), Job("b", other))
    assert sorted(ran[2:]) == ["eval", "eval"] and ran[:2] == ["add", "kept"]
    assert lines["a"]["recipe"] == ["train.py --max_steps=1", "-m eval.x --n=1"]
    assert set(lines) == {"a", "b"} and lines["a"]["right"] > 1


def test_nothing_runs_twice_unless_its_line_or_its_settings_change(tmp_path, ran, capsys):
    run(tmp_path, Job("a", EVAL))
    run(tmp_path, Job("a", EVAL))
    assert ran == ["add", "kept", "eval"]
    changed = Stage("eval", ("-m", "eval.x", "--n=9"), ADD)
    lines = run(tmp_path, Job("a", changed))
    assert ran == ["add", "kept", "eval", "eval"] and lines["a"]["recipe"][-1].endswith("--n=9")
    assert "settings changed since the line was written, run again: a" in capsys.readouterr().out


def test_a_failed_stage_is_tried_once_and_stops_only_what_needs_it(tmp_path, ran):
    bad = Stage("bad", ("train.py", "--fail"))
    jobs = [Job(f"{n}", Stage("eval", ("-m", "eval.x", f"--n={n}"), bad)) for n in range(3)]
    with pytest.raises(ValueError, match=r"3 jobs failed; the first: 0 \(see .*bad-.*log\)"):
        run(tmp_path, *jobs, Job("good", EVAL), lanes=1)
    assert ran == ["bad", "add", "kept", "eval"] and set(read_results(tmp_path / "a.jsonl")) == {
        "good"
    }


@pytest.mark.slow
def test_every_kind_of_job_starts(tmp_path, monkeypatch):
    """All jobs of one mini task for 20 steps, with real commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "TASKS", {"mini_code": study.TASKS["mini_code"]})
    tables.main(["--scale=mini", "--quick"])
    lines = read_results(Path("out/tables/study.jsonl"))
    assert len(lines) == 8 + 5 + 4 and all("pass@1" in line for line in lines.values())
