"""Mask annealing: the causal mask of a converted model opens over anneal_steps, until it shows the whole target.

An AR model has never seen a token ahead of its own. AR2Diff shows it all of them at once (anneal_steps = 0); here they
come little by little, by one of three rules. A row sees a column; a target of four, half of the way:

    causal      edges       band        blocks      bidirectional
    x . . .     x . x .     x x . .     x x . .     x x x x
    x x . .     x x . x     x x x .     x x . .     x x x x
    x x x .     x x x .     x x x x     x x x x     x x x x
    x x x x     x x x x     x x x x     x x x x     x x x x

    edges   a growing random share of the edges ahead, drawn anew at each step (DiffuLLaMA, arXiv 2410.17891)
    band    slot i sees up to i + w, and w grows
    blocks  both ways inside a block, causal across blocks (block diffusion: BD3-LM, arXiv 2503.09573), whose length
            grows from 1, which is AR, to the target; as borders move, an edge may close again for a while. Differs from
            BD3-LM: earlier blocks are read as corrupted as they are, and the separator is slot 0 of the first block

A dense mask turns off the flash kernel. On CUDA the rule goes to FlexAttention, which evaluates it tile by tile and
skips the tiles of which a band or blocks show nothing; of random edges it reads one table for all rows and heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from draws import EDGES, draws_for

FORMS = ("edges", "band", "blocks")
Rule = Callable[[Tensor, Tensor], Tensor]  # (query i, key j), both among the new tokens -> whether i sees a later j


@dataclass
class AnnealConfig:
    """How the mask opens. TrainConfig has these settings."""

    anneal_steps: int = 0  # open the causal mask over so many steps; 0: at once, as the paper does
    anneal_form: str = "edges"  # edges: at random | band: near slots first | blocks: block length grows from 1

    def __post_init__(self):
        if self.anneal_form not in FORMS:
            raise ValueError(f"anneal_form must be one of {', '.join(FORMS)}; got {self.anneal_form!r}")
        if self.anneal_steps < 0:
            raise ValueError(f"anneal_steps must be 0 or more, got {self.anneal_steps}")
        if self.anneal_steps and self.target_attention != "bidirectional":
            raise ValueError("anneal_steps opens the mask of a bidirectional target; target_attention is 'causal'")
        if self.anneal_steps and self.anneal_form != "edges" and self.prefix_attention == "joint":
            # Pads stand between a short prefix and its target, so that distances would depend on the other rows.
            raise ValueError(
                f"anneal_form={self.anneal_form} goes by distances in a target that is read behind its prefix; a joint "
                "prefix opens with anneal_form=edges"
            )


class Annealing:
    """The mask of each step of a training. cfg is its TrainConfig; the printed line says where a dense mask serves."""

    def __init__(self, cfg, model):
        self.cfg, self.flex = cfg, None
        if cfg.anneal_steps:
            self.flex, why = compiled_flex(model)
            if self.flex is None:
                print(f"anneal_steps: the mask is made whole here, a little slower and the same: {why}")

    def opened(self, batch, step: int) -> "Tensor | Ahead | None":
        """What model.decode takes as `opened` at this step; None when all is open and no mask is needed any more."""
        if step >= self.cfg.anneal_steps:
            return None
        ahead, length = rule(batch, step, self.cfg)
        if self.flex is not None:
            return Ahead(ahead, self.flex)
        slot = torch.arange(length, device=batch.target.device)
        return ahead(slot[:, None], slot)  # (T, T)


def rule(batch, step: int, cfg) -> tuple[Rule, int]:
    """(which edges ahead are open at this step, number of new tokens). All are at the last step, anneal_steps - 1.

    A function of (seed, step) and of the target alone, so that all micro-batches see one mask.
    """
    T, device = batch.target.shape[1], batch.target.device
    done, steps = step + 1, cfg.anneal_steps
    if cfg.anneal_form == "edges":
        table = open_edges(batch, step, cfg)
        return lambda i, j: table[i, j], len(table)
    # In tensors: a number in a closure is a constant of the compiled kernel, which would be compiled for each anew.
    if cfg.anneal_form == "band":
        width = torch.full((), (T - 1) * done // steps, device=device)
        return lambda i, j: j <= i + width, T
    size = torch.full((), max(1, T * done // steps), device=device)
    return lambda i, j: i // size == j // size, T


def open_edges(batch, step: int, cfg) -> Tensor:
    """Random edges (T, T) open at this step, (P + T, P + T) if joint; the share grows linearly (DiffuLLaMA, 3.2)."""
    P, T = batch.prefix.shape[1] if cfg.prefix_attention == "joint" else 0, batch.target.shape[1]
    # Target first, so that its edges have the same names however long the prefixes of a micro-batch are.
    row = torch.cat([torch.arange(T, T + P), torch.arange(T)]).to(batch.target.device)
    return draws_for(cfg.seed, row, step).uniform(EDGES, P + T)[0][:, row] < (step + 1) / cfg.anneal_steps


class Flex(NamedTuple):
    """torch's flex_attention and create_block_mask, each compiled where it is to be fast."""

    attention: Callable
    block_mask: Callable


