"""checkpoint.py: to the last bit or not at all."""

import errno
import pickle
import random

import pytest
import torch

from checkpoint import FORMAT, load, load_model, save, write_atomically
from model import ModelConfig, Transformer


def build(**settings) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig(**dict(n_layer=1, n_head=2, n_embd=16, block_size=8, target_length=4) | settings))


@pytest.fixture
def path(tmp_path):
    save(tmp_path / "ckpt.pt", build(), 7, "bytes", best_loss=1.5, train_config={"seed": 3})
    return tmp_path / "ckpt.pt"


def refused(path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("settings", [dict(), dict(tie_weights=False), dict(position="learned", bias=True)], ids=str)
def test_a_model_comes_back_to_the_last_bit(tmp_path, settings):
    model = build(**settings)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 256, (2, 4))
    model(ids, ids).sum().backward()
    optimizer.step()
    save(tmp_path / "a.pt", model, 7, "bytes", optimizer=optimizer.state_dict(), best_loss=1.5)
    again, tokenizer, state = load_model(tmp_path / "a.pt")
    assert again.cfg == model.cfg and tokenizer.name == "bytes" and not again.training
    assert (state["step"], state["best_loss"]) == (7, 1.5)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    for key, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state["optimizer"]["state"][key][name], value) for name, value in moments.items())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.7, 0.99, 0.9999])
def test_a_truncated_file_is_refused(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "not a readable checkpoint" in refused(path)


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_refused(path, seed):
    path.write_bytes(random.Random(seed).randbytes(2000))
    assert "not a readable checkpoint" in refused(path)


@pytest.mark.parametrize("content", [b"hello\n", b"PK\x03\x04 no more", b"{}", b"\x80\x02.", b"\x80\x02}q\x00."])
def test_what_is_no_checkpoint_is_refused(path, content):
    path.write_bytes(content)
    refused(path)


class Trap:
    def __reduce__(self):
        return open, ("trap_was_sprung", "w")


def plain_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [torch.save, plain_pickle])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(path, write, monkeypatch):
    monkeypatch.chdir(path.parent)
    write({"format": FORMAT, "model": Trap()}, path)
    assert "not a readable checkpoint" in refused(path)
    assert not (path.parent / "trap_was_sprung").exists()


@pytest.mark.parametrize("content, found", [({"format": FORMAT + 1}, FORMAT + 1), ({}, None), ([1, 2], "list")])
def test_another_format_is_refused_by_its_number(path, content, found):
    torch.save(content, path)
    assert f"checkpoint format {found}, this code reads {FORMAT}" in refused(path)


def test_a_folder_is_refused_with_what_to_name_instead(tmp_path):
    assert "is a folder" in refused(tmp_path) and "ckpt.pt" in refused(tmp_path)


def test_a_missing_file_is_refused_with_what_is_there(path):
    assert f"no such checkpoint; there are: {path}" in refused(path.with_name("chkpt.pt"))


def test_weights_that_do_not_fit_their_settings_are_refused(path):
    state = load(path)
    torch.save(state | {"model_config": state["model_config"] | {"n_embd": 32}}, path)
    with pytest.raises(ValueError, match="weights do not fit its settings"):
        load_model(path)


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(path, monkeypatch):
    """torch.save fails after half of the bytes, as it does when no space is left."""
    old, real = path.read_bytes(), torch.save

    def half(state, file):
        file.write(old[: len(old) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="not written .*No space left.*untouched"):
        save(path, build(n_layer=2), 8, "bytes")
    monkeypatch.setattr(torch, "save", real)
    assert path.read_bytes() == old and load(path)["step"] == 7
    assert [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


def test_a_reader_never_sees_a_new_file_by_halves(path):
    """While the new content is being written the old is still in its place."""
    old = path.read_bytes()

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == old

    write_atomically(path, write)
    assert path.read_bytes() == b"new"
