"""model.py: masks, cache and padding by invariance; sizes and logits against published numbers and transformers."""

import pytest
import torch
from torch import nn

import model as model_file
from model import ADDED_BY_CONVERSION, ModelConfig, Transformer, attention_mask
from rope import rope_table

PAD = 15
TINY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, target_length=6)
TINY |= dict(vocab_size=19, n_ordinary=15, pad_id=PAD, sep_id=16, mask_id=17)
PATTERNS = {  # prefix_attention, target_attention, and who sees whom: the pictures of attention_mask
    "gpt": ("causal", "causal", "x.... xx... xxx.. xxxx. xxxxx"),
    "prefix_lm": ("bidirectional", "causal", "xx... xx... xxx.. xxxx. xxxxx"),
    "ar2diff": ("joint", "bidirectional", "xxxxx xxxxx xxxxx xxxxx xxxxx"),
    "frozen_prefix": ("bidirectional", "bidirectional", "xx... xx... xxxxx xxxxx xxxxx"),
    "ar_readable_prompt": ("causal", "bidirectional", "x.... xx... xxxxx xxxxx xxxxx"),
}
CACHED = ("gpt", "prefix_lm")


def build(pattern: str = "gpt", seed: int = 0, **settings) -> Transformer:
    torch.manual_seed(seed)
    prefix, target, _ = PATTERNS[pattern]
    paradigm = "diffusion" if target == "bidirectional" else "ar"
    attention = dict(prefix_attention=prefix, target_attention=target, paradigm=paradigm)
    return Transformer(ModelConfig(**TINY | attention | settings)).eval()


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 15, shape, generator=torch.Generator().manual_seed(seed))


def padded_prefixes() -> tuple[torch.Tensor, list[int]]:
    """(prefixes (3, 4), their lengths): full, half, and empty."""
    prefix, lengths = ids(3, 4), [4, 2, 0]
    for row, length in enumerate(lengths):
        prefix[row, length:] = PAD
    return prefix, lengths


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


# Masks


def picture(mask: torch.Tensor) -> str:
    return " ".join("".join("x" if seen else "." for seen in row) for row in mask.tolist())


@pytest.mark.parametrize("kind, drawn", [("causal", "x.x.. x.xx. x.xxx"), ("bidirectional", "x.xxx x.xxx x.xxx")])
def test_masks_are_as_the_docstring_pictures_them(kind, drawn):
    past, new = torch.tensor([[True, False]]), torch.ones(1, 3, dtype=torch.bool)
    assert picture(attention_mask(kind, past, new)[0, 0]) == drawn


def test_a_padding_row_sees_itself_alone_among_the_new():
    new = torch.tensor([[True, False, True]])
    none = torch.ones(1, 0, dtype=torch.bool)
    assert picture(attention_mask("bidirectional", none, new)[0, 0]) == "x.x xxx x.x"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_pattern_lets_a_token_see_exactly_what_is_pictured(pattern):
    """One layer: a gradient from hidden state to embedding is one edge of attention. The oracle is the picture."""
    model, read, written = build(pattern, n_layer=1), [], []
    model.tok.register_forward_hook(lambda _, __, out: read.append(out.retain_grad() or out))
    model.norm.register_forward_hook(lambda _, __, out: written.append(out))
    model(ids(1, 2), ids(1, 3))
    read.sort(key=lambda x: x.shape[1])  # prefix, target
    seen = torch.zeros(5, 5, dtype=torch.bool)
    for i, hidden in enumerate(torch.cat(written, dim=1)[0]):
        grads = torch.autograd.grad(hidden @ torch.randn(16), read, retain_graph=True, allow_unused=True)
        grads = [g if g is not None else torch.zeros_like(x) for g, x in zip(grads, read)]
        seen[i] = torch.cat(grads, dim=1)[0].abs().sum(-1) > 0
    assert picture(seen) == PATTERNS[pattern][2]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_later_token_reaches_earlier_logits_only_if_bidirectional(pattern):
    model, prefix, target = build(pattern), ids(1, 3), ids(1, 4)
    other = target.clone()
    other[0, -1] = (target[0, -1] + 1) % 15
    with torch.no_grad():
        same = torch.equal(model(prefix, target)[:, :-1], model(prefix, other)[:, :-1])
    assert same == (PATTERNS[pattern][1] == "causal")


