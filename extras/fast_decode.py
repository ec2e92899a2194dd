"""Faster inference with the same network and weights. Outputs change by rounding only.

    model = speed_up(model)   # then autoregressive.generate, diffusion.generate, .. as before

The result has the methods of model.Transformer. What is faster (python -m eval.speed measures it):

    one token, CPU     compiled; each matrix is read as rows times a vector, at the speed of the
                       memory (the library's matrix product reaches a third of it)
    more tokens, CPU   oneDNN's products with a copy of the weights in its layout; drafts compiled
    bfloat16, CPU      attention without torch's fused kernel, which is slow there
    CUDA               compiled; it has not run on a GPU yet

The first call of each compiled kind takes tens of seconds. Weights must not change afterwards.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from extras.adapter import DraftModel, GatedLinear, RowCache
from infra.device import compile_or_explain, has_fast_bf16
from model import Attention, Transformer, attend, model_from_state_dict

OPTIONS = {
    # Each decoder has compiled code of its own, and its network stays the same.
    "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    "size_asserts": False,
    "alignment_asserts": False,
    "cpp.enable_floating_point_contract_flag": "fast",  # fused multiply-add
}
COMPILER = {"fullgraph": True, "options": OPTIONS, "isolate_recompiles": True}
COMPILER["recompile_limit"] = 256  # torch stops at 8, and each number of rows is one
FEW_ROWS = 4 if has_fast_bf16(torch.device("cpu")) else 9  # with more, oneDNN is faster


def _shapes(guards) -> list[bool]:
    """Choose what each call checks: the shapes of tensors. More would take as long as a layer."""
    return [g.guard_type == "TENSOR_MATCH" and "block" not in g.name for g in guards]


ONE_LAYER = COMPILER | {"options": OPTIONS | {"guard_filter_fn": _shapes}, "dynamic": False}


class FastDecoder:
    """Has encode, decode, expected_embedding, cfg and tok of the model, which stays as it is."""

    def __init__(self, model: Transformer):
        self.cfg = model.cfg
        self.tok = model.tok
        self.expected_embedding = model.expected_embedding
        # A second module around the same weights: its layers can be exchanged and compiled.
        self.network = model_from_state_dict(model.cfg, model.state_dict())
        if model.cfg.position == "rope":
            self.network.rope = model.rope
        device = model.tok.weight.device
        if device.type == "cuda":
            self.network.run_blocks = compile_or_explain(self.network.run_blocks, device)
        elif device.type == "cpu":
            _exchange_layers(self.network)
        self.encode = torch.no_grad()(self.network.encode)
        # The length of the cache is a variable of the compiled code.
        self.token_step = compile_or_explain(self._logits, device, dynamic=True, **COMPILER)

    def _logits(self, *args) -> Tensor:
        return self.network.head(self.network.run_blocks(*args))

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


def speed_up(model: Transformer | DraftModel) -> "FastDecoder | DraftModel":
    """Return a faster decoder that shares the weights of the model. For inference only.

    A DraftModel is changed itself: one layer is compiled for all, as all take minutes to compile.
    """
    if not isinstance(model, DraftModel):
        return FastDecoder(model)
    network = model.network
    device = network.tok.weight.device
    if device.type == "cpu":
        _exchange_layers(network, drafts=True)
    read = compile_or_explain(lambda block, *args: block(*args, 0), device, **ONE_LAYER)
    network.head.forward = compile_or_explain(network.head.forward, device, **ONE_LAYER)

    def run_blocks(x, rope, mask, causal, cache: RowCache) -> Tensor:
        if cache.k[0] is None:  # nothing was read yet
            return network.run_blocks(x, rope, mask, causal, cache)
        for layer, block in enumerate(network.blocks):
            x = read(block, x, rope, mask, causal, cache.only(layer))
        return network.norm(x)

    model.run_blocks, model.fixed_cache = run_blocks, True
    return model


def attend_fast(q, k, v, mask, dropout, causal) -> Tensor:
    """Return model.attend's result (B, H, T, D), by the fastest way that there is for this form."""
    few = q.shape[2] <= 8 and torch.compiler.is_compiling()
    slow = q.dtype == torch.bfloat16 and q.shape[2] > 1 and mask is None and not causal
    if not few and not slow:
        return attend(q, k, v, mask, dropout, causal)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    if not few:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(-1) @ v
    # Compiled, this is four times as fast as the fused kernel.
    scores = (k[:, :, None].float() * q[..., None, :].float()).sum(-1)  # (B, H, T, S)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1)[..., None]  # (B, H, T, S, 1)
    return (v[:, :, None].float() * p).sum(3).to(q.dtype)


@torch.library.custom_op("ar2diff::packed_linear", mutates_args=())
def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear(x, weight, bias), given the result of pack(weight)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


packed_linear.register_fake(lambda x, packed, bias: x.new_empty(*x.shape[:-1], len(packed)))


def pack(weight: Tensor) -> Tensor | None:
    """Return the weight in oneDNN's layout for a few rows; None if that is not faster here."""
    dtypes = [torch.float32, torch.bfloat16][: 1 + has_fast_bf16(weight.device)]
    usable = torch.backends.mkldnn.is_available() and weight.dtype in dtypes
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4) if usable else None


class FastLinear(nn.Linear):
    """nn.Linear by oneDNN. Compiled for up to FEW_ROWS, it is one pass over the weight."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and x.shape[:-1].numel() <= FEW_ROWS:
            return gemv(x, self.weight, self.bias)
        if self.packed is None or x.dtype != self.packed.dtype:
            return F.linear(x, self.weight, self.bias)
        return packed_linear(x, self.packed, self.bias)


class FastGated(GatedLinear, FastLinear):
    """The same with an adapter, which is only computed from the first mask on."""

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        first = self.gate.first
        change = gemv(gemv(x[:, first:], self.adapter_a, None), self.adapter_b, None)
        added = torch.where(self.gate.on[first:], self.scale * change, 0.0)
        return torch.cat([y[:, :first], y[:, first:] + added], dim=1)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear(x, weight, bias), written in the form that inductor compiles best."""
    rows, width = x.shape[:-1].numel(), x.shape[-1]
    # as_strided stores x first. Otherwise the norm or GELU that made x is fused into the loop over
    # the rows of the weight and computed again for each of them.
    flat = x.reshape(rows, width).float().as_strided((rows, width), (width, 1))
    weight = weight.float()  # in registers, so the sum is float32 in any dtype
    # Up to four sums at once, by parts of the weight or rows of x, because each waits for itself.
    parts = weight.split(-(-len(weight) // max(1, 4 // rows)))
    sums = [torch.cat([(part * row).sum(-1) for part in parts]) for row in flat.unbind(0)]
    y = torch.stack(sums).to(x.dtype).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def _exchange_layers(network: Transformer, drafts: bool = False) -> None:
    """Give each layer the class that is fast on a CPU. Weights stay in place, for gemv."""
    for module in network.modules():
        if type(module) in (nn.Linear, GatedLinear):
            module.__class__ = FastLinear if type(module) is nn.Linear else FastGated
            module.packed = pack(module.weight)
        if type(module) is Attention and (drafts or module.qkv.weight.dtype == torch.bfloat16):
            module.attend = attend_fast
