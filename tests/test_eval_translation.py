"""eval/translation.py, and what it shares with the other tasks: resumed generation, comparison, bad input."""

import gzip
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import sample
from checkpoint import save
from data.loader import write_pairs, write_stream
from data.mini import examples as mini_examples
from data.tokenizer import get_tokenizer
from eval import common, translation
from eval.common import choose, markdown
from model import ModelConfig, Transformer

BYTES = get_tokenizer("bytes")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=48, target_length=16)
DIFFUSION = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
SOURCE = ["one dog", "two cats", "a red book", "it rains", "", "two men talk to a woman"]
TARGET = ["un chien", "deux chats", "un livre rouge", "il pleut", "", "deux hommes parlent à une femme"]
GUESSED = ["un chien", "deux  chats noirs", "une livre", "", "rien", "deux hommes parlent à une femme"]

pytest.importorskip("sacrebleu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Source and target files, guesses, sets, and a random checkpoint of each kind that was trained on one."""
    folder = tmp_path_factory.mktemp("translation")
    for name, lines in (("test.en", SOURCE), ("test.fr", TARGET), ("guess.txt", GUESSED)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with gzip.open(folder / "test.en.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(SOURCE) + "\n")
    pairs = [(BYTES.encode(a), BYTES.encode(b)[:15]) for a, b in zip(SOURCE, TARGET)]
    write_pairs(folder / "pairs", {"train": pairs, "valid": pairs}, "bytes", 16, 48)
    write_stream(
        folder / "stream", {split: [BYTES.encode("text " * 20)] for split in ("train", "valid")}, "bytes", 16, 48
    )
    for kind, config in (("ar", {}), ("diffusion", DIFFUSION)):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**TINY | config)).eval()
        save(folder / f"{kind}.pt", model, 7, "bytes", train_config={"data": str(folder / "pairs")}, fingerprint="abc")
    return folder


def files(place) -> list[str]:
    return [f"--source={place / 'test.en'}", f"--target_source={place / 'test.fr'}"]


def test_bleu_equals_sacrebleus_own_command_on_the_saved_file(place, tmp_path, capsys):
    guess, saved = place / "guess.txt", tmp_path / "new" / "saved.txt"
    result = translation.main([*files(place), f"--predictions={guess}", f"--save={saved}", "--resamples=100"])
    assert saved.read_text(encoding="utf-8") == guess.read_text(encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        str(place / "test.fr"),
        "-i",
        str(saved),
        "-m",
        "bleu",
        "chrf",
        "-w",
        "9",
    ]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [round(result[name], 9) for name in ("bleu", "chrf")] == [row["score"] for row in said]
    assert [row["signature"] for row in said] == list(result["signatures"].values())
    assert 20 < result["bleu"] < 80
    assert (result["exact_match"], result["empty"], result["n"]) == (2 / 6, 1, 6)
    out = capsys.readouterr().out
    assert result["signatures"]["bleu"] in out and json.loads(out.splitlines()[-1])["bleu"] == result["bleu"]


def test_the_reference_scores_100(place):
    result = translation.main([*files(place), "--reference", "--resamples=100"])
    assert result["exact_match"] == 1 and [result["bleu"], result["chrf"]] == pytest.approx([100, 100])


def test_a_line_break_in_a_translation_is_a_space(tmp_path):
    translation.write_predictions(tmp_path / "p.txt", ["a\nb\r\nc", " d ", ""])
    assert translation.read_predictions(str(tmp_path / "p.txt"), 3) == ["a b c", "d", ""]
    assert translation.score("deux\ncents", {"target": "deux cents"}) is True
    assert translation.score("deux cent", {"target": "deux cents"}) is False


def test_examples_are_the_lines_of_a_file_also_gzipped_with_the_text_a_model_knows_before_them(place):
    cfg = translation.TranslationConfig(source=str(place / "test.en.gz"), target_source=str(place / "test.fr"))
    found = translation.examples(cfg)
    assert [(translation.prompt(e), e["target"]) for e in found] == list(zip(SOURCE, TARGET))
    cfg.task_prefix = "fr: "
    assert translation.prompt(translation.examples(cfg)[0]) == "fr: one dog"


@pytest.mark.parametrize("kind", ["ar", "diffusion"])
def test_a_model_is_scored_on_the_held_out_pairs_of_its_set_by_default(place, tmp_path, kind):
    argv = [f"--init_from={place / kind}.pt", f"--json={tmp_path / 'a.json'}", "--resamples=100"]
    argv += ["--steps=3", "--candidates=2"] if kind == "diffusion" else []
    result = translation.main(argv)
    kept = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert result["n"] == len(kept["items"]) == 6 and "items" not in result
    assert {key: kept[key] for key in result} == json.loads(json.dumps(result))
    assert result["settings"]["data"] == str(place / "pairs")
    assert result["trained"] == {"step": 7, "data": str(place / "pairs"), "fingerprint": "abc"}
    assert result["calls_per_sample"] == 6 if kind == "diffusion" else result["calls_per_sample"] <= 15
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]  # the finished parts are gone


