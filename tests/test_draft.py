"""extras/draft.py: the model's own answers, what masks read and learn, continuing, bad input."""

import json
import math
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from drafters import KINDS, PAD, S, drafter, network, prompts
from processes import same
from safetensors.torch import load_file

import autoregressive
import sample
from data.mini import english
from data.objectives import Batch, collate
from extras import draft
from extras.adapter import FILE
from extras.draft import (
    EVAL_BATCHES,
    STATE,
    DraftConfig,
    answer,
    draw_anchors,
    evaluate,
    read_masks,
)
from extras.speculative import read_round
from infra.checkpoint import load, save
from infra.logits import banned_token_ids
from infra.rng import make_rng
from model import ModelConfig, Transformer

EVERY = pytest.mark.parametrize("kind", KINDS, ids=str)
DEMO = sample.DEMO / "ar.pt"
CFG = DraftConfig(prompts="-")


def answers(model, n: int) -> Batch:
    """The model's answers to n prompts."""
    asked = [[i for i in row if i != PAD] for row in prompts(n).tolist()]
    pairs = answer(model, asked, CFG, 0)
    return collate(pairs, range(n), PAD, model.cfg.sep_id, S + 1)


@EVERY
def test_an_answer_is_the_text_up_to_its_pad(kind):
    model = network(**kind)
    asked = [[1, 2, 3], [4], [5, 5, 2]]
    for prompt, text in answer(model, asked, CFG, 0):
        out = autoregressive.generate(model, torch.tensor([prompt]), autoregressive.SamplerConfig())
        assert text + [PAD] * (S - len(text)) == out.tokens[0].tolist() and PAD not in text


@EVERY
@torch.no_grad()
def test_masks_read_in_training_what_they_read_in_decoding(kind):
    """And the frozen logits that verify a draft predict the model's own next token."""
    model = network(**kind)
    made = drafter(model, masks=3)
    batch = answers(model, 12)
    anchor, expected = draw_anchors(batch, 3, PAD, make_rng(0, batch.example))
    hidden, clean = (x.unflatten(1, (-1, 3)) for x in read_masks(made, batch, anchor))
    drafted = model.head(hidden)
    checked = 0
    for b, n in product(range(12), range(anchor.shape[1])):
        if expected[b, n, 0] < 0:  # no such anchor
            continue
        last = int(anchor[b, n])
        text = batch.target[b : b + 1]
        cache = made.encode(batch.prefix[b : b + 1], room=30)
        if last:
            read_round(made, cache, text[:, :last], 1)
            cache.lengths = cache.lengths + last
        found = read_round(made, cache, text[:, last : last + 1], 3)[0, 1:]
        torch.testing.assert_close(drafted[b, n], found, atol=1e-9, rtol=0)
        checked += 1
    logits = model.head(clean).index_fill(-1, banned_token_ids(model.cfg, "cpu"), -math.inf)
    scored = expected >= 0
    assert torch.equal(logits.argmax(-1)[scored], expected[scored])
    assert checked > 20 and scored.sum() > checked and (expected[:, :, 0] < 0).any()


def test_anchors_are_distinct_and_their_masks_expect_the_tokens_after_the_next(monkeypatch):
    monkeypatch.setattr(draft, "ANCHORS", 7)
    target = torch.tensor([[7, 10, 11, 12, PAD, PAD, PAD, PAD], [7, 10, 11, 12, 13, 14, 15, 16]])
    batch = Batch(torch.zeros(2, 0), target, torch.arange(2))
    anchor, expected = draw_anchors(batch, 2, PAD, make_rng(0, batch.example))
    found = [dict(zip(*pair)) for pair in zip(anchor.tolist(), expected.tolist())]
    assert [len(row) for row in found] == [7, 7]
    known = {0: [11, 12], 1: [12, PAD], 2: [PAD, -100]}
    for place, values in found[0].items():
        assert values == known.get(place, [-100, -100])
    assert known.keys() <= found[0].keys()
    for place, values in found[1].items():
        wanted = [*target[1].tolist(), -100, -100, -100, -100]
        assert values == wanted[place + 2 : place + 4]


