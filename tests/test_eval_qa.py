"""eval/qa.py: answers of a file, of a model, and of a model that is told how long the answer is."""

import json
import re
from dataclasses import make_dataclass

import pytest
import torch

import diffusion
from checkpoint import save
from data.loader import write_pairs
from data.tokenizer import get_tokenizer
from eval import qa
from eval.common import Job, _generate
from model import ModelConfig, Transformer

BYTES = get_tokenizer("bytes")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=96, target_length=16)
DIFFUSION = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
CONTEXT = "The red dog of Ann ran."
ASKED = {
    "q1": ("Whose dog?", ["Ann", "Ann's"]),
    "q2": ("What ran?", ["The red dog", "dog", "red dog"]),
    "q3": ("Of whom?", ["of Ann"]),
}
GUESSED = {"q1": "ann.", "q2": "big red dog", "q3": ""}  # F1: 1, 2 * 2 / 5 = 0.8, 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A SQuAD file, guesses, and a random checkpoint of each kind that was trained on a set of pairs."""
    folder = tmp_path_factory.mktemp("qa")
    asked = [
        {"id": i, "question": question, "answers": [{"text": a, "answer_start": 0} for a in answers]}
        for i, (question, answers) in ASKED.items()
    ]
    articles = [{"title": "Dogs", "paragraphs": [{"context": CONTEXT, "qas": asked}]}]
    (folder / "dev.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    (folder / "guess.json").write_text(json.dumps(GUESSED))
    pairs = [(BYTES.encode(f"{question} {CONTEXT}"), BYTES.encode(answers[0])) for question, answers in ASKED.values()]
    write_pairs(folder / "pairs", {"train": pairs, "valid": pairs}, "bytes", 16, 96)
    for kind, config in (("ar", {}), ("diffusion", DIFFUSION)):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**TINY | config)).eval()
        save(folder / f"{kind}.pt", model, 7, "bytes", train_config={"data": str(folder / "pairs")})
    return folder


def test_predictions_score_as_worked_by_hand(place, capsys):
    result = qa.main([f"--source={place / 'dev.json'}", f"--predictions={place / 'guess.json'}"])
    assert result["exact_match"] == pytest.approx(1 / 3) and result["f1"] == pytest.approx(0.6)
    assert (result["n"], result["empty"], result["exact_match_interval_by"]) == (3, 1, "wilson")
    assert result["f1_interval_by"] == "bootstrap" and result["f1_interval"] == [0, 1]
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(json.dumps(result))


def test_the_reference_is_right_and_what_is_saved_can_be_scored(place, tmp_path):
    source, saved = f"--source={place / 'dev.json'}", tmp_path / "new" / "saved.json"
    result = qa.main([source, "--reference", f"--save={saved}"])
    assert result["exact_match"] == result["f1"] == 1
    assert json.loads(saved.read_text()) == {"q1": "Ann", "q2": "The red dog", "q3": "of Ann"}
    against = qa.main([source, f"--predictions={saved}", f"--against={place / 'guess.json'}"])["against"]
    assert against["f1"]["difference"] == pytest.approx(0.4)


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_a_model_answers_from_the_prompt_alone(place, tmp_path, kind):
    """The same answers whatever the right ones are: no canvas is cut to the length of the answer."""
    argv, items = [f"--init_from={place / kind}.pt", f"--json={tmp_path / 'a.json'}"], []
    argv += ["--steps=2", "--candidates=2"] if kind == "diffusion" else []
    for name in ("dev.json", "other.json"):
        text = (place / "dev.json").read_text()
        (place / "other.json").write_text(re.sub(r'"text": "[^"]*"', '"text": "a red dog of Ann"', text))
        result = qa.main([*argv, f"--source={place / name}"])
        items.append(json.loads((tmp_path / "a.json").read_text())["items"])
        assert not any(key.startswith("oracle") for key in result)
    assert items[0] == items[1] and list(items[0]) == list(ASKED)
    assert qa.main(argv)["settings"]["data"] == str(place / "pairs")


