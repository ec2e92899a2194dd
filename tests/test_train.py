"""train.py: a run is a function of its settings. Interruptions, micro-batches and evaluation change nothing."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import autoregressive
import diffusion
import train
from checkpoint import load
from cost import train_flops
from data.loader import open_set, write_pairs
from device import measured_flops, pick_device
from eval.faults import same
from model import ModelConfig, Transformer
from train import TrainConfig, main

ROOT = Path(__file__).parent.parent
TINY = ["--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=4", "--max_steps=6"]
TINY += ["--learning_rate=0.01", "--warmup_steps=2", "--log_interval=1"]
TINY += ["--eval_interval=100", "--eval_batches=1", "--save_interval=100"]
DIFFUSION = ["--paradigm=diffusion", "--prefix_attention=joint", "--target_attention=bidirectional"]
CASES = {
    "ar": [],
    "ar_adamw": ["--optimizer=adamw"],
    "ar_dropout": ["--dropout=0.2"],
    "diffusion": DIFFUSION,
    "modern": DIFFUSION + ["--self_conditioning", "--shift", "--lookahead", "--self_conditioning_prob=0.5"],
    "diffusion_dropout": DIFFUSION + ["--dropout=0.2", "--noise=mask"],
    "annealed": DIFFUSION + ["--anneal_steps=5", "--unroll_temperature=1.0"],
    "band": DIFFUSION + ["--prefix_attention=bidirectional", "--anneal_steps=5", "--anneal_form=band"],
    "both": DIFFUSION + ["--prefix_attention=causal", "--anneal_steps=3", "--ar_weight=0.5"],
}
PASSING = {"tokens_per_s", "mfu", "seconds"}  # what a log line says of the machine and not of the run


def make_set(folder: Path, n: int = 60, target_length: int = 6, longest: int = 5) -> Path:
    """Copy: 1 to 5 letters out of four, so that a few steps teach something."""
    rng = random.Random(0)
    texts = [[97 + rng.randrange(4) for _ in range(1 + i % longest)] for i in range(n)]
    pairs = [(text, text) for text in texts]
    block_size = longest + target_length
    write_pairs(folder, {"train": pairs[10:], "valid": pairs[:10]}, "bytes", target_length, block_size)
    return folder


@pytest.fixture(autouse=True)
def no_speed_test(monkeypatch):
    monkeypatch.setattr(train, "measured_flops", lambda *_: 1e12)


@pytest.fixture(scope="module")
def copy_set(tmp_path_factory) -> Path:
    return make_set(tmp_path_factory.mktemp("sets") / "copy")


@pytest.fixture
def run(copy_set, tmp_path):
    """run(*flags, out="a") trains in tmp_path/a and returns its checkpoint and its log."""

    def run(*flags: str, out: str = "a"):
        main([*TINY, f"--data={copy_set}", f"--out_dir={tmp_path / out}", *flags])
        return load(tmp_path / out / "ckpt.pt"), read_log(tmp_path / out)

    return run


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def lasting(log: list[dict]) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in PASSING} for entry in log]


def furthest(a: dict, b: dict) -> float:
    return max((a["model"][name] - b["model"][name]).abs().max().item() for name in a["model"])


def at_step(monkeypatch, module, step: int, action):
    """Call action() when the loss of that step is asked for."""
    losses = module.losses

    def watched(model, batch, cfg, draws, *rest, **named):
        if draws.step == step and model.training:
            action()
        yield from losses(model, batch, cfg, draws, *rest, **named)

    monkeypatch.setattr(module, "losses", watched)


class Killed(Exception):
    pass


def killed():
    raise Killed


# One run, however it is cut


@pytest.mark.parametrize("case", CASES)
def test_three_steps_and_three_more_equal_six(case, run, monkeypatch, tmp_path):
    """Weights, optimizer, held-out loss and log, to the last bit. The first half is killed in its fourth step."""
    flags = [*CASES[case], "--save_interval=3", "--eval_interval=2"]
    whole, whole_log = run(*flags, out="whole")
    module = autoregressive if case.startswith("ar") else diffusion
    with monkeypatch.context() as patch:
        at_step(patch, module, 4, killed)
        with pytest.raises(Killed):
            run(*flags, out="parts")
    assert load(tmp_path / "parts" / "ckpt.pt")["step"] == 3 and len(read_log(tmp_path / "parts")) == 4
    parts, parts_log = run(*flags, "--init_from=resume", out="parts")
    for name in ("model", "optimizer", "best_loss", "step"):
        assert same(whole[name], parts[name]), name
    assert lasting(whole_log) == lasting(parts_log)
    assert [entry["step"] for entry in parts_log] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("case", ["ar_adamw", "diffusion", "modern", "annealed", "band", "both"])
def test_micro_batches_change_nothing_but_the_memory(case, run):
    """To float tolerance, losses and weights. With annealing too: micro-batches of other widths see the same edges."""
    flags = [*CASES[case], "--optimizer=adamw"]
    one, one_log = run(*flags, out="one")
    four, four_log = run(*flags, "--grad_accum_steps=4", out="four")
    assert furthest(one, four) < 1e-4
    assert [e["loss"] for e in four_log] == pytest.approx([e["loss"] for e in one_log], abs=1e-5)
    assert [e["grad_norm"] for e in four_log] == pytest.approx([e["grad_norm"] for e in one_log], rel=1e-3)


@pytest.mark.parametrize("case", ["ar_dropout", "modern"])
def test_looking_at_a_run_does_not_change_it(case, run):
    """Held-out loss, samples, checkpoints and log lines at every step, or at none."""
    often = ["--eval_interval=1", "--sample_interval=1", "--save_interval=1"]
    one, _ = run(*CASES[case], *often, out="often")
    two, _ = run(*CASES[case], "--log_interval=100", out="never")
    assert same(one["model"], two["model"]) and same(one["optimizer"], two["optimizer"])


def test_another_seed_is_another_run(run):
    assert furthest(run(out="a")[0], run("--seed=2", out="b")[0]) > 1e-3


# Golden values of 20 steps, measured when this test was written. A change here is a change of every published number.
GOLDEN = {"ar": 2.6109, "modern": 6.3405}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_loss_after_20_seeded_steps_is_the_one_on_record(case, run):
    _, log = run(*CASES[case], "--max_steps=20", "--optimizer=adamw")  # muon multiplies in bfloat16
    assert log[-1]["loss"] == pytest.approx(GOLDEN[case], abs=1e-3)


@pytest.mark.parametrize("case", ["ar", "ar_adamw", pytest.param("diffusion", marks=pytest.mark.slow), "modern"])
def test_the_loss_falls(case, run):
    _, log = run(*CASES[case], "--max_steps=80", "--batch_size=16")
    passes = 1 if case.startswith("ar") else 2
    assert log[0]["loss"] > 5.0 * passes and log[-1]["loss"] < 1.6 * passes
    assert log[-1]["val_loss"] < 1.6


def test_bfloat16_computes_about_the_same(run):
    plain, half = run(out="a")[1], run("--dtype=bfloat16", out="b")[1]
    assert half[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.01)
    assert half[0]["loss"] != plain[0]["loss"]


# The log and the checkpoints


def test_a_log_line_says_what_a_plot_needs(run, capsys):
    _, log = run(*DIFFUSION, "--eval_interval=3", "--log_interval=2", "--sample_interval=3")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "grad_norm", "lr"} <= entry.keys() for entry in log)
    assert [entry["step"] for entry in log if "tokens_per_s" in entry] == [2, 4, 6]
    evaluated = [entry for entry in log if "val_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [3, 6]
    by_rate = evaluated[0]["val_loss_by_rate"]
    assert list(by_rate) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert evaluated[0]["val_loss"] == pytest.approx(sum(by_rate.values()) / 5)
    said = capsys.readouterr().out
    assert "step 3 sample: " in said and "parameters" in said and "done: " in said


def test_the_log_has_each_pass_the_flops_of_a_step_and_the_sample(run, capsys):
    """Passes add up to the loss, also over micro-batches; FLOPs are those of cost.py, and no step counts another's."""
    state, log = run(*CASES["both"], "--max_steps=3", "--batch_size=16", "--grad_accum_steps=2", "--sample_interval=3")
    for entry in log:
        assert len(entry["passes"]) == 3 and sum(entry["passes"]) == pytest.approx(entry["loss"], rel=1e-6)
        assert entry["passes"][2] == pytest.approx(entry["ar_loss"] * state["train_config"]["ar_weight"])
    m, accounted = ModelConfig(**state["model_config"]), state["train_config"]
    lengths = (train_flops(m, P, m.target_length, 2, accounted["ar_weight"]) for P in (0, m.block_size))
    low, high = (16 * flops for flops in lengths)
    assert all(low <= entry["flops"] <= high for entry in log)
    assert "sample" not in log[0] and log[2]["sample"].startswith("step 3 sample: ")
    assert log[2]["sample"] in capsys.readouterr().out
    _, ar = run(*CASES["ar"], "--max_steps=1", out="ar")
    assert "passes" not in ar[0] and ar[0]["flops"] > 0


