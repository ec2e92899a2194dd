"""eval/common, exact_match: numbers known by hand; batches change nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from eval_models import BYTES, JOINT, KINDS, save_model, save_pairs, tiny_model

import autoregressive
from data.objectives import collate
from eval import bound, code, common, exact_match, qa, translation
from eval.common import EvalConfig, Generator
from extras.adapter import FILE, AdapterConfig, DraftModel, digest, save_adapter
from infra.checkpoint import load_model
from infra.logits import GenerateOutput
from sample import choose_sampler

ROOT = Path(__file__).parent.parent
SIZES = dict(block_size=64, target_length=24)
PREFIX = 'def f(x):\n    """Text."""\n'
ITEMS = [
    (PREFIX, "    return x"),
    ('def g():\n    "One"\n', "    é = 1"),
    ("def h():\n    'T'\n", "    pass"),
    (PREFIX, "    x += 1"),
]
ENCODED = [(BYTES.encode(prefix), BYTES.encode(target)) for prefix, target in ITEMS]
# Slot 0 is the prompt's last token, as in imported models.
IMPORTED = {f"{kind}_imported": config | dict(sep_id=-1) for kind, config in KINDS.items()}


def generator(kind: str, batch_size: int = 64, seed: int = 0, **sampler) -> Generator:
    model = tiny_model(**SIZES, **KINDS[kind])
    run = EvalConfig(batch_size=batch_size, seed=seed)
    model, *decoder = choose_sampler(model, sampler, "")
    return Generator(model, BYTES, *decoder, run)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a set of pairs, a checkpoint of each kind and one of another target length."""
    folder = tmp_path_factory.mktemp("eval")
    save_pairs(folder / "pairs", ITEMS, 24, 64, source="tests")
    for kind, config in (KINDS | IMPORTED).items():
        save_model(folder / f"{kind}.pt", "elsewhere", **SIZES, **config)
    save_model(folder / "longer.pt", block_size=64, target_length=25)
    frozen = JOINT | dict(prefix_attention="bidirectional", shift=True)
    save_model(folder / "frozen.pt", **SIZES, **frozen)
    return folder


# common


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_in_the_order_of_their_prompts_however_they_are_batched(kind):
    prompts = [BYTES.encode(text) for text in ("abc", "a", "xyz", "ab", "", "b", "abc")]
    sampler = dict(temperature=1.0) | ({} if kind == "ar" else dict(steps=3, candidates=2))
    texts, cost = generator(kind, **sampler).texts(prompts)
    for size in (1, 2):
        assert generator(kind, batch_size=size, **sampler).texts(prompts)[0] == texts
    assert texts[0] != texts[6]  # one prompt, but a row of its own and so draws of its own
    assert generator(kind, **sampler).texts(prompts[6:], [0])[0] == texts[:1]
    assert generator(kind, seed=1, **sampler).texts(prompts)[0] != texts
    assert kind == "ar" or cost["calls_per_sample"] == 6  # 3 steps x 2 candidates


def numbers(rates: dict | None) -> list[float]:
    return [value for value in (rates or {}).values() if isinstance(value, float)]


@pytest.mark.parametrize("kind", IMPORTED)
@pytest.mark.parametrize("module", [bound, code, exact_match, qa, translation])
def test_models_without_a_separator_run_everywhere(place, module, kind):
    """Batches of one row have no padding: the same numbers show that padding changes nothing."""
    argv = [f"--init_from={place / kind}.pt", f"--data={place / 'pairs'}"]
    one, all_at_once = (module.main([*argv, "--n=2", f"--batch_size={n}"]) for n in (1, 64))
    for name in ("items", "exact_match"):
        assert one.get(name) == all_at_once.get(name)
    for name in ("loss", "bits_per_byte"):
        assert numbers(one.get(name)) == pytest.approx(numbers(all_at_once.get(name)), rel=1e-5)


