"""train.py: a run is a function of its settings. Interruptions and micro-batches change nothing."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from processes import TINY, make_copy_set, same
from test_faults import TIMES

import autoregressive
import diffusion
import train
from data.loader import open_dataset
from infra.checkpoint import load
from infra.distributed import DistributedContext
from infra.flops import train_flops
from model import ModelConfig
from train import main

SHORT = [*TINY, "--max_steps=6", "--learning_rate=0.01", "--warmup_steps=2", "--eval_batches=1"]
SHORT += ["--eval_interval=100", "--save_interval=100", "--sample_interval=0"]
DIFFUSION = ["--paradigm=diffusion", "--prefix_attention=joint", "--target_attention=bidirectional"]
CASES = {
    "ar": [],
    "ar_dropout": ["--optimizer=adamw", "--dropout=0.2"],
    "paper": DIFFUSION,
    "modern": [*DIFFUSION, "--self_conditioning", "--shift"],
    "mask": [*DIFFUSION, "--noise=mask", "--dropout=0.2"],
    "random": [*DIFFUSION, "--anneal_steps=5", "--unroll_temperature=1.0"],
    "causal_prefix": [*DIFFUSION, "--prefix_attention=causal", "--anneal_steps=3"],
}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def run(copy_set, tmp_path):
    """run(*flags, out="a") trains in tmp_path/a and returns its checkpoint and its log."""

    def run(*flags: str, out: str = "a"):
        main([*SHORT, f"--data={copy_set}", f"--out_dir={tmp_path / out}", *flags])
        return load(tmp_path / out / "ckpt.pt"), read_log(tmp_path / out)

    return run


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(log: list[dict]) -> list[dict]:
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in log]


def largest_difference(a: dict, b: dict) -> float:
    return max((a["model"][k] - b["model"][k]).abs().max().item() for k in a["model"])


def assert_close(log: list[dict], other: list[dict]) -> None:
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-3)):
        expected = [entry[name] for entry in log]
        assert [entry[name] for entry in other] == pytest.approx(expected, rel=tolerance)


def watch_losses(monkeypatch, module, watch):
    """Call watch(batch, rng, extra_edges) before each training loss. It may return a factor."""
    losses = module.losses

    def watched(model, batch, cfg, rng, *rest, **named):
        factor = watch(batch, rng, named.get("extra_edges")) if model.training else None
        for term in losses(model, batch, cfg, rng, *rest, **named):
            yield term if factor is None else term * factor

    monkeypatch.setattr(module, "losses", watched)


def at_step(monkeypatch, module, step: int, action):
    watch_losses(monkeypatch, module, lambda batch, rng, _: action() if rng.step == step else None)


# One run, however it is cut


@pytest.mark.parametrize("case", CASES)
def test_three_steps_and_three_more_equal_six(case, run, monkeypatch, tmp_path):
    """Weights, optimizer, validation loss and log are equal to the last bit."""
    flags = [*CASES[case], "--save_interval=3", "--eval_interval=2"]
    whole, whole_log = run(*flags, out="whole")
    with monkeypatch.context() as patch:
        at_step(patch, autoregressive if case.startswith("ar") else diffusion, 4, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*flags, out="parts")
    assert load(tmp_path / "parts" / "ckpt.pt")["step"] == 3
    assert len(read_log(tmp_path / "parts")) == 4
    parts, parts_log = run(*flags, "--init_from=resume", out="parts")
    for name in ("model", "optimizer", "best_loss", "step"):
        assert same(whole[name], parts[name]), name
    assert without_times(whole_log) == without_times(parts_log)
    assert [entry["step"] for entry in parts_log] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("case", ["ar", "modern", "random", "causal_prefix"])
def test_micro_batches_equal_one_batch(case, run):
    """To rounding. The micro-batches have other prefix widths but see the same opened edges."""
    flags = [*CASES[case], "--optimizer=adamw"]
    one, one_log = run(*flags, out="one")
    four, four_log = run(*flags, "--grad_accum_steps=4", out="four")
    assert_close(one_log, four_log)
    assert largest_difference(one, four) < 1e-4


@pytest.mark.parametrize("case", ["ar_dropout", "modern"])
def test_evaluation_samples_and_checkpoints_do_not_change_the_run(case, run):
    often = ["--eval_interval=1", "--sample_interval=1", "--save_interval=1"]
    one, _ = run(*CASES[case], *often, out="often")
    two, _ = run(*CASES[case], "--log_interval=100", out="never")
    assert same(one["model"], two["model"]) and same(one["optimizer"], two["optimizer"])


# Losses after 20 steps, computed with an independent earlier version of this code.
GOLDEN = {"ar": 2.6109, "modern": 6.1829, "mask": 5.0156, "causal_prefix": 6.6726}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_loss_after_20_steps_is_the_known_one(case, run):
    flags = ["--max_steps=20", "--optimizer=adamw", "--dropout=0"]  # Muon multiplies in bfloat16
    _, log = run(*CASES[case], *flags)
    assert log[-1]["loss"] == pytest.approx(GOLDEN[case], abs=1e-3)


# The log and the checkpoints


def test_the_log_holds_terms_flops_speed_validation_and_samples(run, capsys):
    flags = ["--batch_size=8", "--grad_accum_steps=2", "--log_interval=2"]
    flags += ["--eval_interval=3", "--sample_interval=3"]
    state, log = run(*CASES["causal_prefix"], *flags)
    m = ModelConfig(**state["model_config"])
    fewest, most = (8 * train_flops(m, P, 6, 2) for P in (0, m.block_size))
    for entry in log:
        assert len(entry["terms"]) == 2 and {"grad_norm", "lr"} <= entry.keys()
        assert sum(entry["terms"]) == pytest.approx(entry["loss"], rel=1e-6)
        assert fewest < entry["flops"] < most
    assert [entry["step"] for entry in log if "tokens_per_s" in entry] == [2, 4, 6]
    assert [entry["step"] for entry in log if "val_loss" in entry] == [3, 6]
    by_rate = log[2]["val_loss_by_rate"]
    assert list(by_rate) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert log[2]["val_loss"] == pytest.approx(sum(by_rate.values()) / 5)
    assert log[2]["sample"] in capsys.readouterr().out


def test_tensorboard_shows_each_step_of_a_resumed_run_once(run, tmp_path):
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(module, reason="pip install tensorboard")
    run("--tensorboard", "--schedule=constant", "--max_steps=3")
    run("--tensorboard", "--schedule=constant", "--init_from=resume")
    board = events.EventAccumulator(str(tmp_path / "a" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_best_pt_has_the_lowest_validation_loss_of_all_parts(run, monkeypatch, tmp_path):
    values = iter([3.0, 1.0, 2.0, 2.5, 1.5, 0.5])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(values)})
    flags = ["--eval_interval=1", "--schedule=constant", "--init_from=resume"]
    for steps, best in ((3, (2, 1.0)), (5, (2, 1.0)), (6, (6, 0.5))):
        last, _ = run(*flags, f"--max_steps={steps}")
        state = load(tmp_path / "a" / "best.pt")
        assert (state["step"], state["best_loss"]) == best and last["best_loss"] == best[1]


def test_changes_that_make_a_resumed_run_differ(run, monkeypatch, capsys):
    """Another end of the decay is said. Losses over other batches are not comparable."""
    values = iter([1.0, 3.0, 2.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(values)})
    changes = ("--max_steps=2", "--max_steps=4", "--eval_batches=2")
    best = [run(change, "--init_from=resume")[0]["best_loss"] for change in changes]
    assert best == [1.0, 1.0, 2.0]
    out = capsys.readouterr().out
    assert "max_steps 2 -> 4 also changes the linear decay" in out and "4 -> 6" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_stops(number, run, monkeypatch, tmp_path, capsys):
    before = signal.getsignal(number)
    at_step(monkeypatch, autoregressive, 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 128 + number and signal.getsignal(number) == before
    assert load(tmp_path / "a" / "ckpt.pt")["step"] == 3 == len(read_log(tmp_path / "a"))
    assert "step 3; use --init_from=resume" in capsys.readouterr().err
    # The garbage collector may end an open loader inside a new thread, which then waits for itself.
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]


@pytest.mark.parametrize("case", ["ar", "paper"])
def test_nan_stops_the_run_and_spares_the_checkpoint(case, run, monkeypatch, tmp_path):
    module = autoregressive if case == "ar" else diffusion
    at_step(monkeypatch, module, 3, lambda: float("nan"))
    with pytest.raises(ValueError, match="loss nan.* step 4; .*--overwrite.* the last saved step"):
        run(*CASES[case], "--save_interval=1")
    state = load(tmp_path / "a" / "ckpt.pt")
    assert state["step"] == 3 and all(value.isfinite().all() for value in state["model"].values())


# How a run starts


def test_resume_starts_an_absent_run_continues_one_and_leaves_a_finished_one(run, tmp_path, capsys):
    flags = ["--schedule=constant", "--init_from=resume"]
    run(*flags)
    assert "starting at step 0" in capsys.readouterr().out
    folder = f"--out_dir={tmp_path / 'a'}"
    main([folder, "--init_from=resume", "--max_steps=8", "--block_size=0"])  # 0: from the data
    longer, log = run(*flags, "--max_steps=8")
    assert "nothing to do" in capsys.readouterr().out and len(log) == 8
    whole, _ = run("--schedule=constant", "--max_steps=8", out="whole")
    assert same(longer["model"], whole["model"])


def test_data_and_runs_may_move(monkeypatch, tmp_path):
    """A bare name, another folder, a link, ~ and a relative path: the content decides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "Läufe von mir"))
    data = make_copy_set(Path("out/data/toy_copy"))
    flags = [*SHORT, "--schedule=constant", "--init_from=resume"]
    main([*flags, "--data=toy_copy", "--out_dir=~/ein Lauf", "--max_steps=1"])
    run_folder = tmp_path / "Läufe von mir" / "ein Lauf"
    moved = data.rename(tmp_path / "moved")
    monkeypatch.setattr("data.loader.SETS", {})  # or the missing set would be built
    refused("toy_copy: no such data set", *flags, f"--out_dir={run_folder}")
    Path("link").symlink_to(moved)
    Path("Läufe von mir/set").symlink_to(moved)
    places = ["moved", str(moved), "link", "~/set", f"../{tmp_path.name}/moved/"]
    for step, place in enumerate(places, 2):
        main([*flags, f"--data={place}", "--out_dir=~/ein Lauf", f"--max_steps={step}"])
    assert load(run_folder / "ckpt.pt")["step"] == 6 and not Path("~").exists()