def test_no_dense_mask_is_made_where_none_is_needed(monkeypatch):
    """A mask, even one that is all True, turns off the flash kernel."""

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


@pytest.mark.parametrize("pattern", ["ar2diff", "frozen_prefix", "ar_readable_prompt"])
def test_opened_edges_lead_from_causal_to_bidirectional(pattern):
    model, prefix, target = build(pattern), ids(2, 3), ids(2, 4)
    size = 7 if pattern == "ar2diff" else 4
    close(model(prefix, target, opened=torch.ones(size, size, dtype=torch.bool)), model(prefix, target))
    causal = build({"frozen_prefix": "prefix_lm"}.get(pattern, "gpt"))
    causal.load_state_dict(model.state_dict())
    close(model(prefix, target, opened=torch.zeros(size, size, dtype=torch.bool)), causal(prefix, target))


# Padding, cache, heads


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_no_logit(pattern, position):
    model, target = build(pattern, position=position), ids(3, 5, seed=1)
    prefix, lengths = padded_prefixes()
    with torch.no_grad():
        together = model(prefix, target)
        for row, length in enumerate(lengths):
            close(together[row : row + 1], model(prefix[row : row + 1, :length], target[row : row + 1]))


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("pattern", CACHED)
def test_some_tokens_at_a_time_equal_all_at_once(pattern, chunk, padded):
    """The KV cache is an optimisation: it may not change a logit. Chunks of 2 catch a mask aligned upper-left."""
    model, target = build(pattern), ids(3, 6, seed=1)
    prefix = padded_prefixes()[0] if padded else ids(3, 4)
    with torch.no_grad():
        cache = model.encode(prefix, room=6)
        parts = [model.decode(cache, part, append=True) for part in target.split(chunk, dim=1)]
        close(torch.cat(parts, dim=1), model(prefix, target))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_are_the_same_with_and_without_gradient(pattern):
    """Under autograd the cache makes new tensors, without it writes in place: one result."""
    model, prefix, target = build(pattern), padded_prefixes()[0], ids(3, 5, seed=1)
    with torch.no_grad():
        plain = model.decode(model.encode(prefix), target)
    close(model(prefix, target), plain)


def test_cache_buffers_stay_in_place_between_diffusion_steps():
    model, prefix = build("frozen_prefix"), ids(2, 4)
    with torch.no_grad():
        cache = model.encode(prefix, room=5)
        places = [t.data_ptr() for t in cache.k + cache.v]
        read = [t[:, :, :4].clone() for t in cache.k + cache.v]
        for seed in (1, 2, 3):
            model.decode(cache, ids(2, 5, seed=seed))
        assert places == [t.data_ptr() for t in cache.k + cache.v]
        assert all(torch.equal(old, t[:, :, :4]) for old, t in zip(read, cache.k + cache.v))
        assert cache.length == 4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_of_a_cache_are_the_cache_of_those_rows(pattern):
    model, prefix, target = build(pattern), padded_prefixes()[0], ids(4, 5, seed=1)
    index = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        close(model.decode(model.encode(prefix).rows(index), target), model(prefix[index], target))


def test_a_joint_prefix_refuses_to_be_appended_to():
    model = build("ar2diff")
    with pytest.raises(ValueError, match="joint prefix cannot be cached"):
        model.decode(model.encode(ids(1, 2)), ids(1, 1), append=True)


def test_grouped_heads_equal_full_heads_with_repeated_weights():
    grouped, full = (build(n_head=4, n_embd=32, n_kv_head=kv) for kv in (2, 0))
    state = grouped.state_dict()
    for name in list(state):
        if "qkv" in name:
            q, k, v = state[name].split((32, 16, 16))
            k, v = (t.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for t in (k, v))
            state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    close(full(ids(2, 3), ids(2, 4)), grouped(ids(2, 3), ids(2, 4)))


