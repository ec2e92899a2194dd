"""Text diffusion: noise, loss, samplers, generate. Lay it beside autoregressive.py: same verbs.

Training corrupts the target at a random rate and asks for the clean text, then feeds the model's own answer back and
asks again: the loss of AR2Diff (arXiv 2401.17181, section 3) after SUNDAE (arXiv 2112.06749). Generation starts from
noise and lets the model rewrite the whole canvas a few times. All slots are alike: text, then learned pads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cross_entropy import cross_entropy_
from device import Late
from draws import CANVAS, CONDITION, CORRUPT, RATE, UNROLL, Draws, Generated, draw_tokens, forbidden_ids, noise_tokens
from samplers import SAMPLERS, SamplerConfig, State, nll


@dataclass
class LossConfig:
    """How the diffusion loss is made. What the noise is stands with the model's settings."""

    unroll_steps: int = 2  # passes: 1 is plain denoising, 2 is the paper's L(1) + L(2)
    unroll_temperature: float = 0.0  # 0: the next pass reads the argmax (the paper); 1: a sample (SUNDAE)
    self_conditioning_prob: float = 1.0  # share of rows that see the soft answer in the unrolled passes
    full_noise_prob: float = 0.0  # share of rows that start as a sampler does, from noise alone
    rate_exponent: float = 1.0  # the other rows' corruption is u ** this, u uniform in (0, 1); below 1: more noise
    ar_weight: float = 0.0  # of the AR loss that is kept beside, for speculative.py: see causal_loss

    def __post_init__(self):
        if not 0 <= self.full_noise_prob <= 1 or not 0 < self.rate_exponent < math.inf:
            raise ValueError(
                "full_noise_prob must be in [0, 1] and rate_exponent above 0; got "
                f"{self.full_noise_prob}, {self.rate_exponent}"
            )
        if not 0 <= self.ar_weight < math.inf:
            raise ValueError(f"ar_weight must be 0 or more, got {self.ar_weight}")
        if not 1 <= self.unroll_steps <= 16 or self.unroll_temperature < 0 or not 0 <= self.self_conditioning_prob <= 1:
            raise ValueError(
                "unroll_steps must be 1 to 16, unroll_temperature 0 or more, self_conditioning_prob in [0, 1]; got "
                f"{self.unroll_steps}, {self.unroll_temperature}, {self.self_conditioning_prob}"
            )


def corrupt(target: Tensor, rate: Tensor, m, draws: Draws) -> Tensor:
    """Replace each token of target (B, T) with probability rate (B, 1); slot 0, the separator, is kept.

    uniform: a random token, perhaps the same one (SUNDAE). mask: m.mask_id (absorbing state, D3PM, arXiv 2107.03006).
    """
    chance, value = draws.uniform(CORRUPT, target.shape[1])
    hit = chance < rate  # (B, T)
    hit[:, 0] = False
    return torch.where(hit, noise_tokens(value, m), target)


def draw_rate(cfg: LossConfig, draws: Draws) -> Tensor:
    """Corruption rates (B, 1): U(0, 1) per row, unless cfg leans toward the noise that a sampler starts from."""
    share, kind = draws.uniform(RATE, 1)  # 2 x (B, 1)
    return torch.where(kind < cfg.full_noise_prob, 1.0, share**cfg.rate_exponent)


def readout(logits: Tensor, shift: bool) -> Tensor:
    """Logits (B, T - 1, V) of the slots after the separator: slot i is read at position i, or at i - 1 with shift."""
    return logits[:, :-1] if shift else logits[:, 1:]


def losses(model, batch, cfg, draws: Draws, rate: Tensor | None = None, opened: Tensor | None = None):
    """The terms L(1), L(2), ... one by one, nats per slot over every slot, clean, corrupted or pad.

    L(k + 1) reads the model's own answer of pass k, as tokens and, with self-conditioning, as soft embedding beside
    them. No gradient crosses that, so each term may be backpropagated before the next is computed. The prefix stays
    clean. rate (B, 1): corruption, drawn per row where it is not given. opened: see model.attention_mask.
    With cfg.ar_weight one more term comes last: that weight times causal_loss.
    """
    m, target = model.cfg, batch.target
    rate = draw_rate(cfg, draws) if rate is None else rate  # (B, 1)
    canvas, estimate = corrupt(target, rate, m, draws), None
    # As readout pairs them; -100 is not scored. Slicing the logits instead would copy them, forth and back.
    expected = F.pad(target[:, 1:], (0, 1) if m.shift else (1, 0), value=-100)  # (B, T)
    for k in range(cfg.unroll_steps):
        logits = model(batch.prefix, canvas, estimate=estimate, opened=opened)  # (B, T, V)
        if k + 1 < cfg.unroll_steps:  # now, for the loss uses the logits up
            with torch.no_grad():
                said = readout(logits, m.shift)  # (B, T - 1, V)
                answer = draw_tokens(said, cfg.unroll_temperature, draws.uniform(UNROLL, said.shape[1], k)[0])
                canvas = torch.cat([target[:, :1], answer], dim=1)
                if m.self_conditioning:
                    told = draws.uniform(CONDITION, 1, k)[0] < cfg.self_conditioning_prob  # (B, 1)
                    estimate = soft_estimate(model, said) * told[..., None]
        term, logits, said = cross_entropy_(logits, expected), None, None  # the next pass makes as many
        yield term
    if cfg.ar_weight:
        yield cfg.ar_weight * causal_loss(model, batch)


