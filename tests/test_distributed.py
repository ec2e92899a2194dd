"""infra/distributed.py: any number of processes trains the model that one process trains."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_train
import torch
import torch.distributed as dist
from processes import start

import train
from infra.checkpoint import load
from infra.distributed import DistributedContext
from model import Transformer

ROOT = Path(__file__).parent.parent
SHORT = [*test_train.SHORT, "--max_steps=3", "--learning_rate=0.001", "--optimizer=adamw"]
SHORT += ["--schedule=constant", "--eval_interval=3", "--sample_interval=3"]
DIFFUSION = ["--paradigm=diffusion", "--target_attention=bidirectional"]
CACHED = [*DIFFUSION, "--prefix_attention=bidirectional", "--self_conditioning"]
WAYS = {
    "ar": [],
    "joint": [*DIFFUSION, "--prefix_attention=joint", "--self_conditioning", "--shift"],
    "cached": CACHED,
    "annealed": [*CACHED, "--prefix_attention=causal", "--anneal_steps=3"],
    "encoder-decoder": [*CACHED, "--arch=encoder_decoder"],
}


@pytest.fixture
def run(copy_set, tmp_path):
    """run(processes, *flags, out="a") trains in tmp_path/a and returns its last checkpoint."""

    def run(processes: int, *flags: str, out: str = "a", prepare=lambda: None):
        def work(rank):
            prepare()
            train.main([*SHORT, f"--data={copy_set}", f"--out_dir={tmp_path / out}", *flags])

        statuses = [child.wait() for child in start(processes, work, tmp_path)]
        outputs = [path.read_text() for path in sorted(tmp_path.glob("output_*"))]
        assert statuses == [0] * processes, outputs
        return load(tmp_path / out / "ckpt.pt")

    return run


def assert_same_training(a: dict, b: dict, tolerance: float = 1e-4) -> None:
    """Weights to 1e-4. Moving averages of gradients relative to their norm: they do not amplify."""
    assert a["step"] == b["step"] and a["best_loss"] == pytest.approx(b["best_loss"], rel=1e-4)
    for name, weight in a["model"].items():
        torch.testing.assert_close(b["model"][name], weight, rtol=0, atol=tolerance)
    moments = [state["optimizer"][0]["state"] for state in (a, b)]
    pairs = [(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0]]
    distance = sum((x - y).norm() ** 2 for x, y in pairs) / sum(x.norm() ** 2 for x, _ in pairs)
    assert distance**0.5 < tolerance


SLOW = [pytest.param(way, marks=() if way == "joint" else pytest.mark.slow) for way in WAYS]


@pytest.mark.parametrize("way", SLOW)
def test_ddp_and_fsdp_train_what_one_process_trains(way, run, tmp_path):
    one = run(1, *WAYS[way], "--grad_accum_steps=2", out="one")
    for parallel, accum in (("ddp", 2), ("fsdp", 1), ("fsdp", 2)):
        flags = [f"--parallel={parallel}", f"--grad_accum_steps={accum}"]
        two = run(2, *WAYS[way], *flags, out=f"{parallel}_{accum}")
        assert_same_training(one, two)
    logs = [(tmp_path / out / "log.jsonl").read_text() for out in ("one", "fsdp_1")]
    counts = [re.findall(r'"(?:tokens|flops)": \d+', log) for log in logs]
    assert counts[0] == counts[1] and len(counts[0]) == 6  # the same rows per micro-batch
    assert (tmp_path / "output_0").read_text().count(" sample: ") == 1
    assert (tmp_path / "output_1").read_text() == ""  # only rank 0 prints


@pytest.mark.slow
def test_four_processes_train_with_muon_what_one_trains(run):
    """Muon rounds to bfloat16, so a last bit of a gradient may change a 256th of an update."""
    flags = [*WAYS["joint"], "--optimizer=muon"]
    one, four = run(1, *flags, out="one"), run(4, *flags, out="four")
    assert_same_training(one, four, tolerance=1e-2)


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(run):
    """Two processes write a checkpoint; one, two and four continue the undisturbed run."""
    flags = [*WAYS["joint"], "--eval_interval=100", "--sample_interval=0"]
    whole = run(1, *flags, "--max_steps=4", out="whole")
    for processes, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "fsdp")):
        out = f"{processes}_{parallel}"
        run(2, *flags, "--max_steps=2", "--parallel=fsdp", out=out)
        more = ["--max_steps=4", "--init_from=resume", f"--parallel={parallel}"]
        assert_same_training(whole, run(processes, *flags, *more, out=out))


def test_two_processes_resume_bit_for_bit(run):
    """Dropout too, whose numbers differ by process."""
    flags = [*WAYS["joint"], "--dropout=0.2", "--eval_interval=100", "--sample_interval=0"]
    whole = run(2, *flags, "--max_steps=4", out="whole")
    run(2, *flags, "--max_steps=2", out="parts")
    parts = run(2, *flags, "--max_steps=4", "--init_from=resume", out="parts")
    assert all(torch.equal(parts["model"][k], v) for k, v in whole["model"].items())


def test_gradients_are_exchanged_once_per_step(run, tmp_path):
    """Two micro-batches of two terms are four backward passes."""

    def count_exchanges():
        all_reduce = dist.all_reduce

        def counted(tensor, *rest):
            if tensor.numel() > 1000 and dist.get_rank() == 0:
                with open(tmp_path / "calls", "a") as file:
                    file.write("x")
            return all_reduce(tensor, *rest)

        dist.all_reduce = counted

    run(2, *WAYS["joint"], "--grad_accum_steps=2", prepare=count_exchanges)
    assert (tmp_path / "calls").read_text() == "xxx"


@pytest.mark.parametrize("prefix", ["causal", "bidirectional"])
def test_a_prefix_read_once_gets_the_gradients_of_one_read_for_every_pass(prefix, run, tmp_path):
    """Two processes with two micro-batches each; in the oracle, one process has all rows."""
    flags = [*CACHED, f"--prefix_attention={prefix}", "--batch_size=8"]
    flags += ["--n_layer=2", "--max_steps=1", "--sample_interval=0"]

    def keep_gradients():
        def keep(ctx, model, max_norm):
            if ctx.is_main:
                gradients = {name: p.grad for name, p in model.named_parameters()}
                torch.save(gradients, tmp_path / "gradients")
            return 0.0

        DistributedContext.clip_gradients = keep

    def read_for_every_pass():
        keep_gradients()
        read = Transformer.encode

        def encode(model, prefix, reserve=0):
            assert (prefix == model.cfg.pad_id).any()
            again = SimpleNamespace(fork=lambda: read(model, prefix, reserve))
            again.detach = lambda: (again, [])
            return again

        Transformer.encode = encode

    run(1, *flags, prepare=read_for_every_pass)
    oracle = torch.load(tmp_path / "gradients")
    run(2, *flags, "--grad_accum_steps=2", out="b", prepare=keep_gradients)
    found = torch.load(tmp_path / "gradients")
    for name, gradient in oracle.items():
        assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


@pytest.mark.parametrize("world_size, accum", [(1, 1), (2, 3), (4, 2)])
def test_the_rows_of_all_processes_are_the_batch(world_size, accum):
    rows = []
    for rank in range(world_size):
        context = DistributedContext(torch.device("cpu"), rank, world_size)
        for micro in range(accum):
            rows += range(24)[context.local_rows(24, accum, micro)]
    assert rows == list(range(24))


def test_an_error_of_one_process_ends_all(copy_set, tmp_path):
    argv = [*SHORT, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", "--init_from=nowhere.pt"]
    first, second = start(2, lambda rank: train.main(argv), tmp_path)
    assert (first.wait(), second.wait()) == (2, 2)
    assert "nowhere.pt: no such checkpoint" in first.output.read_text()
    assert "process 1 lost the others" in second.output.read_text()
    assert "Traceback" not in first.output.read_text() + second.output.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_torchrun_trains_stops_and_resumes(number, copy_set, tmp_path):
    """SIGTERM to torchrun: all save after the step. SIGKILL of one process ends the rest."""
    argv = ["train.py", *SHORT, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    options = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, *argv, "--max_steps=100000"], **options)
    log = tmp_path / "a" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    if number == signal.SIGTERM:
        process.terminate()
    else:
        children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True)
        os.kill(int(children.split()[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    steps = 0
    if number == signal.SIGTERM:
        steps = json.loads(log.read_text().splitlines()[-1])["step"]
        assert f"stopped by SIGTERM at step {steps}" in output
    assert load(tmp_path / "a" / "ckpt.pt")["step"] == steps
    more = [f"--max_steps={steps + 2}", "--init_from=resume"]
    output = subprocess.run([*command, *argv, *more], **options, timeout=90).stdout
    assert load(tmp_path / "a" / "ckpt.pt")["step"] == steps + 2, output
