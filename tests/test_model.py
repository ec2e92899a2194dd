"""model.py: masks, cache and padding by invariance. test_hf.py compares with transformers."""

import pytest
import torch
from eval_models import tiny_model
from memory import peak_bytes
from torch import nn

import diffusion
import model as model_file
from data.objectives import Batch
from infra.rng import make_rng
from model import (
    ModelConfig,
    Transformer,
    build_model,
    meta_model,
    model_from_state_dict,
    split_prompt,
)

PAD = 15
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, target_length=6)
TINY |= dict(vocab_size=19, n_ordinary=15, pad_id=PAD, sep_id=16, mask_id=17)
PATTERNS = {  # prefix_attention, target_attention, and the pictures of attention_mask
    "gpt": ("causal", "causal", "x.... xx... xxx.. xxxx. xxxxx"),
    "prefix_lm": ("bidirectional", "causal", "xx... xx... xxx.. xxxx. xxxxx"),
    "ar2diff": ("joint", "bidirectional", "xxxxx xxxxx xxxxx xxxxx xxxxx"),
    "cached_prefix": ("bidirectional", "bidirectional", "xx... xx... xxxxx xxxxx xxxxx"),
    "ar_readable_prompt": ("causal", "bidirectional", "x.... xx... xxxxx xxxxx xxxxx"),
}
CACHED = ("gpt", "prefix_lm")
WITH_ENCODER = {"encoder ar": "prefix_lm", "encoder diffusion": "cached_prefix"}
ALL = [*PATTERNS, *WITH_ENCODER]


def build(pattern: str = "gpt", **settings) -> Transformer:
    if pattern in WITH_ENCODER:
        settings["arch"] = "encoder_decoder"
    prefix, target, _ = PATTERNS[WITH_ENCODER.get(pattern, pattern)]
    paradigm = "diffusion" if target == "bidirectional" else "ar"
    attention = dict(prefix_attention=prefix, target_attention=target, paradigm=paradigm)
    return tiny_model(**TINY | attention | settings)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 15, shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = [4, 2, 0]


def padded_prefixes() -> torch.Tensor:
    """Prefixes (3, 4) of LENGTHS tokens, then pads."""
    return torch.where(torch.arange(4) < torch.tensor(LENGTHS)[:, None], ids(3, 4), PAD)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


# Masks


def picture(mask: torch.Tensor) -> str:
    return " ".join("".join("x" if seen else "." for seen in row) for row in mask.tolist())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_has_the_edges_of_its_picture(pattern):
    """In one layer, a gradient from hidden state to embedding is one edge of attention."""
    model, read, written = build(pattern, n_layer=1), [], []
    model.tok.register_forward_hook(lambda _, __, out: read.append(out.retain_grad() or out))
    model.norm.register_forward_hook(lambda _, __, out: written.append(out))
    model(ids(1, 2), ids(1, 3))
    read.sort(key=lambda x: x.shape[1])  # prefix, target
    seen = torch.zeros(5, 5, dtype=torch.bool)
    for i, hidden in enumerate(torch.cat(written, dim=1)[0]):
        grads = torch.autograd.grad(
            hidden @ torch.randn(16), read, retain_graph=True, materialize_grads=True
        )
        seen[i] = torch.cat(grads, dim=1)[0].abs().sum(-1) > 0
    assert picture(seen) == PATTERNS[pattern][2]


def test_no_dense_mask_is_made_if_none_is_needed(monkeypatch):
    """Any mask turns off the flash kernel."""

    def refuse(*_):
        raise AssertionError("a dense mask")

    monkeypatch.setattr(model_file, "attention_mask", refuse)
    prefix, target = ids(2, 3), ids(2, 4)
    for pattern in PATTERNS:
        model = build(pattern)
        if pattern != "prefix_lm":  # a causal target after a cached prefix needs one
            model(prefix, target)
        cache = model.encode(prefix)
        if pattern in CACHED:
            for i in range(4):
                model.decode(cache, target[:, i : i + 1], append=True)
        else:
            model.decode(cache, target)


@pytest.mark.parametrize("pattern", ["ar2diff", "cached_prefix", "ar_readable_prompt"])
def test_extra_edges_lead_from_causal_to_bidirectional(pattern):
    model, prefix, target = build(pattern), ids(2, 3), ids(2, 4)
    size = 7 if pattern == "ar2diff" else 4
    edges = torch.ones(size, size, dtype=torch.bool)
    cache = model.encode(prefix)
    close(model.decode(cache, target, extra_edges=edges), model(prefix, target))
    causal = build({"cached_prefix": "prefix_lm"}.get(pattern, "gpt"))
    causal.load_state_dict(model.state_dict())
    close(model.decode(cache, target, extra_edges=~edges), causal(prefix, target))


