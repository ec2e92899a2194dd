"""extras/ may be deleted: the core imports, trains and generates without it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITHOUT_EXTRAS = """
import sys
sys.modules["extras"] = None  # every import of it fails
import torch
import ar2diff, autoregressive, diffusion, sample, train
from data.objectives import Batch
from infra.rng import make_rng
from model import ModelConfig, build_model

source = build_model(ModelConfig(n_layer=1, block_size=16, target_length=6))
settings = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
for module, model in (
    (autoregressive, source), (diffusion, ar2diff.convert(source, **settings))
):
    batch = Batch(torch.ones(2, 4).long(), torch.ones(2, 6).long(), torch.arange(2))
    rng = make_rng(0, batch.example)
    for term in module.losses(model, batch, diffusion.LossConfig(), rng):
        term.backward()
    module.generate(model, batch.prefix, module.SamplerConfig())
sample.sampler_configs()
"""


def test_the_core_works_without_extras():
    argv = [sys.executable, "-c", WITHOUT_EXTRAS]
    subprocess.run(argv, cwd=ROOT, check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "extras").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_no_part_of_extras_imports_another(path):
    """extras.adapter is one part with the two that train it and decode with it."""
    text = path.read_text().replace("from extras.adapter", "")
    assert "from extras" not in text
