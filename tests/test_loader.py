"""data/loader.py: a batch is a function of its place; a data set is whole or refused."""

import json

import pytest
import torch

from data.loader import build_if_missing, open_dataset, prefetch, write_pairs, write_stream
from data.objectives import ObjectiveConfig
from data.tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")
TEXT = list(bytes(range(97, 123)) * 20)


def make_pairs(folder, n=100, **free):
    """n pairs with prefixes of 1 to 7 letters. Each has another target of three letters."""
    pairs = []
    for i in range(n):
        target = [97 + i // 676, 97 + i // 26 % 26, 97 + i % 26]
        pairs.append(([97 + i % 26] * (1 + i % 7), target))
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


def test_a_batch_depends_on_seed_and_step_only(folder, objective):
    used = open_dataset(folder, "train", objective)
    fresh = open_dataset(folder, "train", objective)
    for step in (0, 3, 1, 40, 2):
        used.batch(1, step, 8)
    assert equal(used.batch(7, 13, 8), fresh.batch(7, 13, 8))
    for seed, step in ((8, 13), (7, 14), (2**40 + 7, 13)):
        assert not torch.equal(used.batch(7, 13, 8).target, used.batch(seed, step, 8).target)


def test_parts_of_a_batch_are_the_whole_batch_in_another_order(folder, objective):
    """Four processes or micro-batches see what one sees. Short prefixes are together."""
    data = open_dataset(folder, "train", objective)
    for step in range(12):
        whole = data.batch(5, step, 8)
        parts = [data.batch(5, step, 8, slice(i, i + 2)) for i in range(0, 8, 2)]
        examples = torch.cat([part.example for part in parts])
        assert sorted(examples.tolist()) == [*range(8 * step, 8 * step + 8)]
        for part in parts:
            rows = part.example - 8 * step
            width = part.prefix.shape[1]
            assert torch.equal(part.target, whole.target[rows])
            assert torch.equal(part.prefix, whole.prefix[rows, :width])
            assert (whole.prefix[rows, width:] == BYTES.pad_id).all()


def test_prefetch_gives_the_same_batches_and_raises_errors_at_their_place(folder):
    data = open_dataset(folder, "train")
    batches = prefetch(data.batch, [(0, 0, 4), (0, 1, 4), (-1, 0, 4)], torch.device("cpu"))
    assert all(equal(next(batches), data.batch(0, step, 4)) for step in range(2))
    with pytest.raises(ValueError):
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
    few = data.batch(0, 9, 250).target  # fewer pairs than a batch: they repeat
    assert few.shape[0] == 250 and len({tuple(row) for row in few.tolist()}) == 100


def test_pairs_read_back_in_file_order(tmp_path):
    pairs = make_pairs(tmp_path / "set")
    data = open_dataset(tmp_path / "set", "train")
    assert [data.pair(i) for i in range(100)] == pairs and data.text(27) == ("bbbbbbb", "abb")


def test_the_fingerprint_depends_on_the_content_only(tmp_path, monkeypatch):
    make_pairs(tmp_path / "a", note="one")
    make_pairs(tmp_path / "ä b", note="two")
    make_pairs(tmp_path / "c", n=99)
    monkeypatch.setenv("HOME", str(tmp_path))
    prints = [open_dataset(f"~/{name}", "train").fingerprint for name in ("a", "ä b", "c")]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
def test_damaged_files_are_refused(pairs_folder, name):
    path = pairs_folder / name
    content = path.read_bytes()
    for damaged in (content[:-8], content + b"12345678", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}: .*; build the data set with: python -m"):
            open_dataset(pairs_folder, "train")
    path.write_bytes(b"\x77" * len(content))
    with pytest.raises(ValueError, match=f"{name}: (points outside the tokens|has ids outside)"):
        open_dataset(pairs_folder, "train").batch(0, 0, 4)


def test_a_wrong_meta_is_refused_with_the_command_that_builds_the_set(pairs_folder):
    path = pairs_folder / "meta.json"
    whole = json.loads(path.read_text())
    empty = {"splits": {"train": {"tokens": 0, "pairs": 1}}}
    changes = [{"format": 99}, {"target_length": 13}, {"block_size": 10**30}, {"sha256": 0}, empty]
    for text in [*(json.dumps(whole | change) for change in changes), "{", "[]", "1" * 5000]:
        path.write_text(text)
        with pytest.raises(ValueError, match="meta.json: missing, .*python -m data") as error:
            open_dataset(pairs_folder, "train")
        assert "\n" not in str(error.value)


def test_a_set_is_replaced_whole_or_not_at_all(pairs_folder):
    held = open_dataset(pairs_folder, "train")
    first = held.batch(0, 0, 4)
    bad = {"train": [([1], [2])], "valid": [([1], [2]), ([1], [2] * 9)]}
    with pytest.raises(ValueError, match="valid pair 1 does not fit target_length=5"):
        write_pairs(pairs_folder, bad, "bytes", 5, 12)
    assert open_dataset(pairs_folder, "train").fingerprint == held.fingerprint
    with pytest.raises(ValueError, match="exists and is no data set"):
        make_pairs(pairs_folder.parent)
    make_pairs(pairs_folder, n=50)
    assert len(open_dataset(pairs_folder, "train")) == 50
    assert equal(held.batch(0, 0, 4), first)  # it keeps its data
    assert [path.name for path in pairs_folder.parent.iterdir()] == ["set"]


def test_reserved_ids_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="0 to 255, got 256"):
        write_stream(tmp_path / "set", {"train": [[3, BYTES.pad_id] * 20]}, "bytes", 8, 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # builds three sets
def test_a_known_set_is_built_once(tmp_path, capfd):
    folder = build_if_missing(tmp_path / "toy_copy")
    assert f"python -m data.toy --out={tmp_path}" in capfd.readouterr().out
    assert len(open_dataset(folder, "train")) > 10_000
    assert build_if_missing(folder) == folder and capfd.readouterr().out == ""


def test_an_unknown_set_or_split_is_refused_with_the_known_ones(pairs_folder):
    with pytest.raises(ValueError, match="no such data set, did you mean 'squad'"):
        build_if_missing("squadd")
    with pytest.raises(ValueError, match="no split 'test'; available: train, valid"):
        open_dataset(pairs_folder, "test")


def test_spans_of_a_stream_are_pieces_of_its_text(stream_folder):
    """13 tokens make 2 hidden ones in 1 span: a prefix of 12 of 12. 14 make a prefix of 13."""
    data = open_dataset(stream_folder, "train", ObjectiveConfig(objective="span_corruption"))
    prefix, target, _ = data.batch(0, 3, 6)
    for row in range(6):
        kept, span = BYTES.decode(prefix[row]), BYTES.decode(target[row])
        piece = kept.replace("<0>", span.removeprefix("<0>"))
        assert kept.endswith("<0>") and len(piece) == 13 and piece in BYTES.decode(TEXT * 2)


def test_pairs_under_another_objective_are_texts_cut_anew(pairs_folder):
    data = open_dataset(pairs_folder, "train", ObjectiveConfig(objective="prefix_lm"))
    texts = {"\n".join(data.text(i)) for i in range(len(data))}
    cuts = set()
    for step in range(40):
        for sides in zip(*data.batch(0, step, 4)[:2]):
            prefix, rest = map(BYTES.decode, sides)
            assert prefix and any(prefix + rest in text for text in texts)
            cuts.add(len(prefix))
    assert len(cuts) > 4
