"""data/loader.py: a batch is a function of its place; a data set is whole or refused."""

import numpy as np
import pytest
import torch

from data.loader import open_dataset, prefetch, write_pairs, write_stream
from data.objectives import ObjectiveConfig, splice
from data.tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")
TEXT = list(bytes(range(97, 123)) * 20)
SENTINELS = range(BYTES.sentinel(0), BYTES.vocab_size)


def make_pairs(folder, n=100, **free):
    """n pairs with prefixes of 1 to 7 letters. Each has another target of three letters."""
    pairs = [
        ([97 + i % 26] * (1 + i % 7), [97 + i // 676, 97 + i // 26 % 26, 97 + i % 26])
        for i in range(n)
    ]
    write_pairs(folder, {"train": pairs, "valid": pairs[:5]}, "bytes", 5, 12, **free)
    return pairs


@pytest.fixture
def pairs_folder(tmp_path):
    make_pairs(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def stream_folder(tmp_path):
    write_stream(tmp_path / "set", {"train": [TEXT, TEXT], "valid": [TEXT]}, "bytes", 8, 20)
    return tmp_path / "set"


@pytest.fixture(params=["pairs_folder", "stream_folder"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["auto", "prefix_lm", "span_corruption"])
def objective(request):
    return ObjectiveConfig(objective=request.param)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def spliced(batch, row: int) -> str:
    """The text that span_corruption made a row of."""
    sides = [batch.prefix[row].tolist(), batch.target[row, 1:].tolist()]
    return BYTES.decode(splice(*([t for t in s if t != BYTES.pad_id] for s in sides), SENTINELS))


def test_a_batch_depends_on_seed_and_step_only(folder, objective):
    used = open_dataset(folder, "train", objective)
    fresh = open_dataset(folder, "train", objective)
    for step in (0, 3, 1, 40, 2):
        used.batch(1, step, 8)
    assert equal(used.batch(7, 13, 8), fresh.batch(7, 13, 8))
    for seed, step in ((8, 13), (7, 14), (2**40 + 7, 13)):
        assert not torch.equal(used.batch(7, 13, 8).target, used.batch(seed, step, 8).target)
    with pytest.raises(ValueError, match="must be 0 or more, got -1"):
        used.batch(-1, 0, 8)


def test_slices_of_rows_are_parts_of_the_whole_batch(folder, objective):
    """Four processes or four micro-batches see what one sees. A part may need less padding."""
    data = open_dataset(folder, "train", objective)
    for step in range(12):
        whole = data.batch(5, step, 8)
        parts = [data.batch(5, step, 8, slice(i, i + 2)) for i in range(0, 8, 2)]
        assert torch.equal(torch.cat([p.target for p in parts]), whole.target)
        assert torch.cat([p.example for p in parts]).tolist() == [8 * step + i for i in range(8)]
        for i, part in enumerate(parts):
            rows = whole.prefix[2 * i : 2 * i + 2]
            width = part.prefix.shape[1]
            assert torch.equal(rows[:, :width], part.prefix)
            assert (rows[:, width:] == BYTES.pad_id).all()


def test_prefetch_gives_the_same_batches_and_raises_errors_at_their_place(folder):
    data = open_dataset(folder, "train")
    places = [(0, step, 4) for step in range(5)]
    for place, batch in zip(places, prefetch(data.batch, places, torch.device("cpu")), strict=True):
        assert equal(batch, data.batch(*place))
    batches = prefetch(data.batch, [(0, 0, 4), (-1, 0, 4)], torch.device("cpu"))
    assert equal(next(batches), data.batch(0, 0, 4))
    with pytest.raises(ValueError, match="got -1"):
        next(batches)


def test_a_stream_has_no_pads_and_every_prefix_length(stream_folder):
    data = open_dataset(stream_folder, "train")
    batches = [data.batch(0, step, 3) for step in range(200)]
    assert {batch.prefix.shape[1] for batch in batches} == set(range(1, 20 - 8 + 1))
    for prefix, target, _ in batches:
        window = torch.cat([prefix, target[:, 1:]], dim=1)  # in TEXT each letter follows the last
        assert ((window[:, 1:] - window[:, :-1]) % 26 == 1).all()


def test_every_epoch_is_a_new_permutation(pairs_folder):
    """100 pairs in batches of 8 are 12 steps: 96 different pairs, and another 4 left out."""
    data = open_dataset(pairs_folder, "train")
    epochs = []
    for epoch in range(3):
        targets = torch.cat([data.batch(3, 12 * epoch + k, 8).target for k in range(12)])
        epochs.append([tuple(row) for row in targets.tolist()])
        assert len(set(epochs[-1])) == 96
    assert epochs[0] != epochs[1] and set(epochs[0]) != set(epochs[1])


def test_fewer_pairs_than_a_batch_repeat(tmp_path):
    make_pairs(tmp_path / "few", n=3)
    target = open_dataset(tmp_path / "few", "train").batch(0, 9, 8).target
    assert target.shape[0] == 8 and len({tuple(row) for row in target.tolist()}) == 3


def test_pairs_read_back_in_file_order(tmp_path):
    pairs = make_pairs(tmp_path / "set")
    data = open_dataset(tmp_path / "set", "train")
    assert [data.pair(i) for i in range(len(data))] == pairs
    assert data.text(27) == ("bbbbbbb", "abb")
    for i in (-1, 100):
        with pytest.raises(ValueError, match="pairs 0 to 99"):
            data.pair(i)


def test_the_fingerprint_depends_on_the_content_only(tmp_path, monkeypatch):
    make_pairs(tmp_path / "a", note="one")
    make_pairs(tmp_path / "b" / "ä b", note="two")
    make_pairs(tmp_path / "c", n=99)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "b")
    prints = [open_dataset(name, "train").fingerprint for name in ("~/a", "ä b", "../c")]
    assert prints[0] == prints[1] != prints[2]
    assert open_dataset("../a", "train").meta["note"] == "one"


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
@pytest.mark.parametrize("damage", ["truncate", "grow", "delete"])
def test_a_file_of_the_wrong_size_is_refused(pairs_folder, name, damage):
    path = pairs_folder / name
    content = path.read_bytes()
    path.unlink()
    if damage != "delete":
        path.write_bytes(content[:-8] if damage == "truncate" else content + b"12345678")
    with pytest.raises(ValueError, match=rf"{name}: .*; build the data set with: python -m data"):
        open_dataset(pairs_folder, "train")


def test_ids_and_places_outside_their_limits_are_refused(pairs_folder):
    index = np.fromfile(pairs_folder / "train.idx", np.int64)
    (index + 10_000).tofile(pairs_folder / "train.idx")
    with pytest.raises(ValueError, match="train.idx: points outside the tokens"):
        open_dataset(pairs_folder, "train")
    index.tofile(pairs_folder / "train.idx")
    tokens = np.fromfile(pairs_folder / "train.bin", np.uint16)
    (tokens + 9999).tofile(pairs_folder / "train.bin")
    with pytest.raises(ValueError, match="train.bin: has ids outside the vocabulary of 'bytes'"):
        open_dataset(pairs_folder, "train").batch(0, 0, 4)
