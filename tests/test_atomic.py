"""atomic.py: a file is whole or not there, a changed one is noticed, the last few stay."""

import os
import random
import zipfile

import pytest
import torch

import atomic
from atomic import Damaged, history, put_in_place, read_state, sha256, write_atomically, write_state

STATE = {"format": 1, "numbers": torch.arange(40.0), "text": "x"}


@pytest.fixture
def path(tmp_path):
    write_state(tmp_path / "a.pt", STATE)
    return tmp_path / "a.pt"


def test_what_is_written_is_read(path):
    state = read_state(path)
    assert state["text"] == "x" and torch.equal(state["numbers"], STATE["numbers"])


def test_a_sealed_file_is_still_an_archive_for_everybody(path):
    """The seal is a comment: torch and zip programs read on as if it were not there, and see what it says."""
    assert torch.load(path, weights_only=True)["text"] == "x"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256 ")
    with open(path, "rb") as file:
        assert sha256(file, path.stat().st_size - 64 - 9).decode() == archive.comment[7:].decode()


def test_a_file_without_a_seal_is_read_as_it_is(path):
    """As they were written before there was one."""
    torch.save(STATE, path)
    assert read_state(path)["text"] == "x"


def test_every_flipped_bit_is_noticed(path):
    whole, rng = path.read_bytes(), random.Random(0)
    places = {0, 1, len(whole) - 1, len(whole) - 64, len(whole) - 72, len(whole) - 73, len(whole) - 80, len(whole) - 95}
    places |= {rng.randrange(len(whole)) for _ in range(300)}
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(Damaged):
            read_state(path)


def test_a_file_cut_anywhere_is_noticed(path):
    whole = path.read_bytes()
    for length in [0, 1, 3, 4, 21, 22, 100, *range(len(whole) - 100, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read_state(path)


def test_a_file_that_is_as_it_was_written_is_not_damaged_where_memory_is_short(path, monkeypatch):
    """Put aside for that, a run would lose its last checkpoint to a busy machine."""

    def short(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", short)
    with pytest.raises(ValueError, match="can't allocate memory") as error:
        read_state(path)
    assert not isinstance(error.value, Damaged)


def test_a_damaged_file_names_the_one_before(path):
    write_state(path, STATE, keep=2)
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(Damaged, match=r"a\.1\.pt is the one before it"):
        read_state(path)


def numbers(folder) -> dict[str, str]:
    return {p.name: p.read_text() for p in sorted(folder.iterdir())}


def write(path, text: str, keep: int):
    write_atomically(path, lambda file: file.write(text.encode()), keep)


@pytest.mark.parametrize(
    "keep, left",
    [
        (1, {"a.pt": "4"}),
        (2, {"a.1.pt": "3", "a.pt": "4"}),
        (3, {"a.1.pt": "3", "a.2.pt": "2", "a.pt": "4"}),
        (9, {"a.1.pt": "3", "a.2.pt": "2", "a.3.pt": "1", "a.4.pt": "0", "a.pt": "4"}),
    ],
)
def test_the_last_few_stay(tmp_path, keep, left):
    for k in range(5):
        write(tmp_path / "a.pt", str(k), keep)
    assert numbers(tmp_path) == left


def test_fewer_than_before_are_kept_where_that_is_asked(tmp_path):
    for k in range(6):
        write(tmp_path / "a.pt", str(k), 5)
    write(tmp_path / "a.pt", "6", 2)
    assert numbers(tmp_path) == {"a.1.pt": "5", "a.pt": "6"}


def test_a_file_system_without_links_keeps_the_last_few_too(tmp_path, monkeypatch):
    def none(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", none)
    for k in range(4):
        write(tmp_path / "a.pt", str(k), 3)
    assert numbers(tmp_path) == {"a.1.pt": "2", "a.2.pt": "1", "a.pt": "3"}


@pytest.mark.parametrize("keep", [1, 3])
def test_a_folder_takes_the_place_of_a_file_and_back(tmp_path, keep):
    """A run that goes on under FSDP, and then without."""
    path, half = tmp_path / "a.pt", tmp_path / "a.pt.tmp"
    write(path, "file", keep)
    for text in ("shards", "more shards"):
        half.mkdir()
        (half / "fields.pt").write_text(text)
        put_in_place(half, path, keep)
    assert (path / "fields.pt").read_text() == "more shards"
    write(path, "file again", keep)
    assert path.read_text() == "file again"
    names = {1: ["a.pt"], 3: ["a.1.pt", "a.2.pt", "a.pt"]}[keep]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_at_no_moment_is_there_nothing_to_read(tmp_path, monkeypatch):
    """Whatever call a kill comes before: one of the last two contents is in its place."""
    path, seen = tmp_path / "a.pt", []
    for name in ("link", "replace", "fsync"):
        call = getattr(os, name)

        def watched(*args, call=call):
            seen.append(path.read_text() if path.exists() else "nothing")
            return call(*args)

        monkeypatch.setattr(os, name, watched)
    for k in range(4):
        write(path, str(k), 3)
    first = seen.index("0")
    assert len(seen) > 15 and set(seen[:first]) == {"nothing"} and set(seen[first:]) == {"0", "1", "2", "3"}


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    def half(file):
        file.write(b"half")
        raise RuntimeError("[enforce fail] . unexpected pos")  # torch's words for a full disk

    write(tmp_path / "a.pt", "old", 2)
    with pytest.raises(OSError, match="not written .*untouched"):
        write_atomically(tmp_path / "a.pt", half, 2)
    assert numbers(tmp_path) == {"a.pt": "old"}
    with pytest.raises(OSError, match="gone/a.pt: not written"):
        write(tmp_path / "gone" / "a.pt", "new", 2)


def test_history_names_the_newest_without_a_number():
    assert [history("out/ckpt.pt", n).name for n in range(3)] == ["ckpt.pt", "ckpt.1.pt", "ckpt.2.pt"]
    assert atomic.SEAL[:2] == (71).to_bytes(2, "little")


def test_a_file_that_stands_alone_takes_nothing_else_with_it(tmp_path):
    """No history: neighbours whose names look like one stay, and so does a folder that is in the way."""
    for name in ("page.1.html", "page.2.html"):
        (tmp_path / name).write_text("mine")
    write_atomically(tmp_path / "page.html", lambda file: file.write(b"new"))
    write_atomically(tmp_path / "page.html", lambda file: file.write(b"newer"))
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "a.json").write_text("mine")
    for keep in (0, 1, 3):
        with pytest.raises(OSError, match="not written .*results"):
            write_atomically(folder, lambda file: file.write(b"new"), keep)
    assert (folder / "a.json").read_text() == "mine" and (tmp_path / "page.html").read_text() == "newer"
    assert [(tmp_path / name).read_text() for name in ("page.1.html", "page.2.html")] == ["mine"] * 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.1.html", "page.2.html", "page.html", "results"]
