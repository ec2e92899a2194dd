"""optimizers.py: the learning rate is as by hand, matrices decay, Muon takes what is in the blocks."""

import pytest
import torch

import optimizers
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


@pytest.mark.parametrize("bfloat16", [False, True])
def test_our_muon_is_torchs(bfloat16, monkeypatch):
    """Three steps of wide, tall and square matrices: bit for bit in torch's bfloat16, to its rounding in float32."""
    monkeypatch.setattr(optimizers, "computes_bfloat16", lambda device: bfloat16)
    shapes = [(6, 16), (16, 6), (8, 8)]
    draw = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draw) for shape in shapes]
    models = []
    for kind in (torch.optim.Muon, optimizers.Muon):
        params = [torch.nn.Parameter(start.clone()) for start in starts]
        muon = kind(params, lr=0.1, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        draw.manual_seed(1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=draw)
            muon.step()
        models.append(params)
        assert set(muon.state[params[0]]) == {"momentum_buffer"}
    for theirs, ours, start in zip(*models, starts):
        moved = (theirs - start).norm()
        assert (theirs - ours).norm() <= (1e-6 if bfloat16 else 0.02) * moved


def test_an_update_is_orthogonal(monkeypatch):
    monkeypatch.setattr(optimizers, "computes_bfloat16", lambda device: False)
    group = torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
    update = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))
    found, (u, _, v) = optimizers.orthogonalised(update, group), torch.linalg.svd(update, full_matrices=False)
    along = u.T @ found @ v.T  # diagonal where found has the singular vectors of update
    assert 0.6 < along.diagonal().min() and along.diagonal().max() < 1.25
    assert (along - torch.diag(along.diagonal())).abs().max() < 1e-4
