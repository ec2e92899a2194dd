"""Train an adapter that drafts tokens for a frozen AR model (extras/adapter.py).

    python -m extras.draft --init_from=out/smol_ar/ckpt.pt --prompts=prompts.txt --out_dir=out/draft
    python sample.py --init_from=out/smol_ar/ckpt.pt --draft=out/draft --prompt="Once upon a time"

The model first generates its own answers to the prompts: a line of text each, or JSON lines with
"prompt" or "text". They become the data set out_dir/data. Then masks after many anchors of an
answer learn, in one call, the tokens that follow. --text=FILE learns from a text instead. The same
command continues after an interruption.
"""

import json
import math
import shutil
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import autoregressive
import configurator
from configurator import flatten, group, require, setting, validate
from data import text_file
from data.loader import open_dataset, prefetch, write_pairs
from data.objectives import Batch
from data.sources import parse_json, read_json_lines, read_lines, read_text
from extras.adapter import FILE, AdapterConfig, DraftModel, check_model, digest, save_adapter
from extras.speculative import read_round
from infra import device, run_dir
from infra.checkpoint import load_model, write_atomically
from infra.logits import banned_token_ids, cross_entropy_in_place
from infra.optimizers import learning_rate_at, make_optimizers, set_learning_rate
from infra.rng import SELECT, CounterRNG, make_rng
from model import KVCache

DATA, ANSWERS, SETTINGS, STATE = "data", "answers.jsonl", "settings.json", "state.pt"
HELD_OUT = 10  # every tenth prompt
EVAL_BATCHES = 4
variable = partial(setting, may_change=True)  # an interrupted run may change it


@dataclass
class DraftConfig:
    adapter: AdapterConfig = group(AdapterConfig)
    init_from: str = variable("out/run/ckpt.pt", "the AR model", path=True)
    prompts: str = variable("", "file of prompts", path=True)
    text: str = variable("", "or of any text", path=True)
    out_dir: str = variable("out/draft", "answers, adapter, log", path=True)
    overwrite: bool = variable(False, "replace an earlier run")
    chat: bool = setting(False, "put prompts into the chat template")
    answer_tokens: int = setting(0, "at most; 0: the model's target_length - 1")
    temperature: float = setting(0.0, "of the answers", minimum=1e-3, zero_ok=True)
    loss: str = setting("auto", "auto: ce of greedy answers, else kl", ("auto", "ce", "kl"))
    max_steps: int = variable(200, "optimizer steps", minimum=1)
    batch_size: int = setting(8, "answers per step", minimum=1)
    anchors: int = setting(32, "of each answer in a step", minimum=1)
    optimizer: str = setting("adamw", "muon: of matrices", ("adamw", "muon"))
    learning_rate: float = setting(1e-3, "AdamW's; Muon: 5 times", maximum=1e3)
    warmup_steps: int = setting(10, "steps")
    schedule: str = setting("linear", "after warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = setting(0.0, "of matrices", maximum=10)
    seed: int = setting(1337, "of all draws", maximum=2**62)
    device: str = variable("auto", "auto, cpu, cuda, mps")
    dtype: str = variable("float32", "autocast", ("float32", "bfloat16"))
    eval_interval: int = variable(25, "steps per evaluation and saving", minimum=1)

    def __post_init__(self):
        validate(self)
        one = bool(self.prompts) != bool(self.text)
        require(one, "give --prompts=FILE, or --text=FILE, and not both")


# Data


def read_prompts(cfg: DraftConfig, tokenizer, model_cfg) -> list[list[int]]:
    """Return the ids of each prompt. Lines without one are skipped."""
    path = cfg.prompts
    if path.removesuffix(".gz").endswith(text_file.JSON_LINES):
        items = [item for _, item in read_json_lines(path)]
        fields = [item if isinstance(item, dict) else {"text": item} for item in items]
        texts = [item.get("prompt", item.get("text")) for item in fields]
    else:
        texts = read_lines(path)
    usable = [text for text in texts if isinstance(text, str) and text.strip()]
    hint = 'write a prompt a line, or JSON lines with "prompt" or "text"'
    require(len(usable) > 1, f"{path}: {len(usable)} usable lines, 2 are needed; {hint}")
    if cfg.chat:
        from hf.chat import chat_ids

        ids = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in usable]
    else:
        ids = [tokenizer.encode_prompt(text) for text in usable]
    most = model_cfg.block_size - model_cfg.target_length
    longest = max(map(len, ids))
    limit = f"{path}: a prompt has {longest} tokens, the model reads at most {most}"
    require(longest <= most, f"{limit} before {cfg.answer_tokens}; lower --answer_tokens")
    return ids