def test_the_length_of_the_answer_is_told_on_request_only_and_counted_under_its_own_name(place, tmp_path):
    argv = [f"--init_from={place / 'diffusion.pt'}", "--steps=2", "--candidates=2", f"--source={place / 'dev.json'}"]
    plain = qa.main([*argv, f"--json={tmp_path / 'a.json'}"])
    both = qa.main([*argv, "--oracle_length", f"--json={tmp_path / 'b.json'}"])
    for key in ("exact_match", "f1", "f1_interval", "calls_per_sample", "empty"):
        assert both[key] == plain[key]
    assert {f"oracle_length_{key}" for key in ("exact_match", "f1", "f1_interval")} <= set(both)
    a, b = (json.loads((tmp_path / name).read_text())["items"] for name in ("a.json", "b.json"))
    assert a == b


def test_slots_behind_a_told_length_are_pad_in_every_canvas(monkeypatch):
    """A network that wants an "x" in every slot gets as many as are free: 3, none, or with no length told all 15."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY | DIFFUSION)).eval()
    wanted = torch.full((model.cfg.vocab_size,), -9.0).index_fill(0, torch.tensor([ord("x")]), 9.0)
    monkeypatch.setattr(model, "decode", lambda cache, target, **rest: wanted.expand(*target.shape, -1).clone())
    cfg = make_dataclass("Settings", [], bases=(qa.QaConfig, diffusion.SamplerConfig))(steps=2, candidates=2)
    jobs = [Job(str(i), [65, 66], i, length) for i, length in enumerate((3, 0, 15, -1))]
    found = {job.key: made.text for job, made in _generate(model, BYTES, jobs, cfg)}
    assert found == {"0": "xxx", "1": "", "2": "x" * 15, "3": "x" * 15}


def test_only_a_diffusion_model_can_be_told_a_length(place):
    for argv in ([f"--init_from={place / 'ar.pt'}"], ["--reference", f"--source={place / 'dev.json'}"]):
        with pytest.raises(ValueError, match="--oracle_length needs a diffusion checkpoint"):
            qa.main([*argv, "--oracle_length"])


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"q1": "a", "q2": "b"}', "2 predictions for 3 examples; none for q3 (1 of them)"),
        ('{"q1": "", "q2": "", "q3": "", "q4": ""}', "4 predictions for 3 examples; also one for q4"),
        ('{"q1": "a", "q2": "b", "q3": ', "not JSON, or broken off"),
        ('{"q1": "a", "q2": "b", "q3": null}', "every answer a text"),
        ('["a", "b", "c"]', "one JSON object"),
        ('{"q1": "a", "q2": "b", "q3": "c", "q1": "d"}', "more than one answer for q1"),
        ("", "empty"),
        (b'{"q1": "\xe9"}', "not UTF-8"),
    ],
)
def test_a_bad_file_of_predictions_is_one_line(place, tmp_path, text, says):
    (tmp_path / "p.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for flags in ([f"--predictions={tmp_path / 'p.json'}"], ["--reference", f"--against={tmp_path / 'p.json'}"]):
        with pytest.raises(ValueError, match=re.escape(says)) as error:
            qa.main([f"--source={place / 'dev.json'}", *flags])
        assert str(error.value).startswith(str(tmp_path / "p.json")) and "\n" not in str(error.value)


def test_another_version_or_a_question_without_answers_is_refused(place, tmp_path):
    text = (place / "dev.json").read_text()
    for changed, says in (
        (text.replace('"1.1"', '"v2.0"'), "v2.0"),
        (re.sub(r'"answers": \[[^\]]*\]', '"answers": []', text, count=1), "without answers"),
        (text[:-20], "not JSON, or broken off"),
    ):
        (tmp_path / "dev.json").write_text(changed)
        with pytest.raises(ValueError, match=says):
            qa.main(["--reference", f"--source={tmp_path / 'dev.json'}"])
