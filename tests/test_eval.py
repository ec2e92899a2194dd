"""The evaluations: numbers known by hand, and that batching and order change nothing. Models are random or fake."""

import json
import math
from dataclasses import make_dataclass

import pytest
import torch
from torch import nn

import autoregressive
import diffusion
import sample
from checkpoint import save
from data.loader import open_set, write_pairs
from data.objectives import collate
from data.tokenizer import get_tokenizer
from draws import draws_for
from eval import common, exact_match, python_code
from eval.common import EvalConfig, environment, generate_texts, load_for_eval, wilson, write_json
from model import ModelConfig, Transformer
from sample import PARADIGMS

BYTES = get_tokenizer("bytes")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=64, target_length=24)
DIFFUSION = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
KINDS = {"ar": {}, "diffusion": DIFFUSION}
PREFIX = 'def f(x):\n    """Text."""\n'
ITEMS = [
    (PREFIX, "    return x"),
    ('def g():\n    "One"\n', "    é = 1"),
    ("def h():\n    'T'\n", "    pass"),
    (PREFIX, "    x += 1"),
]
ENCODED = [(BYTES.encode(prefix), BYTES.encode(target)) for prefix, target in ITEMS]


def a_model(kind: str, uniform: bool = False) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY | KINDS[kind])).eval()
    if uniform:
        model.head.weight = nn.Parameter(torch.zeros_like(model.head.weight))
    return model


def settings(kind: str, **changed):
    both = python_code.PythonCodeConfig, PARADIGMS[kind].SamplerConfig
    return make_dataclass("Settings", [], bases=both)(**changed)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a set of pairs, a checkpoint of each kind and one of another target length."""
    folder = tmp_path_factory.mktemp("eval")
    write_pairs(folder / "pairs", {"train": ENCODED, "valid": ENCODED}, "bytes", 24, 64, source="tests")
    for kind in KINDS:
        save(folder / f"{kind}.pt", a_model(kind), 7, "bytes", train_config={"data": "elsewhere"}, fingerprint="abc")
    torch.manual_seed(0)
    save(folder / "longer.pt", Transformer(ModelConfig(**TINY | dict(target_length=25))), 0, "bytes")
    return folder


# common


@pytest.mark.parametrize(
    "hits, n, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson_equals_published_values(hits, n, low, high):
    """81 of 263 is Newcombe 1998, table I, method 3."""
    assert wilson(hits, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_in_the_order_of_their_prefixes_however_they_are_batched(kind):
    model = a_model(kind)
    prefixes = [BYTES.encode(text) for text in ("abc", "a", "xyz", "ab", "", "b", "abc")]
    sampler = dict(temperature=1.0) if kind == "ar" else dict(temperature=1.0, steps=3, candidates=2)
    texts, cost = generate_texts(model, BYTES, prefixes, settings(kind, batch_size=64, **sampler))
    for size in (1, 2):
        assert generate_texts(model, BYTES, prefixes, settings(kind, batch_size=size, **sampler))[0] == texts
    assert texts[0] != texts[6]  # one prefix, but a row of its own and so draws of its own
    assert generate_texts(model, BYTES, prefixes, settings(kind, seed=1, **sampler))[0] != texts
    if kind == "diffusion":
        assert cost["calls_per_sample"] == 6  # 3 steps x 2 candidates


def test_a_text_ends_at_its_first_pad(monkeypatch):
    answer = BYTES.encode("ab") + [BYTES.pad_id] + BYTES.encode("c") + [BYTES.pad_id] * 19
    fake_generate(monkeypatch, lambda prefix: answer)
    assert generate_texts(a_model("ar"), BYTES, [[65], [66, 67]], settings("ar"))[0] == ["ab", "ab"]


def test_settings_of_the_other_paradigm_are_refused(place):
    cfg, model, _, state = load_for_eval([f"--init_from={place / 'diffusion.pt'}", "--steps=3", "--n=5"])
    assert (cfg.steps, cfg.n, model.cfg.paradigm, state["step"]) == (3, 5, "diffusion", 7)
    for kind, flag in (("a diffusion", "--top_k=3"), ("an AR", "--steps=3")):
        with pytest.raises(ValueError, match=f"no setting for {kind} checkpoint"):
            load_for_eval([f"--init_from={place / kind.split()[1].lower()}.pt", flag], EvalConfig)


def test_a_diffusion_checkpoint_may_be_read_left_to_right(place):
    """By --sampler, with the settings of that sampler; by speculation the texts are AR's."""
    torch.manual_seed(0)
    frozen = TINY | DIFFUSION | dict(prefix_attention="bidirectional", shift=True)
    save(place / "frozen.pt", Transformer(ModelConfig(**frozen)), 0, "bytes")
    texts, prefixes = {}, [BYTES.encode(text) for text in ("abc", "a", "xyz", "ab", "b")]
    for sampler in ("ar", "speculative"):
        cfg, model, _, _ = load_for_eval([f"--init_from={place / 'frozen.pt'}", f"--sampler={sampler}"])
        texts[sampler], spent = generate_texts(model, BYTES, prefixes, cfg)
    assert texts["ar"] == texts["speculative"] and len(set(texts["ar"])) > 1
    assert not hasattr(cfg, "steps") and cfg.draft_steps == 2 and spent["calls_per_sample"] >= 3
    with pytest.raises(ValueError, match="'steps' is no setting"):
        load_for_eval([f"--init_from={place / 'frozen.pt'}", "--sampler=speculative", "--steps=3"])
    assert sample.LEFT_TO_RIGHT == common.LEFT_TO_RIGHT


