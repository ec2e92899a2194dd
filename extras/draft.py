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
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm, trange

import autoregressive
import configurator
from configurator import flatten, group, require, setting, validate
from data import text_file
from data.loader import open_dataset, prefetch, write_pairs
from data.objectives import Batch
from data.sources import parse_json, read_json_lines, read_prompts
from extras.adapter import FILE, AdapterConfig, DraftModel, check_model, digest, save_adapter
from infra import checkpoint, device, run_dir
from infra.checkpoint import load_model, write_atomically
from infra.logits import banned_token_ids, cross_entropy_in_place
from infra.optimizers import learning_rate_at, make_optimizers, set_learning_rate
from infra.rng import SELECT, CounterRNG, make_rng

DATA, ANSWERS, SETTINGS, STATE = "data", "answers.jsonl", "settings.json", "state.pt"
HELD_OUT = 10  # every tenth prompt
EVAL_BATCHES = 4
ANSWERS_AT_ONCE = 64  # a network call on a CPU costs the same for 8 as for 64
ANCHORS = 32  # of each answer in a step
MAY_CHANGE = ("init_from", "out_dir", "max_steps", "device", "dtype", "eval_interval")


@dataclass
class DraftConfig:
    adapter: AdapterConfig = group(AdapterConfig)
    init_from: str = setting("out/run/ckpt.pt", "the AR model", path=True)
    prompts: str = setting("", "file of prompts", path=True)
    text: str = setting("", "or of any text", path=True)
    out_dir: str = setting("out/draft", "answers, adapter, log", path=True)
    chat: bool = setting(False, "put prompts into the chat template")
    answer_tokens: int = setting(0, "most; 0: target_length - 1", minimum=2, zero_ok=True)
    temperature: float = setting(0.0, "of the answers", minimum=1e-3, zero_ok=True)
    max_steps: int = setting(200, "optimizer steps", minimum=1)
    batch_size: int = setting(8, "answers per step", minimum=1)
    learning_rate: float = setting(1e-3, "after 10 steps; falls to 0", maximum=1e3)
    seed: int = setting(1337, "of all draws", maximum=2**62)
    device: str = setting("auto", "auto, cpu, cuda, mps")
    dtype: str = setting("float32", "autocast", ("float32", "bfloat16"))
    eval_interval: int = setting(25, "steps per evaluation and saving", minimum=1)

    # Constants, because infra/optimizers.py reads them.
    optimizer = "adamw"
    weight_decay = 0.0
    schedule = "linear"
    warmup_steps = 10

    def __post_init__(self):
        validate(self)
        one = bool(self.prompts) != bool(self.text)
        require(one, "give --prompts=FILE, or --text=FILE, and not both")


# Data


def encode_prompts(cfg: DraftConfig, tokenizer, model_cfg) -> list[list[int]]:
    """Return the ids of each prompt of a file."""
    texts = read_prompts(cfg.prompts)
    if cfg.chat:
        from hf.chat import chat_ids

        ids = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    else:
        ids = [tokenizer.encode_prompt(text) for text in texts]
    most = model_cfg.block_size - model_cfg.target_length
    longest = max(map(len, ids))
    limit = f"{cfg.prompts}: a prompt has {longest} tokens, the model reads at most {most}"
    require(longest <= most, f"{limit} before {cfg.answer_tokens}; lower --answer_tokens")
    return ids


def pad_right(prompts: list[list[int]], model) -> Tensor:
    """Return prefixes (B, P)."""
    rows = [torch.tensor(ids, device=model.tok.weight.device) for ids in prompts]
    return pad_sequence(rows, batch_first=True, padding_value=model.cfg.pad_id)


def answer(model, prompts: list, cfg: DraftConfig, start: int) -> list[tuple[list, list]]:
    """Return pairs (prompt, answer) of ids. start: the number of the first prompt."""
    pad = model.cfg.pad_id
    prefix = pad_right(prompts, model)
    example = torch.arange(start, start + len(prompts), device=prefix.device)
    sampler = autoregressive.SamplerConfig(temperature=cfg.temperature)
    with device.autocast(prefix.device, cfg.dtype):
        out = autoregressive.generate(model, prefix, sampler, cfg.seed, example)
    texts = [tokens[: [*tokens, pad].index(pad)] for tokens in out.tokens.tolist()]
    return list(zip(prompts, texts))


