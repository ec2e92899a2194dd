"""The benchmark runs at tiny sizes and writes down all it says. How fast anything is stands in results/, not here."""

import json

import pytest
import torch

from eval import speed

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


def tiny() -> speed.Shapes:
    sizes = dict(n_layer=1, n_head=2, n_embd=16)
    return speed.Shapes(
        six=sizes | dict(vocab_size=20) | speed.GPT2_BLOCK,
        gpt2=sizes | dict(vocab_size=40) | speed.GPT2_BLOCK,
        small=sizes | dict(vocab_size=30),
        batch=dict(six=(2, 8), gpt2=(2, 8), small=(2, 8)),
        prompt=3,
        long_prompt=9,
        new=6,
        decode_batches=(1, 2),
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(the lines, the file) of a run with all four lines."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("speed")
    (folder / "model.py").write_text(NANOGPT)
    out = folder / "results" / "speed.json"
    lines = speed.main([f"--nanogpt={folder}", f"--out={out}", "--runs=2"], tiny())
    return lines, json.loads(out.read_text())


def test_all_four_lines_are_measured(measured):
    """Each with a positive ratio that lies in its range, from two timed runs and a warm-up of its own."""
    lines, _ = measured
    assert [line["name"] for line in lines] == ["train"] * 4 + ["unroll"] * 6 + ["decode"] * 2 + ["prefix"]
    for line in lines:
        assert 0 < line["ratio"]["low"] <= line["ratio"]["median"] <= line["ratio"]["high"]
        assert all(len(times) == 2 and line["warmup"][name] > 0 for name, times in line["times"].items())


def test_the_file_holds_what_the_table_was_made_of(measured):
    lines, written = measured
    assert written["lines"] == lines
    assert written["seed"] == 1337 and written["command"].startswith("python -m eval.speed --nanogpt=")
    assert all(written[name] for name in ("hardware", "threads", "torch", "python", "commit"))


def test_both_decoders_say_the_same(measured):
    """Same weights, same prompt: our cache and GPT-2's block against transformers, token by token."""
    decoded = [line["note"] for line in measured[0] if line["name"] == "decode"]
    assert all(note["share_of_equal_tokens"] == 1 and note["network_calls"] == 6 for note in decoded)


def test_systems_take_turns():
    """A B, B A, A B: a slow drift of the machine falls on both."""
    order = []
    times, _ = speed.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 0.5}, runs=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert times["b"] == [0.5] * 3  # a system may bring its own clock


def test_a_rate_is_the_inverse_of_the_seconds():
    times = {"ours": [1.0, 2.0], "theirs": [2.0, 2.0]}
    assert speed.Line("n", "c", "ours", "theirs", "", times, {}).ratios == [0.5, 1.0]
    assert speed.Line("n", "c", "ours", "theirs", "", times, {}, rate=True).ratios == [2.0, 1.0]


def test_without_nanogpt_its_line_is_left_out_and_said_so(capsys):
    assert speed.main(["--only=train"], tiny()) == []
    assert "left out" in capsys.readouterr().out


def test_an_unknown_line_stops_the_run():
    with pytest.raises(ValueError, match="there are train, unroll"):
        speed.main(["--only=trian"], tiny())


def test_an_empty_prefix_reads_the_target_alone():
    """What line `train` relies on: with no prefix our AR loss is next-token cross-entropy over the row."""
    cfg = speed.model_config(tiny().six, 0, 8)
    model = speed.Transformer(speed.ModelConfig(**cfg))
    batch = speed.batch_of(cfg, 2, 0, 8, seed=0)
    logits = model(batch.prefix, batch.target)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.target[:, 1:])
    torch.testing.assert_close(speed.autoregressive.loss(model, batch, None, None), expected)
