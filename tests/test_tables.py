"""eval/tables.py: the paper's numbers beside ours, the price of every job, and that every job of every scale starts."""

import importlib
import json
import shutil
from pathlib import Path

import pytest

import ar2diff
import train
from cost import train_flops
from data import mini
from data.loader import write_pairs, write_stream
from data.tokenizer import get_tokenizer
from eval import tables
from eval.plots import plot_study
from model import ModelConfig
from runs import study

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def result(folder: Path, name: str, **metrics) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(metrics))


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_ours_stand_beside_the_papers_and_what_was_not_run_is_empty(tmp_path):
    for seed, bleu in ((1, 30.0), (2, 34.0)):
        result(tmp_path, f"mini_{seed}_mini_translation_ar2diff_n", bleu=bleu)
    result(tmp_path, "mini_1_mini_code_ar2diff_n", **{"pass@1": 0.25})
    found = {row[0]: row[1:] for row in rows(tables.table_2("toy", tmp_path))}
    assert found["AR2Diff_N"] == ["29.41", "68.12", "4.4", "32.0 (30.0 to 34.0)", "", "25.0"]
    assert found["AR2Diff_2N"] == ["29.92", "71.87", "7.7", "", "", ""]


def test_the_cells_of_table_1_and_table_3_are_the_papers():
    """Spot checks against arXiv 2401.17181: span corruption is best on SQuAD; 20 steps solve most of MBPP."""
    one = rows(tables.table_1("toy", Path("nowhere")))
    assert ["decoder_only", "span_corruption", "29.1", "80.6", "11.1", "", "", ""] in one
    assert ["encoder_decoder", "prefix_lm", "27.6", "75.8", "0.0", "", "", ""] in one
    three = rows(tables.table_3("toy", Path("nowhere")))
    assert ["20", "8", "160", "77.72", "16.7", "", "", ""] in three and [
        "10",
        "16",
        "160",
        "77.13",
        "13.3",
        *[""] * 3,
    ] in three


