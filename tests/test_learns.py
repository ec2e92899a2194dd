"""The proof that it learns: copy, reverse and sort, by AR, by diffusion from scratch and by AR2Diff. Minutes, so slow.

Each model is trained and judged by the commands of the README, on strings it has not seen. One thread.
"""

import runpy
from pathlib import Path

import pytest

import ar2diff
import train
from data import toy
from eval import exact_match

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
AR, DIFFUSION = ROOT / "config" / "toy_copy_ar.py", ROOT / "config" / "toy_copy_diffusion.py"
ADAPT_STEPS = 800  # after the conversion; copying and reversing take half of it, sorting does not
SAMPLER = ["--steps=10", "--candidates=1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learns")
    toy.main([f"--out={folder / 'data'}"])
    return folder


@pytest.fixture(scope="module", params=toy.TASKS)
def ar(request, out) -> tuple[str, Path]:
    """(task, checkpoint) of an AR model, which AR2Diff starts from."""
    return request.param, trained(out, "ar", request.param, AR)


def trained(out: Path, name: str, task: str, *argv) -> Path:
    folder = out / f"{name}_{task}"
    train.main([*map(str, argv), f"--data={out / 'data' / f'toy_{task}'}", f"--out_dir={folder}", "--device=cpu"])
    return folder / "ckpt.pt"


def exact(checkpoint: Path, *sampler: str) -> float:
    """Share of held-out strings that come out right."""
    result = exact_match.main([f"--init_from={checkpoint}", "--n=500", *sampler])
    assert result["n"] == 500
    return result["exact_match"]


def test_ar_learns(ar):
    assert exact(ar[1]) >= 0.99


def test_ar2diff_learns(ar, out):
    task, checkpoint = ar
    ar2diff.main([f"--init_from={checkpoint}", f"--out_dir={out / f'start_{task}'}", "--check"])
    start = f"--init_from={out / f'start_{task}' / 'ckpt.pt'}"
    adapted = trained(out, "ar2diff", task, start, f"--max_steps={ADAPT_STEPS}")
    assert exact(adapted, *SAMPLER) >= 0.99


@pytest.mark.parametrize("task", toy.TASKS)
def test_diffusion_learns_from_scratch(task, out):
    assert exact(trained(out, "diffusion", task, DIFFUSION), *SAMPLER) >= 0.99


def test_the_two_toy_configs_describe_one_network():
    """So that the three ways are compared at one size."""
    sizes = [{name: runpy.run_path(str(path))[name] for name in ("n_layer", "n_embd")} for path in (AR, DIFFUSION)]
    assert sizes[0] == sizes[1]
