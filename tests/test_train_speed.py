"""The benchmark of training runs at tiny sizes and writes down all it says. How fast anything is stands in results/."""

import json
from pathlib import Path

import pytest
import torch

import autoregressive
from cost import forward_flops
from eval import train_speed
from eval.timing import GPT2_BLOCK, batch_of, model_config
from model import ModelConfig, Transformer
from runs.speed_tables import lines_table
from runs.tables import TRAINING

THEIRS = Path(__file__).parents[2] / "nanoGPT"

# What the benchmark uses of nanoGPT's model.py, with a network of one layer.
NANOGPT = """
from dataclasses import dataclass
import torch
from torch.nn import Embedding, functional as F

@dataclass
class GPTConfig:
    n_layer: int; n_head: int; n_embd: int; vocab_size: int; block_size: int; dropout: float; bias: bool

class GPT(Embedding):
    def __init__(self, config):
        super().__init__(config.vocab_size, config.vocab_size)

    def forward(self, read, expected):
        logits = super().forward(read)
        return logits, F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=-1)

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""


def tiny() -> train_speed.Shapes:
    sizes = dict(n_layer=1, n_head=2, n_embd=16)
    return train_speed.Shapes(
        six=sizes | dict(vocab_size=20) | GPT2_BLOCK,
        gpt2=sizes | dict(vocab_size=40) | GPT2_BLOCK,
        small=sizes | dict(vocab_size=30),
        batch=dict(six=(2, 8), gpt2=(2, 8), small=(2, 8)),
        product=64,
    )


@pytest.fixture(scope="module", autouse=True)
def bfloat16_is_left_in():
    """At these sizes any processor computes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_speed, "computes_bfloat16", lambda device: True)
        yield


@pytest.fixture(scope="module")
def nanogpt(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nanogpt")
    (folder / "model.py").write_text(NANOGPT)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(the lines, the file) of a run of the lines that need no other process."""
    out = tmp_path_factory.mktemp("speed") / "results" / "speed_train.json"
    lines = train_speed.main([f"--out={out}", "--runs=2", "--only=unroll,anneal,memory,loader"], tiny())
    return lines, out


def names_of(lines: list[dict]) -> list[str]:
    """Each line has a positive ratio that lies in its range, from two timed runs and a warm-up of its own."""
    for line in lines:
        assert 0 < line["ratio"]["low"] <= line["ratio"]["median"] <= line["ratio"]["high"]
        if line["name"] != "memory":
            assert all(len(times) == 2 and line["warmup"][name] > 0 for name, times in line["times"].items())
    return [line["name"] for line in lines]


def test_every_line_is_measured(measured):
    names = ["unroll", "unroll", "mfu"] * 5 + ["anneal"] * 6 + ["memory"] * 4 + ["loader"] * 2
    assert names_of(measured[0]) == names


@pytest.mark.slow  # starts four processes
def test_a_step_beside_nanogpts_is_measured(nanogpt, monkeypatch):
    monkeypatch.setitem(train_speed.CASES, "train", train_speed.ALL[:1])
    lines = train_speed.main([f"--nanogpt={nanogpt}", "--runs=2", "--only=train"], tiny())
    assert names_of(lines) == ["train", "kept", "mfu"]


@pytest.mark.slow  # starts train.py six times
def test_two_processes_are_timed_beside_one():
    lines = train_speed.main(["--runs=1", "--quick", "--only=processes"], tiny())
    assert [line["name"] for line in lines] == ["processes"] and lines[0]["ratio"]["median"] > 0
    assert all(len(times) == 1 for times in lines[0]["times"].values())


@pytest.mark.skipif(not (THEIRS / "model.py").exists(), reason="no checkout of karpathy/nanoGPT in ../nanoGPT")
def test_from_one_start_ours_and_nanogpts_losses_fall_together(monkeypatch):
    monkeypatch.setitem(train_speed.CASES, "loss", [("six", "float32")])
    flags = ["--only=loss", "--loss_steps=12", "--loss_warmup=0", "--loss_rate=5e-3"]
    (line,) = train_speed.main([f"--nanogpt={THEIRS}", *flags], tiny())
    ours, theirs = line["note"]["losses"].values()
    assert len(ours) == 12 and ours[-1] < ours[0] and max(line["times"]["difference"]) < 1e-3


def test_the_file_holds_what_the_table_was_made_of_and_is_gone_on_with(measured, capsys):
    lines, out = measured
    written = json.loads(out.read_text())
    assert written["lines"] == lines
    assert written["seed"] == 1337 and written["command"].startswith("python -m eval.train_speed --out=")
    assert all(written[name] for name in ("hardware", "threads", "torch", "python", "commit"))
    again = train_speed.main([f"--out={out}", "--only=memory,loader"], tiny())
    assert again == lines and capsys.readouterr().out.count("already") == 4


def test_what_the_processor_does_not_compute_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "computes_bfloat16", lambda device: False)
    lines = train_speed.main(["--runs=2", "--only=memory"], tiny())
    assert {line["case"] for line in lines} == {"six float32"}
    assert "memory six bfloat16: left out, this processor has no bfloat16" in capsys.readouterr().out


def test_the_table_shows_them_with_their_units(measured):
    table = lines_table(measured[1].parent, TRAINING)
    assert table.count("| memory") == 4 and " MB" in table and "| loader" in table and "MFLOP/token" in table


def test_the_mask_of_an_annealed_step_is_half_open(monkeypatch):
    """Every pass must see its form's mask: at step 0 of 2 a band of half of the target is open."""
    seen, shapes, decode = [], tiny(), Transformer.decode

    def spied(self, *args, **kwargs):
        seen.append(kwargs.get("opened"))
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "decode", spied)
    cfg, batch = train_speed.TrainSpeedConfig(), batch_of(shapes.small, 2, 4, 4, seed=0)
    for settings in ({}, dict(anneal_steps=2, anneal_form="band")):
        train_speed.our_step(cfg, shapes.small | train_speed.FROZEN, batch, **settings)()
    assert seen[:2] == [None, None] and len(seen) == 4  # two passes each
    assert seen[2].tolist() == [[j <= i + 1 for j in range(4)] for i in range(4)]


