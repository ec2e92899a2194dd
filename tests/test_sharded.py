"""sharded.py: a folder of shards is a checkpoint like any other. Written by one process here; two in
test_distributed.py."""

import pickle

import pytest
import torch
import torch.distributed as dist

import sharded
from atomic import Damaged
from checkpoint import head, load, load_model, save
from model import ModelConfig, Transformer


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of this process."""
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def trained():
    torch.manual_seed(0)
    model = Transformer(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, target_length=4))
    optimizers = [torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)]
    ids = torch.randint(0, 256, (2, 4))
    model(ids, ids).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


@pytest.fixture
def path(alone, trained, tmp_path):
    model, optimizers = trained
    sharded.save(tmp_path / "ckpt.pt", head(model, 7, "bytes") | {"best_loss": 1.5}, model, optimizers)
    return tmp_path / "ckpt.pt"


def test_a_folder_is_read_as_the_file_would_be(path, trained, tmp_path):
    model, optimizers = trained
    save(tmp_path / "file.pt", model, 7, "bytes", optimizer=[o.state_dict() for o in optimizers], best_loss=1.5)
    whole, file = load(path), load(tmp_path / "file.pt")
    assert whole.keys() == file.keys() and (whole["step"], whole["best_loss"]) == (7, 1.5)
    assert whole["model_config"] == file["model_config"]
    for name, value in file["model"].items():
        assert torch.equal(whole["model"][name], value)
    for a, b in zip(whole["optimizer"], file["optimizer"]):
        assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
        for key, values in b["state"].items():
            assert all(torch.equal(a["state"][key][name], value) for name, value in values.items())
    assert load_model(path)[0].cfg == model.cfg


def test_a_command_makes_the_single_file(path, tmp_path, capsys):
    sharded.main([f"--source={path}", f"--out={tmp_path / 'new' / 'one.pt'}"])
    assert "in one file, step 7" in capsys.readouterr().out
    assert load(tmp_path / "new" / "one.pt")["model"].keys() == load(path)["model"].keys()


@pytest.mark.parametrize("argv", [[], ["--source=a"], ["--source={nothing}", "--out={nothing}/b"]])
def test_a_command_without_a_folder_is_one_line(argv, tmp_path):
    with pytest.raises((ValueError, OSError)) as error:
        sharded.main([arg.replace("{nothing}", str(tmp_path / "nothing")) for arg in argv])
    assert "\n" not in str(error.value)


def test_shards_fill_a_model_and_its_optimizers(path, trained):
    model, optimizers = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = optimizers[0].state_dict()["state"][0]["exp_avg"].clone()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    fresh = [torch.optim.AdamW(model.parameters()), torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)]
    sharded.restore(path, model, fresh)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(fresh[0].state_dict()["state"][0]["exp_avg"], steps)


def test_every_file_is_guarded(path):
    for file in list(path.iterdir()):
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        for content in (bytes(changed), whole[:-1], None):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            with pytest.raises(ValueError) as error:
                sharded.read_head(path)
            assert isinstance(error.value, Damaged), file
            file.write_bytes(whole)
    assert sharded.read_head(path)["step"] == 7


class Trap:
    def __reduce__(self):
        return open, ("trap_was_sprung", "w")


def test_an_index_with_code_in_it_is_refused_and_not_run(path, monkeypatch, tmp_path):
    """torch itself unpickles this file as it is. Here even the digest is right."""
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps(Trap()), pickle.dumps({"a": Trap()}), b"cos\nsystem\n(S'touch trap_was_sprung'\ntR."):
        (path / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match="its shards cannot be read: holds .*, which no index has"):
            sharded._read(path, None, no_dist=True)
    assert not (tmp_path / "trap_was_sprung").exists()


def test_the_last_few_stay(alone, trained, tmp_path):
    model, optimizers = trained
    for step in range(4):
        sharded.save(tmp_path / "ckpt.pt", head(model, step, "bytes"), model, optimizers, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.1.pt", "ckpt.pt"]
    assert [load(tmp_path / name)["step"] for name in ("ckpt.pt", "ckpt.1.pt")] == [3, 2]


def test_what_cannot_be_written_leaves_what_was_there(path, trained, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    model, optimizers = trained
    with pytest.raises(OSError, match="not written .*No space left"):
        sharded.save(path, head(model, 8, "bytes"), model, optimizers)
    monkeypatch.undo()
    assert load(path)["step"] == 7