def write_answers(model, prompts: list, cfg: DraftConfig, path: Path, stop) -> list:
    """Return pairs (prompt, answer) of ids. Each batch is appended to the file, which continues."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # without half a line
    pairs = [parse_json(line, str(path)) for line in lines]
    content = "".join(f"{line}\n" for line in lines)
    write_atomically(path, lambda file: file.write(content.encode()))
    first = len(pairs)
    start = time.perf_counter()
    while len(pairs) < len(prompts) and not stop.requested:
        index = range(len(pairs), min(len(pairs) + cfg.batch_size, len(prompts)))
        new = answer(model, [prompts[i] for i in index], cfg, index)
        with open(path, "a") as file:
            file.write("".join(f"{json.dumps(pair)}\n" for pair in new))
        pairs += new
        pace = (time.perf_counter() - start) / (len(pairs) - first)
        left = f"{pace * (len(prompts) - len(pairs)) / 60:.1f} min left"
        tokens = sum(len(text) for _, text in pairs)
        print(f"{len(pairs)} of {len(prompts)} answers | {tokens:,} tokens | {left}", flush=True)
    return pairs


def answer(model, prompts: list, cfg: DraftConfig, example) -> list[tuple[list, list]]:
    """Return the pairs of some prompts. example: keys of the draws."""
    pad = model.cfg.pad_id
    where = model.tok.weight.device
    width = max(map(len, prompts))
    prefix = torch.tensor([ids + [pad] * (width - len(ids)) for ids in prompts], device=where)
    sampler = autoregressive.SamplerConfig(temperature=cfg.temperature)
    keys = torch.tensor(example, device=where)
    with device.autocast(where, cfg.dtype):
        out = autoregressive.generate(model, prefix, sampler, cfg.seed, keys)
    texts = [tokens[: [*tokens, pad].index(pad)] for tokens in out.tokens.tolist()]
    return list(zip(prompts, texts))


def build_text(cfg: DraftConfig, tokenizer, model_cfg) -> None:
    """Write the data set out_dir/data of a text."""
    T = model_cfg.target_length
    name = tokenizer.name
    if tokenizer.file:
        name = str(Path(cfg.init_from).parent / "tokenizer.json")
    sizes = [f"--target_length={T}", f"--block_size={min(model_cfg.block_size, 2 * T)}"]
    place = [f"--out={cfg.out_dir}", f"--name={DATA}", f"--tokenizer={name}"]
    text_file.main([f"--input={cfg.text}", *place, *sizes])


def build_answers(model, tokenizer, prompts: list, cfg: DraftConfig, stop) -> None:
    """Write the data set out_dir/data of the model's answers."""
    out = Path(cfg.out_dir)
    pairs = write_answers(model, prompts, cfg, out / ANSWERS, stop)
    usable = [(i, pair) for i, pair in enumerate(pairs) if pair[1]]
    splits = {"train": [pair for i, pair in usable if i % HELD_OUT]}
    splits["valid"] = [pair for i, pair in usable if i % HELD_OUT == 0]
    if not stop.requested:
        sizes = (model.cfg.target_length, model.cfg.block_size)
        write_pairs(out / DATA, splits, tokenizer.name, *sizes)