def test_the_picture_shows_the_seeds_by_n_and_by_steps(tmp_path):
    for seed, bleu in ((1, 30.0), (2, 34.0)):
        result(tmp_path, f"mini_{seed}_mini_translation_ar2diff_0", bleu=bleu / 2)
        result(tmp_path, f"mini_{seed}_mini_translation_ar2diff_n", bleu=bleu)
        result(tmp_path, f"mini_{seed}_mini_translation_ar", bleu=50.0)
        result(tmp_path, f"mini_{seed}_mini_translation_table3_20_8", bleu=bleu)
    by_n, by_steps = tables.picture("toy", tmp_path)
    name = "mini translation BLEU"
    assert by_n["series"] == {name: {"0": [0.15, 0.17], "N": [0.3, 0.34]}} and by_n["levels"] == {name: 0.5}
    assert by_steps["series"] == {name: {"20": [0.3, 0.34]}}
    plot_study([by_n, by_steps], tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_a_training_is_priced_by_hand(tmp_path):
    """10 steps of 4 rows, 6 tokens of prefix and 5 of target, two passes.

    Bytes: 16 a parameter, 12 where Muon steps, then float32 numbers. A token of the block: 4 x 16 of the norms, 8 x 16
    that attention and the products beside it keep, and 4 hidden widths of 64; 2 x 16 at the ends. A slot: its
    logits; once, beside them, the output layer's gradient."""
    encode = get_tokenizer("bytes").encode
    write_pairs(tmp_path / "set", {"train": [(encode("abcdef"), encode("wxyz"))]}, "bytes", 5, 11)
    settings = dict(n_layer=1, n_head=2, n_embd=16, batch_size=4, **SCRATCH)
    cost = tables.price(settings, tmp_path / "set", 10)
    m = ModelConfig(n_layer=1, n_head=2, n_embd=16, **SCRATCH)
    assert cost["tokens"] == 10 * 4 * 11
    assert cost["flops"] == 10 * 4 * train_flops(m, 6, 5, unroll_steps=2)
    by_muon = 16 * 48 + 16 * 16 + 16 * 128 + 64 * 16
    numbers = 4 * (11 * (12 * 16 + 4 * 64 + 2 * 16) + 5 * 288) + 288 * 16
    assert cost["bytes"] == 16 * cost["params"] - 4 * by_muon + 4 * numbers


SCRATCH = dict(paradigm="diffusion", prefix_attention="bidirectional", target_attention="bidirectional")


@pytest.mark.parametrize(
    "scale", [pytest.param(s, marks=pytest.mark.slow if s == "paper" else ()) for s in tables.PARTS]
)
def test_the_plan_prices_every_training_of_a_seed(scale, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "prepare", lambda cfg: None)
    tables.main([f"--scale={scale}", "--plan", "--peak_tflops=100"])
    said = capsys.readouterr().out
    parts = [study.plan_of(part, study.SIZES[part], 1, study.StudyConfig()) for part in tables.PARTS[scale]]
    assert said.count("\n| ") - 1 == sum(len(plan.trainings) for plan in parts)  # less the line under the header
    assert "hours a seed" in said


def test_gpt2s_ids_are_those_of_its_tokenizer():
    try:
        tokenizer = get_tokenizer("gpt2")
    except ValueError as error:
        pytest.skip(str(error))
    assert {name: getattr(tokenizer, name) for name in tables.GPT2_IDS} == tables.GPT2_IDS


def test_the_papers_sizes_are_trained_as_long_as_it_says():
    plan = study.plan_of("paper_base", study.SIZES["paper_base"], 1, study.StudyConfig(sources="x"))
    steps = {job.removeprefix("paper_base/1/"): n for job, (_, _, n) in plan.trainings.items()}
    assert (steps["ar"], steps["adapt"], steps["adapt_longer"]) == (1_000_000, 10_000, 100_000)
    assert (steps["wmt14_ar"], steps["squad_ar"], steps["mbpp_ar"]) == (500_000, 250_000, 5_000)
    assert all(settings["batch_size"] == 128 for settings, _, _ in plan.trainings.values())


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--scale=tiny"], "scale must be one of toy, small, paper; got 'tiny'"),
        (["--mfu=2"], "mfu in"),
        (["--seeds=0"], "seeds must be at least 1"),
    ],
)
def test_bad_settings_are_refused(argv, says):
    with pytest.raises(ValueError, match=says):
        tables.main(argv)


def test_the_papers_corpus_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="the paper pretrains on mC4 and The Stack; name a set made by .* with --pretrain"
    ):
        tables.main(["--scale=paper", "--tiny"])


def run_here(job) -> None:
    """The commands of a job without a process each."""
    for argv in job.commands:
        if argv[0] == "-c":
            exec(argv[1], {})  # copies a folder
        elif argv[0] == "-m":
            importlib.import_module(argv[1]).main(argv[2:])
        else:
            {"train.py": train, "ar2diff.py": ar2diff}[argv[0]].main([*argv[1:]])


