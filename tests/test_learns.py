"""The proof that it learns, by the commands of the README, on strings it has not seen. Minutes.

Copy, reverse and sort by AR, by diffusion from scratch and by AR2Diff; copy by encoder-decoders;
span corruption. One thread.
"""

from pathlib import Path

import pytest
import torch

import ar2diff
import train
from data import toy
from data.loader import open_dataset
from data.objectives import ObjectiveConfig
from diffusion import align_logits, corrupt
from eval import exact_match
from infra.checkpoint import load_model
from infra.rng import make_rng

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parent.parent / "config"
AR = CONFIG / "toy_copy_ar.py"
DIFFUSION = CONFIG / "toy_copy_diffusion.py"
ADAPT_STEPS = 800  # copying and reversing need half of it, sorting does not
TASKS = [pytest.param(task, marks=pytest.mark.long if task != "copy" else ()) for task in toy.TASKS]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learns")
    toy.main([f"--out={folder / 'data'}"])
    return folder


@pytest.fixture(scope="module", params=TASKS)
def ar(request, out) -> tuple[str, Path]:
    """(task, checkpoint) of an AR model, which AR2Diff starts from."""
    return request.param, trained(out, "ar", request.param, AR)


def trained(out: Path, name: str, task: str, *argv) -> Path:
    folder = out / f"{name}_{task}"
    data = out / "data" / f"toy_{task}"
    train.main([*map(str, argv), f"--data={data}", f"--out_dir={folder}", "--device=cpu"])
    return folder / "ckpt.pt"


def exact(checkpoint: Path) -> float:
    """Return the share of held-out strings that are copied, reversed or sorted without an error."""
    result = exact_match.main([f"--init_from={checkpoint}", "--n=500"])
    assert result["n"] == 500
    return result["exact_match"]


def test_ar_learns(ar):
    assert exact(ar[1]) >= 0.99


def test_ar2diff_learns(ar, out):
    task, checkpoint = ar
    start = out / f"start_{task}"
    ar2diff.main([f"--init_from={checkpoint}", f"--out_dir={start}", "--check"])
    argv = [f"--init_from={start / 'ckpt.pt'}", f"--max_steps={ADAPT_STEPS}"]
    assert exact(trained(out, "ar2diff", task, *argv)) >= 0.99


@pytest.mark.parametrize("task", TASKS)
def test_diffusion_learns_from_scratch(task, out):
    assert exact(trained(out, "diffusion", task, DIFFUSION)) >= 0.99


@pytest.mark.parametrize("config", [AR, pytest.param(DIFFUSION, marks=pytest.mark.long)])
def test_an_encoder_decoder_learns_to_copy(config, out):
    argv = ["--arch=encoder_decoder", "--prefix_attention=bidirectional", "--max_steps=1000"]
    assert exact(trained(out, f"encoder_{config.stem}", "copy", config, *argv)) >= 0.99


@pytest.mark.parametrize("config", [AR, DIFFUSION])
def test_hidden_spans_are_found_in_the_other_half(config, out):
    """The text is a word, a line end and the same word. Chance is 1 letter of 26.

    Not all letters can be right: some are hidden twice, and pure noise does not show where a span
    ends.
    """
    argv = ["--objective=span_corruption", "--prefix_attention=bidirectional", "--max_steps=400"]
    checkpoint = trained(out, f"spans_{config.stem}", "copy", config, *argv)
    model, tokenizer, _ = load_model(checkpoint)
    spans = ObjectiveConfig(objective="span_corruption")
    batch = open_dataset(out / "data" / "toy_copy", "valid", spans).batch(0, 0, 500)
    canvas, shift = batch.target, True
    if model.cfg.paradigm == "diffusion":
        rng = make_rng(0, batch.example)
        canvas = corrupt(canvas, torch.ones(500, 1), model.cfg, rng)
        shift = model.cfg.shift
    with torch.no_grad():
        answer = align_logits(model(batch.prefix, canvas), shift).argmax(-1)
    expected = batch.target[:, 1:]
    letters = expected < tokenizer.n_ordinary
    assert (answer == expected)[letters].float().mean() >= 0.15