@dataclass
class Ahead:
    """Open edges as a rule: stands for the tensor `opened` of model.attention_mask where FlexAttention runs."""

    rule: Rule
    flex: Flex

    def mask(self, past: Tensor | None, real: Tensor | None, S: int, T: int, device) -> "FlexMask":
        """The mask of T new tokens behind S cached ones; past (B, S) and real (B, T) are False at padding."""
        B = None if real is None else len(real)  # one mask for all rows where none has padding
        seen = self.mask_mod(past, real, S, device)
        return FlexMask(self.flex.block_mask(seen, B, None, T, S + T, device=device), self.flex.attention)

    def mask_mod(self, past: Tensor | None, real: Tensor | None, S: int, device) -> Callable:
        """Whether query q sees key kv, as FlexAttention asks: what attention_mask draws as a whole."""
        ahead, cached, zero = (
            self.rule,
            torch.full((), S, device=device),
            torch.zeros((), dtype=torch.long, device=device),
        )

        def seen(b, h, q, kv):
            among = torch.maximum(kv - cached, zero)  # place among the new tokens; 0 for cached ones
            new = (kv - cached <= q) | ahead(q, among)
            if real is not None:
                new = (new & real[b, among]) | (kv - cached == q)  # a padding row may see itself
            if past is None or past.shape[1] == 0:
                return new
            return torch.where(kv < cached, past[b, torch.minimum(kv, cached - 1)], new)

        return seen


@dataclass
class FlexMask:
    """What blocks are given in place of a dense mask; KVCache.attend lets it attend."""

    blocks: object  # torch's BlockMask
    attention: Callable

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention (B, H, T, D). Autocast does not cast for FlexAttention; rotated queries and keys are float32."""
        return self.attention(q.to(v.dtype), k.to(v.dtype), v, block_mask=self.blocks)


def compiled_flex(model) -> tuple[Flex | None, str]:
    """(FlexAttention as the model can use it in training, "") or (None, why not)."""
    m, device = model.cfg, model.tok.weight.device
    if device.type != "cuda":
        return None, f"FlexAttention has no backward pass on {device.type}"
    if m.dropout:
        return None, "FlexAttention has no dropout"
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        flex = Flex(torch.compile(flex_attention), torch.compile(create_block_mask))
        q = torch.zeros(1, m.n_head, 16, m.head_size, device=device, requires_grad=True)
        mask = Ahead(lambda i, j: j <= i + 1, flex).mask(None, None, 0, 16, device)
        mask.attend(q, q, q).sum().backward()
    except Exception as error:  # no compiler, or heads of a size that it does not take
        return None, f"FlexAttention does not work: {str(error).splitlines()[0][:100]}"
    return flex, ""
