"""Faster inference with the same network and weights. Outputs change by rounding only.

    model = speed_up(model)   # then autoregressive.generate, diffusion.generate, .. as before

The result has the methods of model.Transformer. What is faster (python -m eval.speed measures it):

    one token, CPU     compiled; each matrix is read as rows times a vector, at the speed of the
                       memory (the library's matrix product reaches a third of it)
    bfloat16, CPU      attention without torch's fused kernel, which is slow there
    one token, CUDA    compiled, with shapes that never change: a CUDA graph
    a canvas, CUDA     compiled, and replayed from a CUDA graph

The first call of each kind compiles, which takes tens of seconds. The CUDA paths are tested with a
simulated graph; they have not run on a GPU yet.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infra.device import compile_blocks
from model import Attention, KVCache, Transformer, attend, model_from_state_dict, rotate

OPTIONS = {
    # Each decoder has compiled code of its own, and its network stays the same.
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    "size_asserts": False,
    "alignment_asserts": False,
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
}
COMPILER = {"fullgraph": True, "options": OPTIONS, "isolate_recompiles": True}
COMPILER["recompile_limit"] = 256  # torch stops at 8, and each number of rows is one


def speed_up(model: Transformer) -> "FastDecoder":
    """Return a faster decoder that shares the weights of the model. For inference only."""
    return FastDecoder(model, fixed_shapes=model.tok.weight.device.type == "cuda")


class FastDecoder:
    """Has encode, decode, expected_embedding, cfg and tok of the model, which stays as it is.

    fixed_shapes: decode one token with buffers that are read whole, as CUDA graphs need it.
    """

    def __init__(self, model: Transformer, fixed_shapes: bool):
        on_cuda = model.tok.weight.device.type == "cuda"
        self.model = model
        self.cfg = model.cfg
        self.tok = model.tok
        self.expected_embedding = model.expected_embedding
        self.fixed_shapes = fixed_shapes
        self.capture: Callable | None = capture_cuda_graph if on_cuda else None
        # A second module around the same weights: its layers can be exchanged and compiled.
        self.network = model_from_state_dict(model.cfg, model.state_dict())
        if model.cfg.position == "rope":
            self.network.rope = model.rope
        if not on_cuda:
            _exchange_layers(self.network)
        # If shapes change, the length of the cache is a variable of the compiled code.
        token_step = partial(_logits, self.network)
        compiled = torch.compile(token_step, dynamic=not fixed_shapes, **COMPILER)
        self.token_step = CompiledOrEager(compiled, partial(_logits, model))
        if on_cuda:
            compile_blocks(self.network)

    @torch.no_grad()
    def encode(self, prefix: Tensor, reserve: int = 0) -> KVCache:
        """See Transformer.encode."""
        cache = self.model.encode(prefix, reserve)
        return FixedCache(cache) if self.fixed_shapes and type(cache) is KVCache else cache

    @torch.no_grad()
    def decode(self, cache, target, append=False, self_cond=None, extra_edges=None) -> Tensor:
        """See Transformer.decode."""
        one_token = append and target.shape[1] == 1 and extra_edges is None and self_cond is None
        is_fixed = isinstance(cache, FixedCache) and cache.length + target.shape[1] <= cache.reserve
        if one_token and cache.length and is_fixed == self.fixed_shapes:
            logits = self._next_token(cache, target)
            cache.append_valid(target)
            return logits
        if self.capture is None or append or not is_fixed:
            return self.network.decode(cache, target, append, self_cond, extra_edges)

        def step(cache, target, self_cond, extra_edges):
            return self.network.decode(cache, target, False, self_cond, extra_edges)

        key = (target.shape, self_cond is None, extra_edges is None)
        return self._replay(cache, key, step, target, self_cond, extra_edges)

    def _next_token(self, cache: KVCache, token: Tensor) -> Tensor:
        if not self.fixed_shapes:
            return self._token_logits(cache, token)
        place = torch.full((1,), cache.length, device=token.device)

        def step(cache, token, place):
            return self._token_logits(cache.view_at(place), token)

        return self._replay(cache, "token", step, token, place)

    def _token_logits(self, cache: KVCache, token: Tensor) -> Tensor:
        x = self.network.embed(token, 0, None)
        inputs = self.network.prepare_input(x, cache, "causal", None)
        return self.token_step(*inputs, cache)

    def _replay(self, cache: "FixedCache", key, step: Callable, *tensors) -> Tensor:
        """Return step(cache, *tensors), from a CUDA graph that is freed together with the cache."""
        if self.capture is None:
            return step(cache, *tensors)
        if key not in cache.graphs:
            # The graph must not refer to the cache that refers to it, but to the same buffers.
            cache.graphs[key] = self.capture(partial(step, cache.without_graphs()), tensors)
        return cache.graphs[key](*tensors)


def _logits(network: Transformer, x, rope, mask, causal, cache) -> Tensor:
    # The class's own run_blocks: that of the instance may be compiled already.
    return network.head(type(network).run_blocks(network, x, rope, mask, causal, cache))


class CompiledOrEager:
    """Calls `compiled`. If no compiler works, prints why and calls `eager`."""

    def __init__(self, compiled: Callable, eager: Callable):
        self.compiled: Callable | None = compiled
        self.eager = eager

    def __call__(self, *args):
        if self.compiled is not None:
            try:
                return self.compiled(*args)
            except Exception as error:  # whatever the compiler lacks; eager() reports bad arguments
                reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
                print(f"fast_decode: not compiled, running eagerly: {reason}")
                self.compiled = None
        return self.eager(*args)


def capture_cuda_graph(function: Callable, tensors: tuple) -> Callable:
    """Return the function as a CUDA graph: one launch instead of hundreds.

    It takes new tensors (or None) of the same shapes. The function runs twice while it is captured.
    """
    inputs = [None if t is None else t.clone() for t in tensors]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # the first call may compile and select kernels
        function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)

    def replay(*tensors):
        for static, new in zip(inputs, tensors):
            if static is not None:
                static.copy_(new)
        graph.replay()
        return output.clone()  # the next replay overwrites the output

    return replay


class FixedCache(KVCache):
    """A KVCache of constant shape, which is read whole. Its last slot repeats the new token."""

    def __init__(self, cache: KVCache):
        self.__dict__.update(cache.__dict__)
        self.place: Tensor | None = None  # (1,) slot of the next token
        self.graphs: dict[object, Callable] = {}
        for buffer in (*cache.k, *cache.v):
            if buffer is not None:
                buffer[:, :, cache.length :] = 0  # the mask multiplies by 0, and 0 * NaN is NaN

    def view_at(self, place: Tensor) -> "FixedCache":
        """Return a view with the same buffers in which all slots but the last count as read."""
        view = self.without_graphs()
        view.place = place
        view.length = self.reserve - 1
        B = len(self.k[0])
        view.valid = (torch.arange(view.length, device=place.device) < place).expand(B, -1)
        if self.valid is not None:
            view.valid = view.valid & F.pad(self.valid, (0, view.length - self.length), value=True)
        return view

    def without_graphs(self) -> "FixedCache":
        view = copy.copy(self)
        view.graphs = {}
        return view

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.place is None:
            return super().extend(layer, k, v)
        for buffer, new in ((self.k[layer], k), (self.v[layer], v)):
            buffer.index_copy_(2, self.place, new)
            buffer[:, :, -1:] = new
        return self.k[layer], self.v[layer]

    def select(self, index: Tensor) -> KVCache:
        return super().select(index).without_graphs()


class FastAttention(Attention):
    """Attention in bfloat16 on a CPU."""

    def forward(self, x, rope, mask, causal, cache, layer):
        B, T, _ = x.shape
        H, G, D = self.cfg.n_head, self.cfg.kv_heads, self.cfg.head_size
        heads = self.qkv(x).view(B, T, H + 2 * G, D).transpose(1, 2)  # (B, H + 2G, T, D)
        q, k, v = heads.split((H, G, G), dim=1)
        q = self.q_norm(q)
        k = self.k_norm(k)
        if rope is not None:
            q = rotate(q, rope)
            k = rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, G, S + T, D)
        y = attend_bf16(q, k, v, mask, causal)  # (B, H, T, D)
        return self.proj(y.transpose(1, 2).reshape(B, T, H * D))


def attend_bf16(q, k, v, mask, causal) -> Tensor:
    """Return model.attend's result (B, H, T, D), by the fastest way that there is for this form."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    if q.shape[2] == 1 and torch.compiler.is_compiling():
        return attend_one_token(q, k, v, mask)
    if q.shape[2] > 1 and mask is None and not causal:
        return matmul_attention(q, k, v)
    return attend(q, k, v, mask, 0.0, causal)