@torch.no_grad()
def test_an_evaluation_counts_drafts_from_the_left():
    made = drafter(network(), masks=2)
    valid_set = SimpleNamespace(batch=lambda seed, step, size: answers(network(), 9 + step))
    shares, added = [[], []], [[], []]
    for step in range(EVAL_BATCHES):
        batch = valid_set.batch(0, step, 8)
        rng = make_rng(0, batch.example, step)
        anchor, expected = draw_anchors(batch, 2, PAD, rng)
        banned = banned_token_ids(made.cfg, "cpu")
        logits = [made.network.head(x) for x in read_masks(made, batch, anchor)]
        right = [x.index_fill(-1, banned, -9e9).argmax(-1) for x in logits]
        right = (right[0] == right[1]).view(-1, 2).tolist()
        for r, e in zip(right, expected.view(-1, 2).tolist()):
            for j in (0, 1):
                shares[j] += [r[j]] if e[j] >= 0 else []
            if e[0] >= 0:
                added[0].append(1 + r[0])
                added[1].append(1 + r[0] + (r[0] and r[1] and e[1] >= 0))
    found = evaluate(made, valid_set, CFG)
    assert found["accepted"] == pytest.approx([sum(x) / len(x) for x in shares], abs=1e-4)
    assert found["tokens_per_call"] == pytest.approx([sum(x) / len(x) for x in added], abs=1e-4)
    assert 0 < found["accepted"][0] < 1


def test_the_losses_by_their_formulas():
    made = drafter(network(), masks=2)
    batch = answers(network(), 5)
    rng = make_rng(0, batch.example)
    anchor, expected = draw_anchors(batch, 2, PAD, rng)
    scored = expected.flatten(1) >= 0
    parts = read_masks(made, batch, anchor)
    log_q, log_p = (made.network.head(x)[scored].log_softmax(-1) for x in parts)
    wanted = {"text": (log_p.exp() * (log_p - log_q)).sum(-1).mean()}
    wanted["prompts"] = -log_q.gather(-1, expected.flatten(1)[scored][:, None]).mean()
    for source, value in wanted.items():
        found = draft.draft_loss(made, batch, DraftConfig(**{source: "-"}), rng)
        torch.testing.assert_close(found, value, rtol=1e-4, atol=0, check_dtype=False)


# The command


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with checkpoints and prompts."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=40, target_length=14)
    both = dict(paradigm="diffusion", target_attention="bidirectional")
    for name, settings in {"ar": {}, "diffusion": both}.items():
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**sizes | settings))
        for p in model.parameters():
            p.data *= 2
        save(f"{name}.pt", model, 0, "bytes")
    lines = [f"{chr(97 + i % 26)}{i}" for i in range(30)]
    (tmp_path / "p.txt").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (tmp_path / "empty.jsonl").write_text('{"code": "a"}\n[3]\n""\n')
    (tmp_path / "long.txt").write_text("a\n" + "b" * 27)
    return tmp_path


FLAGS = ["--init_from=ar.pt", "--device=cpu", "--rank=4", "--masks=2", "--batch_size=10"]
FLAGS += ["--learning_rate=1e-2", "--eval_interval=3"]


def train(out: str, *flags: str) -> dict:
    return draft.main([*FLAGS, "--prompts=p.txt", f"--out_dir={out}", *flags])


def log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def tensors(out) -> dict:
    return load_file(out / FILE)


def test_training_lowers_the_loss_and_gives_the_same_text_in_fewer_calls(place, capsys):
    """With the demonstration model."""
    (place / "fr.txt").write_text("\n".join(f"fr {english(n)}" for n in range(0, 1999, 33)))
    argv = [f"--init_from={DEMO}", "--prompts=fr.txt", "--rank=8", "--masks=2", "--batch_size=8"]
    argv += ["--max_steps=39", "--eval_interval=3", "--learning_rate=5e-3", "--out_dir=o"]
    last = draft.main([*argv, "--device=cpu"])
    entries = log(place / "o")
    early = entries[2]
    assert last["loss"] < 0.6 * early["loss"]
    assert last["tokens_per_call"][1] > early["tokens_per_call"][1] + 0.3
    assert last["accepted"][0] > early["accepted"][0] + 0.2
    capsys.readouterr()
    flags = [f"--init_from={DEMO}", "--device=cpu", "--prompt=fr eight hundred seven"]
    sample.main(flags)
    expected = capsys.readouterr()
    sample.main([*flags, "--draft=o"])
    found = capsys.readouterr()
    assert found.out == expected.out
    calls = [int(x.err.split(" network calls")[0].split()[-1]) for x in (expected, found)]
    assert calls[1] < 0.8 * calls[0]


