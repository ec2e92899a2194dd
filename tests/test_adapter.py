"""extras/adapter.py: where the gate is off nothing changes; a file fits one model only."""

import pytest
import torch
from drafters import KINDS, PAD, drafter, network, prompts
from torch import nn

from extras.adapter import (
    FILE,
    AdapterConfig,
    DraftModel,
    GatedLinear,
    digest,
    load_adapter,
    save_adapter,
)
from extras.speculative import read_round

IDS = torch.tensor([[1, 2, 3, 0, 4, 5], [5, 4, 0, 1, 1, 2]])
EVERY = pytest.mark.parametrize("kind", KINDS, ids=str)


def read(made: DraftModel, number: torch.Tensor) -> torch.Tensor:
    cache = made.encode(IDS[:, :0], room=6)
    return made.read(IDS, number, torch.arange(6), torch.ones(6, 6).tril().bool(), cache)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_gate_off_it_is_the_network_to_the_bit(kind, dtype):
    model = network(**kind).to(dtype)
    made = drafter(model).to(dtype)
    empty = torch.zeros(2, 0, dtype=torch.long)
    none = torch.zeros(6, dtype=torch.long)
    with torch.no_grad():
        causal = torch.zeros(6, 6, dtype=torch.bool)  # as a mask: another kernel rounds differently
        expected = model.decode(model.encode(empty), IDS, extra_edges=causal)
        assert torch.equal(made.network.head(read(made, none)), expected)
        read(made, torch.tensor([0, 0, 1, 2, 0, 0]))
        found = made.network.decode(made.network.encode(empty), IDS, extra_edges=causal)
        assert torch.equal(found, expected)


@torch.no_grad()
def test_tokens_next_to_masks_are_the_networks_to_the_bit():
    """In one call with both kinds. The masks themselves depend on A, B, alpha and the vectors."""
    made = drafter(network())
    number = torch.tensor([0, 0, 0, 0, 1, 2])
    mixed = read(made, number)
    frozen = drafter(network())
    for name, p in frozen.named_parameters():
        if name.endswith("adapter_b"):
            nn.init.zeros_(p)
    assert torch.equal(mixed[:, :4], read(frozen, number)[:, :4])
    assert (mixed[:, 4:] - read(frozen, number)[:, 4:]).abs().amin((0, 2)).min() > 0
    assert sum(isinstance(part, GatedLinear) for part in made.network.modules()) == 8


@torch.no_grad()
def test_the_low_rank_term_is_b_a_x_times_alpha_over_rank():
    torch.manual_seed(0)
    made = DraftModel(network(), AdapterConfig(rank=4, alpha=6.0)).double()
    layer = made.network.blocks[0].mlp.down
    nn.init.normal_(layer.adapter_b)
    x = torch.randn(2, 3, layer.in_features, dtype=torch.double)
    on = torch.tensor([[True, False, True], [False, False, True]])
    made.gate.on = on[..., None]
    expected = x @ (layer.weight + 1.5 * layer.adapter_b @ layer.adapter_a).T
    torch.testing.assert_close(layer(x)[on], expected[on])
    torch.testing.assert_close(layer(x)[~on], (x @ layer.weight.T)[~on])


@EVERY
@torch.no_grad()
def test_rows_that_grow_independently_equal_one_pass_over_the_text(kind):
    """Each call keeps another number of tokens of each row, and rejects wrong ones and masks."""
    model = network(**kind)
    made = drafter(model)
    prefix = prompts(6)
    texts = torch.randint(5, (6, 9), generator=torch.Generator().manual_seed(2))
    cache = made.encode(prefix, room=20)
    start = cache.lengths.clone()
    assert torch.equal(start, (prefix != PAD).sum(1))
    row = torch.arange(6)
    for keep in ([3, 1, 2, 3, 1, 2], [1, 3, 3, 2, 1, 1], [2, 2, 1, 1, 3, 3]):
        done = cache.lengths - start
        chain = texts.gather(1, done[:, None] + torch.arange(3))
        wrong = torch.arange(3) >= torch.tensor(keep)[:, None]
        logits = read_round(made, cache, torch.where(wrong, (chain + 1) % 5, chain), 2)
        for b in row.tolist():
            ids = prefix[b : b + 1, : start[b]]
            past = model.encode(ids)
            n = int(done[b]) + keep[b]
            expected = model.decode(past, texts[b : b + 1, :n])[0, int(done[b]) :]
            torch.testing.assert_close(logits[b, : keep[b]], expected, atol=1e-9, rtol=0)
        cache.lengths = cache.lengths + torch.tensor(keep)


@torch.no_grad()
def test_a_file_gives_the_same_drafts(tmp_path):
    model = network()
    made = drafter(model).float()
    save_adapter(tmp_path / FILE, made, digest(model))
    for path in (tmp_path, tmp_path / FILE):
        found = load_adapter(path, model)
        assert found.adapter == made.adapter
        for name, tensor in made.learned.items():
            assert torch.equal(found.learned[name], tensor.bfloat16().double())
    assert (tmp_path / FILE).stat().st_size < 4 * sum(p.numel() for p in model.parameters())


def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path):
    model = network()
    path = tmp_path / FILE
    save_adapter(path, drafter(model), digest(model))
    good = path.read_bytes()
    other = network()
    other.blocks[1].mlp.down.weight.data[0, 0] += 1e-9
    cases = [(other, good, "belongs to another model .weights [0-9a-f]{12}, this model has")]
    cases += [(model, good[:n], "damaged, or no adapter") for n in (0, 7, 100, len(good) - 1)]
    for old, new, message in (
        (b'rank\\": 3', b'rank\\": 4', "not fit .*'rank': 4"),
        (b'masks\\": 2', b'masks\\": 9', "mask_vectors.* not fit .*'masks': 9"),
        (b"ar2diff-a", b"ar2diff-b", "no adapter"),
        (b"adapter_a", b"adapter_c", "not fit"),
    ):
        assert old in good
        cases += [(model, good.replace(old, new), message)]
    for asked, content, message in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as refused:
            load_adapter(path, asked)
        assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    with pytest.raises(ValueError, match="no such adapter; make one with python -m extras.draft"):
        load_adapter(tmp_path / "none", model)
