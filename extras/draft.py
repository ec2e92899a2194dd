"""Train an adapter that drafts tokens for a frozen AR model (extras/adapter.py).

    python -m extras.draft --init_from=out/smol_ar/ckpt.pt --prompts=prompts.txt --out_dir=out/draft
    python sample.py --init_from=out/smol_ar/ckpt.pt --draft=out/draft --prompt="Once upon a time"

The model first generates its own answers to the prompts: a line of text each, or JSON lines with
"prompt" or "text". Then masks after many anchors of an answer learn, in one call, the tokens that
follow. --text=FILE takes a text instead. The same command continues after an interruption.
"""

import json
import math
import signal
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import autoregressive
import configurator
from configurator import flatten, group, require, setting, validate
from data.sources import parse_json, read_json_lines, read_lines, read_text
from extras.adapter import FILE, AdapterConfig, DraftModel, check_model, digest, save_adapter
from infra import device, run_dir
from infra.checkpoint import load_model, write_atomically
from infra.logits import banned_token_ids, cross_entropy_in_place
from infra.optimizers import learning_rate_at, make_optimizers, set_learning_rate
from model import KVCache

HELD_OUT = 10  # every tenth prompt
ANSWERS, SETTINGS, STATE = "answers.jsonl", "settings.json", "state.pt"
variable = partial(setting, may_change=True)  # an interrupted run may change it


@dataclass
class DraftConfig:
    adapter: AdapterConfig = group(AdapterConfig)
    init_from: str = variable("out/run/ckpt.pt", "the AR model", path=True)
    prompts: str = variable("", "file of prompts", path=True)
    text: str = variable("", "or of any text", path=True)
    out_dir: str = variable("out/draft", "answers, adapter, log", path=True)
    overwrite: bool = variable(False, "replace what is there")
    chat: bool = setting(False, "put prompts into the chat template")
    answers: int = setting(0, "0: one for each prompt")
    answer_tokens: int = setting(0, "0: the model's target_length - 1")
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


class Row(NamedTuple):
    """A prompt and its answer. start: the index of slot 0, the last given token."""

    start: int
    ids: list[int]


class Batch(NamedTuple):
    ids: Tensor  # (B, L) right-padded
    start: Tensor  # (B,)
    anchor: Tensor  # (B, N) indices; masks follow each of them
    expected: Tensor  # (B, N, K) the token of each mask, -100: none


# Data


def read_prompts(cfg: DraftConfig, tokenizer) -> list[list[int]]:
    """Return the ids of each prompt. Lines without one are skipped."""
    path = cfg.prompts
    if path.removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson")):
        items = [item for _, item in read_json_lines(path)]
        fields = [item if isinstance(item, dict) else {"text": item} for item in items]
        texts = [item.get("prompt", item.get("text")) for item in fields]
    else:
        texts = list(read_lines(path))
    usable = [text for text in texts if isinstance(text, str) and text.strip()]
    hint = 'write a prompt a line, or JSON lines with "prompt" or "text"'
    require(len(usable) > 1, f"{path}: {len(usable)} usable lines, 2 are needed; {hint}")
    if not cfg.chat:
        return [tokenizer.encode_prompt(text) for text in usable]
    from hf.chat import chat_ids

    return [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in usable]


def check_lengths(prompts: list, cfg: DraftConfig, model_cfg) -> None:
    most = model_cfg.block_size - model_cfg.target_length
    longest = max(map(len, prompts))
    limit = f"{cfg.prompts}: a prompt has {longest} tokens, the model reads at most {most}"
    require(longest <= most, f"{limit} before {cfg.answer_tokens}; lower --answer_tokens")


def split_text(cfg: DraftConfig, tokenizer, model_cfg) -> list[Row]:
    """Return the windows of a text."""
    ids = tokenizer.encode(read_text(cfg.text))
    first = [model_cfg.sep_id] if model_cfg.sep_id >= 0 else []
    width = model_cfg.target_length - len(first)
    windows = [ids[i : i + width] for i in range(0, len(ids) - width + 1, width)]
    need = f"{len(ids)} tokens are fewer than two windows of {width}"
    require(len(windows) > 1, f"{cfg.text}: {need}; lower --answer_tokens")
    return [Row(0, first + window) for window in windows]


