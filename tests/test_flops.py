"""infra/flops.py: published parameter counts, FLOPs as torch counts them, memory as measured."""

from types import SimpleNamespace

import pytest
import torch
from memory import peak_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import autoregressive
import diffusion
from data.objectives import Batch
from infra.device import autocast
from infra.flops import estimate, forward_flops, memory, out_of_memory_message, train_flops
from infra.rng import make_rng
from model import ModelConfig, build_model, meta_model, num_params

GPT2 = dict(norm="layernorm", activation="gelu_tanh", position="learned", bias=True)
GPT2 |= dict(vocab_size=50257, n_ordinary=50254, pad_id=50254, sep_id=50255, mask_id=50256)
GPT2 |= dict(block_size=1024)
LLAMA = dict(vocab_size=128256, n_ordinary=128000, pad_id=128001, sep_id=128002, mask_id=128003)
LLAMA |= dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_hidden=8192)
PALM = dict(vocab_size=256000, n_ordinary=255900, pad_id=255997, sep_id=255998, mask_id=255999)
BASE = PALM | dict(n_layer=12, n_head=12, n_embd=768, n_hidden=2048)  # T5 1.1's shape
LARGE = PALM | dict(n_layer=24, n_head=16, n_embd=1024, n_hidden=2816)
XL = PALM | dict(n_layer=24, n_head=32, n_embd=2048, n_hidden=5120)
ENCODER_DECODER = dict(arch="encoder_decoder", prefix_attention="bidirectional")


@pytest.mark.parametrize(
    "settings, millions, tolerance",
    [
        (GPT2 | dict(n_layer=12, n_head=12, n_embd=768), 124.439808, 1e-9),
        (GPT2 | dict(n_layer=24, n_head=16, n_embd=1024), 354.823168, 1e-9),
        (LLAMA, 1235.814400, 1e-9),
        # arXiv 2401.17181, sections 4.1 and 4.3. "Large (270M)" there must be a misprint of 570M.
        (BASE, 280, 2),
        (LARGE, 570, 1),
        (XL, 1700, 20),
        (BASE | ENCODER_DECODER | dict(tie_weights=False), 590, 2),
    ],
)
def test_parameter_counts_are_the_published_ones(settings, millions, tolerance):
    cfg = ModelConfig(**dict(block_size=64) | settings)
    assert num_params(meta_model(cfg)) / 1e6 == pytest.approx(millions, abs=tolerance)


TINY = dict(vocab_size=24, n_ordinary=20, pad_id=20, sep_id=21, mask_id=22, n_layer=2, n_head=4)
TINY |= dict(n_embd=16, block_size=32, n_hidden=24)
DIFFUSION = dict(paradigm="diffusion", target_attention="bidirectional")
CASES = {
    "causal": dict(),
    "prefix LM": dict(prefix_attention="bidirectional"),
    "joint": DIFFUSION | dict(prefix_attention="joint"),
    "cached": DIFFUSION | dict(prefix_attention="bidirectional"),
    "wide heads": dict(head_dim=8, n_kv_head=2),
    "gelu": dict(activation="gelu", tie_weights=False),
    "encoder-decoder": ENCODER_DECODER | dict(head_dim=2),
    "encoder-decoder, diffusion": ENCODER_DECODER | DIFFUSION,
}