def test_a_run_starts_from_the_weights_of_another(run, tmp_path):
    """A rate of 0 leaves them as they are. Resume starts there too if there is no run yet."""
    source, _ = run(out="source")
    path = tmp_path / "source" / "ckpt.pt"
    start = [f"--init_from={path}", "--init_from=resume", "--dropout=0.5", "--learning_rate=0"]
    state, _ = run(*start, out="next")
    assert same(state["model"], source["model"])
    assert state["train_config"]["init_from"] == str(path)
    assert state["model_config"] == source["model_config"] | {"dropout": 0.5}


def refused(message: str, *flags):
    with pytest.raises(ValueError, match=message) as error:
        main([*SHORT, *flags])
    assert "\n" not in str(error.value)


def test_a_run_keeps_its_files_settings_and_data(run, copy_set, tmp_path):
    before, _ = run()
    out = f"--out_dir={tmp_path / 'a'}"
    refused("already holds a run", f"--data={copy_set}", out)
    assert same(load(tmp_path / "a" / "ckpt.pt"), before)
    changes = "n_embd=32 learning_rate=0.5 seed=0 batch_size=8 warmup_steps=0 objective=prefix_lm"
    for change in changes.split():
        message = f"cannot set {change}: .* was trained with"
        refused(message, out, "--init_from=resume", f"--{change}")
    other = make_copy_set(tmp_path / "other", n=50)
    refused("differs from the data of", out, "--init_from=resume", f"--data={other}")
    del before["optimizer"]
    torch.save(before, tmp_path / "a" / "ckpt.pt")
    refused("cannot be resumed, it has no optimizer", out, "--init_from=resume")
    assert run("--overwrite", "--max_steps=2")[0]["step"] == 2


