"""runs/: jobs run in order and once, tables say what the JSON says."""

import itertools
import json
import math
import runpy
import shutil
from pathlib import Path

import pytest

from eval.check_results import run_differences
from runs import choices, few_steps, quickstart, recipes, study, tables
from runs.jobs import Job, at_step, copy_once, plain, work

ROOT = Path(__file__).parent.parent
BOTH_WAYS = [(a, b) for a in (False, True) for b in (False, True)]


def note(folder, word: str) -> list[str]:
    """A command that appends a word to folder/said."""
    return ["-c", f"open(r'{folder / 'said'}', 'a').write('{word} ')"]


def test_jobs_run_after_what_they_need(tmp_path):
    jobs = [
        Job("c", [note(tmp_path, "c")], ["b"]),
        Job("b", [note(tmp_path, "b1"), note(tmp_path, "b2")], ["a"]),
        Job("a", [note(tmp_path, "a")]),
    ]
    work(jobs, tmp_path / "logs")
    assert (tmp_path / "said").read_text() == "a b1 b2 c "


def test_a_job_that_is_done_is_not_run_again(tmp_path):
    work(
        [Job("a", [note(tmp_path, "a")], done=lambda: True), Job("b", [note(tmp_path, "b")], ["a"])], tmp_path / "logs"
    )
    assert (tmp_path / "said").read_text() == "b "


def test_a_failure_stops_what_depends_on_it_and_nothing_else(tmp_path):
    jobs = [
        Job("bad", [["-c", "raise SystemExit(3)"], note(tmp_path, "never")]),
        Job("behind", [note(tmp_path, "never")], ["bad"]),
        Job("beside", [note(tmp_path, "beside")]),
    ]
    with pytest.raises(ValueError, match="2 jobs failed or wait for one that did: bad, behind"):
        work(jobs, tmp_path / "logs", lanes=1)
    assert (tmp_path / "said").read_text() == "beside "


def test_a_run_is_copied_once(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    (source / "ckpt.pt").write_text("400")
    work([Job("copy", [copy_once(source, target)])], tmp_path / "logs")
    (target / "ckpt.pt").write_text("700")
    work([Job("copy", [copy_once(source, target)])], tmp_path / "logs")
    assert (source / "ckpt.pt").read_text() == "400" and (target / "ckpt.pt").read_text() == "700"


@pytest.mark.parametrize("log, done", [('{"step": 3}\n', True), ('{"step": 2}\n', False), ('{"step": 2}\n{"st', False)])
def test_a_training_is_done_when_its_log_says_so(tmp_path, log, done):
    (tmp_path / "ckpt.pt").touch()
    (tmp_path / "log.jsonl").write_text(log)
    assert at_step(tmp_path, 3) == done


def jobs_of(part: str, seed: int = 1, **settings) -> list[Job]:
    return study.plan_of(part, study.SIZES[part], seed, study.StudyConfig(**settings)).jobs


def results_of(jobs: list[Job]) -> set[str]:
    commands = [argv for job in jobs for argv in job.commands]
    return {arg.removeprefix("--json=") for argv in commands for arg in argv if arg.startswith("--json=")}


def test_every_row_of_the_study_has_its_place_in_the_tables():
    rows = {f"mini_1_{task}_{tables.plain(row)}" for task in tables.TASKS for row in tables.ROWS}
    grid = {f"table1_{arch}_{objective}" for arch in study.ARCHITECTURES for objective in study.OBJECTIVES}
    grid |= {f"table3_{steps}_{samples}" for steps, samples in study.STEPS_AND_SAMPLES}
    rows |= {f"mini_1_{task}_{name}" for task in tables.TASKS for name in grid}
    assert results_of(jobs_of("mini")) == {f"results/study/{row}.json" for row in rows}


def test_every_job_of_the_study_comes_after_what_it_needs_and_has_its_own_folder():
    jobs = [job for part in study.SIZES for seed in (1, 2) for job in jobs_of(part, seed)]
    cfg = study.StudyConfig()
    jobs += study.jobs_tried("mini", list(study.TRIED), 1, cfg) + study.jobs_tried("python", study.READOUTS, 1, cfg)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert all(name in names for job in jobs for name in job.after)
    folders = [
        a for job in jobs for argv in job.commands if argv[0] == "train.py" for a in argv if a[:10] == "--out_dir="
    ]
    assert len(set(folders)) == len(folders)


def test_only_what_a_missing_result_needs_is_run(tmp_path, monkeypatch):
    """In a clone that has all results but one: its evaluation, its fine-tuning, its pretraining."""
    jobs, ran = jobs_of("python", results=str(tmp_path)), []
    for name in results_of(jobs):
        if "diffusion__n_steps" not in name:
            (tmp_path / name).touch()
    monkeypatch.setattr(study, "work", lambda jobs, *_: ran.extend(job.name for job in jobs))
    study.run_jobs(jobs, study.StudyConfig())
    tuned = "python/1/python_pairs_diffusion__n_steps"
    assert ran == ["python/1/scratch", tuned, f"{tuned}_eval"]


@pytest.mark.parametrize("part", ["small", "paper_base", "min"])
def test_the_study_refuses_a_part_whose_sets_it_would_build_wrongly(part):
    """Bytes of the standard library stood in for GPT-2 tokens of all packages, and no line said so."""
    with pytest.raises(ValueError, match=f"part must be one of all, mini, python, tried; got '{part}'"):
        study.main([f"--part={part}"])


def test_few_steps_trains_only_what_the_study_lacks_and_counts_what_it_saves(tmp_path):
    """Every evaluation has its model; the interval pools the seeds: 9 and 10 right of 10 are 19 of 20."""
    cfg = few_steps.FewStepsConfig(results=str(tmp_path))
    jobs = [job for seed in (1, 2, 3) for job in few_steps.jobs_of(seed, cfg)]
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) and all(name in names for job in jobs for name in job.after)
    ways, exits = len(few_steps.OURS) + len(few_steps.WAYS), len(few_steps.EXITS) * len(few_steps.EXIT_TASKS)
    assert len(results_of(jobs)) == ways * len(few_steps.STEPS) * 3 + exits * 3
    for seed, right, calls in ((1, 0.9, 5.0), (2, 1.0, 3.0)):
        for label, spent in ((few_steps.FIXED, 50.0), (list(few_steps.EXITS)[2], calls)):
            result = {"exact_match": right, "n": 10, "calls_per_sample": spent}
            (tmp_path / f"mini_{seed}_mini_qa_exit_{plain(label)}.json").write_text(json.dumps(result))
    row = few_steps.exit_table(tmp_path).splitlines()[4]
    assert [cell.strip() for cell in row.split("|")[4:6]] == ["95.0 (76.4 to 99.1)", "4.00 (12.5x)"]


