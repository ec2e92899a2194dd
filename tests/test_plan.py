"""plan.py: what it says is what a run takes, and what cannot fit is refused with what to lower."""

import random
from pathlib import Path

import pytest
import torch
from memory import peak_bytes

import plan as plan_file
import train
from configurator import run as as_command
from cost import num_params
from data.loader import open_set, write_pairs
from distributed import World
from encdec import build_model
from model import ModelConfig, model_settings
from plan import free_memory, plan, size, span
from train import asked, main, settle

FLAGS = ["--device=cpu", "--n_layer=3", "--n_head=4", "--n_embd=64", "--batch_size=8", "--max_steps=3"]
FLAGS += ["--log_interval=1", "--eval_interval=3", "--eval_batches=1", "--save_interval=3", "--sample_interval=0"]
DIFFUSION = ["--paradigm=diffusion", "--prefix_attention=bidirectional", "--target_attention=bidirectional"]
CASES = {
    "ar, adamw": ["--optimizer=adamw"],
    "diffusion, muon": [*DIFFUSION, "--self_conditioning"],
    "annealed": [*DIFFUSION, "--anneal_steps=3", "--anneal_form=band"],
    "micro-batches": [*DIFFUSION, "--grad_accum_steps=4"],
    "checkpointing": [*DIFFUSION, "--gradient_checkpointing"],
}


@pytest.fixture(autouse=True)
def no_speed_test(monkeypatch):
    for module in (train, plan_file):
        monkeypatch.setattr(module, "measured_flops", lambda *_: 1e12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs of 40 to 60 letters each."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("sets") / "letters"
    texts = [[97 + rng.randrange(26) for _ in range(40 + i % 21)] for i in range(60)]
    pairs = [(text, text) for text in texts]
    write_pairs(path, {"train": pairs[10:], "valid": pairs[:10]}, "bytes", 64, 124)
    return path


def settings(folder, tmp_path, *flags: str) -> list[str]:
    return [*FLAGS, f"--data={folder}", f"--out_dir={tmp_path / 'run'}", *flags]


def settled(argv: list[str]):
    """The settings of the run that argv asks for."""
    given, resume = asked(argv)
    return settle(given, resume, Path(given["out_dir"]), World(torch.device("cpu")))[0]


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if "micro" in c else ()) for c in CASES])
def test_the_peak_is_that_of_the_run(case, folder, tmp_path):
    """Of the whole command, model, optimizer and held-out loss included, within a fifth."""
    argv = settings(folder, tmp_path, *CASES[case])
    cfg = settled(argv)
    said = sum(plan(cfg, open_set(folder, "train", cfg))["memory"].values())
    assert said == pytest.approx(peak_bytes(lambda: main(argv)), rel=0.2)


def test_parameters_are_those_of_the_model(folder, tmp_path):
    cfg = settled(settings(folder, tmp_path, *DIFFUSION, "--self_conditioning", "--n_kv_head=2"))
    found = plan(cfg, open_set(folder, "train", cfg))
    assert found["params"] == num_params(build_model(ModelConfig(**model_settings(vars(cfg)))))


def test_flops_are_those_that_the_log_counts(folder, tmp_path):
    """mfu times seconds times the device's rate, of the steps of a run; the plan reads the same batches."""
    argv = settings(folder, tmp_path, *DIFFUSION)
    said = main([*argv, "--plan"])
    seen = []
    count = train.train_flops
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_flops", lambda *given: seen.append(count(*given)) or seen[-1])
        main(argv)
    assert said["flops"] == 8 * sum(seen)
    assert said["seconds"][0] == said["flops"] / 1e12


def test_a_plan_writes_nothing_and_reads_no_weights(folder, tmp_path, monkeypatch, capsys):
    main(settings(folder, tmp_path))
    checkpoint = tmp_path / "run" / "ckpt.pt"
    before, devices, load = checkpoint.stat().st_mtime_ns, [], train.load
    monkeypatch.setattr(train, "load", lambda path, device="cpu": devices.append(device) or load(path, device))
    monkeypatch.setattr(train, "build_model", None)
    capsys.readouterr()
    main([*FLAGS, f"--data={folder}", f"--init_from={checkpoint}", f"--out_dir={tmp_path / 'next'}", "--plan"])
    said = capsys.readouterr().out
    assert devices == ["meta"] and not (tmp_path / "next").exists() and checkpoint.stat().st_mtime_ns == before
    assert [line.split()[0] for line in said.splitlines()] == "plan parameters memory free FLOPs time".split()
    main([*settings(folder, tmp_path, "--max_steps=9"), "--init_from=resume", "--plan"])  # of a run that goes on
    assert devices[-1] == "meta"


def test_what_cannot_fit_is_refused_with_what_fits(folder, tmp_path, monkeypatch, capsys):
    """The flags that it names do fit, by its own count; exit status 2, one line on stderr."""
    argv = settings(folder, tmp_path, *DIFFUSION, "--plan")
    cfg = settled(argv)
    peak = sum(plan(cfg, open_set(folder, "train", cfg))["memory"].values())
    monkeypatch.setattr(plan_file, "free_memory", lambda _: int(0.6 * peak))
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        as_command(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert "free; --grad_accum_steps=2 needs" in said
    main([*argv, "--grad_accum_steps=2"])


@pytest.mark.parametrize(
    "share, flags, said",
    [
        (0.2, ["--batch_size=1"], "--gradient_checkpointing needs"),
        (
            0.01,
            [],
            "no micro-batch is small enough: weights, gradients and optimizer take .* lower --n_layer or --n_embd",
        ),
    ],
)
def test_what_is_lowered_depends_on_what_is_large(share, flags, said, folder, tmp_path, monkeypatch):
    argv = settings(folder, tmp_path, "--n_layer=12", "--plan", *flags)
    cfg = settled(argv)
    found = plan(cfg, open_set(folder, "train", cfg))["memory"]
    fixed = sum(found[name] for name in ("weights", "gradients", "optimizer"))
    free = fixed + 0.5 * (sum(found.values()) - fixed) if flags else share * fixed
    monkeypatch.setattr(plan_file, "free_memory", lambda _: int(free))
    with pytest.raises(ValueError, match=said):
        main(argv)


def test_free_memory_is_not_more_than_there_is():
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


def test_numbers_are_said_with_their_units():
    assert [size(n) for n in (12, 1536, 3 * 2**20, 5 * 2**40)] == ["12 B", "1.50 KiB", "3.00 MiB", "5,120.00 GiB"]
    assert [span(s) for s in (3, 90, 5400, 4 * 86400)] == ["3 s", "1.5 min", "1.5 h", "4.0 days"]
