"""distributed.py: any number of processes trains the model that one trains, and who does not come is named.

Processes are forked from this one, which has torch loaded; two tests start torchrun itself.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from test_train import CASES, DIFFUSION, ROOT, TINY, lasting, make_set, read_log, same

import train
from checkpoint import load
from distributed import ParallelConfig, Watch, World, each_term
from eval.faults import Child, free_port

FROZEN = [*DIFFUSION, "--prefix_attention=bidirectional"]
WAYS = {
    "ar": [],
    "joint": DIFFUSION,
    "modern": CASES["modern"],
    "both": [*CASES["both"], "--self_conditioning"],  # the last term leaves a layer unused
    "annealed": CASES["annealed"],
    "frozen": [*FROZEN, "--self_conditioning"],
    "encoder_decoder": [*FROZEN, "--arch=encoder_decoder"],
}

# Muon multiplies in bfloat16: a last bit of the gradient may turn into a 256th of an entry of its step, and what
# follows is the gradient at weights that far apart. The promise is the gradient at the same weights.
AFTER_MUON = 1e-2


@pytest.fixture(scope="module")
def copy_set(tmp_path_factory) -> Path:
    return make_set(tmp_path_factory.mktemp("sets") / "copy")


def keep_gradients(out: Path) -> None:
    """Let the leader save every parameter's gradient, put together, before each step."""
    clip, every = torch.nn.utils.clip_grad_norm_, []

    def watched(parameters, *rest):
        parameters = list(parameters)
        grads = [train.whole_tensor(p.grad).clone() for p in parameters]
        every.append(grads)
        if os.environ.get("RANK", "0") == "0":
            torch.save(every, out.with_suffix(".grads"))
        return clip(parameters, *rest)

    torch.nn.utils.clip_grad_norm_ = watched


def start(processes: int, work) -> list[Child]:
    """work(rank) in so many connected processes."""
    port, children = free_port(), []
    for rank in range(processes):
        env = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children.append(Child(lambda rank=rank: work(rank), Path(f"said_{rank}"), **(env if processes > 1 else {})))
    return children


@pytest.fixture
def run(copy_set, tmp_path, monkeypatch):
    """run(processes, *flags, out="a") trains in tmp_path/a: gradients of every step and what was said."""
    monkeypatch.chdir(tmp_path)

    def run(processes: int, *flags: str, out: str = "a", code: int = 0, before=lambda rank: None):
        for old in tmp_path.glob("said_*"):
            old.unlink()

        def work(rank):
            train.measured_flops = lambda *_: 1e12
            keep_gradients(tmp_path / out)
            before(rank)
            train.main([*TINY, f"--data={copy_set}", f"--out_dir={tmp_path / out}", "--patience=30", *flags])

        codes = [child.wait() for child in start(processes, work)]
        said = [(tmp_path / f"said_{rank}").read_text() for rank in range(processes)]
        assert codes == [code] * processes, said
        return torch.load(tmp_path / f"{out}.grads") if code == 0 and (tmp_path / f"{out}.grads").exists() else said

    return run


def relative(a: list, b: list) -> float:
    """The largest distance of two steps' gradients, in norms of all of them."""
    return max(
        sum((x - y).norm() ** 2 for x, y in zip(one, other)).sqrt() / sum(x.norm() ** 2 for x in one).sqrt()
        for one, other in zip(a, b)
    ).item()


def furthest(a: dict, b: dict) -> float:
    return max((a["model"][name] - b["model"][name]).abs().max().item() for name in a["model"])


