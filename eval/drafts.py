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
from extras.draft import DATA, DraftConfig, evaluate, read_prompts
from extras.speculative import SamplerConfig, generate, open_draft
from infra import device as devices
from infra.checkpoint import load_model

SEED = 0  # of the random adapter
TRAIN, HELD_OUT = 300, 100  # prompts of a file
TOKENS = (0, 15_000, 50_000, 150_000, 500_000)  # of the curve


@dataclass
class DraftsConfig(Settings):
    what: str = setting("exact", "measurement", ("prompts", "exact", "curve"))
    init_from: str = setting("out/smol_ar/ckpt.pt", "the AR model", path=True)
    draft: str = setting("out/draft", "the adapter", path=True)
    prompts: str = setting("out/prompts/code.jsonl", "as of extras.draft", path=True)
    chat: bool = setting(False, "put prompts into the chat template")
    draft_tokens: int = setting(0, "drafted in one call; 0: the fastest here")
    n: int = setting(100, "prompts", minimum=1)
    length: int = setting(128, "most tokens of a text", minimum=2)
    batch_size: int = setting(8, "texts at a time, of exact", minimum=1)
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
        p.data = p.data.to(model.tok.weight)
    return made.requires_grad_()


def pad_right(prompts: list[list[int]], model) -> Tensor:
    rows = [torch.tensor(ids, device=model.tok.weight.device) for ids in prompts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.cfg.pad_id)


def greedy_with_margins(model, prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens (B, T - 1) and the difference of the two largest logits at each."""
    margins = torch.zeros(len(prefix), model.cfg.target_length - 1)

    def on_step(step: int, tokens, logits, rows) -> None:
        top = logits[:, 0].topk(2).values
        margins[:, step - 1] = (top[:, 0] - top[:, 1]).cpu()

    greedy = autoregressive.SamplerConfig()
    return autoregressive.generate(model, prefix, greedy, on_step=on_step).tokens, margins


def exact(cfg: DraftsConfig, model, prompts: list[list[int]]) -> dict:
    """Return, for a trained and a random adapter, equal texts and calls a token."""
    sampler = SamplerConfig(draft=cfg.draft, draft_tokens=cfg.draft_tokens)
    trained = open_draft(model, sampler, cfg.init_from)
    drafters = {"trained": trained, "random": random_drafter(model)}
    samplers = {"trained": sampler, "random": SamplerConfig(draft_tokens=1)}
    found = {name: {"n": 0, "calls": 0, "tokens": 0, "parted": []} for name in drafters}
    for start in range(0, len(prompts), cfg.batch_size):
        prefix = pad_right(prompts[start : start + cfg.batch_size], model)
        expected, margins = greedy_with_margins(model, prefix)
        if start >= len(prompts) / 4:
            drafters.pop("random", None)
        for name, drafter in drafters.items():
            out = generate(drafter, prefix, samplers[name])
            ends = (out.tokens == model.cfg.pad_id).sum(1) > 0  # its pad is a token, too
            lengths = (out.tokens != model.cfg.pad_id).sum(1) + ends
            found[name]["n"] += len(prefix)
            found[name]["calls"] += int(out.calls.sum())
            found[name]["tokens"] += int(lengths.sum())
            for row in (out.tokens != expected).any(1).nonzero()[:, 0].tolist():
                slot = int((out.tokens[row] != expected[row]).int().argmax())
                place = {"prompt": start + row, "slot": slot}
                place["margin"] = round(margins[row, slot].item(), 6)
                found[name]["parted"].append(place)
        print(f"{min(start + cfg.batch_size, len(prompts))} of {len(prompts)} prompts", flush=True)
    for result in found.values():
        result["calls_per_token"] = round(result["calls"] / result["tokens"], 4)
        result["equal"] = result["n"] - len(result["parted"])
    case = {"prompts": Path(cfg.prompts).stem, "n": len(prompts), "dtype": cfg.dtype}
    case |= {"length": cfg.length, "draft_tokens": cfg.draft_tokens or trained.drafts}
    return {"what": "drafts_exact", "case": case, "rows": found}


def curve(cfg: DraftsConfig, model, prompts) -> dict:
    """Return the held-out acceptance after about TOKENS tokens, as the log of the training has it.

    accepted: share of right drafts by mask. tokens_per_call: expected, with 1 to K masks.
    """
    folder = Path(cfg.draft)
    pairs = [pair for _, pair in read_json_lines(folder / "answers.jsonl")]
    settings = json.loads((folder / "settings.json").read_text())
    mean = sum(len(answer) for _, answer in pairs) / len(pairs)
    untrained = DraftModel(model, AdapterConfig()).eval()
    asked = DraftConfig(prompts=cfg.prompts, batch_size=settings["batch_size"])
    start = evaluate(untrained, open_dataset(folder / DATA, "valid"), asked)
    points = {0: start}
    for entry in read_lines(folder / "log.jsonl"):
        if "accepted" in entry:
            tokens = round(entry["step"] * settings["batch_size"] * mean)
            points[tokens] = {key: entry[key] for key in start}
    nearest = {min(points, key=lambda tokens: abs(tokens - wanted)) for wanted in TOKENS}
    rows = {f"{tokens:,} tokens": points[tokens] for tokens in sorted(nearest)}
    return {"what": "drafts_curve", "rows": rows}


def main(argv: list[str]) -> list[dict]:
    """Measure what argv asks for. Return the new lines of the results file."""
    cfg = configure(DraftsConfig, argv)
    if cfg.what == "prompts":
        write_prompts(Path(cfg.texts), Path(cfg.out_dir))
        return []
    model, tokenizer, _ = load_model(cfg.init_from, devices.pick_device(cfg.device))
    model.cfg = replace(model.cfg, target_length=cfg.length + 1)
    settings = DraftConfig(prompts=cfg.prompts, chat=cfg.chat, answer_tokens=cfg.length)
    prompts = spread(read_prompts(settings, tokenizer, model.cfg), cfg.n)
    measure = {"exact": exact, "curve": curve}[cfg.what]
    with devices.autocast(model.tok.weight.device, cfg.dtype):
        measurement = partial(measure, cfg, model, prompts)
        return add_lines("drafts", argv, cfg, [measurement], SEED, tables)


def tables(lines: list[dict]) -> str:
    """Return the tables of results/drafts.jsonl."""
    texts = []
    curves = []
    for line in lines:
        for name, row in line.get("rows", {}).items():
            if line["what"] == "drafts_curve":
                shares = [f"{share:.2f}" for share in row["accepted"]]
                curves.append([name, *shares, f"{row['tokens_per_call'][-1]:.2f}"])
                continue
            case = line["case"]
            margin = max((text["margin"] for text in row["parted"]), default=0.0)
            equal = f"{row['equal']} of {row['n']}"
            cells = [equal, f"{margin:.3f}", f"{row['calls_per_token']:.2f}"]
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
