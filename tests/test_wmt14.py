"""data/wmt14.py: archives made as the official ones are, read without unpacking."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from data import sources, wmt14
from data.loader import open_set
from data.wmt14 import NEWSTEST, TRAIN

SGM = """<srcset setid="newstest2014" srclang="any">
<doc sysid="ref" docid="1" genre="news" origlang="en">
<p>
<seg id="1">{} &amp; one ,  two</seg>
</p>
<hl>
<seg id="2"> {} <b> three </seg>
</hl>
</doc>
</srcset>
"""


def content(name: str, side: str) -> bytes:
    text = SGM.format(side, side) if name.endswith(".sgm") else "".join(f"{Path(name).stem} {i}\n" for i in range(4))
    return gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()


def write_archive(path: Path, corpus, others=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    members = {corpus.french: content(corpus.french, "fr"), corpus.english: content(corpus.english, "en")}
    if others:
        members = {f"{Path(corpus.english).parent}/readme": b"x" * 2000} | members | {"z.cs-en.en": b"no\n"}
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, raw in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))


@pytest.fixture
def folder(tmp_path):
    """A folder with all seven archives under their official names."""
    for corpus in (*TRAIN.values(), *NEWSTEST.values()):
        write_archive(tmp_path / "wmt" / Path(corpus.archive.url).name, corpus)
    return tmp_path / "wmt"


FLAGS = ["--target_length=48", "--block_size=96"]


def build(tmp_path, *argv):
    wmt14.main([*argv, *FLAGS, f"--out={tmp_path / 'out'}"])
    return [open_set(tmp_path / "out" / "wmt14", split) for split in ("train", "valid")]


def stems(data):
    return [data.text(i)[0].rsplit(".", 1)[0].rsplit(" ", 1)[0] for i in range(len(data))]


def test_all_corpora_are_read_in_order_and_newstest2013_is_held_out(folder, tmp_path):
    train, valid = build(tmp_path, f"--source={folder}", "--task_prefix=fr: ")
    assert len(train) == 5 * 4 and len(valid) == 4
    assert train.text(0) == ("fr: europarl-v7.fr-en 0", "europarl-v7.fr-en 0")
    assert train.text(19) == ("fr: giga-fren.release2.fixed.en 3", "giga-fren.release2.fixed.fr 3")
    assert valid.text(3) == ("fr: newstest2013 3", "newstest2013 3")
    assert train.meta["task_prefix"] == "fr: "


def test_corpora_and_limit_choose_what_is_read(folder, tmp_path):
    train, _ = build(tmp_path, f"--source={folder}", "--corpora=giga-fren,un", "--limit=3")
    assert [train.text(i)[0][:4] for i in range(len(train))] == ["giga"] * 3 + ["undo"] * 3
    for corpus in TRAIN:
        if corpus not in ("giga-fren", "un"):
            (folder / Path(TRAIN[corpus].archive.url).name).unlink()
    assert build(tmp_path, f"--source={folder}", "--corpora=giga-fren,un", "--limit=3")[0].fingerprint == (
        train.fingerprint
    )


def test_unpacked_files_give_the_same_set(folder, tmp_path):
    packed = [data.fingerprint for data in build(tmp_path, f"--source={folder}")]
    for i, path in enumerate(sorted(folder.iterdir())):
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "unpacked" / str(i), filter="data")
    assert [data.fingerprint for data in build(tmp_path, f"--source={tmp_path / 'unpacked'}")] == packed
    for path in (tmp_path / "unpacked").rglob("*.gz"):  # and when gunzip was run as well
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert [data.fingerprint for data in build(tmp_path, f"--source={tmp_path / 'unpacked'}")] == packed


def test_segments_are_what_sacrebleu_makes_of_them(folder, tmp_path):
    sgml = pytest.importorskip("sacrebleu.dataset.fake_sgml", reason="needs sacrebleu")
    examples = wmt14.read(str(folder))
    reader = sgml.FakeSGMLDataset("x", langpairs={})
    for side, field in (("en", "source"), ("fr", "target")):
        (tmp_path / "a.sgm").write_text(SGM.format(side, side))
        reader._convert_format(str(tmp_path / "a.sgm"), str(tmp_path / "a.txt"))
        assert [e[field] for e in examples] == (tmp_path / "a.txt").read_text().splitlines()
    assert [e["prefix"] for e in examples] == ["en &amp; one , two", "en <b> three"]
    assert [e["id"] for e in examples] == ["1", "2"]


def test_newstest2013_is_read_for_scoring_too(folder):
    assert [e["target"] for e in wmt14.read(str(folder), split="valid")] == [f"newstest2013 {i}" for i in range(4)]
    with pytest.raises(ValueError, match="split must be 'valid' or 'test', got 'dev'"):
        wmt14.read(str(folder), split="dev")


def test_without_a_folder_the_official_archives_are_fetched(folder, tmp_path, monkeypatch):
    """The archives lie where their download would be kept, so that no network is asked."""
    monkeypatch.setattr(sources, "DOWNLOADS", str(tmp_path / "downloads"))
    for corpus in (TRAIN["news-commentary"], NEWSTEST["valid"], NEWSTEST["test"]):
        assert corpus.archive.url.startswith("https://www.statmt.org/wmt14/")
        write_archive(tmp_path / "downloads" / corpus.archive.url.removeprefix("https://"), corpus)
    train, valid = build(tmp_path, "--corpora=news-commentary")
    assert (len(train), len(valid), len(wmt14.read())) == (4, 4, 2)


def spoil(folder, name, raw):
    (folder / name).write_bytes(raw)


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda f: (f / "dev.tgz").unlink(), "holds neither dev.tgz nor newstest2013.en"),
        (lambda f: spoil(f, "dev.tgz", b"no archive"), "dev.tgz .*cannot be read"),
        (lambda f: spoil(f, "dev.tgz", (f / "dev.tgz").read_bytes()[:150]), "dev.tgz"),
        (lambda f: write_archive(f / "dev.tgz", NEWSTEST["test"]), "dev.tgz: has no member 'dev/newstest2013.en'"),
        (
            lambda f: spoil(f, "commoncrawl.fr-en.en", b"one\n"),
            r"commoncrawl.fr-en.en has 1 lines, .*tgz \(commoncrawl.fr-en.fr\) 4",
        ),
        (lambda f: spoil(f, "undoc.2000.fr-en.fr", b"a\nb\n\xff\n"), "undoc.2000.fr-en.fr, line 3: not UTF-8"),
    ],
)
def test_damaged_archives_are_named_and_nothing_is_written(folder, tmp_path, harm, message):
    harm(folder)
    with pytest.raises(ValueError, match=message) as error:
        build(tmp_path, f"--source={folder}")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_segment_must_end_on_its_line(folder):
    spoil(folder, "newstest2014-fren-src.en.sgm", b'<seg id="1">one\ntwo</seg>\n')
    with pytest.raises(ValueError, match="src.en.sgm, line 1: a <seg> that does not end"):
        wmt14.read(str(folder))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--corpora=europarl,giga"], "no 'giga', did you mean 'giga-fren'|no 'giga'; there are"),
        (["--limit=-1"], "limit must be 0 or more"),
        (["--source=nowhere"], "nowhere: no such folder"),
    ],
)
def test_settings_are_checked_before_anything_is_read(argv, message):
    with pytest.raises(ValueError, match=message):
        wmt14.main(argv)