# The network


def draw_anchors(batch: Batch, cfg: DraftConfig, model_cfg, rng: CounterRNG) -> tuple:
    """Return anchors (B, N), slots of the target, and what the masks after them expect, (B, N, K).

    After an anchor comes one token that the frozen network predicts, then those of the masks.
    Expected is -100 after the pad that ends a target, or if a target has fewer anchors.
    """
    B, T = batch.target.shape
    K = cfg.adapter.masks
    slot = torch.arange(T, device=batch.target.device)
    is_pad = (batch.target == model_cfg.pad_id) & (slot > 0)
    last = (is_pad.cumsum(1) == 0).sum(1).clamp(max=T - 1)  # (B,) the first pad
    known = slot + 2 <= last[:, None]  # (B, T)
    order = rng.uniform(SELECT, T)[0].masked_fill(~known, -1.0)
    anchor = order.topk(min(cfg.anchors, T), dim=1).indices  # (B, N)
    place = anchor[..., None] + 2 + torch.arange(K, device=slot.device)  # (B, N, K)
    expected = batch.target[:, None].expand(-1, anchor.shape[1], -1)
    expected = expected.gather(2, place.clamp(max=T - 1))
    return anchor, expected.masked_fill(place > last[:, None, None], -100)


def read_masks(model: DraftModel, batch: Batch, anchor: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Return the last layer (B, N K, C) at the masks, and the frozen one's that verifies them.

    Masks see the clean tokens up to their anchor (B, N), and the earlier masks of this anchor.
    """
    N = anchor.shape[1]
    pads = batch.prefix == model.cfg.pad_id
    start = (~pads).sum(1, keepdim=True)  # (B, 1) index of slot 0, if the pads come last
    order = F.pad(pads.long(), (0, batch.target.shape[1])).argsort(dim=1, stable=True)
    ids = torch.cat([batch.prefix, batch.target], dim=1).gather(1, order)  # (B, L)
    L = ids.shape[1]
    slot = torch.arange(L, device=ids.device)
    mask = None
    if model.cfg.prefix_attention == "bidirectional":
        given = slot < start  # (B, L)
        mask = (given[:, None] & given[..., None] | (slot <= slot[:, None]))[:, None]
    cache = KVCache(len(model.network.blocks))
    with torch.no_grad():
        clean = model.read(ids, torch.zeros_like(slot), slot.expand_as(ids), mask, cache)
    cache.length = L
    group = torch.arange(N, device=ids.device).repeat_interleave(K)  # (N K,)
    number = torch.arange(1, K + 1, device=ids.device).repeat(N)
    place = start + anchor.repeat_interleave(K, dim=1)  # (B, N K)
    past = slot <= place[..., None]  # (B, N K, L)
    among = (group == group[:, None]) & (number <= number[:, None])
    mask = torch.cat([past, among.expand(len(ids), -1, -1)], dim=2)[:, None]
    position = place + number
    hidden = model.read(torch.zeros_like(position), number, position, mask, cache)
    index = position.clamp(max=L - 1)[..., None].expand(-1, -1, clean.shape[-1])
    return hidden, clean.gather(1, index)


def draft_loss(model: DraftModel, batch: Batch, cfg: DraftConfig, rng: CounterRNG) -> Tensor:
    """Return the loss of the drafts, nats per mask.

    ce: cross-entropy of the tokens that follow. kl: divergence from the frozen network.
    """
    anchor, expected = draw_anchors(batch, cfg, model.cfg, rng)
    hidden, clean = read_masks(model, batch, anchor, cfg.adapter.masks)
    expected = expected.flatten(1)  # (B, N K)
    head = model.network.head
    own = cfg.prompts and cfg.temperature == 0
    if cfg.loss == "ce" or (cfg.loss == "auto" and own):
        return cross_entropy_in_place(head(hidden), expected)
    scored = expected >= 0
    log_q = head(hidden[scored]).float().log_softmax(-1)  # (M, V)
    log_p = head(clean[scored]).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@torch.no_grad()
def evaluate(model: DraftModel, valid_set, cfg: DraftConfig) -> dict:
    """Return the share of right drafts by mask, and the tokens a call adds with 1 to K masks."""
    where = model.tok.weight.device
    banned = banned_token_ids(model.cfg, where)
    found = []
    for step in range(EVAL_BATCHES):
        batch = valid_set.batch(0, step, cfg.batch_size)
        batch = Batch(*(part.to(where) for part in batch))
        rng = make_rng(0, batch.example, step)
        anchor, expected = draw_anchors(batch, cfg, model.cfg, rng)
        with device.autocast(where, cfg.dtype):
            parts = read_masks(model, batch, anchor, cfg.adapter.masks)
            logits = [model.network.head(part).float() for part in parts]
        draft, true = (x.index_fill(-1, banned, -math.inf).argmax(-1) for x in logits)
        hit = (draft == true).view(expected.shape).float()
        found.append(hit.masked_fill(expected < 0, math.nan).flatten(0, 1))  # (B N, K)
    hits = torch.cat(found)
    hits = hits[~hits[:, 0].isnan()]
    added = 1 + hits.nan_to_num().cumprod(1).mean(0).cumsum(0)
    shares, tokens = ([round(x, 4) for x in part.tolist()] for part in (hits.nanmean(0), added))
    return {"accepted": shares, "tokens_per_call": tokens}


# The run


def train(model: DraftModel, cfg: DraftConfig, weights: str, stop) -> dict:
    """The loop. Returns the last log entry. It continues from out_dir/state.pt."""
    out = Path(cfg.out_dir)
    where = model.tok.weight.device
    train_set, valid_set = (open_dataset(out / DATA, split) for split in ("train", "valid"))
    optimizers = make_optimizers(model, cfg)
    first = restore(out / STATE, model, optimizers)
    log = run_dir.Log(out / "log.jsonl", first)
    places = ((cfg.seed, step, cfg.batch_size) for step in range(first, cfg.max_steps))
    start = time.perf_counter()
    for step, batch in enumerate(prefetch(train_set.batch, places, where), start=first):
        set_learning_rate(optimizers, learning_rate_at(step, cfg))
        with device.autocast(where, cfg.dtype):
            loss = draft_loss(model, batch, cfg, make_rng(cfg.seed, batch.example, step))
        loss.backward()
        loss = float(loss.detach())
        require(math.isfinite(loss), f"loss {loss} at step {step}: lower --learning_rate")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done = step + 1
        entry = {"step": done, "loss": round(loss, 4)}
        if done % cfg.eval_interval == 0 or done == cfg.max_steps or stop.requested:
            left = (time.perf_counter() - start) / (done - first) * (cfg.max_steps - done)
            entry |= evaluate(model, valid_set, cfg) | {"minutes_left": round(left / 60, 1)}
            state = {"step": done, "adapter": model.adapter_tensors()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            save_adapter(out / FILE, model, weights)
            write_atomically(out / STATE, lambda file, state=state: torch.save(state, file))
            print(progress(entry, cfg.max_steps), flush=True)
        log.write(entry)
        if stop.requested:
            break
    if not stop.requested:
        model.requires_grad_()  # see load_adapter
        with device.autocast(where, cfg.dtype):
            model.drafts = fastest(model, log.last["tokens_per_call"])
        save_adapter(out / FILE, model, weights)
    return log.last


@torch.no_grad()
def fastest(model: DraftModel, tokens: list[float]) -> int:
    """Time calls with 0 to K drafts here. Return how many, at least 1, give most tokens/s."""
    ids = torch.zeros(1, 32, dtype=torch.long, device=model.tok.weight.device)
    cache = model.encode(ids[:, : model.cfg.block_size // 2], room=300)
    speeds = []
    for drafts, added in enumerate([1.0, *tokens]):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            read_round(model, cache, ids[:, : drafts + 1], drafts).argmax(-1).cpu()
            times.append(time.perf_counter() - start)
        speeds.append(added / min(times))
        cost = f"{added:.2f} tokens a call, {1000 * min(times):.1f} ms a call"
        print(f"{drafts} drafts: {cost}, {speeds[-1]:.1f} tokens/s", flush=True)
    return speeds.index(max(speeds[1:]), 1)


def restore(path: Path, model: DraftModel, optimizers: list) -> int:
    """Load the state of an interrupted run. Return its step, 0 if there is none."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=model.tok.weight.device, weights_only=True)
    for name, tensor in model.adapter_tensors().items():
        tensor.copy_(state["adapter"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    return state["step"]


def progress(entry: dict, max_steps: int) -> str:
    shares = " ".join(f"{share:.2f}" for share in entry["accepted"])
    calls = f"{entry['tokens_per_call'][-1]:.2f} tokens a call"
    rest = f"loss {entry['loss']:.3f} | {entry['minutes_left']:.1f} min left"
    return f"step {entry['step']} of {max_steps} | held-out accepted {shares} | {calls} | {rest}"


def main(argv: list[str]) -> dict:
    cfg = configurator.configure(DraftConfig, argv)
    model, tokenizer, _ = load_model(cfg.init_from, device.pick_device(cfg.device))
    check_model(model, cfg.init_from)
    most = model.cfg.block_size - 2
    cfg.answer_tokens = cfg.answer_tokens or model.cfg.target_length - 1
    fits = 2 <= cfg.answer_tokens <= most
    require(fits, f"answer_tokens must be 2 to {most}, got {cfg.answer_tokens}")
    model.cfg = replace(model.cfg, target_length=cfg.answer_tokens + 1)
    prompts = read_prompts(cfg, tokenizer, model.cfg) if cfg.prompts else read_text(cfg.text)
    weights = digest(model)
    content = sha256(json.dumps(prompts).encode()).hexdigest()
    settings = flatten(cfg) | {"weights": weights, "content": content}
    out = Path(cfg.out_dir)
    check_settings(settings, out, cfg)
    last = {}
    with run_dir.lock_dir(out), run_dir.StopSignals() as stop:
        if cfg.overwrite:
            for path in (out / name for name in (ANSWERS, STATE, FILE, "log.jsonl")):
                path.unlink(missing_ok=True)
            shutil.rmtree(out / DATA, ignore_errors=True)
        ready = (out / DATA).exists()
        if cfg.text and not ready:
            build_text(cfg, tokenizer, model.cfg)  # raises if it is too short
        text = json.dumps(settings, indent=1)
        write_atomically(out / SETTINGS, lambda file: file.write(text.encode()))
        if cfg.prompts and not ready:
            build_answers(model, tokenizer, prompts, cfg, stop)
        if not stop.requested:
            torch.manual_seed(cfg.seed)  # of the adapter
            last = train(DraftModel(model, cfg.adapter).eval(), cfg, weights, stop)
        if stop.requested:
            name = signal.Signals(stop.requested).name
            print(f"stopped by {name}; the same command continues", file=sys.stderr)
            sys.exit(128 + stop.requested)
    print(f"done: {out / FILE} | python sample.py --init_from={cfg.init_from} --draft={out}")
    return last


def check_settings(settings: dict, out: Path, cfg: DraftConfig) -> None:
    """Raise ValueError if the folder holds the run of other settings."""
    path = out / SETTINGS
    if cfg.overwrite or not path.exists():
        return
    stored = parse_json(path.read_text(), str(path))
    fields = configurator.all_fields(DraftConfig)
    allowed = [name for name, field in fields.items() if field.metadata.get("may_change")]
    hint = "use --overwrite or another --out_dir"
    configurator.refuse_changes(settings, stored, f"{path} has", hint, allowed)


if __name__ == "__main__":
    configurator.run(main, DraftConfig)