@pytest.mark.slow  # trains twice, 5 s
def test_a_kept_ar_loss_is_logged_beside_unweighted_and_falls(run, capsys):
    flags = [*CASES["both"], "--eval_interval=40", "--max_steps=80", "--batch_size=16"]
    _, log = run(*flags)
    assert log[0]["ar_loss"] == pytest.approx(math.log(288), rel=0.1) and log[-1]["ar_loss"] < 1.8
    assert log[0]["loss"] == pytest.approx(2.5 * math.log(288), rel=0.1)  # L(1) + L(2) + half the AR loss
    assert log[-1]["val_ar_loss"] < 1.8 and list(log[-1]["val_loss_by_rate"]) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert f"| AR {log[-1]['val_ar_loss']:.4f}" in capsys.readouterr().out
    _, without = run(*flags, "--ar_weight=0", out="without")
    assert "ar_loss" not in without[0] and "val_ar_loss" not in without[-1]


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(paradigm="diffusion", target_attention="bidirectional", prefix_attention="joint"),
        dict(paradigm="diffusion", target_attention="bidirectional", shift=True, lookahead=True),
    ],
    ids=["ar", "joint", "lookahead"],
)
def test_an_ar_loss_is_kept_only_where_it_can_be(settings):
    with pytest.raises(ValueError, match="ar_weight keeps the AR loss in a diffusion model that"):
        TrainConfig(ar_weight=1.0, **settings)


