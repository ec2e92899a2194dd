"""ar2diff.py: the same tensors under other settings, and a doctor that notices when they are not."""

import math

import pytest
import torch

import ar2diff
from ar2diff import adapt, check
from checkpoint import load, load_model, save
from data.loader import write_pairs
from data.objectives import collate
from model import ADDED_BY_CONVERSION, ModelConfig, Transformer

OURS = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
OURS |= dict(shift=True, lookahead=True, self_conditioning=True)
PAPER = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=22, target_length=12)


def source(**settings) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**SIZES, **settings)).eval()


def text(n: int = 4):
    pairs = [([97 + i, 98, 99], [97 + i, 98, 99]) for i in range(n)]
    return collate(pairs, range(n), 256, 257, 12)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """An AR checkpoint that knows at least that text is letters, beside its data."""
    monkeypatch.chdir(tmp_path)
    pairs = [([97 + i, 98, 99], [97 + i, 98, 99]) for i in range(20)]
    write_pairs("out/data/toy_copy", {"train": pairs, "valid": pairs}, "bytes", 12, 22)
    model = source()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        ar2diff.autoregressive.loss(model, text(8), None, None).backward()
        optimizer.step()
        optimizer.zero_grad()
    save("ar.pt", model, 7, "bytes", train_config={"data": "out/data/toy_copy"})
    return "ar.pt"


@pytest.mark.parametrize("prefix_attention", ["joint", "bidirectional", "causal"])
def test_the_source_tensors_arrive_bit_for_bit(prefix_attention):
    before = source()
    after = adapt(before, **OURS | dict(prefix_attention=prefix_attention))
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name


def test_with_the_papers_settings_there_is_no_new_parameter():
    """facts of the paper, section 16: with N = 0 the AR weights load with nothing missing and nothing unexpected."""
    before = source()
    assert set(adapt(before, **PAPER).state_dict()) == set(before.state_dict())


def test_what_is_new_is_zero_and_named():
    before, after = source(), adapt(source(), **OURS)
    new = set(after.state_dict()) - set(before.state_dict())
    assert {name.split(".")[0] for name in new} == set(ADDED_BY_CONVERSION)
    assert all(after.state_dict()[name].abs().max() == 0 for name in new)


def test_the_source_is_left_alone():
    before = source()
    kept = {name: tensor.clone() for name, tensor in before.state_dict().items()}
    after = adapt(before, **OURS)
    with torch.no_grad():
        for p in after.parameters():
            p += 1
    assert before.cfg.paradigm == "ar" and all(torch.equal(kept[n], t) for n, t in before.state_dict().items())


def test_a_setting_that_needs_other_parameters_is_refused():
    with pytest.raises(ValueError, match="other parameters"):
        adapt(source(), n_layer=3)
    with pytest.raises(ValueError, match="other parameters"):
        adapt(source(), position="learned")


def test_converted_logits_are_the_sources_where_it_sees_the_same_tokens():
    """One target token, causal prefix: there is no future to see, so opening the mask changes nothing."""
    before = source()
    after = adapt(before, **OURS | dict(prefix_attention="causal"))
    prefix, target = text().prefix, text().target[:, :1]
    torch.testing.assert_close(after(prefix, target), before(prefix, target))


def test_every_line_of_the_doctor_holds_for_a_real_conversion():
    model = source()
    rows = check(model, adapt(model, **OURS), text())
    holds = {claim: ok for claim, _, ok in rows if not claim.startswith("loss before")}  # an untrained model may guess
    assert len(rows) == 8 and all(holds.values()), rows


def failing(model, damaged) -> set[str]:
    return {claim for claim, _, ok in check(model, damaged, text()) if not ok and not claim.startswith("loss before")}


def test_the_doctor_sees_a_changed_weight():
    model = source()
    damaged = adapt(model, **OURS)
    with torch.no_grad():
        damaged.blocks[0].mlp.down.weight += 0.05
    assert "under the old mask the logits are the source's" in failing(model, damaged)


def test_the_doctor_sees_a_new_layer_that_is_not_zero():
    model = source()
    damaged = adapt(model, **OURS)
    torch.nn.init.normal_(damaged.condition.weight)
    assert failing(model, damaged) == {"new layers are zero"}


