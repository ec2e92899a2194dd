"""data/parallel.py: line i translates line i, and no source sentence is in both splits."""

import gzip
import hashlib
import zipfile
from pathlib import Path

import pytest
from data_files import texts, write

from data import parallel, sources
from data.loader import open_dataset

MULTI30K = Path(__file__).parents[2] / "shared" / "data" / "multi30k"
real = pytest.mark.skipif(not MULTI30K.exists(), reason="no ../shared/data/multi30k")
SIZES = ["--target_length=48", "--block_size=96"]


def lines(word, n):
    return "".join(f"{word} {i}\n" for i in range(n))


def test_line_i_is_paired_with_line_i(tmp_path):
    """Only line ends end a line. Empty lines stay: line i of the predictions is line i here."""
    a = write(tmp_path / "a.en.gz", " A dog \u2028 ru\rns. \r\n\nNo.\n")
    b = write(tmp_path / "a.fr", "Un chien.\nx\nNon.")
    examples = parallel.read(a, b, task_prefix="fr: ")
    assert [[*example.values()] for example in examples] == [
        ["1", "A dog \u2028 ru\rns.", "fr: A dog \u2028 ru\rns.", "Un chien."],
        ["2", "", "fr: ", "x"],
        ["3", "No.", "fr: No.", "Non."],
    ]


def test_four_files_become_a_set_without_empty_lines(tmp_path):
    files = {
        "source": write(tmp_path / "t.en", lines("dog", 50) + "\nhalf\n"),
        "target": write(tmp_path / "t.fr", lines("chien", 50) + "x\n\n"),
        "valid_source": write(tmp_path / "v.en", "cat\n"),
        "valid_target": write(tmp_path / "v.fr", "chat\n"),
    }
    argv = [f"--{name}={path}" for name, path in files.items()]
    parallel.main([*argv, *SIZES, "--task_prefix=fr: ", f"--out={tmp_path}"])
    pairs = [(f"fr: dog {i}", f"chien {i}") for i in range(50)]
    assert texts(tmp_path / "parallel") == [pairs, [("fr: cat", "chat")]]
    meta = open_dataset(tmp_path / "parallel", "valid").meta
    assert meta["left_out"]["train"]["empty"] == 2 and meta["task_prefix"] == "fr: "


def test_a_reverse_prefix_adds_each_pair_the_other_way_round(tmp_path):
    write(tmp_path / "a.tsv", "".join(f"dog {i}\tchien {i}\n" for i in range(50)))
    argv = [f"--source={tmp_path / 'a.tsv'}", "--task_prefix=fr: ", "--reverse_prefix=en: "]
    parallel.main([*argv, *SIZES, "--held_out=0.2", f"--out={tmp_path}"])
    for part in texts(tmp_path / "parallel"):
        forward = [pair for pair in part if pair[0].startswith("fr: ")]
        backward = [pair for pair in part if pair[0].startswith("en: ")]
        assert backward == [(f"en: {target}", source[4:]) for source, target in forward]
        assert len(part) == 2 * len(forward) > 0


def test_a_zip_of_tabbed_lines_keeps_a_source_in_one_split(tmp_path):
    """As in Tatoeba: several translations of a sentence, with any stop, and a third field."""
    rows = [f"Sentence {i // 4}{'.!'[i % 2]}\tPhrase {i}\tCC-BY someone\n" for i in range(400)]
    with zipfile.ZipFile(tmp_path / "fra-eng.zip", "w") as archive:
        archive.writestr("fra.txt", "".join(rows))
    source = f"--source={tmp_path / 'fra-eng.zip'}"
    parallel.main([source, f"--out={tmp_path}", "--name=t", "--held_out=0.2", *SIZES])
    train, valid = texts(tmp_path / "t")
    assert sorted(train + valid) == sorted(tuple(row.split("\t")[:2]) for row in rows)
    stems = [{source[:-1] for source, _ in part} for part in (train, valid)]
    assert not stems[0] & stems[1] and 10 <= len(stems[1]) <= 30


@real
def test_multi30k_is_the_published_one(tmp_path, monkeypatch):
    """29,000 and 1,014 pairs. The checksums are those that a download is compared with."""
    monkeypatch.setattr(sources, "DOWNLOADS", str(tmp_path / "downloads"))
    for url, sha256 in parallel.CHECKSUMS.items():
        raw = (MULTI30K / Path(url).name).read_bytes()
        assert hashlib.sha256(raw).hexdigest() == sha256
        write(tmp_path / "downloads" / url.removeprefix("https://"), gzip.decompress(raw))
    parallel.main([f"--out={tmp_path}"])
    meta = open_dataset(tmp_path / "multi30k", "train").meta
    for split, n in (("train", 29_000), ("valid", 1_014)):
        assert meta["splits"][split]["pairs"] + meta["left_out"][split]["too_long"] == n
    assert meta["left_out"]["train"]["too_long"] < 2 * 0.01 * 29_000
