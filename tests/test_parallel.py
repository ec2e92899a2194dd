"""data/parallel.py: line i translates line i, and no source sentence is on both sides."""

import gzip
import hashlib
import zipfile
from pathlib import Path

import pytest

from data import parallel, sources
from data.loader import open_set

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
MULTI30K, TATOEBA = SHARED / "multi30k", SHARED / "tatoeba" / "fra-eng.zip"
real_multi30k = pytest.mark.skipif(not MULTI30K.exists(), reason="Multi30k is not in ../shared/data/multi30k")
real_tatoeba = pytest.mark.skipif(not TATOEBA.exists(), reason="Tatoeba is not in ../shared/data/tatoeba")


def write(path, text):
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def texts(folder, split):
    data = open_set(folder, split)
    return [data.text(i) for i in range(len(data))]


def lines(word, n):
    return "".join(f"{word} {i}\n" for i in range(n))


def test_line_i_is_paired_with_line_i(tmp_path):
    a, b = (
        write(tmp_path / "a.en.gz", " A dog \u2028 runs. \r\n\nNo.\n"),
        write(tmp_path / "a.fr", "Un chien.\nx\nNon."),
    )
    first, empty, last = parallel.read(a, b, task_prefix="fr: ")
    assert first == {
        "id": "1",
        "source": "A dog \u2028 runs.",
        "task_prefix": "fr: ",
        "prefix": "fr: A dog \u2028 runs.",
        "target": "Un chien.",
    }
    assert (empty["source"], last["id"], last["target"]) == ("", "3", "Non.")  # kept: line i of the predictions is ours
    assert [parallel.prompt(e) for e in parallel.read(a, b)] == ["A dog \u2028 runs.", "", "No."]


def test_four_files_become_a_set_without_its_empty_lines(tmp_path):
    a, b = (
        write(tmp_path / "t.en", lines("dog", 50) + "\nhalf\n"),
        write(tmp_path / "t.fr", lines("chien", 50) + "x\n\n"),
    )
    c, d = write(tmp_path / "v.en", "cat\ndog 7\n"), write(tmp_path / "v.fr", "chat\nchien 7\n")
    argv = [f"--source={a}", f"--target={b}", f"--valid_source={c}", f"--valid_target={d}", f"--out={tmp_path}"]
    parallel.main([*argv, "--task_prefix=fr: ", "--target_length=16", "--block_size=32"])
    assert texts(tmp_path / "parallel", "train") == [(f"fr: dog {i}", f"chien {i}") for i in range(50)]
    assert texts(tmp_path / "parallel", "valid") == [("fr: cat", "chat"), ("fr: dog 7", "chien 7")]
    meta = open_set(tmp_path / "parallel", "valid").meta
    assert meta["empty"] == {"train": 2, "valid": 0} and meta["seen_in_training"] == 1
    assert meta["task_prefix"] == "fr: "


def test_a_zip_of_tabbed_lines_keeps_a_source_on_one_side(tmp_path):
    """As Tatoeba has it: several translations of a sentence, also with another stop, and newer files a third field."""
    rows = [f"Sentence {i // 4}{'.!'[i % 2]}\tPhrase {i}\tCC-BY someone\n" for i in range(400)]
    with zipfile.ZipFile(tmp_path / "fra-eng.zip", "w") as archive:
        archive.writestr("fra.txt", "".join(rows))
        archive.writestr("_about.txt", "licence")
    source = f"--source={tmp_path / 'fra-eng.zip'}"
    parallel.main([source, f"--out={tmp_path}", "--name=t", "--held_out=0.2", "--target_length=16", "--block_size=40"])
    train, valid = (texts(tmp_path / "t", split) for split in ("train", "valid"))
    assert sorted(train + valid) == sorted(tuple(row.split("\t")[:2]) for row in rows)
    stems = [{source[:-1] for source, _ in part} for part in (train, valid)]
    assert not stems[0] & stems[1] and 10 <= len(stems[1]) <= 30


@pytest.mark.parametrize(
    "source, target, message",
    [
        (lines("a", 5), lines("b", 3), "a.en has 5 lines, .*b.fr 3: line i must translate line i"),
        (lines("a", 3), lines("b", 9), "a.en has 3 lines, .*b.fr 9"),
        ("", lines("b", 2), "a.en has 0 lines, .*b.fr 2"),
        ("", "", "a.en: empty"),
        (lines("a", 2), b"ok\ncaf\xe9\n", r"b.fr, line 2: not UTF-8 text \(byte 3\)"),
        (lines("a", 2), None, "a.en, line 1: no tab; wants source<TAB>target, or give --target=FILE"),
        ("", None, "a.en: empty"),
        ("a\tb\nc\n", None, "a.en, line 2: no tab"),
        (None, None, "a.en: no such file"),
        ("a\tb\na\tc\n", None, "leaves no example for (train|valid)"),
    ],
)
def test_bad_files_are_one_clear_line_and_nothing_is_written(tmp_path, source, target, message):
    argv = [f"--source={tmp_path / 'a.en'}", f"--out={tmp_path / 'out'}"]
    if source is not None:
        write(tmp_path / "a.en", source)
    if target is not None:
        argv.append(f"--target={write(tmp_path / 'b.fr', target)}")
    with pytest.raises(ValueError, match=message) as error:
        parallel.main(argv)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--source=x", "--valid_target=y"], "--valid_target needs --valid_source"),
        (["--source=tatoeba", "--target=y"], "has its own files"),
        (["--source=x", "--held_out=0"], "held_out must be between"),
        (["--source=x", "--taget=y"], "did you mean 'target'"),
    ],
)
def test_settings_that_contradict_are_refused(argv, message):
    with pytest.raises(ValueError, match=message):
        parallel.main(argv)


@real_multi30k
def test_multi30k_is_the_published_one_and_needs_no_network_once_fetched(tmp_path, monkeypatch):
    """29,000, 1,014 and 1,000 pairs; sizes and checksums are those that a download is held against."""
    monkeypatch.setattr(sources, "DOWNLOADS", str(tmp_path / "downloads"))
    for name, download in parallel.MULTI30K.items():
        raw = (MULTI30K / f"{name}.gz").read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == download[1:]
        copy = tmp_path / "downloads" / download.url.removeprefix("https://")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(raw)
    parallel.main([f"--out={tmp_path}"])
    meta = open_set(tmp_path / "multi30k", "train").meta
    kept = {split: counts["pairs"] + meta["too_long"][split] for split, counts in meta["splits"].items()}
    assert kept == {"train": 29000, "valid": 1014} and meta["empty"] == {"train": 0, "valid": 0}
    assert meta["too_long"]["train"] < 2 * 0.01 * 29000
    test = parallel.read(str(MULTI30K / "test_2016_flickr.en.gz"), str(MULTI30K / "test_2016_flickr.fr.gz"))
    assert len(test) == 1000 and all(e["source"] and e["target"] for e in test)


@pytest.mark.slow  # reads 140,000 lines, 2 s
@real_tatoeba
def test_no_tatoeba_sentence_is_on_both_sides():
    """142,787 lines and 98,659 English sentences, counted by another program."""
    examples = parallel.read(str(TATOEBA))
    assert len(examples) == 142787 and len({e["source"] for e in examples}) == 98659
    sides = {True: set(), False: set()}
    for e in examples:
        bare = "".join(c for c in e["source"].lower() if c.isalnum())
        sides[sources.is_held_out(e["source"], parallel.ParallelConfig.held_out)].add(bare)
    assert not sides[True] & sides[False]
    assert 0.045 < len(sides[True]) / len(sides[True] | sides[False]) < 0.055