def test_an_interrupted_run_continues_to_the_bit(place, monkeypatch):
    """First among the answers, then among the steps."""
    monkeypatch.setattr(draft, "ANSWERS_AT_ONCE", 10)
    train("a", "--max_steps=6")

    def interrupt(name: str, call: int):
        real = getattr(draft, name)
        calls = iter(range(call))

        def interrupted(*args):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(draft, name, interrupted)
            train("b", "--max_steps=6")

    interrupt("answer", 2)
    assert len((place / "b" / "answers.jsonl").read_text().splitlines()) == 20
    interrupt("draft_loss", 5)
    assert load(place / "b" / STATE)["step"] == 3 and len(log(place / "b")) == 5
    train("b", "--max_steps=6")
    texts = [(place / out / "answers.jsonl").read_text() for out in "ab"]
    assert texts[0] == texts[1] and log(place / "a") == log(place / "b")
    states = [load(place / out / STATE) for out in "ab"]
    assert same(*states) and states[0]["step"] == 6
    with pytest.raises(ValueError, match="cannot set rank=8: .* has rank=4; use another --out_dir"):
        train("a", "--rank=8")


def test_json_lines_and_a_text_and_samples(place):
    train("a", "--max_steps=1")
    draft.main([*FLAGS, "--prompts=p.jsonl", "--out_dir=b", "--max_steps=1"])
    assert same(tensors(place / "a"), tensors(place / "b"))
    (place / "t.txt").write_text("to be or not to be, that is the question. " * 9)
    last = draft.main([*FLAGS, "--text=t.txt", "--out_dir=c", "--max_steps=4"])
    assert last["loss"] < log(place / "c")[0]["loss"] and not (place / "c/answers.jsonl").exists()
    train("d", "--temperature=1.0", "--max_steps=1")
    lines = [(place / out / "answers.jsonl").read_text().splitlines() for out in "ad"]
    assert len(lines[0]) == len(lines[1]) == 30 and lines[0] != lines[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--prompts=p.txt --init_from=diffusion.pt",
            "decoder-only AR model, got paradigm=diffusion",
        ),
        ("--prompts=none.txt", "none.txt: no such file"),
        ("--prompts=empty.jsonl", "empty.jsonl: 0 usable lines, 2 are needed"),
        ("--prompts=long.txt", "a prompt has 27 tokens, the model reads at most 26 before 13"),
        ("--prompts=p.txt --answer_tokens=39", "the model reads at most 0 before 39"),
        ("--prompts=p.txt --text=p.txt", "give --prompts=FILE, or --text=FILE, and not both"),
        ("", "give --prompts=FILE"),
        ("--text=long.txt --answer_tokens=20", "fewer than block_size"),
        ("--prompts=p.txt --masks=16", "masks must be at most 15"),
        ("--prompts=p.txt --chat", "no chat template"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(place, flags, message):
    before = sorted(place.rglob("*"))
    with pytest.raises(ValueError, match=message) as refused:
        draft.main([*FLAGS, "--out_dir=o", *flags.split()])
    assert "\n" not in str(refused.value) and sorted(place.rglob("*")) == before


def test_sample_refuses_a_draft_that_does_not_fit(place):
    train("o", "--max_steps=1")
    cases = [
        ("--draft=o --init_from=diffusion.pt", "decoder-only AR model, got paradigm=diffusion"),
        ("--draft=o --draft_tokens=3", "draft_tokens must be at most 2, the masks of o, got 3"),
        ("--draft=none", "none: no such adapter"),
        ("--draft_tokens=2", "'draft_tokens' is not a setting of autoregressive"),
        ("--draft=o --steps=3", "'steps' is not a setting of extras.speculative"),
    ]
    for flags, message in cases:
        with pytest.raises(ValueError, match=message) as refused:
            sample.main(["--init_from=ar.pt", "--prompt=a", "--device=cpu", *flags.split()])
        assert "\n" not in str(refused.value)