def read_answers(path: Path) -> list[Row]:
    """Return the answers of a file. A killed run may leave half a line at the end."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [Row(**parse_json(line, str(path))) for line in lines]


def write_answers(model, prompts: list, cfg: DraftConfig, path: Path, stop) -> list[Row]:
    """Let the model answer. Append each batch to the file; continue it if it exists."""
    rows = read_answers(path)
    n = cfg.answers or len(prompts)
    start = time.perf_counter()
    content = "".join(json.dumps(row._asdict()) + "\n" for row in rows)
    write_atomically(path, lambda file: file.write(content.encode()))
    with open(path, "a") as file, tqdm(total=n, initial=len(rows), disable=None) as bar:
        while len(rows) < n and not stop.requested:
            index = range(len(rows), min(len(rows) + cfg.batch_size, n))
            chosen = [prompts[i % len(prompts)] for i in index]
            new = answer(model, chosen, cfg, torch.tensor(index))
            file.write("".join(json.dumps(row._asdict()) + "\n" for row in new))
            file.flush()
            rows += new
            bar.update(len(new))
    tokens = sum(len(row.ids) - row.start - 1 for row in rows)
    seconds = time.perf_counter() - start
    print(f"{len(rows)} of {n} answers, {tokens:,} tokens, {seconds:.0f} s", flush=True)
    return rows


def answer(model, prompts: list, cfg: DraftConfig, example: Tensor) -> list[Row]:
    m = model.cfg
    where = model.tok.weight.device
    width = max(map(len, prompts))
    padded = [ids + [m.pad_id] * (width - len(ids)) for ids in prompts]
    sampler = autoregressive.SamplerConfig(temperature=cfg.temperature)
    prefix = torch.tensor(padded, device=where)
    with device.autocast(where, cfg.dtype):
        out = autoregressive.generate(model, prefix, sampler, cfg.seed, example.to(where))
    rows = []
    for prompt, tokens in zip(prompts, out.tokens.tolist()):
        given = prompt + [m.sep_id] * (m.sep_id >= 0)
        text = tokens[: [*tokens, m.pad_id].index(m.pad_id) + 1]  # with the pad that ends it
        rows.append(Row(len(given) - 1, given + text))
    return rows


def make_batch(rows: list[Row], cfg: DraftConfig, rng: np.random.Generator, K: int) -> Batch:
    """Draw the anchors: after each of them at least one more token is verified, one drafted."""
    B = len(rows)
    L = max(len(row.ids) for row in rows)
    ids = torch.zeros(B, L, dtype=torch.long)
    anchor = torch.zeros(B, cfg.anchors, dtype=torch.long)
    expected = torch.full((B, cfg.anchors, K), -100)
    for b, (start, tokens) in enumerate(rows):
        ids[b, : len(tokens)] = torch.tensor(tokens)
        chosen = start + rng.permutation(len(tokens) - start - 2)[: cfg.anchors]
        for n, place in enumerate(chosen):
            anchor[b, n] = int(place)
            following = tokens[place + 2 : place + 2 + K]
            expected[b, n, : len(following)] = torch.tensor(following)
    return Batch(ids, torch.tensor([row.start for row in rows]), anchor, expected)


# The network


def read_masks(model: DraftModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the last layer (B, N K, C) at the masks, and the frozen one's that verifies them.

    Masks see the clean tokens up to their anchor, and the earlier masks of this anchor.
    """
    B, L = batch.ids.shape
    N, K = batch.expected.shape[1:]
    where = batch.ids.device
    slot = torch.arange(L, device=where)
    cache = KVCache(len(model.network.blocks))
    mask = None
    if model.cfg.prefix_attention == "bidirectional":
        in_prefix = slot < batch.start[:, None]  # (B, L)
        both = in_prefix[:, None] & in_prefix[:, :, None]
        mask = (both | (slot <= slot[:, None]))[:, None]  # (B, 1, L, L)
    with torch.no_grad():
        none = torch.zeros_like(slot)
        clean = model.read(batch.ids, none, slot.expand(B, L), mask, cache)  # (B, L, C)
    cache.length = L
    group = torch.arange(N, device=where).repeat_interleave(K)  # (N K,)
    number = torch.arange(1, K + 1, device=where).repeat(N)
    anchor = batch.anchor.repeat_interleave(K, dim=1)  # (B, N K)
    position = anchor + number
    past = slot <= anchor[..., None]  # (B, N K, L)
    among = (group == group[:, None]) & (number <= number[:, None])
    mask = torch.cat([past, among.expand(B, -1, -1)], dim=2)[:, None]
    hidden = model.read(torch.zeros_like(position), number, position, mask, cache)
    index = position.clamp(max=L - 1)[..., None].expand(-1, -1, clean.shape[-1])
    return hidden, clean.gather(1, index)


