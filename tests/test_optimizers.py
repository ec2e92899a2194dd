"""infra/optimizers.py: the learning rate by hand, which parameter goes where, Muon's update."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from eval_models import tiny_model

from infra.optimizers import learning_rate_at, make_optimizers, set_learning_rate

model = partial(tiny_model, n_layer=2, bias=True)


def config(**changes):
    defaults = dict(optimizer="muon", learning_rate=1.0, weight_decay=0.3, warmup_steps=4)
    return SimpleNamespace(**defaults | dict(max_steps=14, schedule="linear") | changes)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", {0: 0.25, 3: 1.0, 4: 1.0, 9: 1.0, 13: 1.0}),
        ("linear", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 0.5, 13: 0.1}),
        ("cosine", {3: 1.0, 4: 1.0, 9: 0.5, 13: 0.5 * (1 - 0.9510565)}),
    ],
)
def test_the_learning_rate_is_as_by_hand(schedule, expected):
    """Four steps of warm-up, ten of decay."""
    for step, value in expected.items():
        rate = learning_rate_at(step, config(schedule=schedule))
        assert rate == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_matrices_decay(optimizer):
    net = model()
    optimizers = make_optimizers(net, config(optimizer=optimizer))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decayed = [p for group in groups if group["weight_decay"] == 0.3 for p in group["params"]]
    others = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
    assert all(p.dim() == 2 for p in decayed) and all(p.dim() == 1 for p in others)
    # Each parameter once, the tied output layer too.
    assert sorted(map(id, decayed + others)) == sorted(map(id, net.parameters()))


def test_muon_takes_the_matrices_of_the_blocks_only():
    net = model()
    adamw, muon = make_optimizers(net, config())
    names = {id(p): name for name, p in net.named_parameters()}
    params = muon.param_groups[0]["params"]
    assert len(params) == 8 and all(names[id(p)].startswith("blocks.") for p in params)
    set_learning_rate([adamw, muon], 0.01)
    assert (adamw.param_groups[0]["lr"], muon.param_groups[0]["lr"]) == (0.01, 0.05)


def test_muons_update_is_orthogonal():
    """Its singular values lie near 0.2 sqrt(max(rows, columns)) x learning rate, AdamW's size."""
    net = model()
    torch.manual_seed(0)
    _, muon = make_optimizers(net, config(weight_decay=0.0))
    set_learning_rate([muon], 0.01)
    p = muon.param_groups[0]["params"][0]
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    muon.step()
    values = torch.linalg.svdvals(before - p.detach()) / (0.05 * 0.2 * max(p.shape) ** 0.5)
    assert 0.6 < values.min() and values.max() < 1.25
