"""recompute.py: the same gradients, less memory."""

from functools import partial

import pytest
import torch
from memory import peak_bytes

import autoregressive
import diffusion
from data.objectives import Batch
from draws import draws_for
from encdec import build_model
from model import ModelConfig
from recompute import recompute_blocks
from train import TrainConfig

PAD = 15
TINY = dict(n_layer=3, n_head=2, n_embd=16, block_size=16, target_length=6)
TINY |= dict(vocab_size=19, n_ordinary=15, pad_id=PAD, sep_id=16, mask_id=17)
DIFFUSION = dict(paradigm="diffusion", target_attention="bidirectional")
CASES = {
    "ar": {},
    "joint": DIFFUSION | dict(prefix_attention="joint"),
    "frozen, everything on": DIFFUSION | dict(prefix_attention="bidirectional", shift=True, self_conditioning=True),
    "causal prefix, AR loss kept": DIFFUSION | dict(shift=True),
    "dropout": DIFFUSION | dict(prefix_attention="bidirectional", dropout=0.3),
    "encoder-decoder": DIFFUSION | dict(arch="encoder_decoder", prefix_attention="bidirectional"),
}


def gradients(case: str, recompute: bool) -> dict[str, torch.Tensor]:
    cfg = ModelConfig(**TINY | CASES[case])
    torch.manual_seed(0)
    model = build_model(cfg).train()
    if recompute:
        recompute_blocks(model)
    ids = torch.randint(0, 15, (3, 11), generator=torch.Generator().manual_seed(1))
    ids[1, 3:5] = PAD
    batch = Batch(ids[:, :5], torch.cat([torch.full((3, 1), 16), ids[:, 6:]], 1), torch.arange(3))
    loss = diffusion.LossConfig(ar_weight=0.5 if "AR loss" in case else 0.0)
    paradigm = autoregressive if cfg.paradigm == "ar" else diffusion
    torch.manual_seed(2)  # dropout
    for term in paradigm.losses(model, batch, loss, draws_for(3, batch.example)):
        term.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_without(case):
    kept, computed = gradients(case, False), gradients(case, True)
    assert kept.keys() == computed.keys() and any(g.abs().max() > 0 for g in kept.values())
    for name in kept:
        torch.testing.assert_close(computed[name], kept[name], rtol=1e-5, atol=1e-7)


def test_a_step_holds_less_memory():
    """Eight blocks: of seven only the input is left, a twentieth of what they hold. Counted by torch's profiler."""
    cfg = ModelConfig(**TINY | dict(n_layer=8, n_embd=32, block_size=128, target_length=64) | CASES["joint"])
    batch = Batch(torch.zeros(4, 64, dtype=torch.long), torch.ones(4, 64, dtype=torch.long), torch.arange(4))
    peaks = []
    for recompute in (False, True):
        model = build_model(cfg).train()
        if recompute:
            recompute_blocks(model)
        loss = partial(diffusion.loss, model, batch, diffusion.LossConfig(unroll_steps=1), draws_for(0, batch.example))
        peaks.append(peak_bytes(lambda loss=loss: loss().backward()))
    assert peaks[1] < 0.45 * peaks[0], peaks


def test_what_runs_without_gradients_is_left_alone():
    model = build_model(ModelConfig(**TINY | CASES["joint"])).eval()
    prefix, target = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    with torch.no_grad():
        before = model(prefix, target)
        recompute_blocks(model)
        assert torch.equal(model(prefix, target), before)


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="compile and gradient_checkpointing exclude each other"):
        TrainConfig(compile=True, gradient_checkpointing=True)
