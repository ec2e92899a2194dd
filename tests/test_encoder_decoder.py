import pytest
import torch

import ar2diff
import autoregressive
import diffusion
from data.objectives import Batch
from draws import draws_for
from encdec import EncoderDecoder, build_model, model_without_weights
from model import ModelConfig, Transformer

SIZES = dict(vocab_size=24, n_ordinary=20, pad_id=20, sep_id=21, mask_id=22, n_layer=2, n_head=4, n_embd=16)
SIZES |= dict(block_size=16, target_length=6, arch="encoder_decoder", prefix_attention="bidirectional")
DIFFUSION = dict(paradigm="diffusion", target_attention="bidirectional")
PARADIGMS = {"ar": dict(), "diffusion": DIFFUSION}


def network(seed: int = 0, **settings) -> EncoderDecoder:
    torch.manual_seed(seed)
    return build_model(ModelConfig(**SIZES | settings)).eval()


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 3) -> Batch:
    target = tokens(rows, 6, seed=2)
    target[:, 0] = 21
    return Batch(tokens(rows, 5), target, torch.arange(rows))


@pytest.mark.parametrize("arch", ["decoder_only", "encoder_decoder"])
def test_a_model_without_weights_has_the_names_and_shapes_of_one_with(arch):
    cfg = ModelConfig(**SIZES | dict(arch=arch))
    there, shapes = build_model(cfg), model_without_weights(cfg)
    assert {name: t.shape for name, t in there.named_parameters()} == {n: t.shape for n, t in shapes.named_parameters()}
    assert {name: t.shape for name, t in there.named_buffers()} == {n: t.shape for n, t in shapes.named_buffers()}
    assert all(t.is_meta for t in shapes.parameters()) and not any(t.is_meta for t in there.parameters())
    assert (
        shapes.cfg.tie_weights == (shapes.head.weight is shapes.tok.weight) == (there.head.weight is there.tok.weight)
    )


def test_the_setting_chooses_the_class():
    assert type(network()) is EncoderDecoder
    assert type(build_model(ModelConfig(**SIZES | dict(arch="decoder_only")))) is Transformer


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(position="learned"), dict(n_kv_head=2), dict(bias=True), dict(head_dim=8, qkv_bias=True)],
    ids=str,
)
@torch.no_grad()
def test_cached_decoding_equals_all_at_once(settings, chunk):
    """Greedy decoding feeds one token a call; what a call filed must be what one pass computes."""
    model, prefix, target = network(**settings), tokens(2, 5), tokens(2, 6)
    cache = model.encode(prefix, room=6)
    parts = [model.decode(cache, target[:, i : i + chunk], append=True) for i in range(0, 6, chunk)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(prefix, target), atol=1e-5, rtol=0)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_padding_of_the_prefix_changes_no_logit(paradigm):
    model, prefix, target = network(**PARADIGMS[paradigm]), tokens(2, 5), tokens(2, 6)
    padded = torch.cat([prefix, torch.full((2, 3), 20)], dim=1)
    torch.testing.assert_close(model(padded, target), model(prefix, target), atol=1e-5, rtol=0)


@pytest.mark.parametrize("paradigm, seen", [("ar", False), ("diffusion", True)])
@torch.no_grad()
def test_the_first_logits_see_the_last_token_only_in_diffusion(paradigm, seen):
    model, prefix, target = network(**PARADIGMS[paradigm]), tokens(1, 5), tokens(1, 6)
    moved = target.clone()
    moved[0, -1] = (moved[0, -1] + 1) % 20
    assert bool((model(prefix, target)[:, 0] != model(prefix, moved)[:, 0]).any()) == seen


@torch.no_grad()
def test_every_prefix_token_reaches_every_logit():
    model, prefix, target = network(), tokens(1, 5), tokens(1, 6)
    before = model(prefix, target)
    for i in range(5):
        moved = prefix.clone()
        moved[0, i] = (moved[0, i] + 1) % 20
        assert ((model(moved, target) - before).abs().amax(-1) > 0).all()


@torch.no_grad()
def test_the_prefix_is_told_by_its_order():
    model, target = network(), tokens(1, 6)
    assert (model(torch.tensor([[1, 2, 3]]), target) - model(torch.tensor([[2, 1, 3]]), target)).abs().max() > 1e-4


@torch.no_grad()
def test_rows_of_a_cache_are_the_cache_of_those_rows():
    model, target = network(**DIFFUSION), tokens(4, 6)
    prefix = tokens(3, 5)
    prefix[1, 3:] = 20
    index = torch.tensor([2, 0, 0, 1])
    found = model.decode(model.encode(prefix).rows(index), target)
    torch.testing.assert_close(found, model.decode(model.encode(prefix[index]), target))


def test_with_gradient_the_logits_are_the_same_and_every_weight_gets_one():
    model, b = network(), batch()
    with torch.no_grad():
        before = model(b.prefix, b.target)
    logits = model(b.prefix, b.target)
    torch.testing.assert_close(logits, before)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_conversion_keeps_every_weight_and_its_doctor_agrees():
    """A random network has no reason to predict better than chance: that one line is asked of trained ones."""
    source = network()
    model = ar2diff.adapt(source, **DIFFUSION, shift=True, self_conditioning=True)
    assert type(model) is EncoderDecoder
    assert all(torch.equal(model.get_parameter(name), p) for name, p in source.named_parameters())
    for claim, measured, holds in ar2diff.check(source, model, batch()):
        assert holds or claim.startswith("loss before"), (claim, measured)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_a_row_says_the_same_alone_and_in_a_batch(paradigm):
    model, prefix = network(**PARADIGMS[paradigm]), tokens(3, 5)
    module = {"ar": autoregressive, "diffusion": diffusion}[paradigm]
    sampler = module.SamplerConfig(temperature=0.7)
    together = module.generate(model, prefix, sampler)
    for i in range(3):
        alone = module.generate(model, prefix[i : i + 1], sampler, example=torch.tensor([i]))
        assert torch.equal(alone.tokens[0], together.tokens[i])


@pytest.mark.parametrize("paradigm", ["ar", pytest.param("diffusion", marks=pytest.mark.slow)])
def test_it_learns_a_batch_by_heart(paradigm):
    model, b = network(**PARADIGMS[paradigm]).train(), batch()
    module = {"ar": autoregressive, "diffusion": diffusion}[paradigm]
    optimizer, cfg = torch.optim.AdamW(model.parameters(), lr=1e-2), diffusion.LossConfig()
    first = module.loss(model, b, cfg, draws_for(0, b.example)).item()
    for step in range(40):
        loss = module.loss(model, b, cfg, draws_for(0, b.example, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first / 3


@pytest.mark.parametrize("wrong", ["causal", "joint"])
def test_an_encoder_reads_both_ways_and_says_so(wrong):
    with pytest.raises(ValueError, match="an encoder needs prefix_attention='bidirectional'"):
        ModelConfig(**SIZES | DIFFUSION | dict(prefix_attention=wrong))
