"""trouble.py: one line that says what to do."""

import json
from dataclasses import asdict

import pytest
import torch

from data.objectives import Batch
from train import TrainConfig
from trouble import explained, is_out_of_memory, keep_bad_batch, no_number


def genuine() -> BaseException:
    """What the CPU's allocator says."""
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error, expected",
    [
        (genuine(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_is_known_in_the_words_of_every_device(error, expected):
    assert is_out_of_memory(error) == expected


def line(now: dict, processes: int = 1, **settings) -> str:
    cfg = TrainConfig(block_size=256, target_length=128, **settings)
    with pytest.raises(ValueError) as error, explained(asdict(cfg), processes) as where:
        where.update(now)
        raise genuine()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_are_what_to_halve_where_they_fill_the_memory():
    said = line({"step": 7, "rows": 32, "prefix": 128, "target": 128})
    assert said.startswith("out of memory at step 7: 32 rows of 256 tokens want about weights 0.00 GB")
    ways = "--grad_accum_steps=2 (the same run, a micro-batch of 16 rows), or --gradient_checkpointing, or --dtype="
    assert f"try {ways}bfloat16" in said
    assert "--grad_accum_steps=3 (the same run, a micro-batch of 4 rows)" in line(
        {"rows": 6, "step": 0, "prefix": 128, "target": 128}, batch_size=12, grad_accum_steps=2
    )


def test_where_parameters_fill_it_they_are_what_to_share_out():
    now = {"step": 0, "rows": 2, "prefix": 8, "target": 8}
    assert "try torchrun with --parallel=fsdp, a smaller --n_embd" in line(now, n_embd=2048, n_layer=8)
    assert "try --parallel=fsdp" in line(now, processes=2, n_embd=2048, n_layer=8)
    assert "try torchrun with --parallel=fsdp" in line(
        {"step": 0, "rows": 1, "prefix": 128, "target": 128}, dtype="bfloat16"
    )


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match="shapes"), explained(asdict(TrainConfig()), 1):
        raise RuntimeError("shapes")


def test_the_batch_of_a_step_without_a_number_is_kept_to_be_replayed(tmp_path):
    settings = asdict(TrainConfig(data="set", batch_size=2, seed=3))
    batch = Batch(torch.tensor([[1, 2], [3, 256]]), torch.tensor([[257, 5], [257, 6]]), torch.tensor([8, 9]))
    keep_bad_batch(tmp_path, 4, [float("nan"), 1.0], float("inf"), batch, settings)
    kept = json.loads((tmp_path / "bad_batch.json").read_text())
    assert kept["prefix"] == [[1, 2], [3, 256]] and kept["target"] == [[257, 5], [257, 6]]
    assert (kept["example"], kept["step"], kept["seed"]) == ([8, 9], 4, 3)
    assert kept["loss_by_process"] == ["nan", "1.0"] and kept["grad_norm"] == "inf"
    assert kept["replay"] == f"python train.py --out_dir={tmp_path} --init_from=resume --save_interval=1"
    said = no_number(tmp_path, 4, [float("nan"), 1.0], 2.0, settings)
    assert "loss nan (nan, 1.0 by process), gradient norm 2.0 at step 4 (examples 8..9 of set, seed 3)" in said