def test_flops_of_two_passes_are_twice_those_of_one(measured):
    """Joint attention over the same tokens, the head over half of them: two passes and one, by cost.py."""
    notes = {line["name"] + line["case"]: line["note"] for line in measured[0]}
    shape = ModelConfig(**model_config(tiny().six, 4, 4))
    one = 3 * forward_flops(shape, 4, 4) / 8
    assert notes["unrollsix bfloat16"]["flops_per_token"] == 2 * one


def test_without_nanogpt_its_lines_are_left_out_and_said_so(capsys):
    assert train_speed.main(["--only=train,loss"], tiny()) == []
    assert capsys.readouterr().out.count("left out") == 6


def test_an_unknown_line_or_clock_stops_the_run():
    with pytest.raises(ValueError, match="there are train, unroll, memory, loader, anneal"):
        train_speed.main(["--only=trian"], tiny())
    with pytest.raises(ValueError, match="cpu with --threads=1"):
        train_speed.main(["--clock=cpu"], tiny())


@pytest.mark.slow  # starts Python, 3 s
def test_a_step_apart_tells_its_seconds_and_ends():
    cfg = train_speed.TrainSpeedConfig()
    apart = train_speed.Apart(cfg, False, train_speed.product_step, cfg, 1e9, "float32", 8)
    assert 0 < apart() < 10
    apart.end()
    assert apart.process.exitcode == 0


def test_nanogpts_weights_have_our_names():
    """Those of its GPT without biases, written down from its model.py; shapes are checked by load_state_dict."""
    block = ("ln_1.weight", "attn.c_attn.weight", "attn.c_proj.weight", "ln_2.weight", "mlp.c_fc.weight")
    theirs = [f"transformer.h.0.{name}" for name in (*block, "mlp.c_proj.weight")]
    theirs += ["transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "lm_head.weight"]
    model = Transformer(ModelConfig(**model_config(tiny().six, 0, 8)))
    assert set(train_speed.as_ours({name: torch.zeros(1) for name in theirs})) == set(model.state_dict())


def test_an_empty_prefix_reads_the_target_alone():
    """What line `train` relies on: with no prefix our AR loss is next-token cross-entropy over the row."""
    cfg = model_config(tiny().six, 0, 8)
    model = Transformer(ModelConfig(**cfg))
    batch = batch_of(cfg, 2, 0, 8, seed=0)
    logits = model(batch.prefix, batch.target)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.target[:, 1:])
    torch.testing.assert_close(autoregressive.loss(model, batch, None, None), expected)
