"""fast.py changes no output: everything here is compared with the network it was made from."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import autoregressive
import diffusion
import fast
from encdec import build_model
from fast import Fast, RowsTimesVector, speed_up
from model import KVCache, ModelConfig, Transformer
from samplers import SAMPLERS

PAD, SEP = 20, 21
SIZES = dict(vocab_size=23, n_ordinary=20, pad_id=PAD, sep_id=SEP, mask_id=22, target_length=9, block_size=32)
SIZES |= dict(n_layer=2, n_head=2, n_embd=16)
CANVAS = dict(paradigm="diffusion", prefix_attention="bidirectional", target_attention="bidirectional", shift=True)
PREFIX = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
PADDED = torch.tensor([[1, 2, 3], [4, 5, PAD], [6, PAD, PAD]])


def network(**settings) -> Transformer:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SIZES | settings)).eval()
    for p in model.parameters():
        p.data *= 2  # so that what is likeliest depends on what was said
    if model.cfg.self_conditioning:
        torch.nn.init.normal_(model.condition.weight)
    return model


def same(model, prefix, module, cfg, quick=None):
    one, other = (module.generate(m, prefix, cfg) for m in (model, quick or speed_up(model)))
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.calls, other.calls)
    torch.testing.assert_close(one.score, other.score, atol=1e-5, rtol=1e-5)
    return one


@pytest.fixture
def eagerly(monkeypatch):
    """The same code without the compiler, for what is not about it."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)


# Left to right


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prefix", [PREFIX, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(prefix_attention="bidirectional", norm="layernorm", activation="gelu", position="learned", bias=True),
        dict(n_kv_head=1, qk_norm=True, tie_weights=False),
        dict(n_kv_head=1, qk_norm=True, head_dim=12, qkv_bias=True),
        dict(arch="encoder_decoder", prefix_attention="bidirectional"),
    ],
    ids=["ours", "gpt2", "grouped", "qwen", "encoder_decoder"],
)
def test_ar_texts_are_the_same(settings, fixed, prefix, temperature, eagerly):
    model, cfg = network(**settings), autoregressive.SamplerConfig(temperature=temperature)
    found = same(model, prefix, autoregressive, cfg, Fast(model, fixed))
    assert len(found.tokens.unique()) > 3
    same(model, prefix[:1], autoregressive, cfg, Fast(model, fixed))


@pytest.mark.slow  # half a minute in the compiler
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_compiled_texts_are_the_same_and_a_longer_text_is_not_compiled_anew(fixed):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = network()
    quick = Fast(model, fixed)
    for prefix in (PREFIX[:1], PREFIX, PADDED[:1]):
        same(model, prefix, autoregressive, autoregressive.SamplerConfig(), quick)
    before = counters["stats"]["unique_graphs"]
    assert before <= 2 * 2  # two numbers of rows, the blocks and the output layer
    for prefix in (PREFIX[2:], PREFIX.flip(0), torch.arange(10)[None]):
        same(model, prefix, autoregressive, autoregressive.SamplerConfig(), quick)
    assert counters["stats"]["unique_graphs"] - before <= (2 if fixed else 0)  # a longer prompt has longer buffers


@pytest.mark.slow  # ten traces, 8 s
def test_more_networks_and_numbers_of_rows_than_torch_compiles_by_itself(monkeypatch, capsys):
    """Its limit is eight forms of a function, whichever network they are of; the ninth stopped the run."""
    real = torch.compile  # traced as ever, but no code is made: that takes half a minute
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, **options | dict(backend="eager")))
    torch._dynamo.reset()
    for width, rows in itertools.product((16, 32), (1, 2, 3, 5, 8)):
        same(
            network(n_embd=width, n_layer=1), PREFIX[:1].repeat(rows, 1), autoregressive, autoregressive.SamplerConfig()
        )
    assert not capsys.readouterr().out


def test_without_a_compiler_the_texts_are_the_same_and_a_line_says_so(monkeypatch, capsys):
    def no_compiler(f, **options):
        def run(*args):
            raise RuntimeError("no g++ here")

        return run

    monkeypatch.setattr(torch, "compile", no_compiler)
    same(network(), PREFIX, autoregressive, autoregressive.SamplerConfig())
    assert capsys.readouterr().out.splitlines()[0] == "fast.py: not compiled, running eagerly: no g++ here"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (1, 4)])
def test_rows_times_a_vector_is_a_matrix_product(rows, dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48).to(dtype)
    x = torch.randn(*rows, 64).to(dtype)
    right = x.double() @ linear.weight.double().T + linear.bias.double()
    torch.testing.assert_close(
        RowsTimesVector(linear)(x).double(), right, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-5
    )


