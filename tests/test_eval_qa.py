"""eval/qa.py: answers of a file and of a model."""

import json
import re

import pytest
from eval_models import KINDS, save_model, save_pairs

from eval import qa

CONTEXT = "The red dog of Ann ran."
ASKED = {
    "q1": ("Whose dog?", ["Ann", "Ann's"]),
    "q2": ("What ran?", ["The red dog", "dog", "red dog"]),
    "q3": ("Of whom?", ["of Ann"]),
}
GUESSED = {"q1": "ann.", "q2": "big red dog", "q3": ""}  # F1: 1, 2 * 2 / 5 = 0.8, 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A SQuAD file, guesses, and a random checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("qa")
    asked = []
    for i, (question, answers) in ASKED.items():
        spans = [{"text": answer, "answer_start": 0} for answer in answers]
        asked.append({"id": i, "question": question, "answers": spans})
    articles = [{"title": "Dogs", "paragraphs": [{"context": CONTEXT, "qas": asked}]}]
    (folder / "dev.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    (folder / "guess.json").write_text(json.dumps(GUESSED))
    texts = [(f"{question} {CONTEXT}", answers[0]) for question, answers in ASKED.values()]
    save_pairs(folder / "pairs", texts, 16, 96)
    for kind, config in KINDS.items():
        sizes = dict(block_size=96, target_length=16)
        save_model(folder / f"{kind}.pt", folder / "pairs", **sizes, **config)
    return folder


def test_predictions_score_as_worked_by_hand(place, capsys):
    result = qa.main([f"--source={place / 'dev.json'}", f"--predictions={place / 'guess.json'}"])
    assert result["exact_match"] == pytest.approx(1 / 3) and result["f1"] == pytest.approx(0.6)
    assert (result["n"], result["exact_match_interval_by"]) == (3, "wilson")
    assert result["f1_interval_by"] == "bootstrap" and result["f1_interval"] == [0, 1]
    printed = capsys.readouterr().out
    assert "60.0%" in printed and "{" not in printed  # a table and no JSON


def test_the_reference_is_right_and_its_items_can_be_scored(place, tmp_path):
    source, path = f"--source={place / 'dev.json'}", tmp_path / "new" / "a.json"
    result = qa.main([source, "--reference", f"--json={path}"])
    assert result["exact_match"] == result["f1"] == 1
    (tmp_path / "answers.json").write_text(json.dumps(json.loads(path.read_text())["items"]))
    assert qa.main([source, f"--predictions={tmp_path / 'answers.json'}"])["f1"] == 1


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_a_model_answers_from_the_prompt_alone(place, tmp_path, kind):
    """The same answers whatever the right ones are: no canvas has the length of the answer."""
    argv = [f"--init_from={place / kind}.pt", f"--json={tmp_path / 'a.json'}"]
    argv += ["--steps=2", "--candidates=2"] if kind == "diffusion" else []
    text = (place / "dev.json").read_text()
    (place / "other.json").write_text(re.sub(r'"text": "[^"]*"', '"text": "a red dog of"', text))
    items = []
    for name in ("dev.json", "other.json"):
        qa.main([*argv, f"--source={place / name}"])
        items.append(json.loads((tmp_path / "a.json").read_text())["items"])
    assert items[0] == items[1] and list(items[0]) == list(ASKED)
    assert qa.main(argv)["settings"]["data"] == str(place / "pairs")