def attend_one_token(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return attention (B, H, 1, D) of one token. mask (B, 1, 1, S) bool or None.

    Compiled it reads keys and values four times as fast as the fused kernel.
    """
    scores = (k.float() * q.float()).sum(-1) * q.shape[-1] ** -0.5  # (B, H, S)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], float("-inf"))
    return (v.float() * scores.softmax(-1)[..., None]).sum(2, keepdim=True).to(q.dtype)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention (B, H, T, D) as matrix products, by heads if the scores are large."""
    q = q * q.shape[-1] ** -0.5
    if q.shape[2] * k.shape[2] <= 1 << 18:
        return (q @ k.transpose(2, 3)).softmax(-1) @ v
    heads = zip(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    return torch.stack([(a @ b.T).softmax(-1) @ c for a, b, c in heads]).view_as(q)


class GemvLinear(nn.Linear):
    """nn.Linear. Compiled for a few rows of x, it becomes one vectorised pass over the weight."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        faster = rows <= 2 * self.weight.itemsize  # measured: 8 in float32, 4 in bfloat16
        if torch.compiler.is_compiling() and faster:
            return gemv(x, self.weight, self.bias)
        return super().forward(x)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear(x, weight, bias), written in the form that inductor compiles best."""
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    # as_strided stores x first. Otherwise the norm or GELU that made x is fused into the loop over
    # the rows of the weight and computed again for each of them.
    flat = x.reshape(rows, width).float().as_strided((rows, width), (width, 1))
    weight = weight.float()  # in registers, so the sum is float32 in any dtype
    # Several parts of the weight are read at once, because a sum along one row waits for itself.
    parts = weight.split(max(1, len(weight) // (4 if rows == 1 else 2)))
    sums = [torch.cat([(part * row).sum(-1) for part in parts]) for row in flat.unbind(0)]
    y = torch.stack(sums).to(x.dtype).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _exchange_layers(network: Transformer) -> None:
    """Give each layer the class that is fast on a CPU. Weights stay in place."""
    is_bf16 = network.tok.weight.dtype == torch.bfloat16
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = GemvLinear
        if type(module) is Attention and is_bf16:
            module.__class__ = FastAttention
