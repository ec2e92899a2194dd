"""ar2diff.py: the same tensors under other settings, and checks that catch a broken conversion."""

import math

import pytest
import torch

import ar2diff
import diffusion
from ar2diff import convert, open_edges, verify
from data.loader import write_pairs
from data.objectives import collate
from infra.checkpoint import load_model, save
from model import NEW_MODULES, ModelConfig, Transformer

PAPER = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
OURS = PAPER | dict(prefix_attention="bidirectional", shift=True, self_conditioning=True)
LOGITS = "with the causal mask the logits equal the source's"
PAIRS = [([97 + i, 98, 99], [97 + i, 98, 99]) for i in range(20)]


def source() -> Transformer:
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=24, target_length=12)
    return Transformer(ModelConfig(**sizes)).eval()


def text(n: int = 4):
    return collate(PAIRS[:n], range(n), 256, 257, 12)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """An AR checkpoint that has learned that texts are letters, and its data."""
    monkeypatch.chdir(tmp_path)
    write_pairs("data/copy", {"train": PAIRS, "valid": PAIRS}, "bytes", 12, 24)
    model = source()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        ar2diff.autoregressive.loss(model, text(8), None, None).backward()
        optimizer.step()
        optimizer.zero_grad()
    save("ar.pt", model, 7, "bytes", train_config={"data": "data/copy"})
    return "ar.pt"


@pytest.mark.parametrize("settings", [PAPER, OURS, OURS | dict(prefix_attention="causal")])
def test_the_weights_arrive_bit_for_bit_and_new_ones_are_zero(settings):
    """The paper adds no weight (section 4.5). The source stays as it is."""
    before = source()
    kept = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    after = convert(before, **settings)
    weights = after.state_dict()
    new = weights.keys() - kept.keys()
    assert {name.split(".")[0] for name in new} == (set() if settings is PAPER else {*NEW_MODULES})
    assert all(weights[name].abs().max() == 0 for name in new)
    assert all(torch.equal(kept[name], weights[name]) for name in kept)
    for tensor in weights.values():
        tensor.zero_()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.state_dict().items())


@pytest.mark.parametrize("setting", [dict(n_layer=3), dict(position="learned")])
def test_a_setting_that_needs_other_weights_is_refused(setting):
    with pytest.raises(ValueError, match="weight|missing"):
        convert(source(), **setting)


def test_the_logits_are_the_sources_if_no_later_token_exists():
    before = source()
    after = convert(before, **OURS | dict(prefix_attention="causal"))
    first = (text().prefix, text().target[:, :1])
    torch.testing.assert_close(after(*first), before(*first))


# The checks: each way to break a conversion is found by the check made for it.


def failing(model, converted) -> set[str]:
    checks = verify(model, converted, text(), knows_text=False)
    assert len(checks) == 8
    return {claim for claim, _, ok in checks if not ok}


@pytest.mark.parametrize("settings", [PAPER, OURS])
@pytest.mark.parametrize("width", [3, 12])
def test_all_checks_hold_for_a_real_conversion(settings, width):
    """Also if the prefix is as wide as the target: the reads are told apart by their width."""
    model = source()
    batch = text()._replace(prefix=torch.full((4, width), 98))
    checks = verify(model, convert(model, **settings), batch, knows_text=False)
    assert all(ok for *_, ok in checks), checks


def change_a_weight(model):
    model.blocks[0].mlp.down.weight.data += 0.05


def fill_the_new_layer(model):
    torch.nn.init.normal_(model.self_cond_proj.weight)


def make_a_weight_nan(model):
    model.blocks[0].mlp.down.weight.data[0, 0] = math.nan


@pytest.mark.parametrize(
    ("damage", "claims"),
    [
        (change_a_weight, {LOGITS}),
        (fill_the_new_layer, {"new layers are zero"}),
        (make_a_weight_nan, {LOGITS, "L(1) after, at corruption 0 / 0.5 / 1, shift=True"}),
    ],
)
def test_damaged_weights_are_found(damage, claims):
    model = source()
    converted = convert(model, **OURS)
    damage(converted)
    found = failing(model, converted)
    assert claims <= found and (damage is make_a_weight_nan or found == claims)