def test_rope_sees_distances_only():
    model = build(n_layer=2)
    before = model(ids(1, 4), ids(1, 5))
    model.rope = rope_table(ModelConfig(**TINY | dict(block_size=116)))[:, 100:]
    torch.testing.assert_close(model(ids(1, 4), ids(1, 5)), before, rtol=1e-4, atol=2e-5)


def test_learned_positions_are_seen():
    model = build(position="learned")
    before = model(ids(1, 4), ids(1, 5))
    model.pos.weight.data = model.pos.weight.data.roll(1, 0)
    assert not torch.allclose(model(ids(1, 4), ids(1, 5)), before, atol=1e-3)


def test_too_long_an_input_names_the_block_size():
    with pytest.raises(ValueError, match="17 tokens are longer than the model's block_size 16"):
        build()(ids(1, 10), ids(1, 7))


# What a conversion adds


@pytest.mark.parametrize("shift", [False, True], ids=["same", "shift"])
@pytest.mark.parametrize("pattern", ["ar2diff", "frozen_prefix", "ar_readable_prompt"])
def test_added_layers_change_nothing_at_the_start(pattern, shift):
    plain = build(pattern)
    more = build(pattern, seed=1, shift=shift, self_conditioning=True, lookahead=shift)
    found = more.load_state_dict(plain.state_dict(), strict=False)
    assert {key.split(".")[0] for key in found.missing_keys} == set(ADDED_BY_CONVERSION[: 1 + shift])
    estimate = torch.randn(2, 5, 16)
    assert torch.equal(more(ids(2, 3), ids(2, 5), estimate=estimate), plain(ids(2, 3), ids(2, 5)))


def test_an_estimate_of_zeros_contributes_zero():
    model = build("ar2diff", self_conditioning=True)
    nn.init.normal_(model.condition.weight)
    prefix, target, estimate = ids(2, 3), ids(2, 5), torch.randn(2, 5, 16)
    estimate[1] = 0
    none, some = model(prefix, target), model(prefix, target, estimate=estimate)
    assert torch.equal(none[1], some[1]) and not torch.allclose(none[0], some[0], atol=1e-3)


@pytest.mark.parametrize("slot", [1, 2, 4])
def test_with_shift_what_is_known_of_a_slot_enters_where_the_slot_is_predicted(slot):
    """Causal target: the first position that changes is where it entered, slot - 1, for the estimate and the token."""
    model = build("gpt", paradigm="diffusion", shift=True, lookahead=True, self_conditioning=True)
    nn.init.normal_(model.condition.weight)
    nn.init.normal_(model.ahead.weight)
    prefix, target, estimate = ids(1, 3), ids(1, 5), torch.randn(1, 5, 16)
    before = model(prefix, target, estimate=estimate)
    hint, token = estimate.clone(), target.clone()
    hint[0, slot] += torch.randn(16)
    token[0, slot] = (token[0, slot] + 1) % 15
    for after in (model(prefix, target, estimate=hint), model(prefix, token, estimate=estimate)):
        changed = (after != before).any(-1)[0]
        assert changed.nonzero()[0, 0] == slot - 1


def test_soft_embedding_of_certainty_is_the_embedding():
    model, token = build(), ids(2, 3)
    close(model.soft_embedding(nn.functional.one_hot(token, 19) * 100.0), model.tok(token))


# transformers as the oracle