def build_answers(model, tokenizer, prompts: list, cfg: DraftConfig) -> None:
    """Write the data set out_dir/data of the answers. answers.jsonl has those so far."""
    out = Path(cfg.out_dir)
    path = out / ANSWERS
    pairs = [pair for _, pair in read_json_lines(path)] if path.exists() else []
    for start in trange(len(pairs), len(prompts), ANSWERS_AT_ONCE, desc="batches of answers"):
        pairs += answer(model, prompts[start : start + ANSWERS_AT_ONCE], cfg, start)
        lines = "".join(f"{json.dumps(pair)}\n" for pair in pairs).encode()
        write_atomically(path, lambda file, lines=lines: file.write(lines))
    splits = {"train": [pair for i, pair in enumerate(pairs) if i % HELD_OUT and pair[1]]}
    splits["valid"] = [pair for pair in pairs[::HELD_OUT] if pair[1]]
    sizes = (model.cfg.target_length, model.cfg.block_size)
    write_pairs(out / DATA, splits, tokenizer.name, *sizes)


def build_text(cfg: DraftConfig, tokenizer, model_cfg) -> None:
    """Write the data set out_dir/data of a text."""
    T = model_cfg.target_length
    sizes = [f"--target_length={T}", f"--block_size={min(model_cfg.block_size, 2 * T)}"]
    place = [f"--out={cfg.out_dir}", f"--name={DATA}", f"--tokenizer={tokenizer.name}"]
    text_file.main([f"--input={cfg.text}", *place, *sizes])


# The network


def draw_anchors(batch: Batch, K: int, pad_id: int, rng: CounterRNG) -> tuple[Tensor, Tensor]:
    """Return anchors (B, N), slots of the target, and what K masks after them expect, (B, N, K).

    After an anchor comes one token that the frozen network predicts, then those of the masks.
    Expected is -100 after the pad that ends a target, or if a target has fewer anchors.
    """
    T = batch.target.shape[1]
    is_pad = (batch.target == pad_id).long()
    is_pad[:, 0] = 0  # slot 0 is given
    ended = is_pad.cumsum(1) > is_pad  # (B, T) after the first pad
    scored = batch.target.masked_fill(ended, -100)
    ahead = F.pad(scored, (0, K + 1), value=-100).unfold(1, K, 1)[:, 2:]  # (B, T, K)
    order = rng.uniform(SELECT, T)[0].masked_fill(ahead[..., 0] < 0, -1.0)
    anchor = order.topk(min(ANCHORS, T), dim=1).indices  # (B, N)
    return anchor, ahead.gather(1, anchor[..., None].expand(-1, -1, K))


