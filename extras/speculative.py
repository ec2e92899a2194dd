"""Self-speculation: one set of weights drafts the whole target at once and checks it from left to right.

Under the bidirectional mask the network rewrites a canvas, as diffusion.generate does; under the causal mask one call
says of every slot what AR decoding would write there. What agrees, from the left, is kept, and the first slot that
does not gets AR's own token: at least one token a round, and the text is AR's. At a temperature it is drawn from AR's
distribution, exactly (speculative sampling, Leviathan et al., arXiv 2211.17192, section 2.3). Train for both masks with
ar_weight. Lay it beside autoregressive.py: same verbs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from device import Late
from diffusion import readout, soft_estimate
from draws import ACCEPT, CANVAS, SAMPLE, Draws, Generated, draw_tokens, draws_for, forbidden_ids, noise_tokens
from samplers import nll


@dataclass
class SamplerConfig:
    """How a draft is made, and what it is checked against."""

    temperature: float = 0.0  # of the draft and of the AR distribution it is checked against; 0: greedy
    draft_steps: int = 2  # diffusion calls before the first check; one before each later check, which knows more

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 1 <= self.draft_steps <= 16:
            raise ValueError(f"draft_steps must be 1 to 16, got {self.draft_steps}")


@torch.no_grad()
def generate(
    model,
    prefix: Tensor,
    cfg: SamplerConfig,
    seed: int = 0,
    example: Tensor | None = None,
    on_step: Callable | None = None,
) -> Generated:
    """What autoregressive.generate says after each prefix (B, P), in fewer network calls. Each is over all slots.

    Equal but for rounding: where two tokens are likeliest to the last bit, several positions read at once may choose
    the other. score: that of the AR reading. calls: drafts and checks of the row.
    example (B,): names of the rows, which key their draws with the seed; 0 .. B - 1 by default.
    on_step: as diffusion.denoise calls it, after each draft and each check.
    Raises ValueError where the model cannot read its target both ways.
    """
    m, S, device = model.cfg, model.cfg.target_length - 1, prefix.device
    _check_model(m)
    rows, slot = torch.arange(len(prefix), device=device), torch.arange(S, device=device)
    draws = draws_for(seed, rows if example is None else example)
    cache, forbidden = model.encode(prefix, room=m.target_length), forbidden_ids(m, device)
    closed = torch.zeros(S + 1, S + 1, dtype=torch.bool, device=device)  # no edge beside the causal ones
    canvas = noise_tokens(draws.uniform(CANVAS, S)[0], m)  # (R, S)
    written, loss = torch.zeros_like(rows), torch.zeros(len(rows), device=device)  # (R,) slots that are text, their NLL
    tokens, score, calls = torch.full_like(canvas, m.pad_id), torch.zeros_like(loss), torch.zeros_like(rows)
    moving, left, estimate, step = rows >= 0, Late(), None, 0  # (R,): texts that have not ended
    show = on_step or (lambda *_: None)
    show(step, canvas, None, rows)
    for turn in range(S):
        draws, free = draws.at(turn), slot >= written[:, None]  # (R, S)
        drafts = 1 if turn else cfg.draft_steps
        for k in range(drafts):
            guess = readout(model.decode(cache, _behind_separator(canvas, m), estimate=estimate), m.shift)
            estimate = soft_estimate(model, guess) if m.self_conditioning else None
            guess = guess.float().index_fill_(-1, forbidden, -math.inf)  # (R, S, V)
            drawn = draw_tokens(guess, cfg.temperature, draws.uniform(SAMPLE, S, k)[0])
            canvas, step = torch.where(free, drawn, canvas), step + 1
            show(step, canvas, guess, torch.where(moving, rows, -1))
        logits = model.decode(cache, _behind_separator(canvas, m), opened=closed)[:, :-1]
        logits = logits.float().index_fill_(-1, forbidden, -math.inf)  # (R, S, V)
        canvas, end = check(canvas, written, guess, logits, cfg.temperature, draws)
        calls[rows] += (drafts + 1) * moving
        step += 1
        show(step, canvas, logits, torch.where(moving, rows, -1))

        pads = (canvas == m.pad_id) & (slot < end[:, None])
        text = (slot < end[:, None]) & (pads.cumsum(1) - pads.long() == 0)  # (R, S) up to and with the first pad
        loss = loss + nll(logits, canvas).masked_fill(~(text & free), 0.0).sum(1)
        leaving = moving & (pads.any(1) | (end == S))
        tokens[rows] = torch.where(leaving[:, None], torch.where(text, canvas, m.pad_id), tokens[rows])
        score[rows] = torch.where(leaving, loss / text.sum(1), score[rows])
        moving, written = moving & ~leaving, end
        n = left.read(moving.sum())
        if n == 0:
            break
        size = 1 << (n - 1).bit_length() if n else len(rows)  # as diffusion.denoise shrinks its batch
        if size < len(rows):
            stay = (~moving).int().argsort(stable=True)[:size]
            draws, cache, estimate = draws.rows(stay), cache.rows(stay), None if estimate is None else estimate[stay]
            rows, moving, canvas, written, loss = (part[stay] for part in (rows, moving, canvas, written, loss))
    return Generated(tokens, score, calls)


def check(
    draft: Tensor, written: Tensor, guess: Tensor, logits: Tensor, temperature: float, draws: Draws
) -> tuple[Tensor, Tensor]:
    """(draft (R, S) with the first refused token replaced, slots (R,) that are text now).

    guess (R, S, V): the logits that the slots behind the first `written` (R,) were drawn from, one by one: q.
    logits (R, S, V): AR's, each given the draft before its slot: p. A token stays with probability min(1, p / q); the
    first that goes is drawn again from what p has more than q, max(p - q, 0) normalised, which makes each slot's
    distribution p. At temperature 0 both are sure: what is not AR's likeliest token goes, and that token comes.
    """
    p, q = _probabilities(logits, temperature), _probabilities(guess, temperature)  # (R, S, V)
    chance, value = draws.uniform(ACCEPT, draft.shape[1])
    slot, row = torch.arange(draft.shape[1], device=draft.device), torch.arange(len(draft), device=draft.device)
    of_p, of_q = (share.gather(-1, draft[..., None])[..., 0] for share in (p, q))  # (R, S)
    kept = (chance * of_q < of_p) | (slot < written[:, None])
    end = kept.long().cumprod(1).sum(1)  # (R,) where the first refused token stands; S: there is none
    at = end.clamp(max=len(slot) - 1)
    more = (p[row, at] - q[row, at]).clamp(min=0)  # (R, V)
    more = torch.where(more.sum(1, keepdim=True) > 0, more, p[row, at])  # by rounding p may have nowhere more
    own = draw_tokens(more.log()[:, None], 1.0, value[row, at, None])  # (R, 1)
    return torch.where(slot == end[:, None], own, draft), (end + 1).clamp(max=len(slot))


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits / temperature).softmax(-1)


def _behind_separator(canvas: Tensor, m) -> Tensor:
    return F.pad(canvas, (1, 0), value=m.sep_id)  # (R, T)


def _check_model(m) -> None:
    """Raise ValueError, one line, where the two masks would not read the same slots."""
    if m.paradigm != "diffusion" or m.target_attention != "bidirectional":
        raise ValueError(
            f"speculation drafts with a diffusion model, this one has paradigm={m.paradigm!r}: convert it with "
            "python ar2diff.py and train it with --ar_weight=1"
        )
    if m.prefix_attention == "joint":
        raise ValueError("speculation needs a prefix that is read once, causal or bidirectional; this model's is joint")
    if m.lookahead:
        raise ValueError("speculation cannot check a model with lookahead: it reads the very token that it is to judge")