def test_logits_equal_gpt2_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=19, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    ).eval()
    for p in theirs.parameters():  # biases and norms, too, must arrive in their places
        p.data += 0.1 * torch.randn_like(p)
    ours = build(norm="layernorm", activation="gelu_tanh", position="learned", qk_norm=False, bias=True)
    source, target = theirs.state_dict(), ours.state_dict()
    names = {"ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj"}
    names |= {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    filled = {"tok.weight": "transformer.wte.weight", "pos.weight": "transformer.wpe.weight"}
    filled |= {"head.weight": "lm_head.weight"}
    for part in ("weight", "bias"):
        filled[f"norm.{part}"] = f"transformer.ln_f.{part}"
        for layer in range(2):
            filled |= {f"blocks.{layer}.{o}.{part}": f"transformer.h.{layer}.{t}.{part}" for t, o in names.items()}
    assert set(filled) == set(target)
    for name, from_name in filled.items():
        target[name] = source[from_name].T if ".c_" in from_name and name.endswith("weight") else source[from_name]
    ours.load_state_dict(target)
    prefix, text = ids(2, 4), ids(2, 6, seed=1)
    with torch.no_grad():
        expected = theirs(torch.cat([prefix, text], dim=1)).logits[:, 4:]
        torch.testing.assert_close(ours(prefix, text), expected, rtol=1e-4, atol=1e-5)


def test_logits_equal_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=19, hidden_size=32, intermediate_size=24, max_position_embeddings=16)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    rest = dict(rms_norm_eps=1e-5, initializer_range=0.3, tie_word_embeddings=False)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **rest)).eval()
    for name, p in theirs.named_parameters():
        if "norm" in name:
            p.data += 0.1 * torch.randn_like(p)
    ours = build(n_head=4, n_kv_head=2, n_embd=32, n_hidden=24, qk_norm=False, tie_weights=False)
    source, target = theirs.state_dict(), {}
    for name, from_name in (("tok", "model.embed_tokens"), ("norm", "model.norm"), ("head", "lm_head")):
        target[f"{name}.weight"] = source[f"{from_name}.weight"]
    for layer in range(2):
        for name, parts in {
            "norm1": ["input_layernorm"],
            "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attn.proj": ["self_attn.o_proj"],
            "norm2": ["post_attention_layernorm"],
            "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down": ["mlp.down_proj"],
        }.items():
            rows = [source[f"model.layers.{layer}.{part}.weight"] for part in parts]
            target[f"blocks.{layer}.{name}.weight"] = torch.cat(rows)
    ours.load_state_dict(target)
    prefix, text = ids(2, 4), ids(2, 6, seed=1)
    with torch.no_grad():
        expected = theirs(torch.cat([prefix, text], dim=1)).logits[:, 4:]
        torch.testing.assert_close(ours(prefix, text), expected, rtol=1e-4, atol=1e-5)


# Settings


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(paradigm="gan"), "ar, diffusion"),
        (dict(norm="batchnorm"), "rmsnorm, layernorm"),
        (dict(activation="relu"), "swiglu, gelu, gelu_tanh"),
        (dict(position="alibi"), "rope, learned"),
        (dict(prefix_attention="full"), "causal, bidirectional, joint"),
        (dict(target_attention="joint"), "causal, bidirectional"),
        (dict(noise="unifrom"), "uniform, mask"),
        (dict(n_layer=0), "n_layer must be at least 1"),
        (dict(n_embd=15), "multiple of n_head"),
        (dict(n_embd=6), "even head size"),
        (dict(head_dim=5), "even head size"),
        (dict(norm_eps=0.0), "norm_eps must be above 0"),
        (dict(rope_factor=0.0), "rope_factor must be above 0"),
        (dict(rope_slow_turns=4.0), "rope_slow_turns must be 0 or more and below rope_fast_turns"),
        (dict(eos_id=15), "eos_id must be -1 or an ordinary id"),
        (dict(n_head=4, n_kv_head=3), "multiple of n_kv_head"),
        (dict(n_kv_head=-1), "n_kv_head"),
        (dict(dropout=1.0), r"\[0, 1\)"),
        (dict(prefix_attention="joint"), "bidirectional"),
        (dict(target_attention="bidirectional"), "causal"),
        (dict(shift=True), "diffusion"),
        (dict(paradigm="diffusion", lookahead=True), "shift"),
        (dict(mask_id=19), "below vocab_size 19"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_bad_setting_is_refused_with_what_would_do(bad, says):
    with pytest.raises(ValueError, match=says):
        ModelConfig(**TINY | bad)