def causal_loss(model, batch) -> Tensor:
    """What autoregressive.loss is of these weights under the causal mask: nats per slot, pads included.

    Slot i is read at position i - 1 whatever m.shift says, and there is no estimate: left to right there is no answer
    to go back to. The prefix is frozen; a joint one could not be read before the target.
    """
    T = batch.target.shape[1]
    closed = torch.zeros(T, T, dtype=torch.bool, device=batch.target.device)  # no edge beside the causal ones
    logits = model(batch.prefix, batch.target, opened=closed)  # (B, T, V)
    expected = F.pad(batch.target[:, 1:], (0, 1), value=-100)
    return cross_entropy_(logits, expected)


def loss(model, batch, cfg, draws: Draws) -> Tensor:
    """L(1) + L(2) of AR2Diff: a plain sum, nats per target slot."""
    return sum(losses(model, batch, cfg, draws))


@torch.no_grad()
def loss_by_rate(model, batch, cfg, draws: Draws, rates: list[float]) -> dict[str, float]:
    """L(1) at fixed corruption rates, nats per slot. Comparable between diffusion models, not with an AR loss."""
    fixed = {f"{rate:.1f}": torch.full((len(batch.target), 1), rate, device=batch.target.device) for rate in rates}
    once = LossConfig(unroll_steps=1)
    return {name: next(losses(model, batch, once, draws, rate)).item() for name, rate in fixed.items()}


SOFTENED = 1 << 24  # logits that have a softmax beside them at a time, but at least those of one row