def draft_loss(model: DraftModel, batch: Batch, cfg: DraftConfig) -> Tensor:
    """Return the loss of the drafts, nats per mask.

    ce: cross-entropy of the tokens that follow. kl: divergence from the frozen network.
    """
    hidden, clean = read_masks(model, batch)
    expected = batch.expected.flatten(1)  # (B, N K)
    head = model.network.head
    own = cfg.prompts and cfg.temperature == 0
    if cfg.loss == "ce" or (cfg.loss == "auto" and own):
        return cross_entropy_in_place(head(hidden), expected)
    scored = expected >= 0
    log_q = head(hidden[scored]).float().log_softmax(-1)  # (M, V)
    log_p = head(clean[scored]).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@torch.no_grad()
def acceptance(model: DraftModel, batches: list[Batch]) -> tuple[list[float], float]:
    """Return the share of right drafts by mask, and the tokens that a greedy call adds."""
    hits = []
    for batch in batches:
        banned = banned_token_ids(model.cfg, batch.ids.device)
        parts = [model.network.head(x).float() for x in read_masks(model, batch)]
        draft, true = (x.index_fill(-1, banned, -math.inf).argmax(-1) for x in parts)
        hit = (draft == true).view(batch.expected.shape).float()
        hits.append(hit.masked_fill(batch.expected < 0, math.nan).flatten(0, 1))  # (B N, K)
    hit = torch.cat(hits)
    return hit.nanmean(0).tolist(), 1 + float(
        hit.nan_to_num().cumprod(1)[~hit[:, 0].isnan()].sum(1).mean()
    )


# The run