def test_a_torn_last_line_of_a_killed_run_is_dropped(run, tmp_path):
    run("--max_steps=3", "--schedule=constant")
    with open(tmp_path / "a" / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')
    _, log = run("--schedule=constant", "--init_from=resume")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert log[3]["loss"] != 1.0


def test_the_best_checkpoint_is_the_one_of_the_lowest_held_out_loss(run, tmp_path):
    last, log = run("--max_steps=12", "--eval_interval=1", "--learning_rate=0.3", "--schedule=constant")
    lowest = min(log, key=lambda entry: entry["val_loss"])
    best = load(tmp_path / "a" / "best.pt")
    assert best["step"] == lowest["step"] and best["best_loss"] == last["best_loss"] == lowest["val_loss"]


def test_a_resumed_run_remembers_what_was_best(run, monkeypatch, tmp_path):
    values = iter([3.0, 1.0, 2.0, 2.5, 1.5, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(values)})
    run("--eval_interval=1", "--schedule=constant", "--max_steps=3")
    last, _ = run("--eval_interval=1", "--schedule=constant", "--init_from=resume")
    assert last["best_loss"] == 1.0 and load(tmp_path / "a" / "best.pt")["step"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_stops(number, run, monkeypatch, tmp_path, capsys):
    before = signal.getsignal(number)
    at_step(monkeypatch, autoregressive, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + number and signal.getsignal(number) == before
    assert load(tmp_path / "a" / "ckpt.pt")["step"] == 3 == len(read_log(tmp_path / "a"))
    assert "at step 3; go on with --init_from=resume" in capsys.readouterr().err


def test_a_second_signal_stops_at_once(run, monkeypatch, tmp_path):
    at_step(monkeypatch, autoregressive, 2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        run()
    assert load(tmp_path / "a" / "ckpt.pt")["step"] == 0


def command(*flags) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "train.py", *TINY, *flags],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(there, process, seconds: float = 60):
    """Until there() is true. Fails, with what the process said, if it ends before."""
    end = time.time() + seconds
    while not there():
        if process.poll() is not None or time.time() > end:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.01)


@pytest.mark.slow  # starts Python, 6 s
def test_sigterm_ends_a_command_with_status_143_and_a_checkpoint_of_its_last_step(copy_set, tmp_path):
    log = tmp_path / "a" / "log.jsonl"
    flags = ["--max_steps=100000", "--save_interval=100000"]
    process = command(f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", *flags)
    wait_for(lambda: log.exists() and log.read_text().count("\n") > 3, process)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "stopped by SIGTERM at step" in said
    assert load(tmp_path / "a" / "ckpt.pt")["step"] == read_log(tmp_path / "a")[-1]["step"]


@pytest.mark.parametrize("module", [autoregressive, diffusion])
def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(module, run, monkeypatch, tmp_path):
    losses = module.losses

    def broken(model, batch, cfg, draws, *rest, **named):
        for term in losses(model, batch, cfg, draws, *rest, **named):
            yield term * (float("nan") if draws.step == 3 and model.training else 1.0)

    monkeypatch.setattr(module, "losses", broken)
    flags = DIFFUSION if module is diffusion else []
    with pytest.raises(ValueError, match=r"loss nan.* at step 3 \(examples 12\.\.15 .*holds the last good step"):
        run(*flags, "--save_interval=1")
    state = load(tmp_path / "a" / "ckpt.pt")
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())


# How a run starts


def test_a_run_that_was_never_there_is_resumed_from_step_0(run, capsys):
    state, _ = run("--init_from=resume")
    assert state["step"] == 6 and "starting at step 0" in capsys.readouterr().out
    assert same(state["model"], run(out="b")[0]["model"])


@pytest.mark.parametrize("flag", ["--resume", "--init_from=resume"])
def test_a_run_that_is_done_ends_at_once(flag, run, capsys):
    before, log = run()
    after, log_after = run(flag)
    assert "nothing to do" in capsys.readouterr().out
    assert same(before, after) and log == log_after


def test_a_run_goes_on_with_more_steps_and_needs_only_its_folder(run, copy_set, tmp_path):
    """The settings are in the checkpoint: data too. What is given again may leave sizes open with 0."""
    run("--schedule=constant", "--block_size=0", "--target_length=0")
    main([f"--out_dir={tmp_path / 'a'}", "--init_from=resume", "--max_steps=8", "--block_size=0"])
    state = load(tmp_path / "a" / "ckpt.pt")
    assert state["step"] == 8 and state["train_config"]["data"] == str(copy_set)
    whole, _ = run("--schedule=constant", "--max_steps=8", out="whole")
    assert same(state["model"], whole["model"])


def test_a_set_may_be_called_by_its_bare_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "out" / "data" / "toy_copy")
    main([*TINY, "--data=toy_copy", "--out_dir=a", "--max_steps=1"])
    main([*TINY, "--data=out/data/toy_copy", "--out_dir=a", "--max_steps=2", "--init_from=resume"])
    assert load("a/ckpt.pt")["train_config"]["data"] == "out/data/toy_copy"


def test_a_run_may_start_from_the_weights_of_another(run, monkeypatch, tmp_path):
    source, _ = run(out="source")
    at_step(monkeypatch, autoregressive, 0, killed)
    with pytest.raises(Killed):
        run(f"--init_from={tmp_path / 'source' / 'ckpt.pt'}", "--dropout=0.5", out="next")
    start = load(tmp_path / "next" / "ckpt.pt")
    assert start["step"] == 0 and same(start["model"], source["model"])
    assert start["model_config"] == source["model_config"] | {"dropout": 0.5}
    assert start["converted_from"] == str(tmp_path / "source" / "ckpt.pt")


def refused(says: str, *flags):
    with pytest.raises(ValueError, match=says) as error:
        main([*TINY, *flags])
    assert "\n" not in str(error.value)


def test_a_folder_that_holds_a_run_is_not_overwritten_unasked(run, copy_set, tmp_path):
    before, _ = run()
    refused("already holds a run", f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}")
    assert same(load(tmp_path / "a" / "ckpt.pt"), before)
    assert run("--overwrite", "--max_steps=2")[0]["step"] == 2


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--n_embd=32", "was trained with n_embd=16, but n_embd=32 is asked for"),
        ("--learning_rate=0.5", "was trained with learning_rate=0.01, but"),
        ("--seed=5", "was trained with seed=1337, but"),
        ("--batch_size=8", "was trained with batch_size=4, but"),
        ("--seed=0", "was trained with seed=1337, but seed=0"),  # 0 is a value like any other
        ("--warmup_steps=0", "was trained with warmup_steps=2, but"),
    ],
)
def test_a_resumed_run_may_not_change_what_makes_it(flag, says, run, copy_set, tmp_path):
    run()
    refused(says, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", "--init_from=resume", flag)


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--n_layer=2", "is a model with n_layer=1, but n_layer=2 is asked for"),
        ("--paradigm=diffusion", "paradigm=ar, but paradigm=diffusion is asked for; convert it with python ar2diff.py"),
        ("--target_attention=bidirectional", "convert it"),
        ("--anneal_steps=5", "is an AR model and anneal_steps opens a diffusion model's mask; convert it"),
        ("--block_size=64", "is a model with block_size=11, but block_size=64"),
    ],
)
def test_a_model_setting_that_contradicts_the_source_is_refused(flag, says, run, copy_set, tmp_path):
    run()
    source = f"--init_from={tmp_path / 'a' / 'ckpt.pt'}"
    refused(says, f"--data={copy_set}", f"--out_dir={tmp_path / 'b'}", source, flag)
    assert not (tmp_path / "b").exists()


