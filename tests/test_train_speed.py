"""The benchmark of training runs at tiny sizes and writes down all it says. How fast anything is stands in results/."""

import json

import pytest
import torch

import autoregressive
from eval import train_speed
from eval.timing import GPT2_BLOCK, batch_of, model_config
from model import ModelConfig, Transformer

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
        return logits, F.cross_entropy(logits.flatten(0, 1), expected.flatten())

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
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(the lines, the file) of a run with all lines."""
    folder = tmp_path_factory.mktemp("speed")
    (folder / "model.py").write_text(NANOGPT)
    out = folder / "results" / "speed.json"
    lines = train_speed.main([f"--nanogpt={folder}", f"--out={out}", "--runs=2"], tiny())
    return lines, json.loads(out.read_text())


def test_all_lines_are_measured(measured):
    """Each with a positive ratio that lies in its range, from two timed runs and a warm-up of its own."""
    lines, _ = measured
    assert [line["name"] for line in lines] == ["train"] * 4 + ["unroll"] * 6 + ["anneal"] * 6
    for line in lines:
        assert 0 < line["ratio"]["low"] <= line["ratio"]["median"] <= line["ratio"]["high"]
        assert all(len(times) == 2 and line["warmup"][name] > 0 for name, times in line["times"].items())


def test_the_file_holds_what_the_table_was_made_of(measured):
    lines, written = measured
    assert written["lines"] == lines
    assert written["seed"] == 1337 and written["command"].startswith("python -m eval.train_speed --nanogpt=")
    assert all(written[name] for name in ("hardware", "threads", "torch", "python", "commit"))


def test_without_nanogpt_its_line_is_left_out_and_said_so(capsys):
    assert train_speed.main(["--only=train"], tiny()) == []
    assert "left out" in capsys.readouterr().out


def test_an_unknown_line_stops_the_run():
    with pytest.raises(ValueError, match="there are train, unroll, anneal"):
        train_speed.main(["--only=trian"], tiny())


def test_the_mask_of_an_annealed_step_is_half_open(monkeypatch):
    """A system that is called for must see its form's mask: at step 0 of 2 a band of half of the target is open."""
    seen, shapes = [], tiny()
    monkeypatch.setattr(Transformer, "decode", spy(Transformer.decode, seen))
    batch = batch_of(shapes.small, 2, 4, 4, seed=0)
    cfg = train_speed.TrainSpeedConfig()
    for settings in ({}, dict(anneal_steps=2, anneal_form="band")):
        train_speed.our_step(cfg, shapes.small | train_speed.FROZEN, batch, **settings)()
    assert seen[:2] == [None, None] and len(seen) == 4  # two passes each
    assert seen[2].tolist() == [[j <= i + 1 for j in range(4)] for i in range(4)]


def spy(decode, seen):
    def spied(self, *args, **kwargs):
        seen.append(kwargs.get("opened"))
        return decode(self, *args, **kwargs)

    return spied


def test_an_empty_prefix_reads_the_target_alone():
    """What line `train` relies on: with no prefix our AR loss is next-token cross-entropy over the row."""
    cfg = model_config(tiny().six, 0, 8)
    model = Transformer(ModelConfig(**cfg))
    batch = batch_of(cfg, 2, 0, 8, seed=0)
    logits = model(batch.prefix, batch.target)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.target[:, 1:])
    torch.testing.assert_close(autoregressive.loss(model, batch, None, None), expected)