def flops_by_torch(compute, model, batch) -> int:
    """Return the FLOPs of all matrix products for one row, by torch's own counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        compute(model, batch)
    return counter.get_total_flops() // len(batch.example)


def batch_of(rows: int, prefix: int, target: int) -> Batch:
    texts = torch.randint(20, (rows, prefix)), torch.randint(20, (rows, target))
    return Batch(*texts, torch.arange(rows))


def train(model, batch) -> None:
    """Compute the gradients of a step."""
    paradigm = diffusion if model.cfg.paradigm == "diffusion" else autoregressive
    rng = make_rng(0, batch.example)
    for term in paradigm.losses(model, batch, diffusion.LossConfig(), rng):
        term.backward()


@pytest.mark.parametrize("case", CASES)
def test_flops_equal_torchs_count(case):
    """A training step costs three forward passes, because each product has two backwards.

    One exception: what the last block computes from a cached prefix, except keys and values, has
    no backward. We count it all the same.
    """
    cfg = ModelConfig(**TINY | CASES[case])
    model, batch = build_model(cfg), batch_of(3, 7, 5)
    forward = flops_by_torch(lambda *_: model(batch.prefix, batch.target), model, batch)
    assert forward == forward_flops(cfg, 7, 5)
    without_backward = 0
    if case in ("prefix LM", "cached"):
        without_backward = 2 * 2 * 7 * (16 * 16 + 3 * 16 * 24 + 2 * 7 * 16)
    step = flops_by_torch(train, model, batch)
    assert train_flops(cfg, 7, 5, unroll_steps=2) == step + without_backward


MEMORY = dict(n_layer=4, n_head=4, n_embd=64, vocab_size=600, n_ordinary=500, pad_id=500)
MEMORY |= dict(sep_id=501, mask_id=502, block_size=128, target_length=64)
JOINT = DIFFUSION | dict(prefix_attention="joint")
PEAKS = {
    "ar": {},
    "joint": JOINT,
    "cached, self-conditioning": CASES["cached"] | dict(shift=True, self_conditioning=True),
    "gelu, learned positions": JOINT | GPT2 | MEMORY,
    "activation checkpointing": JOINT,
    "bfloat16": JOINT,
    "encoder-decoder": CASES["encoder-decoder, diffusion"],
}


def config(model_cfg: ModelConfig, **changes):
    """Return what infra/flops.py reads of a TrainConfig."""
    cfg = dict(model=model_cfg, optimizer="adamw", dtype="float32", activation_checkpointing=False)
    cfg |= dict(device="cpu", seed=0, batch_size=8, grad_accum_steps=1, max_steps=10)
    cfg["loss"] = diffusion.LossConfig()
    return SimpleNamespace(**cfg | changes)


# bfloat16 takes seconds on a processor that has none.
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c == "bfloat16" else ()) for c in PEAKS]
)
def test_the_memory_estimate_is_near_the_measured_peak(case):
    """Compare with what torch's profiler counts in a step, without weights and gradients."""
    model_cfg = ModelConfig(**MEMORY | PEAKS[case])
    model = build_model(model_cfg).train()
    model.activation_checkpointing = case == "activation checkpointing"
    batch = batch_of(8, 64, 64)
    dtype = "bfloat16" if case == "bfloat16" else "float32"

    def step():
        with autocast(torch.device("cpu"), dtype):
            train(model, batch)

    step()  # gradients exist
    measured, params = peak_bytes(step), num_params(model)
    checkpointing = model.activation_checkpointing
    cfg = config(model_cfg, dtype=dtype, activation_checkpointing=checkpointing)
    parts = memory(cfg, 8, 64, 64)
    copies = parts["weights"] - 4 * params  # autocast's
    assert parts["activations"] + parts["logits"] + copies == pytest.approx(measured, rel=1 / 5)


def test_adamw_takes_sixteen_bytes_per_parameter_and_muon_twelve():
    """n_embd 4, hidden 6: qkv 4 x 12, projection 4 x 4, up 4 x 12, down 6 x 4, in two blocks."""
    sizes = dict(vocab_size=5, n_ordinary=2, pad_id=2, sep_id=3, mask_id=4, n_layer=2, n_head=2)
    model_cfg = ModelConfig(**sizes, n_embd=4, n_hidden=6, block_size=8)
    params = num_params(meta_model(model_cfg))
    parts = memory(config(model_cfg), 1, 1, 1)
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16 * params
    muon = 2 * (48 + 16 + 48 + 24)
    parts = memory(config(model_cfg, optimizer="muon"), 1, 1, 1)
    assert parts["optimizer"] == 8 * params - 4 * muon


def test_the_estimate_adds_up():
    """A batch of prefixes of 30 tokens, a target of 64."""
    model_cfg = ModelConfig(**MEMORY | JOINT)

    class Dataset:
        block_size = 128

        def batch(self, seed, step, batch_size):
            return batch_of(8, 30, 64)

    result = estimate(config(model_cfg), Dataset())
    flops = 10 * 8 * train_flops(model_cfg, 30, 64, unroll_steps=2)
    assert result["flops"] == flops and result["minutes"] > 0
    message = out_of_memory_message(config(model_cfg), 3, 64)
    assert f"{sum(result['memory'].values()) / 1e9:.2f} GB" in message