def test_json_is_made_with_its_folder(tmp_path):
    write_json(str(tmp_path / "new" / "a.json"), environment())
    assert {"commit", "torch", "python", "hardware", "threads"} <= set(
        json.loads((tmp_path / "new" / "a.json").read_text())
    )


# exact_match


@pytest.mark.parametrize(
    "prediction, prefix, target, name, right",
    [
        ("neuf", "fr nine", "neuf", "mini_translation", True),
        ("neuf ", "fr nine", "neuf", "mini_translation", True),
        ("dix", "fr nine", "neuf", "mini_translation", False),
        ("The blue cup.", "qa .. ann has what?", "blue cup", "mini", True),
        ("def f(x):\n  return x+1", "py add 1", "def f(x):\n  return x + 1", "mini", True),
        ("def f(x):\n  return x+2", "py add 1", "def f(x):\n  return x + 1", "mini", False),
        ("abc", "cba", "abc", "toy_reverse", True),
        ("abc ", "cba", "abc", "toy_reverse", False),
    ],
)
def test_each_task_has_its_own_score(prediction, prefix, target, name, right):
    assert exact_match.score(prediction, prefix, target, name) is right


# python_code: loss


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_knows_nothing_pays_log2_of_the_vocabulary_for_each_slot(kind):
    sizes = [len(target.encode()) for _, target in ITEMS]
    assert sizes == [12, 10, 8, 10]  # é is two bytes
    found = python_code.held_out_loss(a_model(kind, uniform=True), ENCODED, sizes, settings(kind))
    assert found["bits_per_byte"] == pytest.approx(math.log2(288) * 4 * 23 / 40, rel=1e-6)
    assert found["of_which_pads"] == pytest.approx(math.log2(288) * (4 * 23 - 40) / 40, rel=1e-6)
    assert set(found.get("by_rate", {})) == ({f"0.{k}" for k in range(1, 10)} if kind == "diffusion" else set())
    for row in found.get("by_rate", {}).values():
        assert row["bits_per_byte"] == pytest.approx(found["bits_per_byte"])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_slot_nats_are_the_training_loss_of_the_paradigm(kind):
    model, m = a_model(kind), ModelConfig(**TINY)
    batch = collate(ENCODED, range(4), m.pad_id, m.sep_id, m.target_length)
    draws = draws_for(3, batch.example)
    if kind == "ar":
        expected, found = autoregressive.loss(model, batch, None, draws), python_code.slot_nats(model, batch, 3)
    else:
        expected = diffusion.loss_by_rate(model, batch, diffusion.LossConfig(), draws, [0.3])["0.3"]
        found = python_code.slot_nats(model, batch, 3, 0.3)
    assert found.shape == (4, 23)
    assert found.mean().item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind, rate", [("ar", None), ("diffusion", 0.5)])
def test_batching_changes_no_item(kind, rate):
    by_one, by_three = (
        python_code.item_nats(a_model(kind), ENCODED, settings(kind, batch_size=size), rate) for size in (1, 3)
    )
    torch.testing.assert_close(torch.tensor(by_one), torch.tensor(by_three))


