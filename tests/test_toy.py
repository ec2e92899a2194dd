"""data/toy.py: the three string tasks."""

import pytest

from data import toy
from data.loader import open_dataset

ORACLES = {
    "copy": str,
    "reverse": lambda s: "".join(reversed(s)),
    "sort": lambda s: "".join(sorted(s)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_targets_are_copied_reversed_and_sorted(name):
    for item in toy.examples(f"toy_{name}", "valid"):
        assert item["target"] == ORACLES[name](item["prefix"])


def test_held_out_strings_are_new_and_every_length_is_trained():
    train, valid = toy.strings("train"), toy.strings("valid")
    assert not set(train) & set(valid)
    assert len(set(train)) == len(train) and len(valid) > 900
    for part in (train, valid):
        assert {len(s) for s in part} == set(range(1, toy.LONGEST + 1))


FINGERPRINTS = ["d3de693e02474c16", "0aa84a0156fdc3eb", "8f64189c7f83ebe8"]


@pytest.mark.slow  # builds three sets
def test_the_sets_are_the_same_on_every_machine(tmp_path):
    toy.main([f"--out={tmp_path}"])
    sets = [open_dataset(tmp_path / f"toy_{name}", "valid") for name in ORACLES]
    assert {(data.target_length, data.block_size) for data in sets} == {(12, 22)}
    assert sets[1].text(3) == tuple(toy.examples("toy_reverse", "valid")[3].values())
    assert [data.fingerprint for data in sets] == FINGERPRINTS
