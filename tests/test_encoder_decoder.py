"""extras/encoder_decoder.py: what reaches the logits. test_model.py tests its cache and padding."""

import torch
from eval_models import tiny_model

import ar2diff
from data.objectives import Batch
from extras.encoder_decoder import EncoderDecoder

SIZES = dict(vocab_size=24, n_ordinary=20, pad_id=20, sep_id=21, mask_id=22)
SIZES |= dict(n_layer=2, n_head=4, block_size=16, target_length=6)
SIZES |= dict(arch="encoder_decoder", prefix_attention="bidirectional")
PARADIGMS = {"ar": {}, "diffusion": dict(paradigm="diffusion", target_attention="bidirectional")}


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(20, (rows, length), generator=torch.Generator().manual_seed(seed))


def changed(row: torch.Tensor, place: int) -> torch.Tensor:
    other = row.clone()
    other[0, place] = (other[0, place] + 1) % 20
    return other


@torch.no_grad()
def test_what_reaches_the_logits():
    """Each prefix token and its order reach all of them, a later target token only in diffusion."""
    prefix, target = tokens(1, 5), tokens(1, 6)
    for paradigm in PARADIGMS:
        model = tiny_model(**SIZES, **PARADIGMS[paradigm])
        before = model(prefix, target)
        for i in range(5):
            difference = model(changed(prefix, i), target) - before
            assert (difference.abs().amax(-1) > 0).all()
        assert (model(prefix.flip(1), target) - before).abs().max() > 1e-4
        first = model(prefix, changed(target, 5))[:, 0]
        assert torch.equal(first, before[:, 0]) == (paradigm == "ar")


def test_the_conversion_keeps_every_weight_and_passes_its_checks():
    source = tiny_model(**SIZES)
    settings = PARADIGMS["diffusion"] | dict(shift=True, self_conditioning=True)
    model = ar2diff.convert(source, **settings)
    assert type(model) is EncoderDecoder
    assert all(torch.equal(model.get_parameter(name), p) for name, p in source.named_parameters())
    target = tokens(3, 6, seed=2)
    target[:, 0] = 21
    batch = Batch(tokens(3, 5), target, torch.arange(3))
    for check in ar2diff.verify(source, model, batch, knows_text=False):
        assert check.ok, check
