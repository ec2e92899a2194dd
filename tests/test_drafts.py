"""eval/drafts.py: texts are compared token by token, calls are counted, prompts are held out."""

import pytest
import torch
from data_files import write

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
    monkeypatch.setattr(drafts, "LENGTH", 12)
    monkeypatch.setattr(drafts, "BATCH", 3)
    write(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    flags = "--prompts=p.jsonl --out_dir=d --max_steps=2 --eval_interval=1 --batch_size=2 --masks=2"
    draft.main([f"--init_from={sample.DEMO / 'ar.pt'}", "--device=cpu", *flags.split()])
    return "d"


def measure(what: str, *flags: str) -> dict:
    argv = [f"--what={what}", f"--init_from={sample.DEMO / 'ar.pt'}", "--draft=d", *flags]
    return drafts.main([*argv, "--prompts=p.jsonl", "--device=cpu", "--json=r.jsonl"])[0]


def test_texts_are_equal_and_calls_are_those_of_the_decoder(adapter):
    line = measure("exact")
    assert read_lines("r.jsonl") == [line]
    equal = {name: (row["equal"], row["n"]) for name, row in line["rows"].items()}
    assert equal == {"trained": (4, 4), "random": (3, 3)}  # random: the first batch
    model, tokenizer, _ = load_model(sample.DEMO / "ar.pt")
    model.cfg = drafts.replace(model.cfg, target_length=13)
    sampler = speculative.SamplerConfig(draft=adapter)
    drafter = speculative.open_draft(model, sampler, "x")
    calls = tokens = 0
    for prompt in PROMPTS:
        prefix = torch.tensor([tokenizer.encode_prompt(prompt)])
        out = speculative.generate(drafter, prefix, sampler)
        calls += int(out.calls)
        tokens += min(12, len(tokenizer.decode(out.tokens[0].tolist()).encode()) + 1)
    trained = line["rows"]["trained"]
    assert (trained["calls"], trained["tokens"]) == (calls, tokens)
    assert trained["calls_per_token"] == round(calls / tokens, 4)


def test_a_text_that_parts_is_reported_with_its_margin(adapter, monkeypatch):
    generate = speculative.generate

    def wrong(*args):
        out = generate(*args)
        out.tokens[1, 2] = 65 + (out.tokens[1, 2] == 65)
        return out

    monkeypatch.setattr(drafts, "generate", wrong)
    monkeypatch.setattr(drafts, "BATCH", 4)
    parted = measure("exact")["rows"]["random"]["parted"]
    model, tokenizer, _ = load_model(sample.DEMO / "ar.pt")
    prefix = torch.tensor([tokenizer.encode_prompt(PROMPTS[1])])
    text = autoregressive.generate(model, prefix, autoregressive.SamplerConfig()).tokens
    start = torch.tensor([[model.cfg.sep_id]])
    logits = model(prefix, torch.cat([start, text[:, :2]], 1))[0, 2]
    best, second = logits.topk(2).values.tolist()
    assert parted == [{"prompt": 1, "margin": pytest.approx(best - second, abs=1e-4)}]


@pytest.mark.parametrize("masks", [2, 1])
def test_the_curve_starts_untrained_and_ends_at_the_last_evaluation(adapter, masks):
    rows = measure("curve", *([f"--draft_tokens={masks}"] if masks < 2 else []))["rows"]
    assert list(rows)[0] == "0 tokens" and len(rows) == 3
    assert {len(shares) for row in rows.values() for shares in row.values()} == {masks}
    last = read_lines("d/log.jsonl")[-1]["accepted"]
    assert list(rows.values())[-1]["accepted"] == last[:masks]


def test_held_out_prompts_are_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(drafts, "TRAIN", 10)
    monkeypatch.setattr(drafts, "HELD_OUT", 4)
    tasks = [{"task_id": i, "text": f"task {i}"} for i in (*range(1, 30), *range(595, 640))]
    write(tmp_path / "mbpp/mbpp.jsonl", tasks)
    for part in ("dev-v1.1", "train-subset-v1.1"):
        qas = [{"question": f" {part} {i} ", "id": f"{i}"} for i in range(130)]
        qas = [question | {"answers": [{"text": "a"}]} for question in qas]
        article = {"title": "t", "paragraphs": [{"context": "a", "qas": qas}]}
        write(tmp_path / f"squad/{part}.json.gz", {"data": [article]})
    drafts.main(["--what=prompts", f"--texts={tmp_path}", f"--out_dir={tmp_path / 'o'}"])
    found = {}
    for name, size in (("train", 10), ("code", 4), ("prose", 4)):
        lines = read_lines(tmp_path / f"o/{name}.jsonl")
        found[name] = [line["prompt"] for line in lines]
        assert len(set(found[name])) == size
    assert all(11 <= int(text.split()[1]) <= 510 for text in found["code"])
    assert all(text.startswith("dev-v1.1") for text in found["prose"])
    assert not {*found["train"]} & {*found["code"], *found["prose"]}
    assert found["train"][:5] == ["task 601", "task 602", "task 603", *found["train"][3:5]]