def test_a_wrong_mask_is_found():
    model = source()
    still_causal = convert(model, paradigm="diffusion", shift=True)
    assert failing(model, still_causal) == {"the converted model does"}
    open_source = convert(model, **PAPER)
    assert "the source does not see later tokens" in failing(open_source, convert(open_source))


def test_a_corrupted_prefix_is_found(monkeypatch):
    real = diffusion.loss

    def corrupting(net, batch, cfg, rng):
        return real(net, batch._replace(prefix=batch.prefix + 1), cfg, rng)

    monkeypatch.setattr(diffusion, "loss", corrupting)
    assert failing(source(), convert(source(), **OURS)) == {"the prefix is never corrupted"}


def test_a_wrong_alignment_is_found(monkeypatch):
    real = diffusion.align_logits
    monkeypatch.setattr(diffusion, "align_logits", lambda logits, shift: real(logits, not shift))
    assert failing(source(), convert(source(), **OURS)) == {"position i - 1 predicts slot i"}


def test_a_source_that_only_guesses_is_found():
    """Equal logits: ln 288 nats for all ids, more than ln 257 for letters and pad."""
    model = source()
    torch.nn.init.zeros_(model.tok.weight)
    before = verify(model, convert(model, **OURS), text())[6]
    assert not before.ok
    assert before.measured.startswith(f"{math.log(288):.3f} (guessing: {math.log(257):.3f})")


# The command


def test_the_command_writes_a_checkpoint_that_passes_all_checks(checkpoint, capsys):
    ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start", "--check"])
    model, tokenizer, state = load_model("start/ckpt.pt")
    assert {name: getattr(model.cfg, name) for name in OURS} == OURS
    facts = (state["step"], tokenizer.name, state["converted_from"], state["train_config"]["data"])
    assert facts == (0, "bytes", "ar.pt step 7", "data/copy")
    printed = capsys.readouterr().out
    assert printed.count("ok  ") == 8 and "FAIL" not in printed


def test_a_failing_check_exits_with_status_1_and_writes_nothing(checkpoint, monkeypatch, tmp_path):
    real = ar2diff.convert

    def careless(model, **settings):
        other = real(model, **settings)
        change_a_weight(other)
        return other

    monkeypatch.setattr(ar2diff, "convert", careless)
    with pytest.raises(SystemExit) as stopped:
        ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start", "--check"])
    assert stopped.value.code == 1 and not (tmp_path / "start").exists()


def test_what_the_command_refuses(checkpoint, tmp_path):
    def refused(message, *flags):
        with pytest.raises(ValueError, match=message):
            ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start", *flags])

    write_pairs("data/long", {"train": PAIRS, "valid": PAIRS}, "bytes", 20, 30)
    refused("data/long has target_length 20, the model 12", "--check", "--data=data/long")
    refused("is a checkpoint; .* are for imported weights", "--paradigm=ar")
    refused("nowhere: no such", "--init_from=nowhere")
    save("no_data.pt", source(), 0, "bytes")
    refused("no_data.pt does not name its data", "--init_from=no_data.pt", "--check")
    assert not (tmp_path / "start").exists()
    ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start"])
    refused("exists; .*--overwrite")
    refused(
        "is a diffusion model; .* needs an AR model", "--init_from=start/ckpt.pt", "--overwrite"
    )
    ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start", "--overwrite", "--noise=mask"])
    assert load_model("start/ckpt.pt")[0].cfg.noise == "mask"
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    refused("hf is a Hugging Face folder", "--out_dir=hf")


@pytest.mark.parametrize("joint", [False, True])
def test_the_share_of_open_edges_grows_linearly(joint):
    wide = collate(PAIRS[:1], range(1), 256, 257, 60)
    longer = wide._replace(prefix=torch.full((1, 7), 98))
    before = None
    for step in range(4):
        edges = open_edges(wide, step, seed=1, steps=4, joint=joint)
        assert edges.float().mean().item() == pytest.approx((step + 1) / 4, abs=0.03)
        other = open_edges(longer, step, seed=1, steps=4, joint=joint)
        assert torch.equal(edges[-60:, -60:], other[-60:, -60:])  # micro-batches agree
        assert before is None or not torch.equal(edges, before)
        before = edges
    assert edges.all()
