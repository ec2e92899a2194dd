"""infra/checkpoint.py: bit for bit, or refused with the reason."""

import errno
import pickle
import random

import pytest
import torch
from eval_models import tiny_model
from processes import same

from infra.checkpoint import FORMAT, CorruptCheckpoint, load, load_model, save


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ckpt.pt"
    save(path, tiny_model(), 7, "bytes", best_loss=1.5, train_config={"seed": 3})
    return path


def refusal(path, kind=ValueError) -> str:
    """Return the one line that refuses a file."""
    with pytest.raises(kind) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "settings", [dict(), dict(tie_weights=False), dict(position="learned", bias=True)], ids=str
)
def test_a_model_comes_back_bit_for_bit(tmp_path, settings):
    model = tiny_model(**settings)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 256, (2, 4))
    model(ids, ids).sum().backward()
    optimizer.step()
    save(tmp_path / "a.pt", model, 7, "bytes", optimizer=[optimizer.state_dict()], best_loss=1.5)
    again, tokenizer, state = load_model(tmp_path / "a.pt")
    assert again.cfg == model.cfg and tokenizer.name == "bytes" and not again.training
    assert (state["step"], state["best_loss"]) == (7, 1.5)
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    assert same(state["optimizer"], [optimizer.state_dict()])
    assert torch.equal(again(ids, ids), model(ids, ids))


def test_two_checkpoints_stay_and_the_name_is_never_missing(path):
    for step in (8, 9):
        save(path, tiny_model(), step, "bytes", keep_last=2)
    assert (load(path)["step"], load(path.with_name("ckpt.1.pt"))["step"]) == (9, 8)
    assert len(list(path.parent.iterdir())) == 2


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99, 0.9999, "noise", "text", "pickle"])
def test_a_damaged_file_is_corrupt(path, share):
    whole = path.read_bytes()
    other = {"noise": random.Random(0).randbytes(2000), "text": b"{}\n", "pickle": b"\x80\x02."}
    path.write_bytes(other[share] if share in other else whole[: int(len(whole) * share)])
    assert "use another checkpoint" in refusal(path, CorruptCheckpoint)


def test_a_flipped_bit_is_found_or_changes_nothing(path):
    """Padding and time stamps are the only bytes of the zip file without a checksum."""
    whole, expected = path.read_bytes(), load(path)
    choose = random.Random(0)
    found = 0
    for _ in range(300):
        flipped = bytearray(whole)
        flipped[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same(load(path), expected)
        except CorruptCheckpoint:
            found += 1
    assert found > 200


class Trap:
    def __reduce__(self):
        return open, ("trap_was_sprung", "w")


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_pickle_is_not_run(path, write, monkeypatch):
    monkeypatch.chdir(path.parent)
    write({"format": FORMAT, "model": Trap()}, path)
    refusal(path)
    assert not (path.parent / "trap_was_sprung").exists()


@pytest.mark.parametrize(
    "change", [{"format": FORMAT + 1}, {"format": True}, {"step": "7"}, {"model": {}}, [1, 2]]
)
def test_wrong_fields_are_refused(path, change):
    torch.save(torch.load(path) | change if isinstance(change, dict) else change, path)
    refusal(path)


def test_unfit_weights_and_missing_files_are_refused(path):
    state = load(path)
    torch.save(state | {"model_config": state["model_config"] | {"n_embd": 32}}, path)
    with pytest.raises(ValueError, match="weights do not fit"):
        load_model(path)
    assert f"no such checkpoint; available: {path}" in refusal(path.with_name("chkpt.pt"))


def test_a_full_disk_leaves_the_old_file(path, monkeypatch):
    """torch.save fails after half of the bytes."""
    old = path.read_bytes()

    def half(state, file):
        file.write(old[: len(old) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="not written .*No space left.*unchanged"):
        save(path, tiny_model(n_layer=2), 8, "bytes")
    assert path.read_bytes() == old and load(path)["step"] == 7
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]
