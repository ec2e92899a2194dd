"""The proof that it learns: copy, reverse and sort, by AR, by diffusion from scratch and by AR2Diff. Minutes, so slow.
And the other network and objective: copy by encoder-decoders, and what span corruption has hidden.

Each model is trained and judged by the commands of the README, on strings it has not seen. One thread.
"""

import runpy
from pathlib import Path

import pytest
import torch

import ar2diff
import train
from checkpoint import load_model
from data import toy
from data.loader import open_set
from data.objectives import ObjectiveConfig
from diffusion import corrupt, readout
from draws import draws_for
from eval import exact_match

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
AR, DIFFUSION = ROOT / "config" / "toy_copy_ar.py", ROOT / "config" / "toy_copy_diffusion.py"
ADAPT_STEPS = 800  # after the conversion; copying and reversing take half of it, sorting does not
SAMPLER = ["--steps=10", "--candidates=1"]
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


@pytest.mark.parametrize("task", TASKS)
def test_diffusion_learns_from_scratch(task, out):
    assert exact(trained(out, "diffusion", task, DIFFUSION), *SAMPLER) >= 0.99


ENCODER_DECODER = ["--arch=encoder_decoder", "--prefix_attention=bidirectional", "--max_steps=1000"]


@pytest.mark.parametrize(
    "config, sampler",
    [(AR, []), pytest.param(DIFFUSION, SAMPLER, marks=pytest.mark.long)],
    ids=["ar", "diffusion"],
)
def test_an_encoder_decoder_learns_to_copy(config, sampler, out):
    assert exact(trained(out, f"encdec_{config.stem}", "copy", config, *ENCODER_DECODER), *sampler) >= 0.99


@pytest.mark.parametrize("config", [AR, DIFFUSION], ids=["ar", "diffusion"])
def test_hidden_spans_are_found_in_the_other_half(config, out):
    """The text is "word, line end, the same word" with spans cut out of it. Chance is 1 letter of 26; some letters are
    hidden twice, and a canvas of pure noise has to guess where a span ends, so not all can be right."""
    argv = [config, "--objective=span_corruption", "--prefix_attention=bidirectional", "--max_steps=400"]
    model, tokenizer, _ = load_model(trained(out, f"spans_{config.stem}", "copy", *argv))
    spans = ObjectiveConfig(objective="span_corruption")
    batch = open_set(out / "data" / "toy_copy", "valid", spans).batch(0, 0, 500)
    canvas, shift = batch.target, True
    if model.cfg.paradigm == "diffusion":
        canvas = corrupt(canvas, torch.ones(500, 1), model.cfg, draws_for(0, batch.example))
        shift = model.cfg.shift
    with torch.no_grad():
        answer = readout(model(batch.prefix, canvas), shift).argmax(-1)
    expected = batch.target[:, 1:]
    letters = expected < tokenizer.n_ordinary
    assert (answer == expected)[letters].float().mean() >= 0.15


def test_the_two_toy_configs_describe_one_network():
    """So that the three ways are compared at one size."""
    sizes = [{name: runpy.run_path(str(path))[name] for name in ("n_layer", "n_embd")} for path in (AR, DIFFUSION)]
    assert sizes[0] == sizes[1]
