"""extras/mask_schedules.py: masks as drawn by hand."""

import re
from types import SimpleNamespace

import pytest
import torch

from configurator import configure
from extras import mask_schedules
from extras.mask_schedules import block_edges
from model import attention_mask
from train import TrainConfig, extra_edges


def picture(T: int, step: int, steps: int) -> str:
    """Return the mask among T new tokens as rows of x and dots."""
    batch = SimpleNamespace(target=torch.zeros(1, T, dtype=torch.long))
    new = torch.ones(1, T, dtype=torch.bool)
    mask = attention_mask("bidirectional", new[:, :0], new, block_edges(batch, step, steps))
    return " ".join("".join("x" if seen else "." for seen in row) for row in mask[0, 0].tolist())


@pytest.mark.parametrize(
    "step, drawn",
    [
        (0, "x.... xx... xxx.. xxxx. xxxxx"),  # blocks of 1: AR
        (1, "xx... xx... xxxx. xxxx. xxxxx"),
        (2, "xxx.. xxx.. xxx.. xxxxx xxxxx"),
        (3, "xxxx. xxxx. xxxx. xxxx. xxxxx"),  # the last block holds the remainder
        (4, "xxxxx xxxxx xxxxx xxxxx xxxxx"),
    ],
)
def test_blocks_of_five_tokens_in_five_steps(step, drawn):
    assert picture(5, step, 5) == drawn


def test_the_docstring_draws_half_of_the_way():
    lines = mask_schedules.__doc__.split("\n\n")[2].splitlines()[1:]
    blocks = [re.split(r"\s{4,}", line.strip())[2].replace(" ", "") for line in lines]
    assert picture(4, 0, 2) == " ".join(blocks)


@pytest.mark.parametrize("steps", [1, 3, 7, 50])
def test_the_last_step_opens_everything(steps):
    assert picture(8, steps - 1, steps) == " ".join(["x" * 8] * 8)


def test_a_training_uses_the_schedule_until_all_is_open():
    flags = "--paradigm=diffusion --target_attention=bidirectional --prefix_attention=bidirectional"
    flags += " --anneal_steps=4 --mask_schedule=blocks"
    cfg = configure(TrainConfig, flags.split())
    batch = SimpleNamespace(target=torch.zeros(1, 8, dtype=torch.long))
    assert torch.equal(extra_edges(batch, 1, cfg), block_edges(batch, 1, 4))
    assert extra_edges(batch, 4, cfg) is None