def test_the_weights_are_shared_and_the_network_stays_as_it_was(eagerly):
    model = network()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    quick = speed_up(model)
    shared = {p.data_ptr() for p in quick.token_model.parameters()}
    assert set(before.values()) == shared == {p.data_ptr() for p in model.parameters()}
    assert all(isinstance(m, torch.nn.Linear) for m in (model.head, model.blocks[0].mlp.up))
    assert type(model.encode(PREFIX)) is KVCache


# Canvases


@pytest.mark.parametrize("prefix", [pytest.param(PREFIX, marks=pytest.mark.slow), PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize(
    "settings",
    [dict(self_conditioning=True), dict(prefix_attention="causal"), dict(prefix_attention="joint"), dict(n_kv_head=1)],
    ids=["bidirectional", "causal", "joint", "grouped"],
)
def test_diffusion_texts_are_the_same_with_candidates_and_rows_that_leave(settings, sampler, prefix, eagerly):
    model = network(**CANVAS | settings)
    for N, block in itertools.product((1, 3), (0, 3)):
        if block and model.cfg.prefix_attention == "joint":
            continue
        cfg = diffusion.SamplerConfig(sampler=sampler, steps=4, candidates=N, settle_entropy=2.0, block_length=block)
        same(model, prefix, diffusion, cfg)


@pytest.mark.parametrize("prefix", [PREFIX, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("settings", [{}, dict(n_kv_head=1), dict(target_attention="causal")], ids=str)
def test_candidates_read_one_prefix_and_say_what_they_say_with_copies_of_it(settings, prefix):
    model = network(**CANVAS | settings).double()
    index = torch.arange(3).repeat_interleave(4)
    canvas = torch.randint(0, 20, (12, 9), generator=torch.Generator().manual_seed(1))
    quick = speed_up(model)
    plain, shared = model.encode(prefix, room=9).rows(index), quick.encode(prefix, room=9).rows(index)
    assert len(shared.shared.k[0]) == 3 and shared.k[0] is None  # no prefix twelve times
    torch.testing.assert_close(quick.decode(shared, canvas), model.decode(plain, canvas), atol=1e-10, rtol=1e-10)
    opened = torch.rand(9, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    one, other = (m.decode(c, canvas, opened=opened) for m, c in ((quick, shared), (model, plain)))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    some = torch.tensor([0, 5, 11])  # the others have left
    one, other = quick.decode(shared.rows(some), canvas[some]), model.decode(plain.rows(some), canvas[some])
    torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_a_prefix_of_padding_alone_is_not_shared():
    """There is nothing in it to attend to: a part of the attention would be 0 / 0."""
    model, prefix, canvas = network(**CANVAS), torch.tensor([[1, 2, 3], [PAD, PAD, PAD]]), PREFIX[:2].repeat(2, 1)
    index, quick = torch.arange(2).repeat_interleave(2), speed_up(model)
    cache = quick.encode(prefix, room=3).rows(index)
    assert cache.shared is None
    right = model.decode(model.encode(prefix, room=3).rows(index), canvas)
    torch.testing.assert_close(quick.decode(cache, canvas), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_one_token_is_attention(padded, monkeypatch):
    shape = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 3, n, 8, generator=shape).bfloat16() for n in (1, 7, 7))
    mask = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])[:, None, None] if padded else None
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    torch.testing.assert_close(fast._attend_with_one(q, k, v, mask), expected.bfloat16(), atol=8e-3, rtol=8e-3)
    monkeypatch.setattr(fast, "ATTEND_WITH_ONE", lambda *args: seen.append(args) or fast._attend_with_one(*args))
    cache, seen = fast.FastCache(1), []
    torch.testing.assert_close(cache.attend(q, k, v, mask, 0.0, False, 0), fast._attend_with_one(q, k, v, mask))
    assert len(seen) == 1


@pytest.mark.slow  # the compiler
def test_attention_of_one_token_is_compiled_once_for_all_lengths():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which reset keeps, and other tests compile too
    for S in (5, 6, 9, 40):
        q, k, v = torch.randn(2, 3, 1, 16).bfloat16(), *torch.randn(2, 2, 3, S, 16).bfloat16()
        torch.testing.assert_close(
            fast.ATTEND_WITH_ONE(q, k, v, None), fast._attend_with_one(q, k, v, None), atol=8e-3, rtol=8e-3
        )
    assert fast.ATTEND_WITH_ONE.quick is not None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first length is taken for a constant


@pytest.mark.parametrize("slots", [16, 600])
def test_attention_as_products_is_attention(slots):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, slots, 8), torch.randn(2, 3, slots + 5, 8), torch.randn(2, 3, slots + 5, 8)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(fast._attend_by_products(q, k, v), right, atol=1e-5, rtol=1e-5)


# CUDA graphs


class Recorder:
    """Stands in for fast.record where there is no GPU: a tape that sees new tensors only through its own copies."""

    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, f, tensors):
        inputs = [None if t is None else t.clone() for t in tensors]
        f(*inputs)  # to warm up, and once more to record
        self.recorded, output = self.recorded + 1, f(*inputs)

        def replay(*tensors):
            for still, new in zip(inputs, tensors):
                if still is not None:
                    still.copy_(new)
            self.replayed += 1
            output.copy_(f(*inputs))
            return output.clone()

        return replay