def test_every_choice_is_a_row_that_some_job_measures(tmp_path):
    """And its cells are the mean and the range of what is there, with what that is out of."""
    jobs = jobs_of("mini") + few_steps.jobs_of(1, few_steps.FewStepsConfig())
    measured = results_of(jobs)
    for choice, (_, folder, row) in choices.CHOICES.items():
        assert f"results/{folder}/mini_1_mini_translation_{plain(row)}.json" in measured, choice
    (tmp_path / "study").mkdir()
    for seed, right in ((1, 0.5), (2, 0.75), (3, 1.0)):
        result = {"exact_match": right, "n": 8, "calls_per_sample": 9.0 + seed}
        (tmp_path / f"study/mini_{seed}_mini_translation_ar2diff_0.json").write_text(json.dumps(result))
    lines = [[c.strip() for c in line.split("|")] for line in choices.choices_table(tmp_path).splitlines()]
    row = next(cells for cells in lines if cells[1:2] == ["N = 0"])
    assert row[3:8] == ["11.0", "75.0 (50.0 to 100.0)", "-", "-", "3 x 8, -, -"]
    assert len(lines) == 2 + len(choices.CHOICES)


def test_the_recipes_are_eight_cells_that_exist_and_every_factor_is_balanced_in_every_other():
    cells = recipes.CELLS
    assert len(set(cells)) == 8 and not any(cell.joint and cell.ar_loss for cell in cells)
    for one, other in itertools.combinations(("shift", "annealed"), 2):
        assert all(sum((getattr(c, one), getattr(c, other)) == pair for c in cells) == 2 for pair in BOTH_WAYS)
    for extra in ("joint", "ar_loss"):
        for factor in ("shift", "annealed"):
            assert sorted(getattr(c, factor) for c in cells if getattr(c, extra)) == [False, True]
    for name, (among, has, has_not) in recipes.EFFECTS.items():
        with_it, without = ([cell for cell in among if side(cell)] for side in (has, has_not))
        assert len(with_it) == len(without) == (2 if "joint" in name or "AR" in name else 4)
        for factor in {"shift", "annealed"} - {name.split()[0].replace("annealing", "annealed")}:
            assert sum(getattr(c, factor) for c in with_it) == sum(getattr(c, factor) for c in without)


