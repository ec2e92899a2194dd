"""optimizers.py: the learning rate is as by hand, matrices decay, Muon takes what is in the blocks."""

import pytest

from model import ModelConfig, Transformer
from optimizers import learning_rate_at, make_optimizers
from train import TrainConfig


@pytest.mark.parametrize(
    "schedule, ratio, expected",
    [
        ("constant", 0.0, {0: 0.25, 3: 1.0, 4: 1.0, 9: 1.0, 13: 1.0}),
        ("linear", 0.0, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 0.5, 13: 0.1}),
        ("linear", 0.2, {4: 1.0, 9: 0.6}),
        ("cosine", 0.0, {3: 1.0, 4: 1.0, 9: 0.5, 13: 0.5 * (1 - 0.9510565)}),
        ("cosine", 0.2, {9: 0.6}),
    ],
)
def test_the_learning_rate_is_as_by_hand(schedule, ratio, expected):
    """Four steps of warm-up, ten of decay."""
    cfg = TrainConfig(learning_rate=1.0, warmup_steps=4, max_steps=14, schedule=schedule, min_lr_ratio=ratio)
    for step, value in expected.items():
        assert learning_rate_at(step, cfg) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_decay_and_nothing_else_does(optimizer):
    cfg = TrainConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=True, optimizer=optimizer, weight_decay=0.3)
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=True))
    groups = [group for found in make_optimizers(model, cfg) for group in found.param_groups]
    decayed = [p for group in groups if group["weight_decay"] == 0.3 for p in group["params"]]
    others = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    assert all(p.dim() == 2 for p in decayed) and all(p.dim() == 1 for p in others)
    assert sorted(map(id, decayed + others)) == sorted(map(id, model.parameters()))  # each once, the tied one too


def test_muon_takes_the_matrices_of_the_blocks_only():
    cfg = TrainConfig(n_layer=2, n_head=2, n_embd=16, block_size=8)
    model = Transformer(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8))
    _, muon = make_optimizers(model, cfg)
    names = {id(p): name for name, p in model.named_parameters()}
    assert len(muon.param_groups[0]["params"]) == 8
    assert all(names[id(p)].startswith("blocks.") for p in muon.param_groups[0]["params"])
