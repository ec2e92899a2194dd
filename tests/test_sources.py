"""data/sources.py: downloads are whole or absent, lines end at a newline, misfits are counted."""

import gzip
import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from data_files import texts, write

from data import sources
from data.loader import open_dataset
from data.sources import SetConfig, local, read_json_lines, read_lines, read_text, write_set

BODY = bytes(range(256)) * 20
SHA = hashlib.sha256(BODY).hexdigest()


def test_a_download_is_whole_or_absent_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DOWNLOADS", str(tmp_path / "downloads"))
    original = Path(write(tmp_path / "a b.bin", BODY))
    url = original.as_uri()
    with pytest.raises(
        ValueError, match="cannot be downloaded .its sha256 is not 0000.*copy on disk"
    ):
        local(url, {url: "0" * 64})
    with pytest.raises(ValueError, match="cannot be downloaded .*No such file"):
        local(f"{url}x")
    assert not [path for path in (tmp_path / "downloads").rglob("*") if path.is_file()]
    path = local(url, {url: SHA})
    assert path.endswith("/a b.bin") and Path(path).read_bytes() == BODY
    original.unlink()
    assert local(url, {url: SHA}) == path


TEXT = "\ufeffone\r\ntwo\u2028still two\x0c\rand on\n\nlast é"
LINES = ["one", "two\u2028still two\x0c\rand on", "", "last é"]


def test_every_wrapping_gives_the_same_lines(tmp_path):
    raw = TEXT.encode()
    for name in ("a.txt", "a.txt.gz"):
        write(tmp_path / name, raw)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("_about.txt", "licence")
        archive.writestr("fra.txt", raw)
    for name in ("a.txt", "a.txt.gz", "a.zip"):
        assert read_lines(tmp_path / name) == LINES


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_texts_are_equal_whatever_their_line_ends(tmp_path, end):
    for name in ("a", "b.gz"):
        path = write(tmp_path / name, f"\ufeffone{end}{end}two")
        assert read_text(path) == "one\n\ntwo"
    path = write(tmp_path / "d.jsonl", f'{{"a": 1}}{end}{end}2')
    assert list(read_json_lines(path)) == [(1, {"a": 1}), (3, 2)]


def test_damaged_files_are_named_in_one_line(tmp_path):
    raw = "\n".join(hashlib.sha256(bytes(i)).hexdigest() for i in range(2000)).encode()
    (tmp_path / "cut.gz").write_bytes(gzip.compress(raw)[:-5000])
    (tmp_path / "latin.txt").write_bytes(b"one\ncaf\xe9\n")
    (tmp_path / "no.zip").write_bytes(b"PK plain")
    for name, message in [
        ("cut.gz", "cut.gz: cannot be read"),
        ("latin.txt", "latin.txt: not UTF-8 text .byte 7"),
        ("no.zip", "no.zip: cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            read_lines(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_hash_holds_out_its_share_whatever_case_and_punctuation():
    held = [sources.is_held_out(f"sentence {i}", 0.2) for i in range(4000)]
    assert 0.18 < np.mean(held) < 0.22
    assert held == [sources.is_held_out(f"Sentence, {i}!", 0.2) for i in range(4000)]
    assert len({sources.is_held_out(mark, 0.5) for mark in "?!–¿;:\ud800"}) == 2


def example(prefix, target, **more):
    return {"prefix": prefix, "target": target, **more}


def test_99_percent_fit_by_default_and_the_rest_is_counted(tmp_path, capsys):
    """200 targets of 1 to 200 bytes: 198 of them fit. The prefixes have 3 to 202."""
    train = [example("p" * (i + 2), "t" * i) for i in range(1, 201)]
    valid = [example("p" * 999, "t"), example("p", "t" * 200), example("p", "t"), example("p", "")]
    valid.append(example("prefix: ", "t", source=""))
    cfg = SetConfig(name="s", out=str(tmp_path))
    write_set(cfg, {"train": train, "valid": valid}, ["data.x", "--a"], note="free")
    data = open_dataset(tmp_path / "s", "train")
    assert texts(tmp_path / "s") == [[tuple(e.values()) for e in train[:198]], [("p", "t")]]
    assert (data.target_length, data.block_size) == (199, 200 + 199)
    counts = {"train": {"empty": 0, "too_long": 2}, "valid": {"empty": 2, "too_long": 2}}
    assert data.meta["left_out"] == counts
    assert (data.meta["command"], data.meta["note"]) == ("python -m data.x --a", "free")
    assert "  valid left out: 2 empty, 2 too long" in capsys.readouterr().out
