"""eval/translation.py, and what it shares with the other tasks: examples, prompts, bad input."""

import gzip
import json
import subprocess
import sys

import pytest
from eval_models import BYTES, KINDS, save_model, save_pairs

from data.loader import write_stream
from data.mini import examples as mini_examples
from eval import common, translation

SIZES = dict(block_size=48, target_length=16)
SOURCE = ["one dog", "two cats", "a red book", "it rains", "", "two men talk to a woman"]
WOMAN = "deux hommes parlent à une femme"
TARGET = ["un chien", "deux chats", "un livre rouge", "il pleut", "", WOMAN]
GUESSED = ["un chien", "deux  chats noirs", "une livre", "", "rien", WOMAN]

pytest.importorskip("sacrebleu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Source and target files, guesses, sets, and a random checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("translation")
    for name, lines in (("test.en", SOURCE), ("test.fr", TARGET), ("guess.txt", GUESSED)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "guess.json").write_text(json.dumps(dict(enumerate(GUESSED, 1))))
    with gzip.open(folder / "test.en.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(SOURCE) + "\n")
    save_pairs(folder / "pairs", [(a, b[:15]) for a, b in zip(SOURCE, TARGET) if b], 16, 48)
    text = {split: [BYTES.encode("text " * 20)] for split in ("train", "valid")}
    write_stream(folder / "stream", text, "bytes", 16, 48)
    for kind, config in KINDS.items():
        save_model(folder / f"{kind}.pt", folder / "pairs", **SIZES, **config)
    return folder


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(common, "RESAMPLES", 100)


def files(place) -> list[str]:
    return [f"--source={place / 'test.en'}", f"--target_source={place / 'test.fr'}"]


def test_bleu_equals_sacrebleus_own_command(place, capsys):
    result = translation.main([*files(place), f"--predictions={place / 'guess.json'}"])
    command = [sys.executable, "-m", "sacrebleu", str(place / "test.fr"), "-i"]
    command += [str(place / "guess.txt"), "-m", "bleu", "chrf", "-w", "9"]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    ours = [round(result[name], 9) for name in ("bleu", "chrf")]
    assert ours == [row["score"] for row in theirs]
    assert [row["signature"] for row in theirs] == list(result["signatures"].values())
    assert 20 < result["bleu"] < 80 and (result["exact_match"], result["n"]) == (2 / 6, 6)
    assert result["signatures"]["bleu"] in capsys.readouterr().out


def test_a_line_break_in_a_translation_is_a_space():
    assert list(map(translation.one_line, ["a\nb\r\nc", " d ", ""])) == ["a b c", "d", ""]


def test_examples_are_the_lines_of_a_file_also_gzipped_after_a_text_that_a_model_knows(place):
    paths = dict(source=f"{place}/test.en.gz", target_source=f"{place}/test.fr")
    cfg = translation.TranslationConfig(**paths)
    found = translation.examples(cfg)
    assert [(e["prefix"], e["target"]) for e in found] == list(zip(SOURCE, TARGET))
    cfg.task_prefix = "fr: "
    assert translation.examples(cfg)[0]["prefix"] == "fr: one dog"


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_a_model_is_scored_on_the_held_out_pairs_of_its_set_by_default(place, tmp_path, kind):
    argv = [f"--init_from={place / kind}.pt", f"--json={tmp_path / 'a.json'}"]
    argv += ["--steps=3", "--candidates=2"] if kind == "diffusion" else []
    result = translation.main(argv)
    kept = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(result)) and result["n"] == len(kept["items"]) == 5
    data = str(place / "pairs")
    assert result["settings"]["data"] == data
    assert result["trained"] == {"step": 7, "data": data, "fingerprint": "abc"}
    calls = result["calls_per_sample"]
    assert calls == 6 if kind == "diffusion" else calls <= 15
    translation.main([*argv, "--items=false"])
    assert "items" not in json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))


# What the tasks share


def test_of_the_mixed_set_each_evaluation_takes_its_task(tmp_path):
    items = [(item["prefix"], item["target"]) for item in mini_examples("mini", "valid")[:9]]
    save_pairs(tmp_path / "x", items, 41, 88, command="python -m data.mini")
    for task, tag in (("translation", "fr "), ("qa", "qa "), ("code", "py ")):
        found = common.held_out(str(tmp_path / "x"), task)
        assert len(found) == 3 and all(example["prefix"].startswith(tag) for example in found)


def test_a_prompt_that_does_not_fit_goes_unanswered_and_is_counted(place, tmp_path, capsys):
    path = tmp_path / "long.tsv"
    path.write_text("short\tcourt\n" + "long " * 9 + "\tlong\n", encoding="utf-8")
    argv = [f"--init_from={place / 'ar.pt'}", f"--source={path}"]
    result = translation.main(argv)
    assert result["n"] == 2 and result["items"]["2"] == ""
    assert "1 of 2 prompts are longer than 32 tokens" in capsys.readouterr().err
    path.write_text("long " * 9 + "\tlong\n", encoding="utf-8")
    with pytest.raises(ValueError, match="1 of 1 prompts are longer than 32 tokens"):
        translation.main(argv)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--data=pairs --predictions=guess.json --reference", "--predictions or --reference, not"),
        ("--data=pairs --reference --steps=3", "unknown setting 'steps'"),
        ("--data=pairs --reference --task_prefix=x", "--task_prefix needs --source"),
        ("--data=stream --reference", "is a stream of text"),
        ("--init_from=bare.pt --reference", "does not name its training data"),
    ],
)
def test_bad_input_is_one_line(place, monkeypatch, flags, says):
    monkeypatch.chdir(place)
    save_model("bare.pt", **SIZES)
    with pytest.raises(ValueError, match=says) as error:
        translation.main(flags.split())
    assert "\n" not in str(error.value)