@pytest.fixture(scope="module")
def sources(copy_set, tmp_path_factory):
    """The checkpoint ar.pt, gpt2.pt with another tokenizer, and a data set of longer texts."""
    folder = tmp_path_factory.mktemp("sources")
    main([*SHORT, f"--data={copy_set}", f"--out_dir={folder}", "--max_steps=1"])
    torch.save(load(folder / "ckpt.pt") | {"tokenizer": "gpt2"}, folder / "gpt2.pt")
    make_copy_set(folder / "longer", target_length=10)
    (folder / "resume.py").write_text("init_from = 'resume'")
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target_length=9", "cannot set target_length=9: .* has target_length=6"),
        ("--block_size=8", "needs 11 tokens, the model's block_size is 8"),
        ("--data=nowhere", "nowhere: no such data set.*mini"),
        ("--grad_accum_steps=3", "batch_size 4 must be a multiple of grad_accum"),
        ("--anneal_steps=3", "anneal_steps needs paradigm=diffusion, got ar"),
        ("--parallel=fsdp", "fsdp needs optimizer=adamw"),
        ("--parallel=fsdp --optimizer=adamw", "fsdp needs torchrun"),
        ("--init_from=ckpt.pt --n_layer=2", "cannot set n_layer=2: .* has n_layer=1; convert it"),
        ("--init_from=ckpt.pt --paradigm=diffusion", "paradigm=ar; convert it with python ar2diff"),
        ("--init_from=ckpt.pt --anneal_steps=5", "anneal_steps needs paradigm=diffusion"),
        ("--init_from=ckpt.pt --data=longer", "needs 15 tokens, .* block_size is 11"),
        ("--init_from=gpt2.pt", "trained with tokenizer 'gpt2', .*'bytes'"),
        ("resume.py", "init_from='resume' in a file; use the flag --init_from=resume"),
    ],
)
def test_a_mistake_is_one_line_before_the_first_step(
    flags, message, copy_set, sources, tmp_path, monkeypatch
):
    monkeypatch.chdir(sources)
    refused(message, f"--data={copy_set}", f"--out_dir={tmp_path / 'b'}", *flags.split())
    assert not (tmp_path / "b").exists()


