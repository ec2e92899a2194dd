"""data/loader.py: batches as a function of their place, and sets that are whole or refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data import loader
from data.loader import bucketed_epoch, build_if_missing, join_documents, open_set, write_pairs, write_stream
from data.objectives import ObjectiveConfig, splice
from data.tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")
TEXT = list(bytes(range(97, 123)) * 20)


def make_pairs(folder: Path, n: int = 100, **meta):
    """n pairs whose prefix lengths run through 1 to 7; the target, three letters, is different for each."""
    pairs = [([97 + i % 26] * (1 + i % 7), [97 + i // 676, 97 + i // 26 % 26, 97 + i % 26]) for i in range(n)]
    write_pairs(folder, {"train": pairs, "valid": pairs[:5]}, "bytes", 5, 12, **meta)
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


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_a_batch_depends_on_seed_and_step_alone(folder):
    used, fresh = open_set(folder, "train"), open_set(folder, "train")
    for step in (0, 3, 1, 40, 2):
        used.batch(1, step, 8)
    assert equal(used.batch(7, 13, 8), fresh.batch(7, 13, 8))
    assert not torch.equal(used.batch(7, 13, 8).target, used.batch(8, 13, 8).target)
    assert not torch.equal(used.batch(7, 13, 8).target, used.batch(7, 14, 8).target)


@pytest.mark.parametrize("bucket", [1, 2])
def test_slices_of_rows_put_together_are_the_whole_batch(folder, bucket):
    """Four processes or four micro-batches see what one sees. A part may need less padding than the whole."""
    data = open_set(folder, "train")
    for step in range(12):
        whole = data.batch(5, step, 8, bucket=bucket)
        parts = [data.batch(5, step, 8, slice(i, i + 2), bucket) for i in range(0, 8, 2)]
        width = whole.prefix.shape[1]
        padded = [torch.nn.functional.pad(p.prefix, (0, width - p.prefix.shape[1]), value=BYTES.pad_id) for p in parts]
        assert torch.equal(torch.cat(padded), whole.prefix)
        assert torch.equal(torch.cat([p.target for p in parts]), whole.target)
        assert torch.equal(torch.cat([p.example for p in parts]), whole.example)


def test_examples_are_numbered_across_the_run(folder):
    assert open_set(folder, "train").batch(0, 6, 4, slice(1, 3)).example.tolist() == [25, 26]


def test_the_target_opens_with_the_separator_and_is_as_wide_as_meta_says(folder):
    data = open_set(folder, "train")
    for step in range(5):
        target = data.batch(0, step, 4).target
        assert target.shape == (4, data.target_length)
        assert (target[:, 0] == BYTES.sep_id).all()


def test_a_stream_never_pads_and_draws_every_prefix_length(stream_folder):
    data = open_set(stream_folder, "train")
    batches = [data.batch(0, step, 3) for step in range(200)]
    assert {b.prefix.shape[1] for b in batches} == set(range(1, 20 - 8 + 1))
    for prefix, target, _ in batches:
        window = torch.cat([prefix, target[:, 1:]], dim=1)  # in this text every letter is followed by the next
        assert ((window[:, 1:] - window[:, :-1]) % 26 == 1).all()


def test_a_stream_as_long_as_its_block_still_gives_batches(tmp_path):
    write_stream(tmp_path / "s", {"train": [TEXT[:20]]}, "bytes", 8, 20)
    data = open_set(tmp_path / "s", "train")
    assert {data.batch(0, step, 4).target.shape for step in range(50)} == {(4, 8)}


def test_every_epoch_is_a_new_permutation(pairs_folder):
    """100 pairs in batches of 8 are 12 steps; 96 different pairs are shown and the 4 left out change."""
    data = open_set(pairs_folder, "train")
    shown = []
    for epoch in range(3):
        targets = torch.cat([data.batch(3, 12 * epoch + k, 8).target for k in range(12)])
        shown.append([tuple(row) for row in targets.tolist()])
        assert len(set(shown[-1])) == 96
    assert shown[0] != shown[1] and set(shown[0]) != set(shown[1])


def test_runs_are_of_one_length_except_for_what_is_left_over():
    lengths = np.array([5] * 9 + [3] * 10 + [8] * 13)
    for batch_size in (4, 8, 16):
        batches = bucketed_epoch(lengths, batch_size, 4, np.random.default_rng(0))
        assert batches.shape == (32 // batch_size, batch_size)
        assert sorted(batches.ravel().tolist()) == list(range(32))
        # Full runs: 2 of length 5, 2 of length 3, 3 of length 8; one mixed one of the 1 + 2 + 1 left over.
        assert sum(len(set(lengths[run])) == 1 for run in batches.reshape(-1, 4)) == 7


def test_a_bucket_of_one_does_not_sort_and_a_whole_one_spares_the_mask(pairs_folder):
    data = open_set(pairs_folder, "train")
    padded = {
        bucket: sum(bool((data.batch(0, k, 4, bucket=bucket).prefix == BYTES.pad_id).any()) for k in range(25))
        for bucket in (1, 4)
    }
    assert padded[1] > 20 and padded[4] < 8  # of 25; 14 or 15 pairs of each of the 7 lengths
    with pytest.raises(ValueError, match="bucket must divide batch_size, got 3 and 4"):
        data.batch(0, 0, 4, bucket=3)


def test_the_remainder_is_dropped_at_random_and_not_from_the_longest():
    """Were it cut off after sorting, the one longest example would never be trained on."""
    lengths = np.array([1] * 9 + [2])
    for bucket in (1, 4):
        seen = [9 in bucketed_epoch(lengths, 4, bucket, np.random.default_rng(i)) for i in range(50)]
        assert 25 < sum(seen) < 50  # 8 of 10 are shown


def test_fewer_pairs_than_a_batch_wrap_around(tmp_path):
    make_pairs(tmp_path / "few", n=3)
    target = open_set(tmp_path / "few", "train").batch(0, 9, 8).target
    assert target.shape[0] == 8
    assert len({tuple(row) for row in target.tolist()}) == 3


def test_pairs_read_back_in_file_order(tmp_path):
    pairs = make_pairs(tmp_path / "set")
    data = open_set(tmp_path / "set", "train")
    assert len(data) == 100
    assert [data.pair(i) for i in range(100)] == pairs
    assert data.text(27) == ("bbbbbbb", "abb")
    for i in (-1, 100):
        with pytest.raises(ValueError, match="pairs 0 to 99"):
            data.pair(i)


def test_empty_sides_are_kept(tmp_path):
    pairs = [([], [97]), ([98], [])]
    write_pairs(tmp_path / "set", {"train": pairs}, "bytes", 3, 5)
    data = open_set(tmp_path / "set", "train")
    assert [data.pair(i) for i in range(2)] == pairs


def test_a_seed_of_any_size_works_and_a_negative_one_is_refused(folder):
    data = open_set(folder, "train")
    assert not torch.equal(data.batch(2**40, 0, 8).target, data.batch(2**41, 0, 8).target)
    with pytest.raises(ValueError, match="seed=-1"):
        data.batch(-1, 0, 8)


def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path):
    make_pairs(tmp_path / "a", note="one")
    make_pairs(tmp_path / "b", note="two")
    make_pairs(tmp_path / "c", n=99)
    prints = [open_set(tmp_path / name, "train").fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]
    assert open_set(tmp_path / "a", "train").meta["note"] == "one"


def test_large_vocabularies_use_two_bytes_a_token(stream_folder):
    assert open_set(stream_folder, "train").meta["dtype"] == "uint16"
    assert (stream_folder / "train.bin").stat().st_size == 2 * 2 * len(TEXT)


def test_documents_are_joined_by_a_blank_line():
    joined = [i for chunk in join_documents(["one\n", "two"], BYTES) for i in chunk]
    assert BYTES.decode(joined) == "one\n\ntwo\n\n"


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
@pytest.mark.parametrize("damage", ["truncate", "grow", "delete"])
def test_a_file_of_the_wrong_size_is_refused(pairs_folder, name, damage):
    path = pairs_folder / name
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-8] if damage == "truncate" else path.read_bytes() + b"12345678")
    with pytest.raises(ValueError, match=rf"{name}: .*; build the set with: python -m data"):
        open_set(pairs_folder, "train")


def test_a_missing_or_foreign_meta_is_refused_with_the_command(tmp_path):
    (tmp_path / "mini").mkdir()
    with pytest.raises(ValueError, match=r"meta.json: not found; build the set with: python -m data.mini --out="):
        open_set(tmp_path / "mini", "train")
    for text, fault in (
        ("{", "cannot be read"),
        ('{"format": 99}', "format 99, this code reads 1"),
        ("[]", "format None"),
    ):
        (tmp_path / "mini" / "meta.json").write_text(text)
        with pytest.raises(ValueError, match=fault) as error:
            open_set(tmp_path / "mini", "train")
        assert "\n" not in str(error.value)


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(ValueError, match="splits 'train', 'valid', got 'test'"):
        open_set(folder, "test")


def test_a_set_that_fails_half_way_leaves_the_old_one_and_no_scratch(pairs_folder):
    before = open_set(pairs_folder, "train").fingerprint
    with pytest.raises(ValueError, match="valid pair 1: its target has 9 tokens, limit 4"):
        write_pairs(pairs_folder, {"train": [([1], [2])], "valid": [([1], [2]), ([1], [2] * 9)]}, "bytes", 5, 12)
    assert open_set(pairs_folder, "train").fingerprint == before
    assert [p.name for p in pairs_folder.parent.iterdir()] == ["set"]


def test_a_set_is_replaced_whole_and_an_open_one_keeps_its_data(pairs_folder):
    held = open_set(pairs_folder, "train")
    first = held.batch(0, 0, 4)
    make_pairs(pairs_folder, n=50)
    assert len(open_set(pairs_folder, "train")) == 50
    assert equal(held.batch(0, 0, 4), first)
    assert [p.name for p in pairs_folder.parent.iterdir()] == ["set"]


def test_a_folder_that_is_no_set_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no data set, so it is not replaced"):
        make_pairs(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").exists()


def test_what_cannot_be_trained_on_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="valid has 19 tokens, fewer than block_size=20"):
        write_stream(tmp_path / "s", {"train": [TEXT], "valid": [TEXT[:19]]}, "bytes", 8, 20)
    with pytest.raises(ValueError, match="target_length < block_size"):
        write_stream(tmp_path / "s", {"train": [TEXT]}, "bytes", 20, 20)
    with pytest.raises(ValueError, match="token ids must be 0 to 255, got 3 to 256"):
        write_stream(tmp_path / "s", {"train": [[3, BYTES.pad_id] * 20]}, "bytes", 8, 20)
    with pytest.raises(ValueError, match="train has no pairs"):
        write_pairs(tmp_path / "s", {"train": []}, "bytes", 5, 12)
    with pytest.raises(ValueError, match="train pair 0: its prefix has 8 tokens, limit 7"):
        write_pairs(tmp_path / "s", {"train": [([1] * 8, [2])]}, "bytes", 5, 12)
    with pytest.raises(ValueError, match="may not be called format"):
        write_pairs(tmp_path / "s", {"train": [([1], [2])]}, "bytes", 5, 12, format=3)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # builds three sets, 4 s
def test_a_known_set_is_built_once_and_the_command_is_shown(tmp_path, capfd):
    folder = build_if_missing(tmp_path / "toy_copy")
    shown = capfd.readouterr().out
    assert shown.startswith(f"building {tmp_path}/toy_copy: python -m data.toy --out={tmp_path}")
    assert len(open_set(folder, "train")) > 10_000
    assert build_if_missing(folder) == folder
    assert capfd.readouterr().out == ""
    shutil.rmtree(folder)


def test_a_set_that_cannot_be_built_is_refused_with_those_that_can(tmp_path):
    with pytest.raises(ValueError, match=r"no such set, .* mini, .*toy_copy"):
        build_if_missing(tmp_path / "squadd")


def test_every_name_in_the_table_has_its_module():
    made, fetched = {"mini", "toy", "python_code"}, {"squad", "mbpp", "parallel"}
    assert {module.split(".")[1] for module in loader.SETS.values()} == made | fetched
    for module in loader.SETS.values():
        assert Path(loader.__file__).with_name(module.split(".")[1] + ".py").exists()


def test_meta_can_be_read_by_people_and_other_programs(pairs_folder):
    meta = json.loads((pairs_folder / "meta.json").read_text())
    assert {k: meta[k] for k in ("format", "kind", "tokenizer", "target_length", "block_size")} == {
        "format": 1,
        "kind": "pairs",
        "tokenizer": "bytes",
        "target_length": 5,
        "block_size": 12,
    }
    assert meta["splits"]["valid"] == {"tokens": 5 * 3 + 1 + 2 + 3 + 4 + 5, "pairs": 5}


# Objectives

SPANS = ObjectiveConfig(objective="span_corruption", span_density=0.3, mean_span=2.0)
SENTINELS = range(BYTES.sentinel(0), BYTES.vocab_size)


def spliced(batch, row: int) -> str:
    sides = [[t for t in side[row].tolist() if t != BYTES.pad_id] for side in (batch.prefix, batch.target[:, 1:])]
    return BYTES.decode(splice(*sides, SENTINELS))


def test_spans_of_a_stream_are_cut_from_its_text(stream_folder):
    """Each row, put together again, is a piece of the text; its length is the most that fits 12 + 7 slots."""
    batch, text = open_set(stream_folder, "train", SPANS).batch(0, 3, 6), BYTES.decode(TEXT + TEXT)
    pieces = {spliced(batch, row) for row in range(6)}
    assert len(pieces) > 1 and all(piece in text for piece in pieces)
    # 14 tokens: 4 hidden in 2 spans, prefix 12 and target 6 of 7. 15: round(4.5) = 4 hidden, a prefix of 13.
    assert {len(piece) for piece in pieces} == {14}
    assert batch.prefix.shape == (6, 12) and batch.target.shape == (6, 8)


@pytest.mark.parametrize("objective", [ObjectiveConfig(objective="prefix_lm"), SPANS], ids=lambda o: o.objective)
def test_under_another_objective_a_pair_is_one_text(pairs_folder, objective):
    """aaa + xyz becomes "aaa", line end, "xyz", whole or in part."""
    data, texts = open_set(pairs_folder, "train", objective), []
    whole = {f"{prefix}\n{target}" for prefix, target in map(data.text, range(len(data)))}
    for step in range(30):
        batch = data.batch(0, step, 4)
        for row in range(4):
            if objective is SPANS:
                texts.append(spliced(batch, row))
            else:
                texts.append(BYTES.decode(batch.prefix[row]) + BYTES.decode(batch.target[row]))
            assert any(texts[-1] in text for text in whole)
        assert batch.prefix.shape[1] <= 7 and batch.target.shape[1] == 5


@pytest.mark.parametrize("objective", [ObjectiveConfig(objective="prefix_lm"), SPANS], ids=lambda o: o.objective)
def test_objectives_depend_on_the_example_and_not_on_its_neighbours(folder, objective):
    data = open_set(folder, "train", objective)
    whole, part = data.batch(5, 2, 8), data.batch(5, 2, 8, slice(4, 8))
    assert torch.equal(whole.target[4:], part.target)
    assert torch.equal(whole.prefix[4:, : part.prefix.shape[1]], part.prefix)