def read_masks(model: DraftModel, batch: Batch, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the last layer (B, N K, C) at the masks, and the frozen one's that verifies them.

    Masks see the clean tokens up to their anchor (B, N), and the earlier masks of this anchor.
    """
    B, N = anchor.shape
    K = model.adapter.masks
    T = batch.target.shape[1]
    slot = torch.arange(T, device=anchor.device)
    with torch.no_grad():
        cache = model.encode(batch.prefix, room=T + N * K)
        causal = slot <= slot[:, None]
        clean = model.read(batch.target, torch.zeros_like(slot), slot, causal, cache)
    group = torch.arange(N, device=slot.device).repeat_interleave(K)  # (N K,) of an anchor
    number = torch.arange(1, K + 1, device=slot.device).repeat(N)
    after = anchor[:, group]  # (B, N K) slot of the anchor
    past = slot <= after[..., None]  # (B, N K, T)
    among = (group == group[:, None]) & (number <= number[:, None])
    edges = torch.cat([past, among.expand(B, -1, -1)], dim=2)
    place = after + number
    hidden = model.read(torch.zeros_like(place), number, place, edges, cache)
    index = place.clamp(max=T - 1)[..., None].expand(-1, -1, clean.shape[-1])
    return hidden, clean.gather(1, index)


def draft_loss(model: DraftModel, batch: Batch, cfg: DraftConfig, rng: CounterRNG) -> Tensor:
    """Return the loss of the drafts, nats per mask.

    Of greedy answers: the cross-entropy, because they are what the frozen network would say. Of
    other texts: the KL divergence from the frozen network.
    """
    anchor, expected = draw_anchors(batch, model.adapter.masks, model.cfg.pad_id, rng)
    hidden, clean = read_masks(model, batch, anchor)
    expected = expected.flatten(1)  # (B, N K)
    head = model.network.head
    if cfg.prompts and cfg.temperature == 0:
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
    places = [(0, step, cfg.batch_size) for step in range(EVAL_BATCHES)]
    found = []
    for step, batch in enumerate(prefetch(valid_set.batch, places, where)):
        rng = make_rng(0, batch.example, step)
        anchor, expected = draw_anchors(batch, model.adapter.masks, model.cfg.pad_id, rng)
        with device.autocast(where, cfg.dtype):
            logits = [model.network.head(x).float() for x in read_masks(model, batch, anchor)]
        draft, true = (x.index_fill(-1, banned, -math.inf).argmax(-1) for x in logits)
        hit = (draft == true).view(expected.shape).float()
        found.append(hit.masked_fill(expected < 0, math.nan).flatten(0, 1))  # (B N, K)
    hits = torch.cat(found)
    hits = hits[~hits[:, 0].isnan()]
    added = 1 + hits.nan_to_num().cumprod(1).mean(0).cumsum(0)
    shares, tokens = ([round(x, 4) for x in part.tolist()] for part in (hits.nanmean(0), added))
    return {"accepted": shares, "tokens_per_call": tokens}


# The run


def train(model: DraftModel, cfg: DraftConfig, weights: str) -> dict:
    """The loop. Returns the last log entry. It continues from out_dir/state.pt."""
    out = Path(cfg.out_dir)
    where = model.tok.weight.device
    train_set, valid_set = (open_dataset(out / DATA, split) for split in ("train", "valid"))
    optimizers = make_optimizers(model, cfg)
    first = 0
    if (out / STATE).exists():
        state = checkpoint.load(out / STATE, where)
        model.load_state_dict(state["model"], strict=False)  # the network has its weights
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        first = state["step"]
    log = run_dir.Log(out / "log.jsonl", first)
    places = [(cfg.seed, step, cfg.batch_size) for step in range(first, cfg.max_steps)]
    batches = tqdm(prefetch(train_set.batch, places, where), total=len(places))
    for done, batch in enumerate(batches, start=first + 1):
        set_learning_rate(optimizers, learning_rate_at(done - 1, cfg))
        with device.autocast(where, cfg.dtype):
            loss = draft_loss(model, batch, cfg, make_rng(cfg.seed, batch.example, done - 1))
        loss.backward()
        loss = float(loss.detach())
        require(math.isfinite(loss), f"loss {loss} at step {done}: lower --learning_rate")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        entry = {"step": done, "loss": round(loss, 4)}
        saves = done % cfg.eval_interval == 0 or done == cfg.max_steps
        if saves:
            entry |= evaluate(model, valid_set, cfg)
            tqdm.write(" | ".join(f"{name} {value}" for name, value in entry.items()))
        log.write(entry)
        if saves:
            state = {"model": model.learned}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            checkpoint.save(out / STATE, model.network, done, train_set.tokenizer_name, **state)
            save_adapter(out / FILE, model, weights)
    return log.last


def main(argv: list[str]) -> dict:
    """Train, or continue. Returns the last log entry."""
    cfg = configurator.configure(DraftConfig, argv)
    model, tokenizer, _ = load_model(cfg.init_from, device.pick_device(cfg.device))
    check_model(model, cfg.init_from)
    cfg.answer_tokens = cfg.answer_tokens or model.cfg.target_length - 1
    model.cfg = replace(model.cfg, target_length=cfg.answer_tokens + 1)
    prompts = encode_prompts(cfg, tokenizer, model.cfg) if cfg.prompts else []
    weights = digest(model)
    settings = flatten(cfg) | {"weights": weights}
    out = Path(cfg.out_dir)
    path = out / SETTINGS
    if path.exists():
        stored = parse_json(path.read_text(), str(path))
        hint = "use another --out_dir"
        configurator.refuse_changes(settings, stored, f"{path} has", hint, MAY_CHANGE)
    with run_dir.lock_dir(out):
        ready = (out / DATA).exists()
        if cfg.text and not ready:
            build_text(cfg, tokenizer, model.cfg)  # raises if it is too short
        text = json.dumps(settings, indent=1)
        write_atomically(path, lambda file: file.write(text.encode()))
        if cfg.prompts and not ready:
            build_answers(model, tokenizer, prompts, cfg)
        torch.manual_seed(cfg.seed)  # of the adapter
        last = train(DraftModel(model, cfg.adapter).eval(), cfg, weights)
    print(f"done: {out / FILE} | python sample.py --init_from={cfg.init_from} --draft={out}")
    return last


if __name__ == "__main__":
    configurator.run(main, DraftConfig)
