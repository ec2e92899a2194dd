"""eval/harness.py: likelihoods against the AR loss and the bound, and the harness itself."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from data_files import write
from eval_models import BYTES, tiny_model

import autoregressive
from ar2diff import convert
from data.objectives import collate
from eval import harness
from eval.bound import BoundConfig, target_nats
from eval.common import EvalConfig, Generator
from eval.harness import BOUND, EXACT, Model, is_greedy, until
from infra.checkpoint import save
from model import Transformer
from sample import choose_sampler

SIZES = dict(block_size=20, target_length=8)


def a_model(kind: str) -> Transformer:
    source = tiny_model(**SIZES, sep_id=-1 if kind == "imported" else BYTES.sep_id)
    for p in source.parameters():
        p.data.mul_(4)  # far from uniform, so that order and place matter
    if kind != "diffusion":
        return source
    return convert(source, paradigm="diffusion", target_attention="bidirectional", shift=True)


def adapted(kind: str = "ar", **bound) -> Model:
    model = a_model(kind)
    run = EvalConfig(batch_size=2)
    model, *decoder = choose_sampler(model, {}, "")
    generator = Generator(model, BYTES, *decoder, run)
    return Model(generator, BoundConfig(**bound))


def asked(*args) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=one) for one in args]


@pytest.mark.parametrize(
    "text, stops, cut",
    [
        ("one. two", ["w", "."], "one"),
        ("one. two", ["three"], "one. two"),
        ("one", None, "one"),
        ("one\n\ntwo", "\n\n", "one"),
        ("one", [""], "one"),
    ],
)
def test_a_text_ends_before_the_first_stop_string(text, stops, cut):
    assert until(text, stops) == cut


@pytest.mark.parametrize("kind", ["ar", "imported"])
def test_ar_likelihoods_are_exact(kind):
    """A target that fills the canvas has no pads: the training loss is its mean over slots.

    A short one is added up by hand from the logits. The next prompt is longer: a padded batch.
    """
    ours = adapted(kind)
    requests = [("ab", "cdefghi"), ("ab", "cd"), ("abcdef", "q"), ("", "hello")]
    found = [log_p for log_p, _ in ours.loglikelihood(asked(*requests))]
    alone = [ours.loglikelihood(asked(request))[0][0] for request in requests]
    assert found == pytest.approx(alone, rel=1e-5) and ours.measure == EXACT
    sep_id = ours.model.cfg.sep_id
    batch = collate([(list(b"ab"), list(b"cdefghi"))], [0], BYTES.pad_id, sep_id, 8)
    mean = autoregressive.loss(ours.model, batch, None, None).item()
    assert found[0] == pytest.approx(-7 * mean, rel=1e-5)
    logits = ours.model(batch.prefix, batch.target)[0].log_softmax(-1)
    expected = (logits[0, ord("c")] + logits[1, ord("d")]).item()
    assert found[1] == pytest.approx(expected, rel=1e-5)


def test_greedy_is_the_result_of_ar_decoding():
    ours = adapted()
    with torch.no_grad():
        text = []
        for _ in range(3):
            logits = ours.model(torch.tensor([list(b"ab")]), torch.tensor([[257, *text]]))[0, -1]
            logits[257:] = -torch.inf
            text.append(int(logits.argmax()))
    other = [*text[:2], (text[2] + 1) % 256]
    pairs = [(list(b"ab"), text), (list(b"ab"), other), (list(b"ab"), text[:1])]
    assert is_greedy(ours.model, pairs, 2) == [True, False, True]
    assert is_greedy(a_model("diffusion"), pairs, 2) == [False] * 3


def test_a_diffusion_model_answers_by_the_bound_and_says_so():
    ours = adapted("diffusion", noise_steps=3, draws=3)
    found = ours.loglikelihood(asked(("ab", "cd"), ("a", "xyz")))
    pairs = [(list(b"ab"), list(b"cd")), (list(b"a"), list(b"xyz"))]
    text, pads = target_nats(ours.model, pairs, [0, 1], ours.bound)
    assert [p for p, _ in found] == pytest.approx([-a - b for a, b in zip(text, pads)])
    assert ours.measure == BOUND


def test_generation_obeys_stops_lengths_and_the_size_of_the_model(monkeypatch):
    ours, prompts = adapted(), []

    def fixed(self, prefixes):
        prompts.extend(map(bytes, prefixes))
        return ["one two"] * len(prefixes), {}

    monkeypatch.setattr(Generator, "texts", fixed)
    options = [{"until": [" "]}, {"max_gen_toks": 5, "until": []}, {}]
    made = ours.generate_until(asked(*zip(("a", "b", "0123456789abcdef"), options)))
    assert made == ["one", "one t", "one two"]
    assert prompts == [b"a", b"b", b"456789abcdef"]  # 20 - 8 tokens of the end
    assert ours.shortened == 1


# Through the harness itself

FIELDS = dict(dataset_path="json", test_split="test", target_delimiter="")
FIELDS |= dict(doc_to_text="{{question}}", doc_to_target="{{answer}}")
EXACT_MATCH = dict(metric="exact_match", aggregation="mean", higher_is_better=True)
KINDS = {
    "generate_until": dict(generation_kwargs={"until": ["\n"]}, metric_list=[EXACT_MATCH]),
    "multiple_choice": dict(doc_to_choice=["x", "y", "z"], metric_list=[{"metric": "acc"}]),
}


@pytest.fixture
def task(tmp_path, monkeypatch):
    """task(kind, answers) writes a task file and its data."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write_task(kind: str, answers: list[str]):
        rows = [{"question": q, "answer": a} for q, a in zip("abcd", answers)]
        files = {"data_files": {"test": write(tmp_path / f"{kind}.jsonl", rows)}}
        names = dict(task=f"ours_{kind}", output_type=kind, dataset_kwargs=files)
        return write(tmp_path / f"{kind}.yaml", FIELDS | names | KINDS[kind])  # JSON is YAML

    return write_task


