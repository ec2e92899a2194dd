"""data/toy.py: the three string tasks."""

import pytest

from data import toy
from data.loader import open_set


def test_targets_are_the_copied_reversed_and_sorted_strings():
    for split in ("train", "valid"):
        for name, task in (
            ("copy", str),
            ("reverse", lambda s: "".join(reversed(s))),
            ("sort", lambda s: "".join(sorted(s))),
        ):
            for item in toy.examples(f"toy_{name}", split)[:100]:
                assert item["target"] == task(item["prefix"])
                assert toy.score(item["target"], item) and not toy.score(item["target"] + "a", item)


def test_held_out_strings_are_new_and_every_length_is_trained():
    """Once the first strings drawn were held out, and with them every string of one letter."""
    train, valid = toy.strings("train"), toy.strings("valid")
    assert not set(train) & set(valid)
    assert len(set(train)) == len(train) and len(valid) > 900
    for part in (train, valid):
        assert {len(s) for s in part} == set(range(1, toy.LONGEST + 1))


@pytest.mark.slow  # builds three sets, 2 s
def test_the_sets_open_and_fit(tmp_path, capsys):
    toy.main([f"--out={tmp_path}"])
    for name in ("toy_copy", "toy_reverse", "toy_sort"):
        data = open_set(tmp_path / name, "valid")
        assert (data.target_length, data.block_size) == (12, 22)
        assert data.text(3) == tuple(toy.examples(name, "valid")[3].values())
    assert capsys.readouterr().out.count("\n") == 3


def test_an_unknown_task_or_split_is_refused():
    for name, split in (("toy_swap", "train"), ("toy_copy", "test")):
        with pytest.raises(ValueError, match="toy_copy, toy_reverse, toy_sort"):
            toy.examples(name, split)