# resumed generation


class Stopped(Exception):
    pass


def stopping_after(n: int, monkeypatch):
    """Generation that breaks off before batch n."""
    whole, count = sample.PARADIGMS["ar"].generate, iter(range(100))

    def generate(*args, **rest):
        if next(count) == n:
            raise Stopped
        return whole(*args, **rest)

    fake = SimpleNamespace(generate=generate, SamplerConfig=common.autoregressive.SamplerConfig)
    monkeypatch.setattr(sample, "PARADIGMS", {"ar": fake})
    return count


def test_a_run_that_broke_off_keeps_its_finished_texts_and_ends_as_if_it_had_not(place, tmp_path, monkeypatch, capsys):
    argv = [f"--init_from={place / 'ar.pt'}", "--temperature=1.0", "--batch_size=1", "--resamples=100"]
    whole = translation.main([*argv, f"--json={tmp_path / 'whole.json'}"])
    part, argv = tmp_path / "a.txt.part.jsonl", [*argv, f"--save={tmp_path / 'a.txt'}", f"--json={tmp_path / 'a.json'}"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping_after(4, patch)
        translation.main(argv)
    assert len(part.read_text(encoding="utf-8").splitlines()) == 1 + 4
    part.write_bytes(part.read_bytes()[:-9])  # the power went in the middle of a line
    with monkeypatch.context() as patch:
        count = stopping_after(99, patch)
        result = translation.main(argv)
        assert next(count) == 3  # of six batches, three were there
    assert "3 texts are there already" in capsys.readouterr().out
    a, b = (json.loads((tmp_path / name).read_text(encoding="utf-8")) for name in ("whole.json", "a.json"))
    assert a["items"] == b["items"] and len(set(a["items"].values())) > 1
    assert result["bleu"] == whole["bleu"] and result["calls_per_sample"] == whole["calls_per_sample"]
    assert not part.exists()


@pytest.mark.parametrize("change", ["--seed=1", "--temperature=0.5", "--init_from=other.pt", "--n=5", "--source"])
def test_finished_texts_of_another_run_are_not_used(place, tmp_path, monkeypatch, capsys, change):
    argv = [f"--init_from={place / 'ar.pt'}", "--temperature=1.0", "--batch_size=1", f"--save={tmp_path / 'a.txt'}"]
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping_after(2, patch)
        translation.main(argv)
    torch.manual_seed(1)
    save(
        tmp_path / "other.pt", Transformer(ModelConfig(**TINY)), 0, "bytes", train_config={"data": str(place / "pairs")}
    )
    change = change.replace("other.pt", str(tmp_path / "other.pt"))
    more = (
        [change] if change != "--source" else [f"--source={place / 'test.fr'}", f"--target_source={place / 'test.en'}"]
    )
    count = stopping_after(99, monkeypatch)
    n = translation.main([*argv, "--resamples=100", *more])["n"]
    assert next(count) == n and "is of another run (other " in capsys.readouterr().out


def test_without_a_file_to_write_nothing_is_kept(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    translation.main([f"--init_from={place / 'ar.pt'}", "--resamples=100"])
    assert list(tmp_path.iterdir()) == []


# comparison


def test_two_runs_are_compared_by_their_json_or_by_their_predictions(place, tmp_path, capsys):
    base = [*files(place), "--resamples=200"]
    translation.main([*base, f"--predictions={place / 'guess.txt'}", f"--json={tmp_path / 'theirs.json'}"])
    found = [
        translation.main([*base, "--reference", f"--against={path}"])["against"]
        for path in (tmp_path / "theirs.json", place / "guess.txt")
    ]
    assert found[0] | {"file": ""} == found[1] | {"file": ""}
    em = found[0]["exact_match"]
    assert (em["theirs"], em["difference"], em["test"]) == (2 / 6, pytest.approx(4 / 6), "mcnemar")
    assert em["p"] == 2 / 16 and found[0]["bleu"]["test"] == "bootstrap"
    assert "theirs" in capsys.readouterr().out
    translation.main([*base, "--reference", "--items=false", f"--json={tmp_path / 'none.json'}"])
    assert "items" not in json.loads((tmp_path / "none.json").read_text())
    with pytest.raises(ValueError, match="keeps no answers to compare with"):
        translation.main([*base, "--reference", f"--against={tmp_path / 'none.json'}"])
    with pytest.raises(ValueError, match="on 6 other examples"):
        translation.main([*base, "--reference", "--n=3", f"--against={tmp_path / 'theirs.json'}"])


# common


def test_examples_are_chosen_evenly_and_all_by_default():
    assert choose(list("abcdefgh"), 4) == ["a", "c", "e", "g"]
    assert choose([1, 2, 3], 0) == choose([1, 2, 3], 9) == [1, 2, 3]
    with pytest.raises(ValueError, match="no examples"):
        choose([], 0)


def test_of_the_mixed_set_each_evaluation_takes_its_task(tmp_path):
    items = mini_examples("mini", "valid")[:9]
    pairs = [(BYTES.encode(item["prefix"]), BYTES.encode(item["target"])) for item in items]
    write_pairs(tmp_path / "mini", {"train": pairs, "valid": pairs}, "bytes", 41, 88)
    for task, tag in (("translation", "fr "), ("qa", "qa "), ("code", "py ")):
        found = common.held_out(str(tmp_path / "mini"), task)
        assert len(found) == 3 and all(example["prefix"].startswith(tag) for example in found)
    (tmp_path / "mini").rename(tmp_path / "mini_qa")
    with pytest.raises(ValueError, match="holds no code: use python -m eval.qa"):
        common.held_out(str(tmp_path / "mini_qa"), "code")


def test_a_prompt_that_does_not_fit_goes_unanswered_and_is_told(place, tmp_path, capsys):
    (tmp_path / "long.tsv").write_text("short\tcourt\n" + "long " * 9 + "\tlong\n", encoding="utf-8")
    argv = [f"--init_from={place / 'ar.pt'}", f"--source={tmp_path / 'long.tsv'}", "--resamples=100"]
    assert translation.main([*argv, f"--json={tmp_path / 'a.json'}"])["n"] == 2
    assert "1 of 2 prompts have more than 32 tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["items"]["2"] == ""
    (tmp_path / "long.tsv").write_text("long " * 9 + "\tlong\n", encoding="utf-8")
    with pytest.raises(ValueError, match="all 1 prompts have more than 32 tokens"):
        translation.main(argv)


def test_a_table_is_aligned():
    assert markdown(["a", "value"], [["long name", "1"]]) == (
        "| a         | value |\n| --------- | ----- |\n| long name | 1     |"
    )


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--predictions=nowhere.txt"], "nowhere.txt: no such file"),
        (["--predictions=short.txt"], "short.txt: 2 lines for 6 examples"),
        (["--predictions=latin.txt"], "latin.txt, line 2: not UTF-8"),
        (["--predictions=test.fr", "--reference"], "give --predictions or --reference, not both"),
        (["--reference", "--data=pairs"], "give --source or --data, not both"),
        (["--reference", "--n=-1"], "n must be 0 (all) or more"),
        (["--reference", "--steps=3"], "unknown setting 'steps'"),
        (["--reference", "--against=short.txt"], "short.txt: 2 lines for 6 examples"),
    ],
)
def test_bad_input_is_one_line(place, tmp_path, monkeypatch, argv, says):
    monkeypatch.chdir(place)
    (place / "short.txt").write_text("a\nb\n")
    (place / "latin.txt").write_bytes("a\nd\xe9j\xe0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        translation.main(["--source=test.en", "--target_source=test.fr", *argv])
    assert "\n" not in str(error.value)


def test_a_set_or_checkpoint_that_asks_nothing_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match="is a stream of text, which asks nothing"):
        translation.main(["--reference", f"--data={place / 'stream'}"])
    with pytest.raises(ValueError, match="--task_prefix needs --source"):
        translation.main(["--reference", f"--data={place / 'pairs'}", "--task_prefix=x"])
    save(tmp_path / "bare.pt", Transformer(ModelConfig(**TINY)), 0, "bytes")
    with pytest.raises(ValueError, match="does not say what it was trained on"):
        translation.main(["--reference", f"--init_from={tmp_path / 'bare.pt'}"])
    with pytest.raises(ValueError, match="no such checkpoint"):
        translation.main(["--reference", f"--init_from={tmp_path / 'none.pt'}"])
