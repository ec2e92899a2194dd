"""Faster inference with the same network and weights. Outputs change by rounding only.

    model = speed_up(model)   # then autoregressive.generate, diffusion.generate, .. as before

The result has the methods of model.Transformer. What is faster (python -m eval.speed measures it):

    one token, CPU     compiled; each matrix is read as rows times a vector, at the speed of the
                       memory (the library's matrix product reaches a third of it)
    bfloat16, CPU      attention without torch's fused kernel, which is slow there
    CUDA               compiled; it has not run on a GPU yet

The first call of each kind compiles, which takes tens of seconds.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from infra.device import compile_or_explain
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


class FastDecoder:
    """Has encode, decode, expected_embedding, cfg and tok of the model, which stays as it is."""

    def __init__(self, model: Transformer):
        self.model = model
        self.cfg = model.cfg
        self.tok = model.tok
        self.encode = torch.no_grad()(model.encode)
        self.expected_embedding = model.expected_embedding
        # A second module around the same weights: its layers can be exchanged and compiled.
        self.network = model_from_state_dict(model.cfg, model.state_dict())
        if model.cfg.position == "rope":
            self.network.rope = model.rope
        if model.tok.weight.device.type == "cuda":
            compile_or_explain(self.network)
        else:
            _exchange_layers(self.network)
        # The length of the cache is a variable of the compiled code.
        compiled = torch.compile(partial(_logits, self.network), dynamic=True, **COMPILER)
        self.token_step = CompiledOrEager(compiled, partial(_logits, model))

    @torch.no_grad()
    def decode(self, cache, target, append=False, self_cond=None, extra_edges=None) -> Tensor:
        """See Transformer.decode."""
        one_token = append and target.shape[1] == 1 and extra_edges is None and self_cond is None
        if not one_token or not cache.length:
            return self.network.decode(cache, target, append, self_cond, extra_edges)
        x = self.network.embed(target, 0, None)
        logits = self.token_step(*self.network.prepare_input(x, cache, "causal", None), cache)
        cache.append_valid(target)
        return logits


def speed_up(model: Transformer) -> FastDecoder:
    """Return a faster decoder that shares the weights of the model. For inference only."""
    return FastDecoder(model)


def _logits(network: Transformer, x, rope, mask, causal, cache: KVCache) -> Tensor:
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
