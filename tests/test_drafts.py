"""eval/drafts.py: texts are compared token by token, calls are counted, prompts are held out."""

import gzip
import json

import pytest
import torch

import autoregressive
import sample
from eval import drafts
from eval.common import read_lines
from extras import draft, speculative
from infra.checkpoint import load_model

PROMPTS = ["fr one", "fr two hundred", "qa ann 4821. bob 9035. ann?", "py add 3"]


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """An adapter of the demonstration model, trained for two steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    flags = "--prompts=p.jsonl --out_dir=d --max_steps=2 --eval_interval=1 --batch_size=2 --rank=4"
    draft.main([f"--init_from={sample.DEMO / 'ar.pt'}", "--device=cpu", *flags.split()])
    return "d"


def measure(what: str, *flags: str) -> dict:
    argv = [f"--what={what}", f"--init_from={sample.DEMO / 'ar.pt'}", "--draft=d", *flags]
    flags = ["--prompts=p.jsonl", "--length=12", "--device=cpu", "--json=r.jsonl"]
    return drafts.main([*argv, *flags])[0]


def test_texts_are_equal_and_calls_are_those_of_the_decoder(adapter, capsys):
    line = measure("exact", "--batch_size=3")
    assert read_lines("r.jsonl") == [line]
    equal = {name: (row["equal"], row["n"]) for name, row in line["rows"].items()}
    assert equal == {"trained": (4, 4), "random": (3, 3)}  # random: batches in the first quarter
    model, tokenizer, _ = load_model(sample.DEMO / "ar.pt")
    model.cfg = drafts.replace(model.cfg, target_length=13)
    sampler = speculative.SamplerConfig(draft=adapter)
    drafter = speculative.open_draft(model, sampler, "x")
    calls = tokens = 0
    for prompt in PROMPTS:
        out = speculative.generate(
            drafter, torch.tensor([tokenizer.encode_prompt(prompt)]), sampler
        )
        calls += int(out.calls)
        tokens += min(12, len(tokenizer.decode(out.tokens[0].tolist()).encode()) + 1)
    trained = line["rows"]["trained"]
    assert (trained["calls"], trained["tokens"]) == (calls, tokens)
    assert trained["calls_per_token"] == round(calls / tokens, 4)


def test_a_text_that_parts_is_reported_with_its_place_and_margin(adapter, monkeypatch):
    generate = speculative.generate

    def wrong(*args):
        out = generate(*args)
        out.tokens[1, 2] = 65 + (out.tokens[1, 2] == 65)
        return out

    monkeypatch.setattr(drafts, "generate", wrong)
    parted = measure("exact")["rows"]["random"]["parted"]
    model, tokenizer, _ = load_model(sample.DEMO / "ar.pt")
    seen = []
    greedy = autoregressive.SamplerConfig()
    prefix = torch.tensor([tokenizer.encode_prompt(PROMPTS[1])])
    autoregressive.generate(
        model, prefix, greedy, on_step=lambda s, t, logits, r: seen.append(logits)
    )
    best, second = seen[2][0, 0].topk(2).values.tolist()
    assert parted == [{"prompt": 1, "slot": 2, "margin": pytest.approx(best - second, abs=1e-4)}]


def test_the_curve_starts_untrained_and_ends_at_the_last_evaluation(adapter):
    rows = measure("curve")["rows"]
    log = read_lines("d/log.jsonl")
    assert list(rows)[0] == "0 tokens" and len(rows) == 2
    assert list(rows.values())[-1]["accepted"] == log[-1]["accepted"]


def test_held_out_prompts_are_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(drafts, "TRAIN", 10)
    monkeypatch.setattr(drafts, "HELD_OUT", 4)
    (tmp_path / "mbpp").mkdir()
    (tmp_path / "squad").mkdir()
    tasks = [{"task_id": i, "text": f"task {i}"} for i in (*range(1, 30), *range(595, 640))]
    lines = "".join(json.dumps(task) + "\n" for task in tasks)
    (tmp_path / "mbpp/mbpp.jsonl").write_text(lines)
    for part in ("dev-v1.1", "train-subset-v1.1"):
        answers = [{"text": "a"}]
        qas = [{"question": f" {part} {i} ", "id": f"{i}", "answers": answers} for i in range(130)]
        article = {"title": "t", "paragraphs": [{"context": "a", "qas": qas}]}
        content = json.dumps({"data": [article]})
        with gzip.open(tmp_path / f"squad/{part}.json.gz", "wt") as file:
            file.write(content)
    drafts.main(["--what=prompts", f"--texts={tmp_path}", f"--out_dir={tmp_path / 'o'}"])
    found = {}
    for name, size in (("train", 10), ("code", 4), ("prose", 4)):
        lines = (tmp_path / f"o/{name}.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["prompt"] for line in lines]
        assert len(set(found[name])) == size
    assert all(11 <= int(text.split()[1]) <= 510 for text in found["code"])
    assert all(text.startswith("dev-v1.1") for text in found["prose"])
    assert not {*found["train"]} & {*found["code"], *found["prose"]}
    assert found["train"][:5] == ["task 601", "task 602", "task 603", *found["train"][3:5]]