def test_main_effects_are_found_where_effects_add_up():
    """Shift +30, annealing +4, joint -6, AR loss -1 on a base of 50: each is read off exactly."""
    worth = dict(shift=30, annealed=4, joint=-6, ar_loss=-1)
    cells = {c: 50 + sum(worth[name] * value for name, value in c._asdict().items()) for c in recipes.CELLS}
    assert [recipes.effect(cells, name) for name in recipes.EFFECTS] == [30, 4, -6, -1]


def test_an_interval_over_seeds_is_students():
    """1, 2, 3: standard deviation 1, two degrees of freedom, 4.303 / sqrt(3) to either side."""
    assert recipes.student([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 2.4843, 2 + 2.4843), abs=1e-4)
    assert recipes.student([5.0]) == (5.0, -math.inf, math.inf)


def recipe_jobs(seed: int = 1) -> list[Job]:
    return [job for part in recipes.TASKS for job in recipes.jobs_of(part, seed, recipes.RecipesConfig())]


def test_every_recipe_has_its_models_its_results_and_its_row(tmp_path):
    jobs = [job for seed in (1, 2) for job in recipe_jobs(seed)]
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) and all(name in names for job in jobs for name in job.after)
    folders = [a for job in jobs for argv in job.commands for a in argv if a.startswith("--out_dir=")]
    assert len(set(folders)) == len(folders)
    rows = [plain(cell.name) for cell in recipes.CELLS] + [plain(f"form_{label}") for label in recipes.FORMS]
    wanted = {f"{part}_{seed}_{task}_{row}" for part, task in recipes.TASKS.items() for seed in (1, 2) for row in rows}
    wanted |= {
        f"mini_{seed}_mini_translation_{plain(cell.name)}_left_to_right"
        for seed in (1, 2)
        for cell in recipes.CELLS
        if not cell.joint
    }
    assert results_of(jobs) == {f"results/recipes/{name}.json" for name in wanted}


def test_recipes_train_as_their_names_say_within_one_budget():
    """FLOPs: three passes of two thirds of the steps are two passes of all, to the rounding of the steps."""
    by_name = {job.name: job for job in recipe_jobs()}
    for cell in recipes.CELLS:
        convert, adapt, tune = (
            by_name[f"mini/1/recipe_{plain(cell.name)}_{stage}"].commands[0]
            for stage in ("start", "adapt", "mini_translation")
        )
        assert f"--shift={str(cell.shift).lower()}" in convert
        assert f"--prefix_attention={'joint' if cell.joint else 'causal'}" in convert
        assert any(a.startswith("--anneal_steps=") for a in adapt) == cell.annealed
        for argv, steps in ((adapt, 200), (tune, 200)):
            assert ("--ar_weight=1.0" in argv) == cell.ar_loss
            taken = int(next(a for a in argv if a.startswith("--max_steps=")).split("=")[1])
            assert taken * (3 if cell.ar_loss else 2) == pytest.approx(2 * steps, abs=2)
    for label in ("band", "blocks"):
        flags = by_name[f"mini/1/recipe_form_{label}_adapt"].commands[0]
        assert f"--anneal_form={label}" in flags and "--anneal_steps=100" in flags


def test_the_tables_of_recipes_say_mean_and_interval_over_seeds(tmp_path):
    for seed, right in ((1, 0.90), (2, 0.92), (3, 0.94)):
        for cell in recipes.CELLS:
            found = {"exact_match": right if cell.shift else right - 0.5}
            (tmp_path / f"mini_{seed}_mini_translation_{plain(cell.name)}.json").write_text(json.dumps(found))
        for name, value in (("ar2diff_n", right), ("form_band", right - 0.1 * seed)):
            (tmp_path / f"mini_{seed}_mini_translation_{name}.json").write_text(json.dumps({"exact_match": value}))
    cells = [[c.strip() for c in line.split("|")] for line in recipes.cells_table(tmp_path, tmp_path).splitlines()]
    row = next(cells for cells in cells if cells[1:2] == ["shift, annealed, joint"])
    assert row[2] == "92.0 (90.0 to 94.0)" and row[3] == "-" and row[-2] == "3/0"
    lines = [[c.strip() for c in line.split("|")] for line in recipes.effects_table(tmp_path, tmp_path).splitlines()]
    assert next(line for line in lines if line[1:2] == ["shift"])[2] == "+50.0 (+50.0 to +50.0) *"
    assert next(line for line in lines if line[1].startswith("joint"))[2].startswith("+0.00 (")
    band = next(line for line in lines if line[1].startswith("opened by edges (against band)"))
    assert band[2] == "+20.0 (-4.8 to +44.8)"  # 10, 20, 30: 20 -+ 4.303 * 10 / sqrt(3)
    blocks = next(line for line in lines if line[1].startswith("opened by edges (against blocks)"))
    assert blocks[2] == "-"