def soft_estimate(model, logits: Tensor) -> Tensor:
    """Soft embedding (B, T, C) of a prediction (B, T - 1, V). The separator's slot gets zeros, by mask: zero logits
    would give the mean embedding instead."""
    few = max(1, SOFTENED // logits[0].numel())
    return F.pad(torch.cat([model.soft_embedding(part) for part in logits.split(few)]), (0, 0, 1, 0))


@torch.no_grad()
def generate(
    model,
    prefix: Tensor,
    cfg: SamplerConfig,
    seed: int = 0,
    example: Tensor | None = None,
    on_step: Callable | None = None,
    given: Tensor | None = None,
) -> Generated:
    """Denoise cfg.candidates random canvases per prefix (B, P), keep the one the model scores best (section 4.2).

    With cfg.block_length a text is written block by block, each a canvas of its own behind all that was written before
    (BD3-LM, arXiv 2503.09573); the candidates are of a block, and a text ends with the first pad.
    example (B,): names of the rows, which key their draws with the seed; 0 .. B - 1 by default.
    given (B, T - 1): token ids that stay as they are, -1 where the slot is free (infilling).
    on_step: see denoise; row r is candidate r % N of prompt r // N. Steps are counted anew in each block.
    """
    m, N, (B, P), device = model.cfg, cfg.candidates, prefix.shape, prefix.device
    length = cfg.max_new_tokens or m.target_length - 1
    width = min(cfg.block_length or length, length)
    if width < length and m.prefix_attention == "joint":
        raise ValueError("block_length needs a prefix that is read once; this model's prefix_attention is joint")
    if P + 1 + length > m.block_size:
        raise ValueError(f"{P} + 1 + {length} tokens are longer than the model's block_size {m.block_size}")
    example = torch.arange(B, device=device) if example is None else example
    tokens = torch.full((B, length), m.pad_id, device=device)
    score, calls = torch.zeros(B, device=device), torch.zeros(B, dtype=torch.long, device=device)
    begun, before = torch.zeros_like(calls), torch.full((B, 1), m.sep_id, device=device)  # slots that are scored
    cache, rows = model.encode(prefix, room=1 + length), torch.arange(B, device=device)  # texts that go on
    for start in range(0, length, width):
        slots, prompt = min(width, length - start), torch.arange(len(rows), device=device).repeat_interleave(N)  # (R,)
        candidate = torch.arange(N, device=device).repeat(len(rows))
        draws = Draws(seed, example[rows][prompt], candidate, step=start // width * cfg.steps)
        made = denoise(
            model,
            cache.rows(prompt) if N > 1 else cache,
            before[prompt],
            slots,
            cfg,
            draws,
            _renumbered(on_step, rows, N),
            None if given is None else given[rows][prompt, start : start + slots],
        )
        made = best_of(made, N)
        tokens[rows, start : start + slots] = made.tokens
        score[rows] += made.score * slots
        calls[rows] += made.calls
        begun[rows] += slots
        if start + slots == length:
            break
        ended = (made.tokens == m.pad_id).any(1) & (given is None)  # in a template a pad is a slot that was not needed
        stay = (~ended).nonzero()[:, 0]
        if not len(stay):
            break
        # What is finished is prefix now, and is read as one: by the causal mask, an AR model's own, or both ways.
        read = torch.cat([before, made.tokens[:, :-1]], dim=1)[stay]
        closed = read.new_zeros(slots, slots, dtype=torch.bool) if m.prefix_attention == "causal" else None
        cache = cache if len(stay) == len(rows) else cache.rows(stay)
        model.decode(cache, read, append=True, opened=closed)
        rows, before = rows[stay], made.tokens[stay, -1:]
        calls[rows] += 1
    return Generated(tokens, score / begun, calls)


def _renumbered(on_step: Callable | None, rows: Tensor, N: int) -> Callable | None:
    # Texts that have ended are no rows of denoise any more; a hook knows each by its first number.
    if on_step is None:
        return None
    number = (rows[:, None] * N + torch.arange(N, device=rows.device)).flatten()
    return lambda step, canvas, logits, r: on_step(step, canvas, logits, torch.where(r < 0, -1, number[r]))


def best_of(made: Generated, N: int) -> Generated:
    """Of each N rows in turn the one of lowest score; the calls of all of them are counted."""
    best = made.score.view(-1, N).argmin(1) + torch.arange(len(made.score) // N, device=made.score.device) * N  # (B,)
    return Generated(made.tokens[best], made.score[best], made.calls.view(-1, N).sum(1))


@torch.no_grad()
def denoise(
    model,
    cache,
    before: Tensor,
    slots: int,
    cfg: SamplerConfig,
    draws: Draws,
    on_step: Callable | None = None,
    given: Tensor | None = None,
) -> Generated:
    """Rewrite a canvas of noise behind each of R cached prefixes for cfg.steps network calls; all R rows are kept.

    before (R, 1): the token ahead of the canvas, clean: the separator, or the last one of the block before.
    on_step: called with (step, canvas (R, S), logits (R, S, V), rows (R,)) after each network call, and once before
        the first with step 0 and logits None. Rows that settle leave; until the batch has shrunk their number is -1.
    """
    m, sampler = model.cfg, SAMPLERS[cfg.sampler]
    canvas = noise_tokens(draws.uniform(CANVAS, slots)[0], m)  # (R, S)
    free = torch.ones_like(canvas, dtype=torch.bool)
    if given is not None:
        free = given < 0
        canvas = torch.where(free, canvas, given)
    rows, closed = torch.arange(len(canvas), device=canvas.device), forbidden_ids(m, canvas.device)
    state = State(canvas, canvas, canvas, torch.full(canvas.shape, -1.0, device=canvas.device), rows < 0, free)
    answers, scores, calls = canvas.clone(), torch.zeros(len(canvas), device=canvas.device), torch.zeros_like(rows)
    moving, left, estimate = rows >= 0, Late(), None  # (R,): rows that have not settled
    if on_step is not None:
        on_step(0, state.canvas, None, rows)
    for step in range(cfg.steps):
        last = step + 1 == cfg.steps
        logits = model.decode(cache, torch.cat([before, state.canvas], dim=1), estimate=estimate)
        logits = readout(logits, m.shift)
        if m.self_conditioning and not last:
            estimate = soft_estimate(model, logits)
        logits = logits.index_fill_(-1, closed, -math.inf)  # (R, S, V), in place: the network's own are used up
        state = sampler(logits, state, step, cfg, draws.at(draws.step + step), m)
        calls[rows] += moving
        if on_step is not None:
            on_step(step + 1, state.canvas, logits, torch.where(moving, rows, -1))
        if not last and not cfg.may_settle:
            continue
        leaving = moving & (state.settled | last)
        if left.sees_none(leaving):
            continue
        scores[rows] = torch.where(leaving, nll(logits, state.judged).mean(1), scores[rows])
        answers[rows] = torch.where(leaving[:, None], state.answer, answers[rows])
        moving = moving & ~leaving
        n = left.read(moving.sum())
        if n == 0:
            break
        size = 1 << (n - 1).bit_length() if n else len(rows)  # batches of 1, 2, 4, ..: a compiled step knows them all
        if size < len(rows):
            stay = (~moving).int().argsort(stable=True)[:size]  # rows that have settled fill up the batch
            state, draws, cache = State(*(part[stay] for part in state)), draws.rows(stay), cache.rows(stay)
            rows, moving, before = rows[stay], moving[stay], before[stay]
            estimate = estimate[stay] if estimate is not None else None
    return Generated(answers, scores, calls)
