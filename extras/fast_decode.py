"""Speed only: the same network behind faster steps. Deleting this file changes no output.

    model = speed_up(model)        # then autoregressive.generate, diffusion.generate, .. as before

The result has the methods of model.Transformer and shares its weights. What is faster (python -m eval.speed measures
it):

    one token behind a cache     compiled whole; on a CPU every matrix is read as rows times a vector, which a
                                 compiler turns into one pass at the speed of the memory, where the library's matrix
                                 product reaches a third of it; keys and values in bfloat16 likewise, for any number
                                 of rows. On CUDA buffers and shapes are fixed: a CUDA graph.
    a canvas on a CPU            left to the library: compiled it gained nothing; in bfloat16 attention is two matrix
                                 products, which took half the time of the fused kernel
    a canvas on CUDA             compiled, its steps replayed from a CUDA graph
    N candidates of a prompt     on a CPU read the one copy of its prefix that there is

The first call of each kind compiles: tens of seconds. What is for CUDA has not been run on a GPU yet.
"""

from collections.abc import Callable
from copy import copy
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encdec import model_without_weights
from model import KVCache, Transformer

FEW = {torch.float32: 8, torch.bfloat16: 4}  # rows up to which a matrix is read faster than it is multiplied
MANY = 256  # forms that one process may compile: torch stops at 8, and 1 to 8 rows of one network are as many


def speed_up(model: Transformer) -> "Fast":
    """The same network, same weights (not a copy of them), faster. For inference only."""
    return Fast(model, fixed=model.tok.weight.device.type == "cuda")


class Fast:
    """encode, decode, soft_embedding, cfg and tok of a Transformer. fixed: the step of a token never changes shape."""

    def __init__(self, model: Transformer, fixed: bool):
        self.plain, self.cfg, self.tok, self.soft_embedding = model, model.cfg, model.tok, model.soft_embedding
        self.fixed, on_cuda = fixed, model.tok.weight.device.type == "cuda"
        # What is compiled is a second module around the same weights: the caller's stays as it is.
        self.token_model = model_without_weights(model.cfg).eval()
        self.token_model.load_state_dict(model.state_dict(), assign=True)
        if not on_cuda:
            _read_by_rows(self.token_model)
        blocks, head = self.token_model._run_blocks, self.token_model.head.forward
        # Shapes that change (the length that was read) are variables; each number of rows is compiled once.
        self.blocks = Compiled(blocks, model._run_blocks, fullgraph=True, dynamic=not fixed)
        self.head = model.head if on_cuda else Compiled(head, model.head, fullgraph=True, dynamic=False)
        self.canvas_blocks = Compiled(model._run_blocks, model._run_blocks) if on_cuda else model._run_blocks
        self.record = record if on_cuda else None

    @torch.no_grad()
    def encode(self, prefix: Tensor, room: int = 0) -> KVCache:
        """See Transformer.encode."""
        cache = self.plain.encode(prefix, room)
        if type(cache) is not KVCache:
            return cache
        other = FastCache(len(cache.k), cache.room)
        other.__dict__.update(cache.__dict__)
        if self.fixed:  # what is masked is multiplied by 0, which must not be 0 times NaN
            for buffer in (*cache.k, *cache.v):
                if buffer is not None:
                    buffer[:, :, cache.length :] = 0
        return other

    @torch.no_grad()
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
        replayed = self.record and not append and opened is None and isinstance(cache, FastCache)
        plain._run_blocks = partial(self._canvas, cache) if replayed else self.canvas_blocks
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
            x = self._replay(cache, "token", self._token, *self._place_in_fixed_buffers(x, cache))
        else:
            x = self.blocks(*self.plain._place(x, cache, "causal", None), cache)
        cache.length += 1
        if cache.real is not None:
            cache.real = torch.cat([cache.real, torch.ones_like(token, dtype=torch.bool)], dim=1)
        return self.head(x)

    def _token(self, cache: "FastCache", x, rope, mask, at) -> Tensor:
        cache.at = at
        x = self.blocks(x, rope, mask, False, cache)
        cache.at = None
        return x

    def _canvas(self, owner: "FastCache", x, rope, mask, causal, cache) -> Tensor:
        """The blocks over a canvas, as Transformer calls them. cache: the owner, or None where its prefix is joint."""

        def blocks(view, x, rope, mask):
            return self.canvas_blocks(x, rope, mask, causal, None if cache is None else view)

        return self._replay(owner, (x.shape, owner.length, causal), blocks, x, rope, mask)

    def _replay(self, cache: "FastCache", key, f: Callable, *tensors) -> Tensor:
        """f(cache, *tensors), on CUDA from a graph that lives and dies with the cache: its buffers stay in place."""
        if self.record is None:
            return f(cache, *tensors)
        if key not in cache.graphs:
            view = copy(cache)  # the same buffers; the cache itself would hold a graph that holds the cache
            view.graphs = None
            cache.graphs[key] = self.record(partial(f, view), tensors)
        return cache.graphs[key](*tensors)

    def _place_in_fixed_buffers(self, x: Tensor, cache: "FastCache"):
        """As Transformer._place, for attention over whole buffers: what is not written yet is masked."""
        (B, _, _), S, capacity = x.shape, cache.length, cache.k[0].shape[2]
        if S + 1 > self.cfg.block_size:
            raise ValueError(f"{S + 1} tokens are longer than the model's block_size {self.cfg.block_size}")
        at = torch.full((1,), S, device=x.device)
        real = torch.arange(capacity, device=x.device)[None] <= at  # (1, capacity)
        position = at[None]  # (1, 1)
        if cache.real is not None:
            real = real.expand(B, -1) & F.pad(cache.real, (0, capacity - S), value=True)
            position = cache.real.sum(1, keepdim=True)  # padding takes no position
        if self.cfg.position == "learned":
            return x + self.plain.pos(position), None, real[:, None, None], at
        return x, self.plain.rope[:, position].to(x.dtype)[:, :, None], real[:, None, None], at