def test_the_sampler_may_be_named(place, tmp_path):
    """A diffusion model from left to right, and an AR model with an adapter: the text is AR's."""
    model = load_model(place / "ar.pt")[0]
    save_adapter(tmp_path / FILE, DraftModel(model, AdapterConfig()), digest(model))
    prompts = [BYTES.encode(text) for text in ("abc", "a", "xyz", "ab", "b")]
    for kind, flag, name in (
        ("frozen", "--sampler=ar", "ar"),
        ("ar", f"--draft={tmp_path}", "speculative"),
    ):
        argv = [f"--init_from={place / kind}.pt", flag]
        _, opened, _ = common.open_checkpoint(argv, common.PairsConfig)
        texts, cost = opened.texts(prompts)
        plain = load_model(place / f"{kind}.pt")[0]
        greedy = autoregressive.SamplerConfig()
        expected = [autoregressive.generate(plain, torch.tensor([p]), greedy) for p in prompts]
        rows = [out.tokens[0].tolist() for out in expected]
        rows = [row[: [*row, BYTES.pad_id].index(BYTES.pad_id)] for row in rows]
        assert texts == [BYTES.decode(row) for row in rows] and len(set(texts)) > 1
        assert not hasattr(opened.sampler, "steps") and opened.settings()["sampler"] == name
        assert cost["calls_per_sample"] >= 1


def test_examples_are_chosen_evenly_and_all_by_default():
    assert common.choose(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    assert common.choose([1, 2, 3], 0) == common.choose([1, 2, 3], 9) == [1, 2, 3]
    with pytest.raises(ValueError, match="no examples"):
        common.choose([], 0)


BARE = {"PATH": "", "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}  # no git, no home


def test_the_result_is_kept_whatever_the_environment_lacks(place, tmp_path):
    """No git, no home, an ascii terminal, a closed stream, a reader that leaves at once."""
    path = tmp_path / "ü" / "a b.json"
    flags = f"--init_from={place}/diffusion.pt --data={place}/pairs --steps=2 --n=2"
    command = f"{sys.executable} -m eval.exact_match {flags} '--json={path}' 2>&- | true"
    subprocess.run(["/bin/sh", "-c", command], cwd=ROOT, env=BARE, timeout=300)
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["n"] == 2 and result["commit"] == "unknown"


def test_a_result_that_cannot_be_written_is_printed(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        common.finish(str(tmp_path / "file" / "a.json"), {}, "the result")
    assert capsys.readouterr().out == "the result\n"


# exact_match


@pytest.mark.parametrize(
    "prediction, prefix, target, mini, right",
    [
        ("neuf ", "fr nine", "neuf", True, True),
        ("dix", "fr nine", "neuf", True, False),
        ("The blue cup.", "qa .. ann has what?", "blue cup", True, True),
        ("def f(x):\n  return x+1", "py add 1", "def f(x):\n  return x + 1", True, True),
        ("def f(x):\n  return x+2", "py add 1", "def f(x):\n  return x + 1", True, False),
        ("abc", "cba", "abc", False, True),
        ("abc ", "cba", "abc", False, False),
    ],
)
def test_each_task_has_its_own_score(prediction, prefix, target, mini, right):
    assert exact_match.score(prediction, prefix, target, mini) is right


def test_a_mini_set_is_known_under_any_name(place, tmp_path, monkeypatch):
    items = [("fr nine", "neuf"), ("fr ten", "neuf")]
    save_pairs(tmp_path / "x", items, 24, 64, command="python -m data.mini --out=out")

    def generate(model, prompt, cfg, seed, example):
        answer = BYTES.encode("neuf ")
        rows = torch.tensor([[*answer, *[BYTES.pad_id] * 18]] * len(prompt))
        return GenerateOutput(rows, torch.zeros(len(rows)), torch.full((len(rows),), 5))

    monkeypatch.setattr(autoregressive, "generate", generate)
    argv = [f"--init_from={place / 'ar.pt'}", f"--data={tmp_path / 'x'}"]
    result = exact_match.main(argv)
    assert (result["hits"], result["calls_per_sample"]) == (2, 5)
    fields = {"command", "seed", "torch", "python", "commit", "hardware", "threads", "settings"}
    assert fields <= set(result)


# bound


@torch.no_grad()
def test_slot_nats_are_the_training_loss():
    model = tiny_model(**SIZES)
    batch = collate(ENCODED, range(4), model.cfg.pad_id, model.cfg.sep_id, 24)
    found = bound.slot_nats(model, batch)
    assert found.shape == (4, 23)
    expected = autoregressive.loss(model, batch, None, None)
    assert found.mean().item() == pytest.approx(float(expected), rel=1e-6)


def test_a_checkpoint_made_for_other_pairs_is_refused(place):
    with pytest.raises(ValueError, match="24, 64.*25, 64"):
        bound.main([f"--init_from={place / 'longer.pt'}", f"--data={place / 'pairs'}"])