@pytest.fixture(params=["ar", "diffusion"])
def checkpoint(request, tmp_path):
    path = tmp_path / f"{request.param}.pt"
    save(path, a_model(request.param), 3, "bytes")
    return path


def test_a_generation_task_runs_through_the_harness(task, checkpoint, tmp_path):
    """Four items, of which two ask for what the model writes: the harness's exact_match is 0.5."""
    requests = [(question, {"until": ["\n"]}) for question in "abcd"]
    texts = adapted(checkpoint.stem).generate_until(asked(*requests))
    path = task("generate_until", [*texts[:2], texts[2] + "x", texts[3] + "x"])
    flags = [f"--init_from={checkpoint}", "--device=cpu", f"--tasks={path}"]
    found = harness.main([*flags, f"--json={tmp_path / 'found.json'}"])
    assert found["tasks"]["ours_generate_until"]["exact_match,none"] == 0.5
    assert found["n"] == {"ours_generate_until": 4}
    assert json.loads((tmp_path / "found.json").read_text()) == found


def test_a_choice_is_the_likeliest_and_its_kind_is_printed(task, checkpoint, capsys):
    """The right answer is the likeliest one, twice of four; --n=3 leaves out the last."""
    kind = checkpoint.stem
    ours = adapted(kind, noise_steps=2, draws=2)
    requests = asked(*((question, choice) for question in "abcd" for choice in "xyz"))
    scores = [p for p, _ in ours.loglikelihood(requests)]
    best = ["xyz"[max(range(3), key=lambda j: scores[3 * i + j])] for i in range(4)]
    wrong = ["y" if one != "y" else "z" for one in best]
    path = task("multiple_choice", [best[0], wrong[1], best[2], wrong[3]])
    flags = [f"--init_from={checkpoint}", "--device=cpu", "--batch_size=2", "--noise_steps=2"]
    found = harness.main([*flags, "--draws=2", "--n=3", f"--tasks={path}"])
    assert math.isclose(found["tasks"]["ours_multiple_choice"]["acc,none"], 2 / 3)
    assert f"likelihoods: {EXACT if kind == 'ar' else BOUND}" in capsys.readouterr().out