class Compiled:
    """f compiled; where no compiler works, `plain` runs, which computes the same, and a line says so."""

    def __init__(self, f: Callable, plain: Callable, **options):
        self.quick, self.plain = torch.compile(f, **options), plain

    def __call__(self, *args):
        if self.quick is not None:
            try:
                with torch._dynamo.config.patch(recompile_limit=MANY):
                    return self.quick(*args)
            except Exception as error:  # whatever the compiler lacks; what is wrong with args, plain will say
                reason = str(error).splitlines()[0][:100]
                print(f"fast.py: not compiled, running eagerly: {reason}")
                self.quick = None
        return self.plain(*args)


def record(f: Callable, tensors: tuple) -> Callable:
    """f on CUDA as a graph: one launch where f makes hundreds. Takes new tensors (or None) of the same shapes.

    f runs several times on the tensors it is recorded with, so it must bear that.
    """
    inputs = [None if t is None else t.clone() for t in tensors]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what compiles or picks a kernel at its first call must have done so
        f(*inputs)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = f(*inputs)

    def replay(*tensors):
        for still, new in zip(inputs, tensors):
            if still is not None:
                still.copy_(new)
        graph.replay()
        return output.clone()  # the graph's own memory is overwritten by its next run

    return replay


class FastCache(KVCache):
    """A KVCache that N rows of a prompt can share, and whose buffers can be read whole (CUDA graphs)."""

    def __init__(self, n_layer: int, room: int = 0):
        super().__init__(n_layer, room)
        self.at: Tensor | None = None  # (1,): where the next token goes in buffers that are read whole
        self.shared: FastCache | None = None  # the prefixes of B prompts, for B x N rows here
        self.N = 1
        self.graphs: dict | None = {}  # steps behind this cache that were recorded

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
            return _attend_to_both(q, *both, self.shared.real, k, v, None if mask is None else mask[..., S:])
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":
            if q.shape[2] == 1:
                return (_attend_with_one if torch.compiler.is_compiling() else ATTEND_WITH_ONE)(q, k, v, mask)
            if mask is None and not causal:
                return _attend_by_products(q, k, v)
        return super().attend(q, k, v, mask, dropout, causal, layer)

    def rows(self, index: Tensor) -> KVCache:
        if self.shared is not None:  # some have left, and the others are too few to share
            return self.shared.rows(index // self.N)
        N = len(index) // len(self.k[0]) if self.length else 0
        everyone = torch.arange(len(index), device=index.device)
        on_cpu = index.device.type == "cpu"  # the kernel that says how much it saw is this device's
        nothing = self.real is not None and not bool(self.real.any(1).all())  # a prefix that is padding all through
        if N < 2 or not on_cpu or nothing or not torch.equal(index, everyone // N):
            return super().rows(index)
        other = FastCache(len(self.k), self.room)
        other.length, other.shared, other.N = self.length, self, N
        other.real = None if self.real is None else self.real[index]
        return other


def _attend_to_both(q, shared_k, shared_v, real, k, v, mask) -> Tensor:
    """Attention (R, H, T, D) of q to prefixes (B, H, S, D) that R / B rows share and to keys of their own (R, H, T, D).

    real (B, S) bool: what of a prefix is no padding. mask (R, 1, T, T): of the own keys. Each part is attended to by
    itself, the prefix by all its rows at once; the parts weigh what their scores' sums of exponentials weigh.
    """
    (R, H, T, D), B = q.shape, len(shared_k)
    N = R // B
    together = q.view(B, N, H, T, D).transpose(1, 2).reshape(B, H, N * T, D)
    there = None if real is None else real[:, None, None].expand(B, 1, N * T, -1)
    far, far_sum = _attend_and_sum(together, shared_k, shared_v, there)
    far = far.view(B, H, N, T, D).transpose(1, 2).reshape(R, H, T, D)
    far_sum = far_sum.reshape(B, H, N, T).transpose(1, 2).reshape(R, H, T)
    near, near_sum = _attend_and_sum(q, k, v, mask)
    share = torch.sigmoid(far_sum - near_sum)[..., None]  # (R, H, T, 1)
    return torch.lerp(near.to(share.dtype), far.to(share.dtype), share).to(q.dtype)


def _attend_and_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention (B, H, T, D) and the log of its scores' exponential sum (B, H, T), float32 or finer. No empty rows."""
    if mask is not None:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)


def _attend_with_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (B, H, 1, D) of one token; mask (B, 1, 1, S) bool or None.

    Compiled it reads keys and values at the speed of the memory; the fused kernel, in bfloat16, at a quarter of that.
    """
    scores = (k.float() * q.float()).sum(-1) * q.shape[-1] ** -0.5  # (B, H, S)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], float("-inf"))
    return (v.float() * scores.softmax(-1)[..., None]).sum(2, keepdim=True).to(q.dtype)


def _attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention (B, H, T, D) as matrix products; a head at a time where all scores would not fit a cache."""
    q = q * q.shape[-1] ** -0.5
    if q.shape[2] * k.shape[2] <= 1 << 18:
        return (q @ k.transpose(2, 3)).softmax(-1) @ v
    heads = zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return torch.stack([(a @ b.T).softmax(-1) @ c for a, b, c in heads]).view_as(q)


ATTEND_WITH_ONE = Compiled(_attend_with_one, F.scaled_dot_product_attention, fullgraph=True, dynamic=True)


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
        # Several places of the weight are read at once: a sum that runs through one row has to wait for itself.
        parts = weight.split(max(1, len(weight) // (4 if rows == 1 else 2)))
        y = torch.stack([torch.cat([(part * row).sum(-1) for part in parts]) for row in flat.unbind(0)])
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def _read_by_rows(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, RowsTimesVector(child))
        else:
            _read_by_rows(child)
