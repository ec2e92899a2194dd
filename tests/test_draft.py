"""extras/draft.py: the model's own answers, what masks read and learn, continuing, bad input."""

import json
import math

import numpy as np
import pytest
import torch
from drafters import KINDS, PAD, drafter, network, prompts
from processes import same

import autoregressive
import sample
from data.mini import english
from extras import draft
from extras.adapter import FILE
from extras.draft import Batch, DraftConfig, Row, acceptance, answer, make_batch, read_masks
from extras.speculative import read_round
from infra.checkpoint import save
from infra.logits import banned_token_ids
from model import ModelConfig, Transformer

EVERY = pytest.mark.parametrize("kind", KINDS, ids=str)
DEMO = sample.DEMO / "ar.pt"
CFG = DraftConfig(prompts="-", anchors=8)


def answers(model, n: int) -> list[Row]:
    asked = [[i for i in row if i != PAD] for row in prompts(n).tolist()]
    rows = answer(model, asked, CFG, torch.arange(n))
    return [row for row in rows if len(row.ids) - row.start > 2]


@EVERY
def test_an_answer_is_prompt_slot_0_and_the_text_with_its_pad(kind):
    model = network(**kind)
    for row, prompt in zip(answer(model, [[1, 2, 3], [4]], CFG, torch.arange(2)), ([1, 2, 3], [4])):
        out = autoregressive.generate(model, torch.tensor([prompt]), autoregressive.SamplerConfig())
        text = out.tokens[0].tolist()
        text = text[: text.index(PAD) + 1] if PAD in text else text
        given = prompt + [model.cfg.sep_id] * (model.cfg.sep_id >= 0)
        assert row == Row(len(given) - 1, given + text)


@EVERY
@torch.no_grad()
def test_masks_read_in_training_what_they_read_in_decoding(kind):
    """And the frozen logits that verify a draft predict the model's own next token."""
    model = network(**kind)
    made = drafter(model, masks=3)
    rows = answers(model, 12)
    batch = make_batch(rows, CFG, np.random.default_rng(0), 3)
    hidden, clean = (x.unflatten(1, (8, 3)) for x in read_masks(made, batch))
    checked = 0
    for b, (start, ids) in enumerate(rows):
        for n in range(8):
            if batch.expected[b, n, 0] < 0:  # no such anchor
                continue
            anchor = int(batch.anchor[b, n])
            cache = made.encode(torch.tensor([ids[:start]], dtype=torch.long), room=30)
            if anchor > start:
                read_round(made, cache, torch.tensor([ids[start:anchor]]), 1)
                cache.lengths = cache.lengths + anchor - start
            found = read_round(made, cache, torch.tensor([ids[anchor : anchor + 1]]), 3)[0, 1:]
            torch.testing.assert_close(hidden[b, n], found, atol=1e-9, rtol=0)
            checked += 1
    logits = model.head(clean).index_fill(-1, banned_token_ids(model.cfg, "cpu"), -math.inf)
    scored = batch.expected >= 0
    assert torch.equal(logits.argmax(-1)[scored], batch.expected[scored])
    assert checked > 20 and scored.sum() > checked and (batch.expected[:, :, 0] < 0).any()


@torch.no_grad()
def test_anchors_are_distinct_and_their_masks_expect_the_tokens_after_the_next():
    row = Row(2, [10, 11, 12, 13, 14, 15, 16])
    _, start, anchor, expected = make_batch([row], CFG, np.random.default_rng(0), 2)
    by_anchor = dict(zip(anchor[0].tolist(), expected[0].tolist()))
    assert by_anchor == {2: [14, 15], 3: [15, 16], 4: [16, -100], 0: [-100, -100]}
    assert start.tolist() == [2]


@torch.no_grad()
def test_acceptance_counts_drafts_from_the_left():
    made = drafter(network(), masks=2)
    rows = answers(network(), 30)
    batch = make_batch(rows, CFG, np.random.default_rng(0), 2)
    hidden, clean = read_masks(made, batch)
    banned = banned_token_ids(made.cfg, "cpu")
    draft, true = (
        made.network.head(x).index_fill(-1, banned, -9e9).argmax(-1) for x in (hidden, clean)
    )
    pairs = (draft == true).view(-1, 2).tolist()
    known = (batch.expected >= 0).view(-1, 2).tolist()
    share = [
        sum(p[j] for p, k in zip(pairs, known) if k[j]) / sum(k[j] for k in known) for j in (0, 1)
    ]
    added = [1 + p[0] + (p[0] and p[1] and k[1]) for p, k in zip(pairs, known) if k[0]]
    found, tokens = acceptance(
        made, [Batch(*(x[:9] for x in batch)), Batch(*(x[9:] for x in batch))]
    )
    assert found == pytest.approx(share) and tokens == pytest.approx(sum(added) / len(added))
    assert 0 < found[0] < 1