def test_the_standard_error_is_that_of_a_mean_where_all_items_are_one_byte():
    bits = [1.0, 2.0, 4.0, 5.0]
    found = python_code.bits_per_byte([b * math.log(2) for b in bits], [0.0] * 4, [1] * 4)
    assert found["bits_per_byte"] == pytest.approx(3.0)
    assert found["standard_error"] == pytest.approx(torch.tensor(bits).std().item() / 2, rel=1e-6)
    proportional = python_code.bits_per_byte([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [10, 20, 30])
    assert proportional["standard_error"] == pytest.approx(0.0, abs=1e-12)  # every byte costs the same
    assert proportional["of_which_pads"] == pytest.approx(proportional["bits_per_byte"] / 2)
    assert python_code.bits_per_byte([1.0], [0.0], [1])["standard_error"] is None


# python_code: parsing

BODIES = [
    "    return x",
    "    return (x",
    "",
    "  \n ",
    "    pass",
    "    ...\n    return None",
    "    return x",
    "    y = '\ufffd'",
]


def test_parse_shares_by_hand():
    found = python_code.parse_shares([PREFIX] * 8, BODIES)
    assert found["hits"] == {"parse": 4, "empty": 2, "trivial": 2}
    assert (found["parse"], found["empty"], found["trivial"], found["parse_and_not_trivial"]) == (0.5, 0.25, 0.25, 0.25)
    assert found["parse_of_non_empty"] == pytest.approx(4 / 6)
    assert found["parse_of_non_empty_interval"] == list(wilson(4, 6))
    assert (found["distinct"], found["not_utf8"]) == (7 / 8, 1 / 8)
    assert found["mean_bytes"] == (12 + 13 + 0 + 4 + 8 + 23 + 12 + 11) / 8
    assert python_code.parse_shares([PREFIX], [""])["parse_of_non_empty"] is None


@pytest.mark.parametrize(
    "body, trivial",
    [("    pass", True), ("    return", True), ("    'text'", True), ("    return 1", True), ("    return x", False),
     ("    pass\n    x = 1", False), ("    raise ValueError", False), ("    return (", False), ("", False)],
)  # fmt: skip
def test_what_does_nothing_is_trivial(body, trivial):
    assert python_code.is_trivial(PREFIX, body) is trivial


def fake_generate(monkeypatch, answer) -> None:
    """autoregressive.generate gives answer(prefix ids), padded, at 5 calls a row."""

    def generate(model, prefix, cfg, seed, example, on_step=None):
        rows = [answer(row) for row in prefix.tolist()]
        rows = [row + [BYTES.pad_id] * (23 - len(row)) for row in rows]
        return autoregressive.Generated(torch.tensor(rows), torch.zeros(len(rows)), torch.full((len(rows),), 5))

    monkeypatch.setattr(autoregressive, "generate", generate)


def test_main_with_a_generator_that_knows_the_answers(place, monkeypatch, capsys):
    known = {tuple(prefix): target for prefix, target in ENCODED[1:3]}  # of the two others it says nothing
    fake_generate(monkeypatch, lambda prefix: known.get(tuple(prefix), []))
    flags = [f"--init_from={place / 'ar.pt'}", f"--data={place / 'pairs'}", f"--json={place / 'a.json'}"]
    result = python_code.main(flags)
    assert result["generated"]["hits"] == {"parse": 2, "empty": 2, "trivial": 1}
    assert result["held_out"]["hits"] == {"parse": 4, "empty": 0, "trivial": 1}
    assert result["calls_per_sample"] == 5
    assert json.loads((place / "a.json").read_text()) == result
    assert result["dataset"]["fingerprint"] == open_set(place / "pairs", "valid").fingerprint
    assert result["dataset"]["items"] == [0, 1, 2, 3] and result["trained"] == {
        "step": 7, "data": "elsewhere", "fingerprint": "abc"
    }  # fmt: skip
    assert {"command", "seed", "torch", "commit", "hardware", "settings"} <= set(result)
    printed = capsys.readouterr().out
    assert "compares with AR rows only" in printed and "50.0% parse" in printed
    assert json.loads(printed.splitlines()[-1]) == result


def test_main_on_a_diffusion_checkpoint_says_that_it_is_no_likelihood(place, capsys):
    flags = [
        f"--init_from={place / 'diffusion.pt'}",
        f"--data={place / 'pairs'}",
        "--n=2",
        "--steps=2",
        "--candidates=1",
    ]
    result = python_code.main(flags)
    assert result["dataset"]["items"] == [0, 2]  # evenly spaced
    assert "no likelihood" in result["loss"]["measure"] and "no likelihood" in capsys.readouterr().out
    mean = sum(row["bits_per_byte"] for row in result["loss"]["by_rate"].values()) / 9
    assert result["loss"]["bits_per_byte"] == pytest.approx(mean)


def test_a_checkpoint_made_for_other_pairs_is_refused(place):
    for flags, message in (
        (["--init_from=longer.pt"], "target_length=24"),
        (["--init_from=ar.pt", "--n=0"], "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            python_code.main([flags[0].replace("=", f"={place}/"), f"--data={place / 'pairs'}", *flags[1:]])
