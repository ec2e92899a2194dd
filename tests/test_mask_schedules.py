"""anneal.py: each form as drawn by hand; FlexAttention's question and the dense mask give one answer."""

import re
from types import SimpleNamespace

import pytest
import torch

import anneal
from anneal import FORMS, Ahead, AnnealConfig, Annealing, Flex, open_edges, rule
from model import ModelConfig, Transformer, attention_mask
from train import TrainConfig

PAD = 15
TINY = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, target_length=8, paradigm="diffusion")
TINY |= dict(vocab_size=19, n_ordinary=15, pad_id=PAD, sep_id=16, mask_id=17, target_attention="bidirectional")


def settings(form: str, steps: int, prefix_attention: str = "bidirectional", seed: int = 0) -> SimpleNamespace:
    return SimpleNamespace(anneal_form=form, anneal_steps=steps, prefix_attention=prefix_attention, seed=seed)


def batch(T: int, P: int = 3, B: int = 1) -> SimpleNamespace:
    return SimpleNamespace(prefix=torch.zeros(B, P, dtype=torch.long), target=torch.zeros(B, T, dtype=torch.long))


def model(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**TINY | dict(prefix_attention="bidirectional") | changes)).eval()


def drawn(cfg, T: int, step: int) -> str:
    """The target's own mask as rows of x and dots: the causal edges and the open ones."""
    opened = Annealing(cfg, model()).opened(batch(T), step)
    one = torch.ones(1, T, dtype=torch.bool)
    mask = attention_mask("bidirectional", one[:, :0], one, opened)[0, 0]
    return " ".join("".join("x" if seen else "." for seen in row) for row in mask.tolist())


def test_a_band_is_as_drawn_by_hand():
    """Four slots in three steps: slot i sees up to i + 1, i + 2, i + 3."""
    found = [drawn(settings("band", 3), 4, step) for step in range(3)]
    assert found == ["xx.. xxx. xxxx xxxx", "xxx. xxxx xxxx xxxx", "xxxx xxxx xxxx xxxx"]


def test_blocks_are_as_drawn_by_hand():
    """Five slots in five steps: blocks of 1, which is AR, of 2, 3, 4 (the last one holds what is left over) and 5."""
    found = [drawn(settings("blocks", 5), 5, step) for step in range(5)]
    assert found == [
        "x.... xx... xxx.. xxxx. xxxxx",
        "xx... xx... xxxx. xxxx. xxxxx",
        "xxx.. xxx.. xxx.. xxxxx xxxxx",
        "xxxx. xxxx. xxxx. xxxx. xxxxx",
        "xxxxx xxxxx xxxxx xxxxx xxxxx",
    ]


def test_the_docstring_draws_half_of_the_way():
    band, blocks = (drawn(settings(form, 2), 4, 0) for form in ("band", "blocks"))
    rows = [re.split(r"\s{4,}", line.strip()) for line in anneal.__doc__.split("\n\n")[2].splitlines()[1:]]
    assert " ".join(row[2].replace(" ", "") for row in rows) == band
    assert " ".join(row[3].replace(" ", "") for row in rows) == blocks


def test_random_edges_open_in_linear_shares_and_keep_their_names_behind_a_joint_prefix():
    def share(step, prefix_attention="bidirectional"):
        return open_edges(batch(100, 100), step, settings("edges", 10, prefix_attention)).float()

    for step in (0, 4, 9):
        assert share(step).mean().item() == pytest.approx((step + 1) / 10, abs=0.02)
    assert share(0).shape == (100, 100) and share(0, "joint").shape == (200, 200)
    assert torch.equal(share(4, "joint")[100:, 100:], share(4))  # target edges have one name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_ends_open_and_then_needs_no_mask(form):
    annealing = Annealing(settings(form, 7), model())
    assert annealing.opened(batch(8), 6).all()
    assert annealing.opened(batch(8), 7) is None


def test_a_band_only_ever_grows():
    annealing = Annealing(settings("band", 20), model())
    masks = [annealing.opened(batch(8), step) for step in range(20)]
    assert all((later | ~earlier).all() for earlier, later in zip(masks, masks[1:]))