@pytest.mark.parametrize("prefix", [PREFIX, PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("position", ["rope", "learned"])
def test_tokens_from_a_recorded_step_are_the_same(position, prefix, eagerly):
    model = network(position=position)
    quick = Fast(model, fixed=True)
    quick.record = tape = Recorder()
    found = same(model, prefix, autoregressive, autoregressive.SamplerConfig(), quick)
    assert (tape.recorded, tape.replayed) == (1, found.calls.max())
    same(model, prefix.flip(0), autoregressive, autoregressive.SamplerConfig(), quick)  # a new cache, a new recording
    assert tape.recorded == 2


@pytest.mark.parametrize("prefix", [pytest.param(PREFIX, marks=pytest.mark.slow), PADDED], ids=["full", "padded"])
@pytest.mark.parametrize("attention", ["bidirectional", "causal", "joint"])
@pytest.mark.parametrize("N", [1, 3])
def test_canvases_from_a_recorded_step_are_the_same(N, attention, prefix, eagerly):
    """Recorded once for each number of rows, whatever the number of steps; for every block anew."""
    model = network(**CANVAS | dict(prefix_attention=attention, self_conditioning=True))
    quick = Fast(model, fixed=True)
    for block in (0, 3) if attention != "joint" else (0,):
        quick.record = tape = Recorder()
        cfg = diffusion.SamplerConfig(sampler="resample", steps=4, candidates=N, block_length=block)
        same(model, prefix, diffusion, cfg, quick)
        blocks = 3 if block else 1
        assert tape.recorded <= 2 * blocks and tape.replayed == 4 * blocks  # the first step has no estimate


def test_a_recording_goes_when_its_cache_goes(eagerly):
    """Without waiting for the garbage collector: on a GPU it holds memory."""
    import weakref

    quick = Fast(network(), fixed=True)
    quick.record = Recorder()
    cache = quick.encode(PREFIX, room=4)
    with torch.no_grad():
        quick.decode(cache, PREFIX[:, :1], append=True)
    gone = weakref.ref(cache.graphs["token"])
    del cache
    assert gone() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_texts_are_the_same_on_cuda():
    cuda = torch.device("cuda")
    for settings in ({}, CANVAS, CANVAS | dict(prefix_attention="joint", self_conditioning=True)):
        model = network(**settings).to(cuda)
        for prefix in (PREFIX, PADDED, PREFIX[:1]):
            if model.cfg.paradigm == "ar":
                same(model, prefix.to(cuda), autoregressive, autoregressive.SamplerConfig())
            else:
                for sampler in SAMPLERS:
                    same(model, prefix.to(cuda), diffusion, diffusion.SamplerConfig(sampler=sampler, candidates=2))


# Slowness that no output shows


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers that are read, shapes that depend on them."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(func.__name__.startswith(name) for name in self.WAITS)
        return func(*args, **kwargs or {})


def reads(module, model, cfg) -> int:
    with Reads() as seen:
        module.generate(model, PREFIX, cfg)
    return seen.count


class NeverRead:
    """device.Late before anything has come back from the device."""

    def read(self, number):
        return None

    def sees_none(self, flags):
        return False


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("quick", [False, True])
def test_no_step_of_a_canvas_waits_for_the_device(sampler, quick, eagerly, monkeypatch):
    monkeypatch.setattr(diffusion, "Late", NeverRead)
    model = network(**CANVAS, self_conditioning=True)
    model = speed_up(model) if quick else model
    few, many = (reads(diffusion, model, diffusion.SamplerConfig(sampler=sampler, steps=n)) for n in (2, 9))
    assert few == many <= 3


def test_no_token_of_a_text_waits_for_the_device(eagerly, monkeypatch):
    monkeypatch.setattr(autoregressive, "Late", NeverRead)
    for model in (network(), network(target_length=20)):
        for one in (model, Fast(model, fixed=True)):
            assert reads(autoregressive, one, autoregressive.SamplerConfig()) <= 2