class Run:
    """The training of an adapter on rows. It continues from out/state.pt."""

    def __init__(self, model: DraftModel, cfg: DraftConfig, rows: list[Row], weights: str):
        self.model = model
        self.cfg = cfg
        self.out = Path(cfg.out_dir)
        self.weights = weights
        self.where = model.tok.weight.device
        self.optimizers = make_optimizers(model, cfg)
        self.first_step = 0
        period = HELD_OUT if len(rows) >= HELD_OUT else len(rows)
        usable = [(i, row) for i, row in enumerate(rows) if len(row.ids) - row.start > 2]
        self.rows = [row for i, row in usable if i % period]
        held_out = [row for i, row in usable if i % period == 0]
        enough = self.rows and held_out
        require(enough, f"{self.out}: the answers are too short to learn from, use other prompts")
        places = range(0, min(len(held_out), 32), cfg.batch_size)
        self.held_out = [self.batch(held_out[i : i + cfg.batch_size], i) for i in places]

    def batch(self, rows: list[Row], *key: int) -> Batch:
        rng = np.random.default_rng((self.cfg.seed, *key))
        batch = make_batch(rows, self.cfg, rng, self.model.adapter.masks)
        return Batch(*(part.to(self.where) for part in batch))

    def train_batch(self, step: int) -> Batch:
        """Every row once an epoch, in a new order."""
        B = self.cfg.batch_size
        index = np.arange(step * B, (step + 1) * B)
        chosen = []
        for epoch, place in zip(*divmod(index, len(self.rows))):
            order = np.random.default_rng((self.cfg.seed, int(epoch), 0)).permutation(
                len(self.rows)
            )
            chosen.append(self.rows[order[place]])
        return self.batch(chosen, step, 1)

    def save(self, step: int) -> None:
        state = {"step": step, "adapter": self.model.adapter_tensors()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_adapter(self.out / FILE, self.model, self.weights)
        write_atomically(self.out / STATE, lambda file: torch.save(state, file))

    def restore(self) -> None:
        path = self.out / STATE
        if not path.exists():
            return
        state = torch.load(path, map_location=self.where, weights_only=True)
        self.first_step = state["step"]
        for name, tensor in self.model.adapter_tensors().items():
            tensor.copy_(state["adapter"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)

    def evaluate(self) -> dict:
        with device.autocast(self.where, self.cfg.dtype):
            shares, tokens = acceptance(self.model, self.held_out)
        return {"accepted": [round(x, 4) for x in shares], "tokens_per_call": round(tokens, 3)}

    def train(self, stop) -> dict:
        cfg = self.cfg
        log = run_dir.Log(self.out / "log.jsonl", self.first_step)
        if self.first_step == 0:
            self.show(log, {"step": 0} | self.evaluate())
        start = time.perf_counter()
        for step in range(self.first_step, cfg.max_steps):
            set_learning_rate(self.optimizers, learning_rate_at(step, cfg))
            with device.autocast(self.where, cfg.dtype):
                loss = draft_loss(self.model, self.train_batch(step), cfg)
            loss.backward()
            loss = float(loss.detach())
            require(math.isfinite(loss), f"loss {loss} at step {step}: lower --learning_rate")
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            done = step + 1
            last = done == cfg.max_steps or stop.requested
            entry = {"step": done, "loss": round(loss, 4)}
            if last or done % cfg.eval_interval == 0:
                seconds = time.perf_counter() - start
                left = seconds / (done - self.first_step) * (cfg.max_steps - done)
                entry |= self.evaluate() | {"minutes_left": round(left / 60, 1)}
                self.save(done)
            self.show(log, entry)
            if stop.requested:
                break
        return log.last

    def show(self, log, entry: dict) -> None:
        log.write(entry)
        if "accepted" not in entry:
            return
        shares = " ".join(f"{share:.2f}" for share in entry["accepted"])
        loss = f" | loss {entry['loss']:.3f}" if "loss" in entry else ""
        left = f" | {entry['minutes_left']:.1f} min left" if "minutes_left" in entry else ""
        calls = f"{entry['tokens_per_call']:.2f} tokens a call"
        where = f"step {entry['step']} of {self.cfg.max_steps}"
        print(f"{where}{loss} | held-out accepted {shares} | {calls}{left}", flush=True)


def main(argv: list[str]) -> dict:
    cfg = configurator.configure(DraftConfig, argv)
    model, tokenizer, _ = load_model(cfg.init_from, device.pick_device(cfg.device))
    check_model(model, cfg.init_from)
    T = cfg.answer_tokens + 1 if cfg.answer_tokens else model.cfg.target_length
    most = model.cfg.block_size
    require(2 < T < most, f"answer_tokens must be 2 to {most - 2}, got {T - 1}")
    cfg.answer_tokens = T - 1
    model.cfg = replace(model.cfg, target_length=T)
    if cfg.prompts:
        prompts = read_prompts(cfg, tokenizer)
        check_lengths(prompts, cfg, model.cfg)
        repeats = cfg.answers > len(prompts) and not cfg.temperature
        hint = "greedy answers to the same prompt are equal; set --temperature"
        require(not repeats, f"answers={cfg.answers} for {len(prompts)} prompts: {hint}")
    else:
        prompts = split_text(cfg, tokenizer, model.cfg)
    weights = digest(model)
    content = sha256(json.dumps(prompts).encode()).hexdigest()
    settings = flatten(cfg) | {"weights": weights, "content": content}
    out = Path(cfg.out_dir)
    check_settings(settings, out, cfg)
    with run_dir.lock_dir(out), run_dir.StopSignals() as stop:
        if cfg.overwrite:
            for name in (ANSWERS, STATE, FILE, "log.jsonl"):
                (out / name).unlink(missing_ok=True)
        text = json.dumps(settings, indent=1)
        write_atomically(out / SETTINGS, lambda file: file.write(text.encode()))
        rows = prompts
        if cfg.prompts:
            rows = write_answers(model, prompts, cfg, out / ANSWERS, stop)
        last = {}
        if not stop.requested:
            torch.manual_seed(cfg.seed)  # of the adapter
            run = Run(DraftModel(model, cfg.adapter).eval(), cfg, rows, weights)
            run.restore()
            last = run.train(stop)
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
