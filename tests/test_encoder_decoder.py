"""extras/encoder_decoder.py: what must hold of any network with a cache, and of an encoder."""

import pytest
import torch

import ar2diff
from data.objectives import Batch
from extras.encoder_decoder import EncoderDecoder
from model import ModelConfig, build_model

SIZES = dict(vocab_size=24, n_ordinary=20, pad_id=20, sep_id=21, mask_id=22)
SIZES |= dict(n_layer=2, n_head=4, n_embd=16, block_size=16, target_length=6)
SIZES |= dict(arch="encoder_decoder", prefix_attention="bidirectional")
PARADIGMS = {"ar": {}, "diffusion": dict(paradigm="diffusion", target_attention="bidirectional")}


def network(paradigm: str = "ar", **settings) -> EncoderDecoder:
    torch.manual_seed(0)
    return build_model(ModelConfig(**SIZES | PARADIGMS[paradigm] | settings)).eval()


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(seed))


def batch(rows: int = 3) -> Batch:
    target = tokens(rows, 6, seed=2)
    target[:, 0] = 21
    return Batch(tokens(rows, 5), target, torch.arange(rows))


def changed(row: torch.Tensor, place: int) -> torch.Tensor:
    other = row.clone()
    other[0, place] = (other[0, place] + 1) % 20
    return other


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize(
    "settings", [{}, dict(position="learned"), dict(n_kv_head=2, head_dim=8, qkv_bias=True)]
)
@torch.no_grad()
def test_cached_decoding_equals_one_pass(settings, chunk):
    model, prefix, target = network(**settings), tokens(2, 5), tokens(2, 6)
    cache = model.encode(prefix, reserve=6)
    parts = [model.decode(cache, part, append=True) for part in target.split(chunk, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(prefix, target), atol=1e-5, rtol=0)


@pytest.mark.parametrize("paradigm", PARADIGMS)
@torch.no_grad()
def test_padding_of_the_prefix_changes_no_logit(paradigm):
    model, prefix, target = network(paradigm), tokens(2, 5), tokens(2, 6)
    padded = torch.cat([prefix, torch.full((2, 3), 20)], dim=1)
    torch.testing.assert_close(model(padded, target), model(prefix, target), atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_reaches_the_logits():
    """Each prefix token and its order reach all of them, a later target token only in diffusion."""
    prefix, target = tokens(1, 5), tokens(1, 6)
    for paradigm in PARADIGMS:
        model = network(paradigm)
        before = model(prefix, target)
        for i in range(5):
            difference = model(changed(prefix, i), target) - before
            assert (difference.abs().amax(-1) > 0).all()
        assert (model(prefix.flip(1), target) - before).abs().max() > 1e-4
        first = model(prefix, changed(target, 5))[:, 0]
        assert torch.equal(first, before[:, 0]) == (paradigm == "ar")


@torch.no_grad()
def test_selected_rows_of_a_cache_are_the_cache_of_those_rows():
    model, target, prefix = network("diffusion"), tokens(4, 6), tokens(3, 5)
    prefix[1, 3:] = 20
    index = torch.tensor([2, 0, 0, 1])
    selected = model.decode(model.encode(prefix).select(index), target)
    torch.testing.assert_close(selected, model.decode(model.encode(prefix[index]), target))


def test_the_conversion_keeps_every_weight_and_passes_its_checks():
    source = network()
    settings = PARADIGMS["diffusion"] | dict(shift=True, self_conditioning=True)
    model = ar2diff.convert(source, **settings)
    assert type(model) is EncoderDecoder
    assert all(torch.equal(model.get_parameter(name), p) for name, p in source.named_parameters())
    for check in ar2diff.verify(source, model, batch(), knows_text=False):
        assert check.ok, check
