"""Speed only: the same network behind faster steps. Deleting this file changes no output.

    model = speed_up(model)        # then autoregressive.generate, diffusion.generate, .. as before

The result has the methods of model.Transformer and shares its weights. What is faster, measured on two CPU cores and a
network of GPT-2 small's shape (python -m eval.speed):

    one token behind a cache     compiled whole; on a CPU every matrix is read as rows times a vector, which a
                                 compiler turns into one pass at the speed of the memory, where the library's matrix
                                 product reaches a third of it. On CUDA buffers and shapes are fixed: a CUDA graph.
    a canvas on a CPU            left to the library, which is at its limit there; in bfloat16 attention is two matrix
                                 products, half the time of the fused kernel
    a canvas on CUDA             compiled
    N candidates of a prompt     read the one copy of its prefix that there is

The first call of each kind compiles: tens of seconds.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec import build_model
from model import KVCache, Transformer

FEW = {torch.float32: 8, torch.bfloat16: 4}  # rows up to which a matrix is read faster than it is multiplied


def speed_up(model: Transformer) -> "Fast":
    """The same network, same weights (not a copy of them), faster. For inference only."""
    return Fast(model, fixed=model.tok.weight.device.type == "cuda")


class Fast:
    """encode, decode, soft_embedding, cfg and tok of a Transformer. fixed: the step of a token never changes shape."""

    def __init__(self, model: Transformer, fixed: bool):
        self.plain, self.cfg, self.tok, self.soft_embedding = model, model.cfg, model.tok, model.soft_embedding
        self.fixed, on_cuda = fixed, model.tok.weight.device.type == "cuda"
        # What is compiled is a second module around the same weights: the caller's stays as it is.
        with torch.device("meta"):
            self.token_model = build_model(model.cfg).eval()
        self.token_model.load_state_dict(model.state_dict(), assign=True)
        if not on_cuda:
            _read_by_rows(self.token_model)
        mode = "reduce-overhead" if on_cuda else "default"  # CUDA graphs
        # Shapes that change (the length that was read) are variables; each number of rows is compiled once.
        self.blocks = torch.compile(self.token_model._run_blocks, fullgraph=True, dynamic=not fixed, mode=mode)
        self.head = torch.compile(self.token_model.head.forward, fullgraph=True, dynamic=False, mode=mode)
        self.canvas_blocks = torch.compile(model._run_blocks) if on_cuda else model._run_blocks

    def encode(self, prefix: Tensor, room: int = 0) -> KVCache:
        """See Transformer.encode."""
        cache = self.plain.encode(prefix, room)
        if type(cache) is not KVCache or cache.prefix is not None:
            return cache
        other = FastCache(len(cache.k), cache.room)
        other.__dict__.update(cache.__dict__)
        if self.fixed:  # what is masked is multiplied by 0, which must not be 0 times NaN
            for buffer in (*cache.k, *cache.v):
                if buffer is not None:
                    buffer[:, :, cache.length :] = 0
        return other

    def decode(
        self,
        cache: KVCache,
        target: Tensor,
        append: bool = False,
        estimate: Tensor | None = None,
        opened: Tensor | None = None,
    ) -> Tensor:
        """See Transformer.decode."""
        assert not (append and getattr(cache, "shared", None)), "what rows share is not theirs to go on with"
        one_token = append and target.shape[1] == 1 and opened is None and estimate is None
        if one_token and isinstance(cache, FastCache) and cache.length and self._is_few(len(target)):
            return self._next_token(cache, target)
        plain, eager = self.plain, self.plain._run_blocks
        plain._run_blocks = self.canvas_blocks
        try:
            return plain.decode(cache, target, append, estimate, opened)
        finally:
            plain._run_blocks = eager

    def _is_few(self, rows: int) -> bool:
        return self.fixed or rows <= FEW.get(self.tok.weight.dtype, 0)

    def _next_token(self, cache: "FastCache", token: Tensor) -> Tensor:
        """Logits (B, 1, V) after one more token (B, 1), which is filed."""
        x = self.plain._embed(token, 0, None)
        if self.fixed:
            x, rope, mask = self._place_in_fixed_buffers(x, cache)
            x = self.blocks(x, rope, mask, False, cache).clone()  # the graph's own memory is overwritten by the next
            cache.at = None
        else:
            x = self.blocks(*self.plain._place(x, cache, "causal", None), cache)
        cache.length += 1
        if cache.real is not None:
            cache.real = torch.cat([cache.real, torch.ones_like(token, dtype=torch.bool)], dim=1)
        return self.head(x)

    def _place_in_fixed_buffers(self, x: Tensor, cache: "FastCache"):
        """As Transformer._place, for attention over whole buffers: what is not written yet is masked."""
        (B, _, _), S, capacity = x.shape, cache.length, cache.k[0].shape[2]
        if S + 1 > self.cfg.block_size:
            raise ValueError(f"{S + 1} tokens are longer than the model's block_size {self.cfg.block_size}")
        cache.at = torch.full((1,), S, device=x.device)
        real = torch.arange(capacity, device=x.device)[None] <= cache.at  # (1, capacity)
        position = cache.at[None]  # (1, 1)
        if cache.real is not None:
            real = real.expand(B, -1) & F.pad(cache.real, (0, capacity - S), value=True)
            position = cache.real.sum(1, keepdim=True)  # padding takes no position
        if self.cfg.position == "learned":
            return x + self.plain.pos(position), None, real[:, None, None]
        return x, self.plain.rope[:, position].to(x.dtype)[:, :, None], real[:, None, None]


class FastCache(KVCache):
    """A KVCache that N rows of a prompt can share, and whose buffers can be read whole (CUDA graphs)."""

    def __init__(self, n_layer: int, room: int = 0):
        super().__init__(n_layer, room)
        self.at: Tensor | None = None  # (1,): where the next token goes in buffers that are read whole
        self.shared: FastCache | None = None  # the prefixes of B prompts, for B x N rows here
        self.N = 1

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.shared is not None:
            return k, v  # of the canvas alone: the prefix comes in where attention is made
        if self.at is None:
            return super().extend(layer, k, v)
        self.k[layer].index_copy_(2, self.at, k)
        self.v[layer].index_copy_(2, self.at, v)
        return self.k[layer], self.v[layer]

    def attend(self, q, k, v, mask, dropout, causal, layer):
        if self.shared is not None:
            S, repeat = self.shared.length, q.shape[1] // self.shared.k[layer].shape[1]  # grouped-query attention
            both = (t[layer][:, :, :S].repeat_interleave(repeat, dim=1) for t in (self.shared.k, self.shared.v))
            return _attend_to_both(q, *both, k, v)
        if mask is None and not causal and q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.shape[2] > 1:
            return _attend_by_products(q, k, v)
        return super().attend(q, k, v, mask, dropout, causal, layer)

    def rows(self, index: Tensor) -> KVCache:
        if self.shared is not None:  # some have left, and the others are too few to share
            return self.shared.rows(index // self.N)
        N = len(index) // len(self.k[0]) if self.length else 0
        everyone = torch.arange(len(index), device=index.device)
        if N < 2 or self.real is not None or not torch.equal(index, everyone // N):
            return super().rows(index)
        other = FastCache(len(self.k), self.room)
        other.length, other.shared, other.N = self.length, self, N
        return other


def _attend_to_both(q: Tensor, shared_k: Tensor, shared_v: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention (R, H, T, D) of q to prefixes (B, H, S, D) that R / B rows share and to keys of their own (R, H, T, D).

    The softmax runs over both kinds of scores; the prefix is never repeated.
    """
    (R, H, T, D), (B, _, S, _) = q.shape, shared_k.shape
    N, q = R // B, q * D**-0.5
    together = q.view(B, N, H, T, D).transpose(1, 2).reshape(B, H, N * T, D)
    scores = (together @ shared_k.transpose(2, 3)).view(B, H, N, T, S).transpose(1, 2).reshape(R, H, T, S)
    p = torch.cat([scores, q @ k.transpose(2, 3)], dim=-1).softmax(-1)  # (R, H, T, S + T)
    own = p[..., S:] @ v
    p = p[..., :S].view(B, N, H, T, S).transpose(1, 2).reshape(B, H, N * T, S)
    return own + (p @ shared_v).view(B, H, N, T, D).transpose(1, 2).reshape(R, H, T, D)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention (B, H, T, D) as matrix products; a head at a time where all scores would not fit a cache."""
    q = q * q.shape[-1] ** -0.5
    if q.shape[2] * k.shape[2] <= 1 << 18:
        return (q @ k.transpose(2, 3)).softmax(-1) @ v
    heads = zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return torch.stack([(a @ b.T).softmax(-1) @ c for a, b, c in heads]).view_as(q)


class RowsTimesVector(nn.Module):
    """nn.Linear for a few rows of x, written so that inductor makes one vectorised pass over the weight of it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, width = x.shape[:-1].numel(), x.shape[-1]
        # as_strided has x written to memory first. Without it what made x (a norm, a GELU) is fused into the loop over
        # the rows of the weight and computed anew for each of them.
        flat = x.reshape(rows, width).float().as_strided((rows, width), (width, 1))
        weight = self.weight.float()  # in registers: the sum is float32 whatever the weights are
        y = torch.stack([(weight * row).sum(-1) for row in flat.unbind(0)]).to(x.dtype)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _read_by_rows(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, RowsTimesVector(child))
        else:
            _read_by_rows(child)
