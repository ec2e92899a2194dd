"""extras/fast_decode.py changes no output: all is compared with the network it was made from."""

import pytest
import torch
from drafters import drafter

import autoregressive
import diffusion
from extras import speculative
from extras.fast_decode import FastLinear, attend_fast, gemv, pack, speed_up
from model import Attention, KVCache, ModelConfig, Transformer, build_model

PAD = 20
SIZES = dict(vocab_size=23, n_ordinary=20, pad_id=PAD, sep_id=21, mask_id=22, target_length=9)
SIZES |= dict(block_size=32, n_layer=2, n_head=2, n_embd=16)
CANVAS = dict(paradigm="diffusion", target_attention="bidirectional", shift=True)
CACHED = CANVAS | dict(prefix_attention="bidirectional")
FULL = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
PADDED = torch.tensor([[1, 2, 3], [4, 5, PAD], [6, PAD, PAD]])
GREEDY = autoregressive.SamplerConfig()
PREFIXES = pytest.mark.parametrize("prefix", [FULL, PADDED], ids=["full", "padded"])


def network(**settings) -> Transformer:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SIZES | settings)).eval()
    for p in model.parameters():
        p.data *= 2  # so that the text depends on the tokens so far
    if model.cfg.self_conditioning:
        torch.nn.init.normal_(model.self_cond_proj.weight)
    return model


def assert_same(model, prefix, module, cfg, fast=None):
    expected = module.generate(model, prefix, cfg)
    found = module.generate(fast or speed_up(model), prefix, cfg)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.calls, expected.calls)
    torch.testing.assert_close(found.score, expected.score, atol=1e-5, rtol=1e-5)
    return expected


@pytest.fixture
def eager(monkeypatch):
    """The same code without the compiler."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)


# One token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@PREFIXES
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(norm="layernorm", activation="gelu", position="learned", bias=True),
        dict(n_kv_head=1, qk_norm=True, head_dim=12, qkv_bias=True, tie_weights=False),
        dict(arch="encoder_decoder", prefix_attention="bidirectional"),
    ],
    ids=["ours", "gpt2", "qwen", "encoder_decoder"],
)
def test_ar_texts_are_the_same(settings, prefix, temperature, eager):
    model, cfg = network(**settings), autoregressive.SamplerConfig(temperature=temperature)
    fast = speed_up(model)
    assert len(assert_same(model, prefix, autoregressive, cfg, fast).tokens.unique()) > 3
    assert_same(model, prefix[:1], autoregressive, cfg, fast)


def test_drafts_are_the_same(eager, monkeypatch):
    made, fast = (drafter(network(n_kv_head=1), masks=1) for _ in range(2))
    speed_up(fast)
    assert_same(made, PADDED, speculative, speculative.SamplerConfig(), fast)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_same(made, PADDED, speculative, speculative.SamplerConfig(), fast)


@pytest.mark.slow  # half a minute in the compiler
def test_a_layer_is_compiled_once_for_drafts():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made, fast = (drafter(network(), masks=1) for _ in range(2))
    speed_up(fast)
    for prefix in (FULL[:1], FULL[1:2], PADDED[2:]):
        assert_same(made, prefix, speculative, speculative.SamplerConfig(), fast)
    # A layer, the head, and the trial of the compiler.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.slow  # half a minute in the compiler
def test_a_longer_text_is_not_compiled_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    model = network()
    fast = speed_up(model)
    for prefix in (FULL[:1], FULL, PADDED[:1]):
        assert_same(model, prefix, autoregressive, GREEDY, fast)
    before = graphs["unique_graphs"]
    assert 1 < before <= 4  # the trial of the compiler, two numbers of rows, and a mask
    for prefix in (FULL[2:], FULL.flip(0), torch.arange(10)[None]):
        assert_same(model, prefix, autoregressive, GREEDY, fast)
    assert graphs["unique_graphs"] == before


def test_without_a_compiler_the_texts_are_the_same_and_a_line_tells_why(monkeypatch, capsys):
    def no_compiler(f, **options):
        def run(*args):
            raise RuntimeError("no g++ here")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert_same(network(), FULL, autoregressive, GREEDY)
    assert "not compiled, running eagerly: no g++ here" in capsys.readouterr().out


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (1, 4)])
def test_gemv_is_a_matrix_product(rows, dtype, atol):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).to(dtype)
    x = torch.randn(*rows, 64).to(dtype)
    expected = x.double() @ linear.weight.double().T + linear.bias.double()
    found = gemv(x, linear.weight, linear.bias).double()
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (1, 4), (2, 9)])
def test_packed_linear_is_linear(rows, bias, dtype, atol):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias).to(dtype).requires_grad_(False)
    x = torch.randn(*rows, 64).to(dtype)
    expected = torch.nn.functional.linear(x, linear.weight, linear.bias)
    linear.__class__, linear.packed = FastLinear, pack(linear.weight)
    without = not torch.backends.mkldnn.is_available() or dtype == torch.bfloat16
    assert without or linear.packed.is_mkldnn
    torch.testing.assert_close(linear(x), expected, atol=atol, rtol=1e-5)
    assert pack(linear.weight.double()) is None
    linear.packed = None  # as where oneDNN cannot
    torch.testing.assert_close(linear(x), expected, atol=0, rtol=0)


def test_weights_are_shared_and_the_model_stays_as_it_was(eager):
    model = network(**CACHED, self_conditioning=True)
    fast = speed_up(model)
    assert_same(model, PADDED, diffusion, diffusion.SamplerConfig(steps=3), fast)
    shared = {p.data_ptr() for p in fast.network.parameters()}
    assert shared == {p.data_ptr() for p in model.parameters()}
    assert type(model.head) is torch.nn.Linear and type(model.encode(FULL)) is KVCache


# Attention in bfloat16


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("T, kind", [(1, "causal"), (5, "causal"), (5, "bidirectional")])
@PREFIXES
@torch.no_grad()
def test_fast_attention_is_attention(prefix, T, kind, compiling, monkeypatch):
    """In float32, so that both kernels give nearly the same."""
    model, other = (network(**CACHED, n_kv_head=1, qk_norm=True) for _ in range(2))
    for module in other.modules():
        if type(module) is Attention:
            module.attend = attend_fast
    target = torch.arange(3 * T).view(3, T)
    cache, other_cache = model.encode(prefix, T), model.encode(prefix, T)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    model.cfg.target_attention = other.cfg.target_attention = kind
    found = other.decode(other_cache, target)
    torch.testing.assert_close(found, model.decode(cache, target), atol=1e-5, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("prefix", [FULL, PADDED, FULL[:1]])
def test_texts_are_the_same_on_cuda(prefix):
    prefix = prefix.cuda()
    assert_same(network().cuda(), prefix, autoregressive, GREEDY)
    for settings in (CACHED, CANVAS | dict(prefix_attention="joint", self_conditioning=True)):
        model = network(**settings).cuda()
        for sampler in diffusion.SAMPLERS:
            cfg = diffusion.SamplerConfig(sampler=sampler, candidates=2)
            assert_same(model, prefix, diffusion, cfg)