def test_equal_flops_counts_two_passes_a_diffusion_step():
    """A AR steps and N diffusion steps of two passes cost as much as N + A / 2 diffusion steps."""
    size = study.SIZES["mini"]
    argv = next(job for job in jobs_of("mini") if job.name.endswith("scratch_longer")).commands[1]
    steps = next(int(a.split("=")[1]) for a in argv if a.startswith("--max_steps="))
    assert 2 * steps == size.A + 2 * size.N
    assert 2 * quickstart.SCRATCH_EQUAL == size.A + 2 * quickstart.SCRATCH_N
    settings = {name: runpy.run_path(f"config/{name}.py")["max_steps"] for name in ("ar2diff_1_ar", "ar2diff_2_adapt")}
    assert settings == {"ar2diff_1_ar": size.A, "ar2diff_2_adapt": quickstart.SCRATCH_N}


@pytest.mark.slow
def test_two_quickstarts_are_the_same_but_for_their_times(tmp_path, monkeypatch):
    """Act 1 as it is, but of few steps and items: once with two trainings at a time, once with one."""
    left_out = shutil.ignore_patterns("out", ".*", "__pycache__", "*.png", "results", "tests")
    measure, pages = quickstart.exact_match.main, []

    def short(jobs, logs, lanes, show):
        more = ["--batch_size=8", "--eval_batches=1", "--device=cpu"]
        for job in jobs:
            for argv in job.commands:
                if argv[0] == "train.py":
                    argv += [*more, f"--max_steps={9 if job.name.endswith('longer') else 6}"]
        work(jobs, logs, lanes)

    monkeypatch.setattr(quickstart, "work", short)
    monkeypatch.setattr(quickstart.exact_match, "main", lambda argv: measure([*argv, "--n=8", "--device=cpu"]))
    for lanes in (2, 1):
        folder = shutil.copytree(ROOT, tmp_path / f"{lanes}", ignore=left_out)
        monkeypatch.chdir(folder)
        quickstart.main(["--acts=1", f"--lanes={lanes}"])
        pages.append(folder / "out/quickstart.md")
    assert pages[0].read_text().count("\n|") == 7 and "ms a sample" in pages[0].read_text()
    assert run_differences(*pages) == []
    said = [json.loads((page.parent / "quality.json").read_text()) for page in pages]
    assert all(row.pop("seconds_per_sample") > 0 for page in said for row in page["rows"])
    assert said[0] == said[1] and len(said[0]["series"]) == 3


def test_the_mini_table_says_mean_and_range_over_seeds(tmp_path):
    for seed, share in ((1, 0.90), (2, 0.94), (3, 0.95)):
        result = {"exact_match": share, "calls_per_sample": 10.0, "seconds_per_sample": 0.02}
        (tmp_path / f"mini_{seed}_mini_translation_ar2diff_n.json").write_text(json.dumps(result))
    row = next(line for line in tables.mini_table(tmp_path).splitlines() if line.startswith("| AR2Diff_N  "))
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        *("AR2Diff_N", "93.0 (90.0 to 95.0)", "-", "-", "-", "-", "10.0", "20.0", "3/0/0"),
    ]


def test_tables_are_written_behind_their_markers_and_nowhere_else(tmp_path):
    (tmp_path / "study").mkdir()
    result = {
        "exact_match": 0.5,
        "n": 500,
        "calls_per_sample": 10.0,
        "seconds_per_sample": 0.02,
        "hardware": "h",
        "torch": "2",
        "python": "3",
        "commit": "c",
    }
    (tmp_path / "study/mini_1_mini_translation_ar2diff_n.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table: tried -->\nold\n<!-- end -->\nafter\n")
    tables.write_into(page, tmp_path)
    once = page.read_text()
    assert once.startswith("before\n<!-- table: tried -->\n") and once.endswith("<!-- end -->\nafter\n")
    assert "| ours" in once and "50.0" in once and "old" not in once
    tables.write_into(page, tmp_path)
    assert page.read_text() == once
