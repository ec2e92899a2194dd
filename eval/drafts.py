"""Measure an adapter that drafts (extras/draft.py): is the text the same, in how many calls?

    python -m eval.drafts --what=prompts --out_dir=out/prompts     # to train on, and held-out ones
    python -m eval.drafts --init_from=out/smol_ar/ckpt.pt --draft=out/draft --chat \\
        --prompts=out/prompts/code.jsonl --json=results/drafts.jsonl

exact  greedy texts: how many are those of the frozen model, in how many network calls? Where texts
       part, margin is the difference of the two largest logits: near 0 for a tie that rounding
       decides. A quarter of the prompts also with a random adapter of one mask.
curve  acceptance on held-out answers against the tokens that the adapter has learned from.

The prompts are tasks of MBPP and questions of SQuAD. Held-out ones are of the test parts.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import autoregressive
from configurator import configure, run, setting
from data import squad
from data.loader import open_dataset
from data.sources import read_json_lines
from eval.common import Settings, markdown, read_lines, write_lines
from eval.speed import add_lines
from extras.adapter import AdapterConfig, DraftModel
from extras.draft import DATA, DraftConfig, encode_prompts, evaluate, pad_right
from extras.speculative import SamplerConfig, generate, open_draft
from infra import device as devices
from infra.checkpoint import load_model

SEED = 0  # of the random adapter
TRAIN, HELD_OUT = 620, 100  # prompts of a file; MBPP has no more tasks to train on
LENGTH = 128  # most tokens of a text
BATCH = 8  # texts at a time


@dataclass
class DraftsConfig(Settings):
    what: str = setting("exact", "measurement", ("prompts", "exact", "curve"))
    init_from: str = setting("out/smol_ar/ckpt.pt", "the AR model", path=True)
    draft: str = setting("out/draft", "the adapter", path=True)
    prompts: str = setting("out/prompts/code.jsonl", "as of extras.draft", path=True)
    chat: bool = setting(False, "put prompts into the chat template")
    draft_tokens: int = setting(0, "drafted in one call; 0: one a mask")
    dtype: str = setting("float32", "autocast", ("float32", "bfloat16"))
    device: str = setting("auto", "auto, cpu, cuda, mps")
    texts: str = setting("../shared/data", "folder of MBPP and SQuAD, of prompts", path=True)
    out_dir: str = setting("out/prompts", "for the files of prompts", path=True)
    json: str = setting("", "add a line with the result to this file", path=True)


def write_prompts(folder: Path, out: Path) -> None:
    """Write train.jsonl (3 tasks, 2 questions, in turn), code.jsonl and prose.jsonl."""
    tasks = [task for _, task in read_json_lines(folder / "mbpp/mbpp.jsonl")]
    code = [task["text"] for task in tasks if 11 <= task["task_id"] <= 510]
    taught = [task["text"] for task in tasks if task["task_id"] >= 601]
    prose, asked = (
        [example["question"].strip() for example in squad.read(str(folder / "squad" / name))]
        for name in ("dev-v1.1.json.gz", "train-subset-v1.1.json.gz")
    )
    asked = spread(asked, 2 * TRAIN // 5)
    train = []
    for i in range(TRAIN // 5):
        train += taught[3 * i : 3 * i + 3] + asked[2 * i : 2 * i + 2]
    files = {"train": train, "code": spread(code, HELD_OUT), "prose": spread(prose, HELD_OUT)}
    for name, texts in files.items():
        write_lines(out / f"{name}.jsonl", [{"prompt": text} for text in texts])
        print(f"{out / name}.jsonl: {len(texts)} prompts")


def spread(items: list, n: int) -> list:
    """Return n items, evenly spaced."""
    return items[:: max(1, len(items) // n)][:n]


def random_drafter(model) -> DraftModel:
    """Return an untrained adapter of one mask that changes its hidden states."""
    torch.manual_seed(SEED)
    made = DraftModel(model, AdapterConfig(masks=1)).eval()
    for name, p in made.learned.items():
        if name.endswith("adapter_b"):
            nn.init.normal_(p, std=0.02)
    return made.to(model.tok.weight.dtype).requires_grad_()


def greedy_with_margins(model, prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, T - 1) and the difference of the two largest logits at each."""
    margins = torch.zeros(len(prefix), model.cfg.target_length - 1)

    def on_step(step: int, tokens, logits, rows) -> None:
        top = logits[:, 0].topk(2).values
        margins[:, step - 1] = (top[:, 0] - top[:, 1]).cpu()

    greedy = autoregressive.SamplerConfig()
    return autoregressive.generate(model, prefix, greedy, on_step=on_step).tokens, margins