def test_a_source_with_another_tokenizer_is_refused(run, copy_set, tmp_path):
    state, _ = run()
    torch.save(state | {"tokenizer": "gpt2"}, tmp_path / "other.pt")
    source = f"--init_from={tmp_path / 'other.pt'}"
    refused("trained with tokenizer 'gpt2'.*'bytes'", f"--data={copy_set}", f"--out_dir={tmp_path / 'b'}", source)


def test_data_longer_than_the_model_is_refused(run, tmp_path):
    run()
    longer = make_set(tmp_path / "longer", target_length=10, longest=5)
    source = f"--init_from={tmp_path / 'a' / 'ckpt.pt'}"
    refused("needs 15 tokens .*block_size is 11", f"--data={longer}", f"--out_dir={tmp_path / 'b'}", source)


def test_data_that_changed_since_the_checkpoint_is_refused(tmp_path):
    data = make_set(tmp_path / "set")
    flags = [f"--data={data}", f"--out_dir={tmp_path / 'a'}"]
    main([*TINY, *flags, "--max_steps=1"])
    make_set(data, n=50)
    refused("has changed since", *flags, "--init_from=resume")


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--target_length=9", "is made with target_length=6, but target_length=9 is asked for"),
        ("--vocab_size=300", "is made with vocab_size=288"),
        ("--block_size=8", "needs 11 tokens for prefix . target, the model's block_size is 8"),
        ("--data=nowhere", "nowhere: no such set.*mini"),
        ("--init_from=nowhere.pt", "nowhere.pt: no such checkpoint"),
        ("--schedule=sawtooth", "constant, linear, cosine"),
        ("--optimizer=sgd", "muon, adamw"),
        ("--dtype=int8", "float32, bfloat16"),
        ("--device=tpu", "available: cpu"),
        ("--max_steps=0", "max_steps must be at least 1"),
        ("--eval_batches=0", "eval_batches must be at least 1"),
        ("--grad_accum_steps=3", "batch_size must be a multiple of grad_accum_steps"),
        ("--anneal_steps=3", "bidirectional"),
        ("--max_step=3", "did you mean 'max_steps'"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_step(flag, says, copy_set, tmp_path):
    refused(says, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", flag)
    assert not (tmp_path / "a" / "log.jsonl").exists()


def test_self_conditioning_without_an_unrolled_pass_is_refused():
    with pytest.raises(ValueError, match="unroll_steps of 2 or more"):
        TrainConfig(paradigm="diffusion", target_attention="bidirectional", self_conditioning=True, unroll_steps=1)


# Parts


def test_clipping_bounds_the_gradient_and_0_turns_it_off(run, monkeypatch):
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, *args):
        every = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack(every).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    run("--optimizer=adamw", "--grad_clip=0.01", "--max_steps=2", out="clipped")
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    _, log = run("--optimizer=adamw", "--grad_clip=0", "--max_steps=2", out="free")
    assert norms[2:] == pytest.approx([entry["grad_norm"] for entry in log], rel=1e-5)


def test_annealing_opens_the_mask_linearly_and_then_lets_go_of_it(run, monkeypatch):
    seen, losses = [], diffusion.losses

    def watched(model, batch, cfg, draws, rate=None, opened=None):
        if model.training:
            seen.append(opened)
        yield from losses(model, batch, cfg, draws, rate, opened)

    monkeypatch.setattr(diffusion, "losses", watched)
    run(*DIFFUSION, "--anneal_steps=4")
    assert [opened is None for opened in seen] == [False] * 4 + [True] * 2
    assert seen[3].all()  # the last mask of all is the bidirectional one already


def test_training_reads_every_pair_once_an_epoch(copy_set, run, monkeypatch):
    seen, losses = [], autoregressive.losses

    def watched(model, batch, cfg, draws, **rest):
        if model.training:
            seen.extend(map(tuple, batch.target.tolist()))
        yield from losses(model, batch, cfg, draws, **rest)

    monkeypatch.setattr(autoregressive, "losses", watched)
    run("--batch_size=10", "--max_steps=5", "--grad_accum_steps=2")
    data = open_set(copy_set, "train")
    assert sorted(row.count(256) for row in seen) == sorted(5 - len(data.pair(i)[1]) for i in range(50))


def test_a_compiler_that_does_not_work_is_named_and_the_run_goes_on(run, monkeypatch, capsys):
    def fail(self):
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(Transformer, "compile_", fail)
    assert run("--compile")[0]["step"] == 6
    assert "compile=True has no effect here, running eagerly: no compiler\n" in capsys.readouterr().out


@pytest.mark.parametrize("there", (True, False))
def test_a_processor_without_bfloat16_is_named(there, run, monkeypatch, capsys):
    monkeypatch.setattr(train, "computes_bfloat16", lambda device: there)
    run("--dtype=bfloat16", "--max_steps=1")
    assert ("this processor has no bfloat16" in capsys.readouterr().out) == (not there)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ar", "modern", "annealed", "both"])
def test_a_compiled_run_is_the_eager_one(case, run, capsys):
    """To rounding: losses, gradient norms and weights of six steps of AdamW. A minute each: the compiler."""
    flags = [*CASES[case], "--optimizer=adamw", "--learning_rate=0.001"]
    (eager, log), (compiled, other) = run(*flags), run(*flags, "--compile", out="b")
    if "running eagerly" in capsys.readouterr().out:
        pytest.skip("no compiler works here")
    for a, b in zip(log, other):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    assert furthest(eager, compiled) < 1e-4


def test_the_device_is_what_is_asked_for_and_there():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cuda", "mps", "cpu")


def test_the_speed_of_a_matmul_is_a_number_of_operations_a_second():
    assert 1e6 < measured_flops(torch.device("cpu"), "float32") < 1e14


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_bit(copy_set, tmp_path):
    """kill -9, most of them while a checkpoint is being written: save_interval is 1. About two minutes."""
    rng, flags = random.Random(0), [*CASES["modern"], f"--data={copy_set}", "--max_steps=3000"]
    flags += ["--save_interval=1", "--eval_interval=7"]
    main([*TINY, *flags, f"--out_dir={tmp_path / 'whole'}", "--save_interval=3000"])
    last, kills, half_written = tmp_path / "parts" / "ckpt.pt", 0, 0
    while kills < 20:
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = command(*flags, f"--out_dir={tmp_path / 'parts'}", "--init_from=resume")
        wait_for(lambda before=before: last.exists() and last.stat().st_mtime_ns != before, process)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run was over before it was killed: more max_steps, please"
        kills += 1
        half_written += last.with_name("ckpt.pt.tmp").exists()
        step = load(last)["step"]
        assert whole_lines(tmp_path / "parts")[:step] == list(range(1, step + 1))
    assert half_written > 0  # or the test does not test what it says
    process = command(*flags, f"--out_dir={tmp_path / 'parts'}", "--init_from=resume", "--save_interval=3000")
    said, _ = process.communicate()
    assert process.returncode == 0, said
    whole, parts = (load(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    for name in ("model", "optimizer", "best_loss", "step"):
        assert same(whole[name], parts[name]), name
    assert lasting(read_log(tmp_path / "whole")) == lasting(read_log(tmp_path / "parts"))


def whole_lines(folder: Path) -> list[int]:
    """The steps in a log whose last line may be torn."""
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]