def test_the_doctor_sees_a_mask_that_is_still_causal():
    model = source()
    still = adapt(model, paradigm="diffusion", target_attention="causal", prefix_attention="causal")
    assert "the converted model does" in failing(model, still)


def test_the_doctor_sees_a_source_that_sees_the_future():
    looking = adapt(source(), **PAPER)
    assert "the source does not see the future" in failing(looking, adapt(looking))


def test_the_doctor_sees_weights_that_predict_their_own_slot():
    """A network whose embedding is its output layer and whose blocks do nothing repeats its input: not what AR does."""
    model = source()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.zero_(), block.mlp.down.weight.zero_()
        model.tok.weight.normal_()
    assert ar2diff._clean_loss(model, text(), shift=False) < ar2diff._clean_loss(model, text(), shift=True)


def test_a_dirty_prefix_is_noticed(monkeypatch):
    model, batch = source(), text()
    real = ar2diff.diffusion.loss

    def careless(net, batch, cfg, draws):
        return real(net, batch._replace(prefix=batch.prefix + 1), cfg, draws)

    monkeypatch.setattr(ar2diff.diffusion, "loss", careless)
    assert failing(model, adapt(model, **OURS)) == {"prefix ids are untouched in every pass"}
    assert batch.prefix.shape[1] != batch.target.shape[1]  # the spy tells reads of the prefix by their width


def test_the_prefix_is_watched_also_where_it_is_as_wide_as_the_target():
    """Reads are told apart by their width; with equal widths the line once said "0 of 0 reads" and held."""
    model = adapt(source(), **OURS | dict(block_size=24))
    wide = text()._replace(prefix=torch.full((4, 12), 98))
    assert ar2diff._spied_prefixes(model, wide, 0) == (4, 0)


def test_the_command_writes_a_checkpoint_that_training_and_sampling_take(checkpoint, capsys):
    ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start", "--check"])
    model, tokenizer, state = load_model("start/ckpt.pt")
    assert (model.cfg.paradigm, model.cfg.prefix_attention, model.cfg.shift) == ("diffusion", "bidirectional", True)
    assert (state["step"], tokenizer.name, state["converted_from"]) == (0, "bytes", "ar.pt step 7")
    said = capsys.readouterr().out
    assert said.count("ok  ") == 8 and "FAIL" not in said


def test_the_command_stops_with_status_1_and_writes_nothing_where_a_claim_fails(checkpoint, monkeypatch, capsys):
    real = ar2diff.adapt

    def clumsy(model, **settings):
        other = real(model, **settings)
        torch.nn.init.normal_(other.blocks[0].mlp.down.weight)
        return other

    monkeypatch.setattr(ar2diff, "adapt", clumsy)
    with pytest.raises(SystemExit) as stopped:
        ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start", "--check"])
    assert stopped.value.code == 1 and "FAIL" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such checkpoint"):
        load("start/ckpt.pt")


def test_lookahead_without_shift_is_refused(checkpoint):
    with pytest.raises(ValueError, match="lookahead needs shift"):
        ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start", "--shift=false", "--lookahead"])


def test_a_diffusion_checkpoint_is_not_converted_again(checkpoint):
    ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start"])
    with pytest.raises(ValueError, match="a diffusion model already"):
        ar2diff.main(["--init_from=start/ckpt.pt", "--out_dir=again"])


def test_an_earlier_conversion_is_not_overwritten_unasked(checkpoint):
    ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start"])
    with pytest.raises(ValueError, match="--overwrite"):
        ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start"])
    ar2diff.main([f"--init_from={checkpoint}", "--out_dir=start", "--overwrite", "--noise=mask"])
    assert load_model("start/ckpt.pt")[0].cfg.noise == "mask"


def test_guessing_costs_what_the_doctor_says():
    model = source()
    torch.nn.init.zeros_(model.tok.weight)
    line = next(m for claim, m, _ in check(model, adapt(model, **OURS), text()) if claim.startswith("loss before"))
    assert line.startswith(f"{math.log(288):.3f} (guessing costs {math.log(257):.3f}, less: random weights")