def test_the_losses_by_their_formulas():
    made = drafter(network(), masks=2)
    batch = make_batch(answers(network(), 5), CFG, np.random.default_rng(0), 2)
    hidden, clean = read_masks(made, batch)
    scored = batch.expected.flatten(1) >= 0
    log_q, log_p = (made.network.head(x)[scored].log_softmax(-1) for x in (hidden, clean))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    cfg = DraftConfig(prompts="-", loss="kl")
    found = draft.draft_loss(made, batch, cfg)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0, check_dtype=False)
    expected = -log_q.gather(-1, batch.expected.flatten(1)[scored][:, None]).mean()
    found = draft.draft_loss(made, batch, CFG)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0, check_dtype=False)


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
FLAGS += ["--schedule=constant", "--learning_rate=1e-2", "--eval_interval=3"]


def train(out: str, *flags: str) -> dict:
    return draft.main([*FLAGS, "--prompts=p.txt", f"--out_dir={out}", *flags])


def log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_gives_the_same_text_in_fewer_calls(place, capsys):
    """With the demonstration model."""
    (place / "fr.txt").write_text("\n".join(f"fr {english(n)}" for n in range(0, 1999, 33)))
    argv = [f"--init_from={DEMO}", "--prompts=fr.txt", "--rank=8", "--masks=2", "--batch_size=8"]
    argv += ["--max_steps=40", "--eval_interval=20", "--learning_rate=5e-3", "--out_dir=o"]
    last = draft.main([*argv, "--device=cpu"])
    entries = log(place / "o")
    assert last["loss"] < 0.6 * entries[1]["loss"]
    assert last["tokens_per_call"] > entries[0]["tokens_per_call"] + 0.3
    assert last["accepted"][0] > entries[0]["accepted"][0] + 0.2
    printed = capsys.readouterr().out
    for part in ("61 of 61 answers", "held-out accepted", "min left", "sample.py --init_from="):
        assert part in printed
    flags = [f"--init_from={DEMO}", "--device=cpu", "--prompt=fr eight hundred seven"]
    sample.main(flags)
    expected = capsys.readouterr()
    sample.main([*flags, "--draft=o"])
    found = capsys.readouterr()
    assert found.out == expected.out
    calls = [int(x.err.split(" network calls")[0].split()[-1]) for x in (expected, found)]
    assert calls[1] < 0.8 * calls[0]


def test_an_interrupted_run_continues_to_the_bit(place, capsys):
    train("a", "--max_steps=6")
    train("b", "--max_steps=3")
    lines = (place / "b" / "answers.jsonl").read_text()
    (place / "b" / "answers.jsonl").write_text(lines[: len(lines) // 2])  # half a line
    train("b", "--max_steps=6")
    for name in ("answers.jsonl", FILE):
        assert (place / "a" / name).read_bytes() == (place / "b" / name).read_bytes()
    states = [torch.load(place / out / "state.pt") for out in "ab"]
    assert same(*states) and states[0]["step"] == 6
    kept = ("step", "loss", "accepted")
    assert [[e.get(k) for k in kept] for e in log(place / "a")] == [
        [e.get(k) for k in kept] for e in log(place / "b")
    ]
    with pytest.raises(ValueError, match="cannot set rank=8: .* has rank=4; use --overwrite"):
        train("a", "--rank=8")
    train("a", "--rank=8", "--overwrite", "--max_steps=1")
    assert log(place / "a")[-1]["step"] == 1


def test_json_lines_and_a_text_and_samples(place):
    train("a", "--max_steps=1")
    draft.main([*FLAGS, "--prompts=p.jsonl", "--out_dir=b", "--max_steps=1"])
    assert (place / "a" / FILE).read_bytes() == (place / "b" / FILE).read_bytes()
    (place / "t.txt").write_text("to be or not to be, that is the question. " * 9)
    last = draft.main([*FLAGS, "--text=t.txt", "--out_dir=c", "--max_steps=4"])
    assert last["loss"] < log(place / "c")[1]["loss"] and not (place / "c/answers.jsonl").exists()
    train("d", "--answers=45", "--temperature=1.0", "--max_steps=1")
    rows = draft.read_answers(place / "d" / "answers.jsonl")
    assert len(rows) == 45 and rows[0] != rows[30] and rows[0].ids[:2] == rows[30].ids[:2]


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
        ("--prompts=p.txt --answer_tokens=39", "answer_tokens must be 2 to 38, got 39"),
        ("--prompts=p.txt --answers=31", "answers=31 for 30 prompts: greedy answers"),
        ("--prompts=p.txt --text=p.txt", "give --prompts=FILE, or --text=FILE, and not both"),
        ("", "give --prompts=FILE"),
        ("--text=long.txt --answer_tokens=20", "long.txt: 29 tokens are fewer than two windows"),
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