@pytest.mark.parametrize("way", ["modern", pytest.param("both", marks=pytest.mark.slow)])
def test_two_processes_compute_the_gradient_of_one(way, run, tmp_path):
    """Accumulation too: of four processes, or two with two micro-batches each. Three steps, so weights follow."""
    flags = [*WAYS[way], "--optimizer=adamw", "--max_steps=3"]
    one, two = run(1, *flags, out="one"), run(2, *flags, "--grad_accum_steps=2", out="two")
    assert relative(one, two) < 1e-5
    logs = [lasting(read_log(tmp_path / name)) for name in ("one", "two")]
    for a, b in zip(*logs):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["lr"] == a["lr"]
        assert b.get("ar_loss", 0) == pytest.approx(a.get("ar_loss", 0), rel=1e-5)
    assert logs[1][-1]["val_loss"] == pytest.approx(logs[0][-1]["val_loss"], rel=1e-5)
    assert logs[1][-1].get("val_loss_by_rate", {}) == pytest.approx(logs[0][-1].get("val_loss_by_rate", {}), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_one_two_and_four_processes_compute_one_gradient(way, run):
    """Every way of reading prefix and target. Muon too, of which every process makes the same step. A minute."""
    flags = [*WAYS[way], "--max_steps=2"]
    one = run(1, *flags, out="one")
    for processes, accum in ((2, 1), (2, 2), (4, 1)):
        found = run(processes, *flags, f"--grad_accum_steps={accum}", out=f"{processes}_{accum}")
        assert relative(one[:1], found[:1]) < 1e-5, (processes, accum)
        assert relative(one, found) < AFTER_MUON, (processes, accum)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_shared_out_model_computes_the_same(way, run, tmp_path):
    """FSDP = DDP = single, for both optimizers' state: three steps. A minute."""
    for optimizer in ("adamw", "muon"):
        flags = [*WAYS[way], f"--optimizer={optimizer}", "--max_steps=3", "--learning_rate=0.001"]
        one = run(1, *flags, out=f"one_{optimizer}")
        two = run(2, *flags, "--parallel=fsdp", out=f"two_{optimizer}")
        assert relative(one[:1], two[:1]) < 1e-5
        assert relative(one, two) < (1e-5 if optimizer == "adamw" else AFTER_MUON)
        states = [load(tmp_path / f"{name}_{optimizer}" / "ckpt.pt") for name in ("one", "two")]
        assert furthest(*states) < (1e-5 if optimizer == "adamw" else 1e-3)


def test_a_model_shared_out_in_two_is_the_model(run, tmp_path):
    """The quick one of those above: AdamW and joint attention, in blocks; held-out loss and sample too."""
    flags = [*WAYS["modern"], "--optimizer=adamw", "--max_steps=2", "--sample_interval=1"]
    one, two = run(1, *flags, out="one"), run(2, *flags, "--parallel=fsdp", out="two")
    assert relative(one, two) < 1e-5
    logs = [lasting(read_log(tmp_path / name)) for name in ("one", "two")]
    assert logs[1][-1]["val_loss"] == pytest.approx(logs[0][-1]["val_loss"], rel=1e-5)
    said = (tmp_path / "said_0").read_text()
    assert said.count(" sample: ") == 2 and (tmp_path / "said_1").read_text() == ""


@pytest.mark.slow
def test_bfloat16_shards_compute_about_the_same(run, tmp_path):
    """Weights gathered in bfloat16 against autocast's: 2% of the gradient. 5 s."""
    flags = [*DIFFUSION, "--optimizer=adamw", "--max_steps=2", "--dtype=bfloat16"]
    one, two = run(1, *flags, out="one"), run(2, *flags, "--parallel=fsdp", out="two")
    assert 1e-6 < relative(one, two) < 0.02
    weights = load(tmp_path / "two" / "ckpt.pt")["model"]
    assert all(value.dtype == torch.float32 for value in weights.values())


@pytest.mark.slow
def test_shards_of_two_are_read_by_one_and_by_four(run, tmp_path):
    """Written at world size 2, gone on with at 1 (no shards), 2 and 4: the run that was never cut. A minute."""
    flags = [*WAYS["modern"], "--optimizer=adamw", "--schedule=constant"]
    run(1, *flags, "--max_steps=4", out="whole")
    whole = load(tmp_path / "whole" / "ckpt.pt")
    for processes, parallel in ((1, "ddp"), (2, "fsdp"), (4, "fsdp"), (2, "ddp")):
        out = f"{processes}_{parallel}"
        run(2, *flags, "--max_steps=2", "--parallel=fsdp", out=out)
        assert (tmp_path / out / "ckpt.pt").is_dir()
        run(processes, *flags, "--max_steps=4", "--init_from=resume", f"--parallel={parallel}", out=out)
        found = load(tmp_path / out / "ckpt.pt")
        assert found["step"] == 4 and furthest(whole, found) < 1e-5, out
        assert (tmp_path / out / "ckpt.pt").is_dir() == (parallel == "fsdp")
        said = (tmp_path / "said_0").read_text()
        assert ("from here on equal to rounding" in said) == ((processes, parallel) != (2, "fsdp"))
    run(4, *flags, "--max_steps=6", "--init_from=resume", "--parallel=fsdp", out="whole")  # from a file into shards
    assert load(tmp_path / "whole" / "ckpt.pt")["step"] == 6


@pytest.mark.slow  # three runs of two processes, 2 s
def test_two_processes_go_on_to_the_last_bit(run, tmp_path):
    """With dropout, whose draws differ by process: cut at step 2, as one piece."""
    flags = [*WAYS["joint"], "--dropout=0.2", "--schedule=constant"]
    run(2, *flags, "--max_steps=4", out="whole")
    run(2, *flags, "--max_steps=2", out="parts")
    run(2, *flags, "--max_steps=4", "--init_from=resume", out="parts")
    whole, parts = (load(tmp_path / name / "ckpt.pt") for name in ("whole", "parts"))
    assert same(whole["model"], parts["model"]) and same(whole["optimizer"], parts["optimizer"])
    assert "not to the last bit" not in (tmp_path / "said_0").read_text()


def test_gradients_are_exchanged_once_a_step(run, tmp_path):
    """Two micro-batches of two terms: four backward passes, and one exchange of the one bucket there is."""
    calls = tmp_path / "calls"

    def before(rank):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        wrap = World.wrap

        def hooked(self, model, cfg):
            whole = wrap(self, model, cfg)

            def counted(state, bucket):
                if rank == 0:
                    with open(calls, "a") as file:
                        file.write("x")
                return allreduce_hook(state, bucket)

            whole.register_comm_hook(None, counted)
            return whole

        World.wrap = hooked

    run(2, *DIFFUSION, "--grad_accum_steps=2", "--max_steps=3", before=before)
    steps = len(calls.read_text()) / 3
    assert steps == int(steps) <= 2  # DDP's first step has a bucket order of its own


def test_the_rows_of_all_processes_are_the_batch():
    seen = []
    for size, parts in ((1, 1), (2, 3), (4, 2)):
        rows = []
        for rank in range(size):
            world = World(torch.device("cpu"))
            world.rank, world.size = rank, size
            for part in range(parts):
                found = world.rows(24, parts, part)
                rows += range(24)[found]
        seen.append(rows)
    assert seen == [list(range(24))] * 3


def test_a_term_too_many_is_an_error_and_not_left_out():
    terms = iter([torch.ones(()), torch.ones(())])
    with pytest.raises(AssertionError, match="more than 1 terms"):
        list(each_term(lambda do: do(), terms, 1, last=True))


@pytest.mark.parametrize(
    "flags, says",
    [
        (
            ["--batch_size=6", "--grad_accum_steps=2"],
            "must be a multiple of grad_accum_steps times processes, got 6, 2",
        ),
        (["--init_from=nowhere.pt"], "nowhere.pt: no such checkpoint"),
        (["--parallel=fsdp", "--compile"], "compile and parallel=fsdp are not tried together"),
    ],
)
def test_a_mistake_ends_all_processes_with_its_line(flags, says, copy_set, tmp_path, monkeypatch):
    """The leader says it. The others would wait at the barrier until torchrun ends them."""
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", *flags]
    first, second = start(2, lambda rank: train.main(argv))
    assert first.wait() == 2
    os.kill(second.pid, signal.SIGTERM)
    second.wait()
    said = Path("said_0").read_text()
    assert says in said and said.count("error:") == 1 and "Traceback" not in said


def test_shards_need_processes_that_are_connected(copy_set, tmp_path):
    with pytest.raises(ValueError, match="start them with torchrun, or go on with --parallel=ddp"):
        train.main([*TINY, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", "--parallel=fsdp"])


@pytest.mark.parametrize("settings", [{"parallel": "tp"}, {"patience": 0.0}])
def test_a_setting_that_is_none_is_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be"):
        ParallelConfig(**settings)


def test_settings_that_differ_between_processes_are_named(copy_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", "--patience=5"]
    children = start(2, lambda rank: train.main([*argv, f"--seed={7 + rank}"]))
    codes = [child.wait() for child in children]
    said = Path("said_0").read_text() + Path("said_1").read_text()
    assert codes == [2, 2] and "process 1 has settings" in said and "--seed=8" in said, said


@pytest.mark.slow  # it waits three seconds for a process that is dead
def test_who_dies_at_the_very_end_leaves_no_traceback(copy_set, tmp_path, monkeypatch):
    """The last barrier stood outside of what turns a broken connection into a line."""
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", "--patience=5", "--max_steps=1"]

    def work(rank):
        if rank == 1:
            World.leave = lambda self: os.kill(os.getpid(), signal.SIGKILL)
        train.measured_flops = lambda *_: 1e12
        train.main(argv)

    codes = [child.wait() for child in start(2, work)]
    said = Path("said_0").read_text()
    assert codes == [2, -signal.SIGKILL] and "Traceback" not in said, said
    assert "error: process 0 lost the others at the end: process 1 (" in said, said


class Store(dict):
    """What a Watch needs of torch's store."""

    set = dict.__setitem__

    def multi_get(self, keys):
        return [str(self[key]).encode() for key in keys]


@pytest.fixture
def watches():
    """Three processes' watches on one store; the third one's thread is the only one that is over."""
    store = Store()
    made = [Watch(store, rank, 3, patience=1.0) for rank in range(3)]
    yield made
    for watch in made:
        watch.over.set()


def test_who_is_behind_and_who_says_nothing_is_named(watches):
    for watch in watches:
        watch.count, watch.where = 5, "in step 2"
    time.sleep(0.3)
    assert watches[0].culprit(0.5) == ""
    watches[1].count, watches[1].where = 4, "in the backward pass of step 1"
    watches[2].over.set()
    time.sleep(0.3)
    assert re.fullmatch(
        r"process 1 \(.*, pid \d+\) hangs in the backward pass of step 1 and process 2 \(.*, pid \d+\) is dead or "
        "stopped; last heard of in step 2",
        watches[0].culprit(0.5),
    )


def test_a_store_that_is_gone_is_what_is_named(watches):
    """With the process that held it: the line said only that a connection was reset."""

    def gone(keys):
        raise RuntimeError("Connection reset by peer")

    watches[0].over.set()
    watches[0].store.multi_get = gone
    assert watches[0].culprit(0.1).startswith("torchrun's store does not answer, the process that holds it is gone")


def test_a_store_that_never_answers_ends_the_process(monkeypatch, capsys):
    """Its host was stopped: torch's multi_get then waited without end, and so did the process."""

    class Silent(Store):
        def multi_get(self, keys):
            time.sleep(1.0)
            return super().multi_get(keys)

    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    watch = Watch(Silent(), 0, 1, patience=0.2)
    assert ended.wait(3.0)
    watch.over.set()
    assert "error: torchrun's store does not answer: not a word in 0.2 s" in capsys.readouterr().err


@pytest.mark.parametrize("goes_on", [True, False])
def test_who_goes_on_while_it_listens_names_nobody(goes_on, monkeypatch, capsys):
    """Where the first step took long, what the leader had told last was older than the step it had taken meanwhile."""
    listened, ended = threading.Event(), threading.Event()

    class Slow(Watch):
        def culprit(self, seconds):
            self.count += goes_on
            listened.set()
            return "process 1 hangs at the start"

    monkeypatch.setattr(os, "_exit", lambda code: ended.set())
    watch = Slow(Store(), 0, 2, patience=0.1)
    assert listened.wait(5.0) and ended.wait(0.3 if goes_on else 5.0) != goes_on
    watch.over.set()
    assert ("hangs" in capsys.readouterr().err) != goes_on


def torchrun(*args: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *args],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_torchrun_trains_and_stops_and_goes_on(copy_set, tmp_path):
    """The command line, and SIGTERM to torchrun: all stop after one step, with its checkpoint. 20 s: four Pythons."""
    argv = ["train.py", *TINY, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", "--max_steps=100000"]
    process = torchrun("--standalone", "--nproc_per_node=2", *argv)
    log = tmp_path / "a" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    steps = read_log(tmp_path / "a")[-1]["step"]
    assert "stopped by SIGTERM at step" in said and load(tmp_path / "a" / "ckpt.pt")["step"] == steps, said
    more = [*argv[:-1], f"--max_steps={steps + 2}", "--init_from=resume", "--schedule=linear"]
    process = torchrun("--standalone", "--nproc_per_node=2", *more)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and load(tmp_path / "a" / "ckpt.pt")["step"] == steps + 2, said


@pytest.mark.slow
def test_two_nodes_train_what_one_process_does(copy_set, tmp_path, run):
    """Two torchrun agents that meet at a port of this machine, one process each. 15 s."""
    flags = [*WAYS["modern"], "--optimizer=adamw", "--max_steps=3"]
    run(1, *flags, out="one")
    port = free_port()
    agents = [
        torchrun(
            *("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"),
            *("--local_addr=127.0.0.1", "--rdzv_id=test", "train.py", *TINY, *flags),
            *(f"--data={copy_set}", f"--out_dir={tmp_path / 'two'}"),
        )
        for _ in range(2)
    ]
    said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert furthest(*(load(tmp_path / name / "ckpt.pt") for name in ("one", "two"))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_torchrun_ends_where_one_process_does_not_go_on(number, copy_set, tmp_path):
    """Killed: torchrun names it at once. Stopped: the other does after --patience. 20 s."""
    argv = ["train.py", *TINY, f"--data={copy_set}", f"--out_dir={tmp_path / 'a'}", "--max_steps=100000"]
    process = torchrun("--standalone", "--nproc_per_node=2", *argv, "--patience=5")
    log = tmp_path / "a" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.05)
    lines = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True).stdout.splitlines()[1:]
    children = [int(pid) for pid, parent in map(str.split, lines) if int(parent) == process.pid]
    victim = max(children)
    os.kill(victim, number)
    said, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    if number == signal.SIGKILL:
        assert f"(pid: {victim})" in said and "exitcode  : -9" in said, said
    else:
        assert f"pid {victim}) is dead or stopped; last heard of" in said, said
