"""ar2diff.py: the same tensors under other settings, and checks that catch a broken conversion."""

import math

import pytest
import torch
from eval_models import CACHED, JOINT, tiny_model

import ar2diff
import autoregressive
import diffusion
from ar2diff import convert, open_edges, verify
from data.loader import write_pairs
from data.objectives import collate
from infra.checkpoint import load_model, save
from model import NEW_MODULES, Transformer

PAPER = JOINT
OURS = CACHED | dict(shift=True, self_conditioning=True)
PAIRS = [([97 + i, 98, 99], [97 + i, 98, 99]) for i in range(20)]


def source() -> Transformer:
    return tiny_model(n_layer=2, block_size=24, target_length=12)


def text(n: int = 4):
    return collate(PAIRS[:n], range(n), 256, 257, 12)


@pytest.mark.parametrize("settings", [PAPER, OURS, OURS | dict(prefix_attention="causal")])
def test_the_weights_arrive_bit_for_bit_and_new_ones_are_zero(settings):
    """The paper adds no weight (section 4.5). The source stays as it is."""
    before = source()
    kept = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    weights = convert(before, **settings).state_dict()
    new = weights.keys() - kept.keys()
    assert {name.split(".")[0] for name in new} == (set() if settings is PAPER else {*NEW_MODULES})
    assert all(weights[name].abs().max() == 0 for name in new)
    assert all(torch.equal(kept[name], weights[name]) for name in kept)
    for tensor in weights.values():
        tensor.zero_()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.state_dict().items())
    with pytest.raises(ValueError, match="weight|missing"):
        convert(before, n_layer=3)


# The checks: each way to break a conversion is found by the check made for it.


def failing(model, converted, width: int = 3) -> set[str]:
    batch = text()._replace(prefix=torch.full((4, width), 98))
    checks = verify(model, converted, batch, knows_text=False)
    assert len(checks) == 8
    return {claim for claim, _, ok in checks if not ok}


@pytest.mark.parametrize("settings", [PAPER, OURS])
@pytest.mark.parametrize("width", [3, 12])
def test_all_checks_hold_for_a_real_conversion(settings, width):
    """Also if the prefix is as wide as the target: the reads are told apart by their width."""
    assert not failing(source(), convert(source(), **settings), width)


def change_a_weight(model, patch=None):
    model.blocks[0].mlp.down.weight.data += 0.05


def make_a_weight_nan(model, patch):
    model.blocks[0].mlp.down.weight.data[0, 0] = math.nan


def fill_the_new_layer(model, patch):
    torch.nn.init.normal_(model.self_cond_proj.weight)


def corrupt_the_prefix(model, patch):
    loss = diffusion.loss

    def corrupted(net, batch, *rest):
        return loss(net, batch._replace(prefix=batch.prefix + 1), *rest)

    patch.setattr(diffusion, "loss", corrupted)


def align_wrongly(model, patch):
    align = diffusion.align_logits
    patch.setattr(diffusion, "align_logits", lambda logits, shift: align(logits, not shift))


@pytest.mark.parametrize(
    ("damage", "claim"),
    [
        (change_a_weight, "with the causal mask the logits equal the source's"),
        (make_a_weight_nan, "L(1) after, at corruption 0 / 0.5 / 1, shift=True"),
        (fill_the_new_layer, "new layers are zero"),
        (corrupt_the_prefix, "the prefix is never corrupted"),
        (align_wrongly, "position i - 1 predicts slot i"),
    ],
)
def test_a_broken_conversion_is_found(damage, claim, monkeypatch):
    converted = convert(source(), **OURS)
    damage(converted, monkeypatch)
    found = failing(source(), converted)
    assert claim in found and (found == {claim} or "weight" in damage.__name__)


def test_a_wrong_mask_is_found():
    still_causal = convert(source(), paradigm="diffusion", shift=True)
    assert failing(source(), still_causal) == {"the converted model sees later tokens"}
    open_source = convert(source(), **PAPER)
    assert "the source does not see later tokens" in failing(open_source, convert(open_source))


def test_a_source_that_only_guesses_is_found():
    """Equal logits cost ln 288 nats, more than ln 257: guessing among letters and the pad."""
    model = source()
    torch.nn.init.zeros_(model.tok.weight)
    before = verify(model, convert(model, **OURS), text())[6]
    assert not before.ok
    assert before.measured.startswith(f"{math.log(288):.3f} (guessing: {math.log(257):.3f})")


# The command


@pytest.fixture
def here(tmp_path, monkeypatch):
    """ar.pt has learned that texts are letters; data/ is its data; hf/ holds other weights."""
    monkeypatch.chdir(tmp_path)
    write_pairs("data", {"train": PAIRS, "valid": PAIRS}, "bytes", 12, 24)
    write_pairs("long", {"train": PAIRS, "valid": PAIRS}, "bytes", 20, 30)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    model = source()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        autoregressive.loss(model, text(8), None, None).backward()
        optimizer.step()
        optimizer.zero_grad()
    save("ar.pt", model, 7, "bytes", train_config={"data": "data"})
    return tmp_path


def test_the_command_writes_a_checkpoint_that_passes_all_checks(here, capsys):
    ar2diff.main(["--init_from=ar.pt", "--out_dir=start", "--check"])
    printed = capsys.readouterr().out
    assert printed.count("ok  ") == 8 and "FAIL" not in printed
    model, tokenizer, state = load_model("start/ckpt.pt")
    assert {name: getattr(model.cfg, name) for name in OURS} == OURS
    facts = (state["step"], tokenizer.name, state["converted_from"], state["train_config"]["data"])
    assert facts == (0, "bytes", "ar.pt step 7", "data")
    ar2diff.main(["--init_from=ar.pt", "--out_dir=start", "--overwrite", "--noise=mask"])
    assert load_model("start/ckpt.pt")[0].cfg.noise == "mask"


def test_a_failing_check_exits_with_status_1_and_writes_nothing(here, monkeypatch):
    def careless(model, **settings):
        other = convert(model, **settings)
        change_a_weight(other)
        return other

    monkeypatch.setattr(ar2diff, "convert", careless)
    with pytest.raises(SystemExit) as stopped:
        ar2diff.main(["--init_from=ar.pt", "--out_dir=start", "--check"])
    assert stopped.value.code == 1 and not (here / "start").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--check --data=long", "needs target_length=12, got 20"),
        ("--out_dir=done", "exists; .*--overwrite"),
        ("--init_from=done/ckpt.pt", "is a diffusion model; .* needs an AR model"),
        ("--out_dir=hf", "hf is a Hugging Face folder"),
    ],
)
def test_a_mistake_is_refused_and_writes_nothing(flags, message, here):
    ar2diff.main(["--init_from=ar.pt", "--out_dir=done"])
    with pytest.raises(ValueError, match=message):
        ar2diff.main(["--init_from=ar.pt", "--out_dir=start", *flags.split()])
    assert not (here / "start").exists()


@pytest.mark.parametrize("joint", [False, True])
def test_the_share_of_open_edges_grows_linearly(joint):
    wide = collate(PAIRS[:1], range(1), 256, 257, 60)
    longer = wide._replace(prefix=torch.full((1, 7), 98))
    for step in range(4):
        edges = open_edges(wide, step, seed=1, steps=4, joint=joint)
        assert edges.float().mean().item() == pytest.approx((step + 1) / 4, abs=0.03)
        other = open_edges(longer, step, seed=1, steps=4, joint=joint)
        assert torch.equal(edges[-60:, -60:], other[-60:, -60:])  # equal for all micro-batches
    assert edges.all()