# Parts


def test_clipping_bounds_the_gradient_and_0_turns_it_off():
    layer = torch.nn.Linear(3, 1, bias=False)
    context = DistributedContext(torch.device("cpu"))
    for largest, left in ((0, 5.0), (7, 5.0), (0.5, 0.5)):
        layer.weight.grad = torch.tensor([[0.0, 3.0, 4.0]])
        assert context.clip_gradients(layer, largest) == 5
        assert layer.weight.grad.norm().item() == pytest.approx(left, rel=1e-4)


def test_annealing_opens_the_mask_and_every_pair_is_read_once_an_epoch(copy_set, run, monkeypatch):
    edges = []
    rows = []

    def watch(batch, rng, extra_edges):
        edges.append(extra_edges)
        rows.extend(batch.target.tolist())

    watch_losses(monkeypatch, diffusion, watch)
    run(*DIFFUSION, "--anneal_steps=4", "--batch_size=10", "--max_steps=5")
    assert [part is None for part in edges] == [False] * 4 + [True]
    assert edges[3].all()  # the last mask of all is the bidirectional one already
    data = open_dataset(copy_set, "train")
    texts = [[token for token in row if token < 256] for row in rows]
    assert sorted(texts) == sorted(data.pair(i)[1] for i in range(50))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ar", "modern", "random", "causal_prefix"])
def test_a_compiled_run_equals_the_eager_one(case, run, capsys):
    """To rounding: losses, gradient norms and weights of six steps of AdamW."""
    flags = [*CASES[case], "--optimizer=adamw", "--learning_rate=0.001"]
    eager, eager_log = run(*flags)
    compiled, log = run(*flags, "--compile", out="b")
    if "running eagerly" in capsys.readouterr().out:
        pytest.skip("no compiler works here")
    assert_close(eager_log, log)
    assert largest_difference(eager, compiled) < 1e-4


@pytest.mark.parametrize("fast", [True, False])
def test_auto_takes_the_faster_number_format(run, monkeypatch, capsys, fast):
    monkeypatch.setattr(train.device, "has_fast_bf16", lambda device: fast)
    state, _ = run("--dtype=auto")
    assert state["train_config"]["dtype"] == ("bfloat16" if fast else "float32")
    run("--dtype=bfloat16", out="b")
    assert ("bfloat16 is slow" in capsys.readouterr().out) == (not fast)