def losses(job) -> list[float]:
    folder = next(a for a in job.commands[-1] if a.startswith("--out_dir=")).removeprefix("--out_dir=")
    return [json.loads(line)["loss"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def start_every_job(cfg: tables.TablesConfig) -> None:
    """Run every job of one seed, 20 steps each; what starts from nothing must have learned by then."""
    for plan in tables.plans(cfg):
        for job in plan.jobs:
            run_here(job)
            if job.name.endswith(("/ar", "/scratch")) or "/table1" in job.name:
                found = losses(job)
                assert len(found) == 20 and sum(found[-3:]) < sum(found[:3]), job.name
        results = {path.stem for path in Path(study_results(cfg)).glob("*.json")}
        assert all(any(task in name for name in results) for task in plan.size.tasks)


def study_results(cfg: tables.TablesConfig) -> str:
    return tables.study_config(cfg).results


@pytest.mark.slow
def test_every_job_of_the_toy_scale_starts_and_learns_something(tmp_path, monkeypatch):
    """One task of the mini part: the others differ in their data only."""
    monkeypatch.chdir(tmp_path)
    mini.main(["--out=out/data"])
    only = {"mini_code": study.SIZES["mini"].tasks["mini_code"]}
    monkeypatch.setitem(study.SIZES, "mini", study.replace(study.SIZES["mini"], tasks=only, table_3=("mini_code",)))
    monkeypatch.setitem(tables.PARTS, "toy", ["mini"])
    start_every_job(tables.TablesConfig(tiny=True, seeds=1))


@pytest.fixture
def real_data(tmp_path, monkeypatch):
    """Tiny slices of the real sets, in the folder that --sources names; GPT-2's vocabulary is stood in for by bytes."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the real data sets in ../shared/data")
    return slices(tmp_path, monkeypatch)


def slices(folder: Path, monkeypatch) -> Path:
    import gzip

    monkeypatch.chdir(folder)
    made = folder / "sources"
    for name in ("squad", "mbpp", "multi30k", "wmt14"):
        (made / name).mkdir(parents=True)
    squad = json.loads(gzip.open(SHARED / "data/squad/dev-v1.1.json.gz").read())
    squad["data"] = squad["data"][:2]
    for article in squad["data"]:
        article["paragraphs"] = article["paragraphs"][:2]
    for name in ("train-v1.1.json", "dev-v1.1.json.gz"):
        raw = json.dumps(squad if "dev" in name else squad | {"data": squad["data"][:1]}).encode()
        (made / "squad" / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    shutil.copy(SHARED / "data/mbpp/mbpp.jsonl", made / "mbpp/mbpp.jsonl")
    for split in ("train", "val", "test_2016_flickr"):
        for language in ("en", "fr"):
            lines = gzip.open(SHARED / f"data/multi30k/{split}.{language}.gz").read().split(b"\n")[:200]
            (made / "multi30k" / f"{split}.{language}.gz").write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return made


@pytest.mark.slow
@pytest.mark.long  # three minutes
def test_every_job_of_the_small_scale_starts_and_learns_something(real_data, monkeypatch):
    monkeypatch.setattr(tables, "GPT2", ["--tokenizer=bytes"])
    encode = get_tokenizer("bytes").encode
    text = (ROOT / "model.py").read_text()
    write_stream("out/small/data/python_code", {s: [encode(text)] for s in ("train", "valid")}, "bytes", 128, 256)
    body = [(encode(f'def f{i}(x):\n    """Add {i}."""\n'), encode(f"    return x + {i}")) for i in range(40)]
    write_pairs("out/small/data/python_pairs", {"train": body, "valid": body[:8]}, "bytes", 64, 128)
    cfg = tables.TablesConfig(scale="small", tiny=True, seeds=1, sources=str(real_data))
    tables.prepare(cfg)
    monkeypatch.setitem(study.SIZES, "small", study.replace(study.SIZES["small"], network=["--block_size=2048"]))
    start_every_job(cfg)


@pytest.mark.slow
@pytest.mark.long  # three minutes
def test_every_job_of_the_paper_starts_and_learns_something(real_data, monkeypatch):
    """The Base size; Large and XL differ in their numbers only. A set made here stands for WMT14."""
    monkeypatch.setattr(tables, "GPT2", ["--tokenizer=bytes"])
    encode = get_tokenizer("bytes").encode
    text = (ROOT / "model.py").read_text()
    write_stream("corpus", {s: [encode(text)] for s in ("train", "valid")}, "bytes", 128, 256)
    lines = {side: [f"sentence {i} {side}" for i in range(40)] for side in ("en", "fr")}
    pairs = [(encode(a), encode(b)) for a, b in zip(lines["en"], lines["fr"])]
    write_pairs("out/paper/data/wmt14", {"train": pairs, "valid": pairs[:8]}, "bytes", 32, 64)
    for side in lines:
        (real_data / "wmt14" / f"newstest2014.{side}").write_text("\n".join(lines[side]) + "\n")
    monkeypatch.setitem(tables.PARTS, "paper", ["paper_base"])
    cfg = tables.TablesConfig(scale="paper", tiny=True, seeds=1, sources=str(real_data), pretrain="corpus")
    tables.prepare(cfg)
    base = study.replace(study.SIZES["paper_base"], network=["--block_size=2048"])
    monkeypatch.setitem(study.SIZES, "paper_base", base)
    start_every_job(cfg)