# Padding, cache, heads


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("pattern", ALL)
def test_padding_changes_no_logit(pattern, position):
    model, target = build(pattern, position=position), ids(3, 5, seed=1)
    prefix = padded_prefixes()
    with torch.no_grad():
        together = model(prefix, target)
        for row, length in enumerate(LENGTHS):
            alone = model(prefix[row : row + 1, :length], target[row : row + 1])
            close(together[row : row + 1], alone)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize(
    "settings", [{}, dict(position="learned"), dict(n_kv_head=1, head_dim=16, qkv_bias=True)]
)
@pytest.mark.parametrize("pattern", [*CACHED, "encoder ar"])
def test_cached_decoding_equals_one_pass(pattern, settings, chunk, padded):
    """Chunks of 2 catch a causal mask that is aligned at the start."""
    model, target = build(pattern, **settings), ids(3, 6, seed=1)
    prefix = padded_prefixes() if padded else ids(3, 4)
    with torch.no_grad():
        cache = model.encode(prefix, reserve=6)
        parts = [model.decode(cache, part, append=True) for part in target.split(chunk, dim=1)]
        close(torch.cat(parts, dim=1), model(prefix, target))


@pytest.mark.parametrize("pattern", ALL)
def test_selected_rows_of_a_cache_are_the_cache_of_those_rows(pattern):
    model, prefix, target = build(pattern), padded_prefixes(), ids(4, 5, seed=1)
    index = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        selected = model.decode(model.encode(prefix).select(index), target)
    close(selected, model(prefix[index], target))  # with gradient: another path


def test_without_a_separator_slot_0_is_the_last_token_of_the_prompt():
    cfg = ModelConfig(**TINY | dict(sep_id=-1))
    prompt = torch.tensor([[1, 2, 3], [4, PAD, PAD], [PAD, 5, 6]])
    prefix, start = split_prompt(prompt, cfg)
    assert start.tolist() == [[3], [4], [6]]
    assert prefix.tolist() == [[1, 2], [PAD, PAD], [PAD, 5]]
    assert torch.equal(split_prompt(prompt, ModelConfig(**TINY))[0], prompt)


# Weights, activation checkpointing


@pytest.mark.parametrize("arch", ["decoder_only", "encoder_decoder"])
def test_a_meta_model_has_the_names_and_shapes_and_takes_the_weights(arch):
    cfg = ModelConfig(**TINY | dict(arch=arch, prefix_attention="bidirectional"))
    model, meta = build_model(cfg).eval(), meta_model(cfg)
    assert type(meta) is type(model) and (type(model) is Transformer) == (arch == "decoder_only")
    for read in (Transformer.named_parameters, Transformer.named_buffers):
        shapes = [{name: t.shape for name, t in read(m)} for m in (model, meta)]
        assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in meta.parameters()) and meta.head.weight is meta.tok.weight
    restored = model_from_state_dict(cfg, model.state_dict())
    assert restored.tok.weight.data_ptr() == model.tok.weight.data_ptr()  # no copy
    assert torch.equal(restored(ids(2, 3), ids(2, 4)), model(ids(2, 3), ids(2, 4)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(prefix_attention="joint"),
        dict(prefix_attention="bidirectional", shift=True, self_conditioning=True),
        dict(shift=True, dropout=0.3),
        dict(arch="encoder_decoder", prefix_attention="bidirectional", dropout=0.2),
    ],
    ids=["ar", "joint", "cached", "causal prefix", "encoder_decoder"],
)
def test_activation_checkpointing_gives_the_same_gradients_in_less_memory(settings):
    if settings:
        settings |= dict(paradigm="diffusion", target_attention="bidirectional")
    cfg = ModelConfig(**TINY | dict(n_layer=6) | settings)
    batch = Batch(padded_prefixes(), ids(3, 6), torch.arange(3))
    loss_cfg = diffusion.LossConfig()
    gradients, peaks = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model(cfg).train()
        model.activation_checkpointing = recompute

        def step(model=model):
            for term in diffusion.losses(model, batch, loss_cfg, make_rng(3, batch.example)):
                term.backward()

        torch.manual_seed(2)  # dropout
        peaks.append(peak_bytes(step))
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    assert peaks[1] < 0.8 * peaks[0]


# Self-conditioning


@pytest.mark.parametrize("slot", [1, 2, 4])
def test_with_shift_the_hint_of_a_slot_enters_where_the_slot_is_predicted(slot):
    """In a causal target the first position that changes is where it entered: slot - 1."""
    model = build("gpt", paradigm="diffusion", shift=True, self_conditioning=True)
    nn.init.normal_(model.self_cond_proj.weight)
    prefix, target, hint = ids(1, 3), ids(1, 5), torch.randn(1, 5, 16)
    cache = model.encode(prefix)
    before = model.decode(cache, target, self_cond=hint)
    hint[0, slot] += torch.randn(16)
    changed = (model.decode(cache, target, self_cond=hint) != before).any(-1)[0]
    assert changed.nonzero()[0, 0] == slot - 1


# Settings


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(n_embd=15), "multiple of n_head"),
        (dict(n_head=4, n_kv_head=3), "multiple of n_kv_head"),
        (dict(mask_id=19), "vocab_size 19"),
        (dict(eos_id=15), "eos_id"),
        (dict(prefix_attention="joint"), "target_attention='?bidirectional"),
        (dict(target_attention="bidirectional"), "target_attention='?causal"),
        (dict(shift=True), "paradigm='?diffusion"),
        (dict(arch="encoder_decoder"), "prefix_attention='?bidirectional"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**TINY | settings)
