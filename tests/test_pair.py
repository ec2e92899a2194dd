"""runs/pair.py: its jobs are commands that exist, and what is kept is the model in half of the bytes."""

import importlib
import io
import json
from pathlib import Path

import pytest
import torch

import checkpoint
import sample
from configurator import read_settings
from data.python_code import parses
from data.tokenizer import get_tokenizer
from model import ModelConfig, Transformer
from runs import pair

SETTINGS = {"train.py": "TrainConfig", "ar2diff.py": "ConvertConfig"}
SETTINGS |= {"data.bpe": "BpeConfig", "data.python_code": "PythonCodeConfig"}


def test_every_command_has_settings_that_exist_and_waits_for_what_it_reads():
    done = {""}
    for job in pair.jobs(pair.PairConfig()):
        assert set(job.after) <= done
        done.add(job.name)
        for command in job.commands:
            program, argv = (command[1], command[2:]) if command[0] == "-m" else (command[0], command[1:])
            module = importlib.import_module(program.removesuffix(".py"))
            given, _ = read_settings(getattr(module, SETTINGS[program]), argv)
            folder = Path(str(given.get("init_from", ""))).parent.name
            assert not folder or folder in job.after, f"{job.name} reads {folder} and does not wait for it"


def test_every_training_is_as_long_as_its_share():
    steps = [read_settings_of(job) for job in pair.jobs(pair.PairConfig(scale=0.1)) if job.commands[0][0] == "train.py"]
    assert steps == [pair.A // 10, pair.N // 10, pair.F // 10, pair.F // 10]


def test_more_steps_are_not_spent_on_bodies():
    longer = [read_settings_of(job) for job in pair.jobs(pair.PairConfig(scale=5)) if job.commands[0][0] == "train.py"]
    assert longer == [5 * pair.A, 5 * pair.N, pair.F, pair.F]


def read_settings_of(job) -> int:
    return int(next(flag for flag in job.commands[0] if flag.startswith("--max_steps=")).split("=")[1])


def test_what_is_kept_is_the_model_in_bfloat16_without_its_optimizer(tmp_path):
    tokenizer = get_tokenizer("bytes")
    special = {name: getattr(tokenizer, name) for name in ("vocab_size", "n_ordinary", "pad_id", "sep_id", "mask_id")}
    model = Transformer(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, target_length=8, **special))
    checkpoint.save(tmp_path / "ckpt.pt", model, 7, "bytes", optimizer=[{"state": torch.ones(10_000)}])
    pair.keep(tmp_path / "ckpt.pt", tmp_path / "kept.pt")
    kept, _, state = checkpoint.load_model(tmp_path / "kept.pt")
    assert state["step"] == 7 and "optimizer" not in state
    assert all(tensor.dtype is torch.bfloat16 for tensor in state["model"].values())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(kept.state_dict()[name], tensor, rtol=2**-8, atol=0)


@pytest.mark.long
@pytest.mark.slow  # two minutes: everything, of a few steps each, on the code of eval/
def test_all_of_it_runs_and_is_not_done_again(tmp_path, capsys):
    flags = ["--source=eval", "--scale=0.01", "--n=4", "--device=cpu"]
    flags += [f"--{name}={tmp_path / name}" for name in ("out", "kept", "results")]
    pair.main(flags)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"ar.pt", "diffusion.pt", "tokenizer.json"}
    assert {path.stem for path in (tmp_path / "results").iterdir()} == set(pair.READOUTS)
    before = (tmp_path / "out" / "bodies" / "ckpt.pt").stat().st_mtime_ns
    pair.main(flags)
    assert (tmp_path / "out" / "bodies" / "ckpt.pt").stat().st_mtime_ns == before


# What is kept in pair/


KEPT = Path(pair.__file__).parent.parent / "pair"


def test_what_is_kept_is_small_and_what_was_judged():
    assert sum(path.stat().st_size for path in KEPT.iterdir()) < 15e6
    results = [json.loads(path.read_text()) for path in (KEPT.parent / "results" / "pair").glob("*.json")]
    assert {result["paradigm"] for result in results} == {"ar", "diffusion"}
    for result in results:
        state = checkpoint.load(KEPT / Path(result["settings"]["init_from"]).name)
        assert result["trained"]["fingerprint"] == state["fingerprint"] and result["trained"]["step"] == state["step"]
        assert result["generated"]["n"] == 200


def test_sampling_without_a_checkpoint_shows_the_pair_with_an_example(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    sample.main(["--steps=10", "--candidates=1", "--device=cpu"])
    out, err = capsys.readouterr()
    assert parses(sample.EXAMPLE, out.rstrip("\n")), "this is the first that a newcomer sees"
    assert sample.EXAMPLE in err and "10 network calls" in err


def test_the_page_of_the_pair_has_both_models(tmp_path, capsys):
    page = tmp_path / "page.html"
    sample.main([f"--html={page}", f"--prompt={sample.EXAMPLE}", "--steps=3", "--candidates=1", "--device=cpu"])
    assert str(KEPT) not in page.read_text() and "pair/diffusion.pt" in page.read_text()
    assert page.read_text().count("autoregressive, left to right") == 1 and "diffusion, resample" in page.read_text()