def test_a_run_that_does_not_anneal_says_nothing_and_one_on_a_cpu_says_one_line(capsys):
    assert Annealing(settings("band", 0), model()).opened(batch(8), 0) is None
    assert capsys.readouterr().out == ""
    Annealing(settings("band", 3), model())
    said = capsys.readouterr().out
    assert said.startswith("anneal_steps: the mask is made whole here, a little slower and the same: ")
    assert said.endswith("FlexAttention has no backward pass on cpu\n") and said.count("\n") == 1


def test_the_defaults_open_at_once_and_edge_by_edge():
    assert (AnnealConfig.anneal_steps, AnnealConfig.anneal_form) == (0, "edges")


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(anneal_form="bands"), "anneal_form must be one of edges, band, blocks; got 'bands'"),
        (dict(anneal_steps=-1), "anneal_steps must be 0 or more, got -1"),
        (dict(anneal_steps=3, target_attention="causal", paradigm="ar"), "bidirectional target"),
        (dict(anneal_steps=3, anneal_form="band", prefix_attention="joint"), "opens with anneal_form=edges"),
    ],
)
def test_what_cannot_be_annealed_is_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        TrainConfig(**dict(paradigm="diffusion", target_attention="bidirectional") | flags)


# FlexAttention: asked for each edge, it hears what the dense mask shows

PADDED = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
CASES = {  # past (B, S), real (B, T), S, prefix_attention
    "nothing cached": (None, None, 0, "bidirectional"),
    "cached": (None, None, 3, "bidirectional"),
    "cached with padding": (PADDED, torch.ones(3, 8, dtype=torch.bool), 3, "bidirectional"),
    "joint with padding": (torch.ones(3, 0, dtype=torch.bool), torch.cat([PADDED, PADDED, PADDED], 1), 0, "joint"),
}


# A joint prefix opens by edges alone.
@pytest.mark.parametrize("form, case", [(f, c) for f in FORMS for c in CASES if f == "edges" or CASES[c][3] != "joint"])
def test_flex_attention_is_told_the_dense_mask(form, case):
    from torch.nn.attention.flex_attention import create_mask

    past, real, S, prefix_attention = CASES[case]
    T = 9 if prefix_attention == "joint" else 8
    ahead, length = rule(batch(8, 1), 3, settings(form, 9, prefix_attention))
    assert length == T
    slot, B = torch.arange(T), 1 if real is None else 3
    old = torch.ones(1, S, dtype=torch.bool) if past is None else past
    new = torch.ones(1, T, dtype=torch.bool) if real is None else real
    dense = attention_mask("bidirectional", old, new, ahead(slot[:, None], slot))  # (B, 1, T, S + T)
    asked = create_mask(Ahead(ahead, None).mask_mod(past, real, S, "cpu"), B, None, T, S + T, "cpu")
    assert torch.equal(asked, dense)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "prefix_attention, form", [(p, f) for p in ("bidirectional", "causal") for f in FORMS] + [("joint", "edges")]
)
def test_flex_attention_gives_the_logits_of_the_dense_mask(prefix_attention, form):
    """Of a whole network, padded prefixes and full ones, without gradients: a CPU has no backward for it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    net, flex = model(prefix_attention=prefix_attention), Flex(flex_attention, create_block_mask)
    full = torch.randint(0, 15, (3, 4), generator=torch.Generator().manual_seed(1))
    padded = full.clone()
    padded[1, 2:] = PAD
    target = torch.randint(0, 15, (3, 8), generator=torch.Generator().manual_seed(2))
    ahead, length = rule(batch(8, 4), 3, settings(form, 9, prefix_attention))
    slot = torch.arange(length)
    with torch.no_grad():
        for prefix in (full, padded):
            flexible = net(prefix, target, opened=Ahead(ahead, flex))
            dense = net(prefix, target, opened=ahead(slot[:, None], slot))
            torch.testing.assert_close(flexible, dense, rtol=1e-4, atol=2e-5)


def test_a_band_leaves_tiles_out():
    """Block sparsity: of 8 x 8 tiles of 16 slots a band of half a tile needs the lower triangle and one diagonal."""
    from torch.nn.attention.flex_attention import create_block_mask

    ahead, _ = rule(batch(128), 0, settings("band", 127 // 8))
    seen = Ahead(ahead, None).mask_mod(None, None, 0, "cpu")
    blocks = create_block_mask(seen, None, None, 128, 128, "cpu", BLOCK_SIZE=16)
    tiles = int(blocks.kv_num_blocks.sum() + blocks.full_kv_num_blocks.sum())
    assert tiles == 8 * 9 // 2 + 7