def exact(cfg: DraftsConfig, model, trained: DraftModel, tokenizer) -> dict:
    """Return, for a trained and a random adapter, equal texts and calls a token."""
    settings = DraftConfig(prompts=cfg.prompts, chat=cfg.chat, answer_tokens=LENGTH)
    prompts = spread(encode_prompts(settings, tokenizer, model.cfg), HELD_OUT)
    pad = model.cfg.pad_id
    drafters = {"trained": trained, "random": random_drafter(model)}
    tokens_of = {"trained": cfg.draft_tokens or trained.adapter.masks, "random": 1}
    found = {name: {"n": 0, "calls": 0, "tokens": 0, "parted": []} for name in drafters}
    for start in range(0, len(prompts), BATCH):
        prefix = pad_right(prompts[start : start + BATCH], model)
        expected, margins = greedy_with_margins(model, prefix)
        if start >= len(prompts) / 4:
            drafters.pop("random", None)
        for name, drafter in drafters.items():
            out = generate(drafter, prefix, SamplerConfig(draft_tokens=tokens_of[name]))
            ends = (out.tokens == pad).any(1)  # its pad is a token, too
            result = found[name]
            result["n"] += len(prefix)
            result["calls"] += int(out.calls.sum())
            result["tokens"] += int((out.tokens != pad).sum() + ends.sum())
            differs = out.tokens != expected  # (B, T - 1)
            first = differs.int().argmax(1)
            for row in differs.any(1).nonzero()[:, 0].tolist():
                margin = round(margins[row, first[row]].item(), 6)
                result["parted"].append({"prompt": start + row, "margin": margin})
        print(f"{start + len(prefix)} of {len(prompts)} prompts", flush=True)
    for result in found.values():
        result["calls_per_token"] = round(result["calls"] / result["tokens"], 4)
        result["equal"] = result["n"] - len(result["parted"])
    case = {"prompts": Path(cfg.prompts).stem, "n": len(prompts), "dtype": cfg.dtype}
    case |= {"length": LENGTH, "draft_tokens": tokens_of["trained"]}
    return {"what": "drafts_exact", "case": case, "rows": found}


def curve(cfg: DraftsConfig, model, trained: DraftModel, tokenizer) -> dict:
    """Return the held-out acceptance at each evaluation in the log of the training.

    accepted: share of right drafts by mask. tokens_per_call: expected, with 1 to K masks.
    """
    folder = Path(cfg.draft)
    pairs = [pair for _, pair in read_json_lines(folder / "answers.jsonl")]
    batch_size = json.loads((folder / "settings.json").read_text())["batch_size"]
    tokens_per_step = batch_size * sum(len(answer) for _, answer in pairs) / len(pairs)
    K = cfg.draft_tokens or trained.adapter.masks
    settings = DraftConfig(adapter=trained.adapter, prompts=cfg.prompts, batch_size=batch_size)
    untrained = DraftModel(model, trained.adapter).eval()
    start = evaluate(untrained, open_dataset(folder / DATA, "valid"), settings)
    log = [{"step": 0} | start, *read_lines(folder / "log.jsonl")]
    rows = {}
    for entry in log:
        if "accepted" in entry:
            shares = {name: entry[name][:K] for name in start}
            rows[f"{round(entry['step'] * tokens_per_step):,} tokens"] = shares
    return {"what": "drafts_curve", "rows": rows}


def main(argv: list[str]) -> list[dict]:
    """Measure what argv asks for. Return the new lines of the results file."""
    cfg = configure(DraftsConfig, argv)
    if cfg.what == "prompts":
        write_prompts(Path(cfg.texts), Path(cfg.out_dir))
        return []
    model, tokenizer, _ = load_model(cfg.init_from, devices.pick_device(cfg.device))
    model.cfg = replace(model.cfg, target_length=LENGTH + 1)
    sampler = SamplerConfig(draft=cfg.draft, draft_tokens=cfg.draft_tokens)
    trained = open_draft(model, sampler, cfg.init_from)
    measure = {"exact": exact, "curve": curve}[cfg.what]
    with devices.autocast(model.tok.weight.device, cfg.dtype):
        measurement = partial(measure, cfg, model, trained, tokenizer)
        return add_lines("drafts", argv, cfg, [measurement], SEED, tables)


def tables(lines: list[dict]) -> str:
    """Return the tables of results/drafts.jsonl."""
    texts = []
    curves = []
    for line in lines:
        case = line.get("case", {})
        for name, row in line["rows"].items():
            if line["what"] == "drafts_curve":
                shares = [f"{share:.2f}" for share in row["accepted"]]
                curves.append([name, *shares, f"{row['tokens_per_call'][-1]:.2f}"])
            else:
                margin = max((text["margin"] for text in row["parted"]), default=0.0)
                cells = [f"{row['equal']} of {row['n']}", f"{margin:.3f}"]
                cells.append(f"{row['calls_per_token']:.2f}")
                texts.append([f"{case['prompts']}, {case['dtype']}", name, *cells])
    found = []
    if texts:
        heads = ["prompts", "adapter", "equal texts", "largest margin", "calls a token"]
        found.append(markdown(heads, texts))
    if curves:
        masks = [f"mask {k}" for k in range(1, len(curves[0]) - 1)]
        found.append(markdown(["learned from", *masks, "tokens a call"], curves))
    return "\n\n".join(found)


if __name__ == "__main__":
    run(main, DraftsConfig)
