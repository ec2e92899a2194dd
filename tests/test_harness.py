"""eval/harness.py: likelihoods against autoregressive.loss and eval.bound, stop strings by hand, one task through
lm-evaluation-harness, offline."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from ar2diff import adapt
from autoregressive import loss
from checkpoint import save
from data.objectives import collate
from data.tokenizer import get_tokenizer
from eval import harness
from eval.bound import target_nats
from eval.harness import BOUND, EXACT, Answers, HarnessConfig, before, greedy
from model import ModelConfig, Transformer

TOKENIZER = get_tokenizer("bytes")
SIZES = dict(n_layer=1, n_head=2, n_embd=16, block_size=20, target_length=8)


def model(paradigm: str = "ar") -> Transformer:
    torch.manual_seed(0)
    source = Transformer(ModelConfig(**SIZES)).eval()
    for p in source.parameters():
        p.data.mul_(4)  # far from uniform, so that order and place matter
    if paradigm == "ar":
        return source
    return adapt(source, paradigm="diffusion", target_attention="bidirectional", shift=True)


def answers(paradigm: str = "ar", **settings) -> Answers:
    both = type("Both", (HarnessConfig,), {})(tasks="x", batch_size=2, **settings)
    both.temperature, both.top_k, both.top_p, both.sampler = 0.0, 0, 1.0, "resample"
    return Answers(model(paradigm), TOKENIZER, both)


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
        ("stop at once", ["stop"], ""),
    ],
)
def test_a_text_ends_before_the_first_stop_string(text, stops, cut):
    assert before(text, stops) == cut


def test_ar_likelihoods_are_exact():
    """A target that fills the canvas has no pads: then the loss of training is its mean over slots. A short one: the
    difference of two such sums, by hand from the logits."""
    ours = answers()
    full, short = ours.loglikelihood(asked(("ab", "cdefghi"), ("ab", "cd")))
    batch = collate([(list(b"ab"), list(b"cdefghi"))], [0], 256, 257, 8)
    assert full[0] == pytest.approx(-7 * loss(ours.model, batch, None, None).item(), rel=1e-5)
    logits = ours.model(batch.prefix, batch.target)[0].log_softmax(-1)
    assert short[0] == pytest.approx((logits[0, ord("c")] + logits[1, ord("d")]).item(), rel=1e-5)
    assert ours.measure == EXACT


def test_order_and_batch_change_no_likelihood():
    ours, requests = answers(), [("a", "xyz"), ("abcdef", "q"), ("", "hello"), ("abc", "xyz")]
    together = ours.loglikelihood(asked(*requests))
    one_by_one = [ours.loglikelihood(asked(request))[0] for request in requests]
    assert [p for p, _ in together] == pytest.approx([p for p, _ in one_by_one], rel=1e-5)


def test_greedy_is_what_ar_decoding_gives():
    net = model()
    with torch.no_grad():
        prefix, text = torch.tensor([list(b"ab")]), []
        for _ in range(3):
            logits = net(prefix, torch.tensor([[257, *text]]))[0, -1]
            logits[257:] = -torch.inf
            text.append(int(logits.argmax()))
    other = [*text[:2], (text[2] + 1) % 256]
    pairs = [(list(b"ab"), text), (list(b"ab"), other), (list(b"ab"), text[:1])]
    assert greedy(net, pairs, 2) == [True, False, True]
    assert greedy(model("diffusion"), pairs, 2) == [False] * 3


def test_a_diffusion_model_answers_by_the_bound_and_says_so():
    ours = answers("diffusion", noise_steps=3, draws=3)
    found = ours.loglikelihood(asked(("ab", "cd"), ("a", "xyz")))
    text, pads = target_nats(
        ours.model, [(list(b"ab"), list(b"cd")), (list(b"a"), list(b"xyz"))], [0, 1], ours.cfg.bound()
    )
    assert [p for p, _ in found] == pytest.approx([-a - b for a, b in zip(text, pads)])
    assert ours.measure == BOUND and "bound" in BOUND


def test_a_rolling_likelihood_reads_each_token_once_with_what_fits_before_it():
    """17 letters in targets of 7: three windows, behind nothing, 7 and the 12 that a prefix holds."""
    ours, text = answers(), "abcdefghijklmnopq"
    windows = [("", "abcdefg"), ("abcdefg", "hijklmn"), ("cdefghijklmn", "opq")]
    parts = [p for p, _ in ours.loglikelihood(asked(*windows))]
    assert ours.loglikelihood_rolling(asked((text,), ("ab",)))[0] == pytest.approx(sum(parts), rel=1e-5)
    assert ours.loglikelihood_rolling(asked(("",))) == [0.0]


@pytest.mark.parametrize("paradigm", ["ar", "diffusion"])
def test_generation_obeys_stops_lengths_and_the_size_of_the_model(paradigm, monkeypatch):
    ours, prompts = answers(paradigm), []

    def fixed(model, tokenizer, prefixes, cfg):
        prompts.extend(map(bytes, prefixes))
        return ["one two"] * len(prefixes), {}

    monkeypatch.setattr(harness, "generate_texts", fixed)
    made = ours.generate_until(
        asked(("a", {"until": [" "]}), ("b", {"max_gen_toks": 5, "until": []}), ("0123456789abcdef", {}))
    )
    assert made == ["one", "one t", "one two"]
    assert prompts == [b"a", b"b", b"456789abcdef"] and ours.shortened == 1  # 20 - 8 tokens of the end


def test_a_continuation_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a continuation has 9 tokens, the model's target holds 7: 'cdefghijk'"):
        answers().loglikelihood(asked(("ab", "cdefghijk")))


def test_settings_are_checked():
    with pytest.raises(ValueError, match="name a task"):
        HarnessConfig()
    with pytest.raises(ValueError, match="noise_steps must be at least 1, got 0"):
        HarnessConfig(tasks="x", noise_steps=0)


# Through the harness itself

YAML = """
task: ours_{kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
{more}
"""
GENERATION = """generation_kwargs:
  until: ["\\n"]
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
CHOICE = """doc_to_choice: ["x", "y", "z"]
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path, monkeypatch):
    """task(kind, answers) writes a task file and its data."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(kind: str, wanted: list[str]):
        data = tmp_path / f"{kind}.jsonl"
        rows = [{"question": question, "answer": answer} for question, answer in zip("abcd", wanted)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / f"{kind}.yaml"
        path.write_text(YAML.format(kind=kind, data=data, more=GENERATION if "gener" in kind else CHOICE))
        return path

    return write


@pytest.fixture(params=["ar", "diffusion"])
def checkpoint(request, tmp_path):
    path = tmp_path / f"{request.param}.pt"
    save(path, model(request.param), 3, "bytes")
    return path


def test_a_generation_task_runs_through_the_harness(task, checkpoint, tmp_path, capsys):
    """Four items, of which two ask for what the model writes: the harness's exact_match is 0.5."""
    flags = [f"--init_from={checkpoint}", "--device=cpu", "--temperature=0", "--seed=0"]
    flags += [] if "ar.pt" in str(checkpoint) else ["--steps=3", "--candidates=1"]
    nothing = task("generate_until", ["x"] * 4)
    written = []
    make = harness.generate_texts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "generate_texts", lambda *given: written.append(make(*given)) or written[-1])
        harness.main([*flags, f"--tasks={nothing}"])
    texts = [before(text, ["\n"]) for text in written[0][0]]
    right = task("generate_until", [texts[0], texts[1], texts[2] + "x", texts[3] + "x"])
    found = harness.main([*flags, f"--tasks={right}", f"--json={tmp_path / 'found.json'}"])
    assert found["tasks"]["ours_generate_until"]["exact_match,none"] == 0.5
    assert found["n"] == {"ours_generate_until": 4}
    assert json.loads((tmp_path / "found.json").read_text())["tasks"] == json.loads(json.dumps(found["tasks"]))
    assert "likelihoods:" not in capsys.readouterr().out


def test_a_choice_is_the_likeliest_and_its_kind_is_said(task, checkpoint, capsys):
    """The right answer is the one that Answers finds likeliest, twice of four; --n=3 leaves out the last."""
    kind = checkpoint.stem
    ours = answers(kind, noise_steps=2, draws=2)
    requests = asked(*((question, choice) for question in "abcd" for choice in "xyz"))
    scores = [p for p, _ in ours.loglikelihood(requests)]
    best = ["xyz"[max(range(3), key=lambda j: scores[3 * i + j])] for i in range(4)]
    wrong = ["y" if one != "y" else "z" for one in best]
    path = task("multiple_choice", [best[0], wrong[1], best[2], wrong[3]])
    flags = [f"--init_from={checkpoint}", "--device=cpu", "--batch_size=2", "--noise_steps=2", "--draws=2", "--n=3"]
    found = harness.main([*flags, f"--tasks={path}"])
    assert math.isclose(found["tasks"]["ours_multiple_choice"]["acc,none"], 2 / 3)
    assert f"likelihoods: {EXACT if kind == 'ar' else BOUND}" in capsys.readouterr().out


def test_a_task_that_is_not_there_is_named(task, checkpoint, tmp_path):
    with pytest.raises(ValueError, match="none.yaml: no such task file"):
        harness.main([f"--init_from={checkpoint}", f"--tasks={tmp_path / 'none.yaml'}"])


def test_a_missing_package_is_named_with_its_pip_line(checkpoint, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match="the harness is not installed .*; pip install lm-eval"):
        harness.main([f"--init_from={checkpoint}", "--tasks=x"])
