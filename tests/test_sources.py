"""data/sources.py: what is fetched is whole or not there, lines end at a newline, and what does not fit is counted."""

import gzip
import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from data import sources
from data.loader import open_set
from data.sources import Download, SetConfig, is_held_out, local, read_lines, write_set

BODY = bytes(range(256)) * 20
SHA = hashlib.sha256(BODY).hexdigest()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/gone":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[:-7] if self.path == "/broken" else BODY)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DOWNLOADS", str(tmp_path / "downloads"))
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_a_url_is_fetched_once_and_kept_under_its_host_and_path(server, tmp_path, capsys):
    url = f"{server.url}/set/../a%20b.gz"
    known = [Download(url, len(BODY), SHA)]
    path = local(url, known)
    assert path.endswith(f"127.0.0.1:{server.server_port}/set/a b.gz")
    assert files(tmp_path) == [tmp_path / path] and (tmp_path / path).read_bytes() == BODY
    assert local(url, known) == path and len(server.asked) == 1
    assert capsys.readouterr().out.count("fetched from") == 1


def test_a_path_is_left_alone_and_a_file_url_is_copied(server, tmp_path):
    assert local("some/file.gz") == "some/file.gz"
    (tmp_path / "x").write_bytes(BODY)
    assert open(local((tmp_path / "x").as_uri()), "rb").read() == BODY


@pytest.mark.parametrize(
    "path, size, sha256, message",
    [
        ("/gone", 0, "", "404"),
        ("/broken", 0, "", "5,113 bytes came, 5,120 were expected"),
        ("/whole", 5121, "", "5,120 bytes came, 5,121 were expected"),
        ("/whole", 5120, "0" * 64, f"its sha256 is {SHA}, 0000"),
    ],
)
def test_what_is_not_whole_and_as_published_is_not_kept(server, tmp_path, path, size, sha256, message):
    url = server.url + path
    with pytest.raises(ValueError, match=f"^{url}: cannot be fetched .*{message}.*with --source$"):
        local(url, [Download(url, size, sha256)])
    assert not files(tmp_path)


def test_without_a_network_the_way_out_is_named(server, tmp_path):
    url = server.url.rpartition(":")[0] + ":1/x.gz"
    with pytest.raises(ValueError, match=r"cannot be fetched \(.*refused\); give a copy on disk with --source$"):
        local(url)
    assert not list(tmp_path.iterdir())


TEXT = "\ufeffone\r\ntwo\u2028still two\x0c\rand on\n\nlast é"
LINES = ["one", "two\u2028still two\x0c\rand on", "", "last é"]


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_the_same_lines_come_out_of_every_wrapping(tmp_path):
    raw = TEXT.encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw))
    write_tar(tmp_path / "a.tgz", {"other": b"x" * 3000, "in/a.txt": raw, "./b.txt.gz": gzip.compress(raw)})
    write_tar(tmp_path / "a.tar", {"in/a.txt": raw, "b.txt.gz": gzip.compress(raw), "other": b"y"})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("_about.txt", "licence")
        archive.writestr("fra.txt", raw)
    whole = [list(read_lines(str(tmp_path / name))) for name in ("a.txt", "a.txt.gz", "a.zip")]
    members = [
        list(read_lines(str(tmp_path / name), m)) for name in ("a.tgz", "a.tar") for m in ("in/a.txt", "b.txt.gz")
    ]
    assert whole + members == [LINES] * 7


def test_damaged_files_are_named_in_one_line(tmp_path):
    raw = "".join(f"{i} {hashlib.sha256(str(i).encode()).hexdigest()}\n" for i in range(2000)).encode()
    (tmp_path / "cut.gz").write_bytes(gzip.compress(raw)[:-5000])
    (tmp_path / "latin.txt").write_bytes(b"one\ncaf\xe9\n")
    write_tar(tmp_path / "cut.tgz", {"m": raw})
    (tmp_path / "cut.tgz").write_bytes((tmp_path / "cut.tgz").read_bytes()[:-5000])
    (tmp_path / "no.zip").write_bytes(b"PK plain")
    for name in ("two", "none"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for text in ("a.txt", "b.tsv", "c.md")[:: 1 if name == "two" else 5][: 3 if name == "two" else 0]:
                archive.writestr(text, "x")
    for name, member, message in [
        ("missing.txt", "", "missing.txt: no such file"),
        ("cut.gz", "", r"cut.gz: cannot be read after line \d\d+"),
        ("cut.tgz", "m", r"cut.tgz \(m\): cannot be read after line \d\d+"),
        ("cut.tgz", "absent", "cut.tgz.*(cannot be read|has no member)"),
        ("latin.txt", "", r"latin.txt, line 2: not UTF-8 text \(byte 3\)"),
        ("no.zip", "", "no.zip: cannot be read"),
        ("two.zip", "", "wants one text file in it, has a.txt, b.tsv, c.md"),
        ("none.zip", "", "wants one text file in it, has nothing"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            list(read_lines(str(tmp_path / name), member))
        assert "\n" not in str(error.value)


def test_a_hash_holds_out_its_share_whatever_case_and_punctuation():
    held = [is_held_out(f"sentence {i}", 0.2) for i in range(4000)]
    assert 0.18 < np.mean(held) < 0.22
    assert held == [is_held_out(f"Sentence, {i}!", 0.2) for i in range(4000)]
    assert all(is_held_out(f"sentence {i}", 0.5) for i in range(4000) if held[i])
    assert len({is_held_out(mark, 0.5) for mark in ("?", "!", "...", "?!", "–", "¿", ";", ":")}) == 2


def example(i, prefix, target, **more):
    return {"id": str(i), "prefix": prefix, "target": target, **more}


def test_99_percent_fit_by_default_and_the_rest_is_counted(tmp_path, capsys):
    """200 targets of 1 to 200 bytes: 198 of them fit; the prefixes, equally long, are those of 3 to 202."""
    train = [example(i, "p" * (i + 2), "t" * i) for i in range(1, 201)]
    valid = [example(0, "p" * 999, "t"), example(1, "ppp", "t" * 200), example(2, "ppp", "t"), example(3, "pp", "")]
    cfg = SetConfig(source="file", name="s", out=str(tmp_path))
    meta = write_set(cfg, train, valid, "the command", licence="free")
    assert (meta["target_length"], meta["block_size"]) == (199, 200 + 199)
    assert meta["too_long"] == {"train": 2, "valid": 2} and meta["empty"] == {"train": 0, "valid": 1}
    assert meta["seen_in_training"] == 1 and meta["licence"] == "free" and meta["command"] == "the command"
    data = open_set(tmp_path / "s", "train")
    assert [data.text(i) for i in range(len(data))] == [(e["prefix"], e["target"]) for e in train[:198]]
    assert [open_set(tmp_path / "s", "valid").text(i) for i in range(1)] == [("ppp", "t")]
    printed = capsys.readouterr().out
    assert "2 of 200 in training, 2 of 3 held out; as empty: 0 and 1" in printed and printed.count("\n") == 2


@pytest.mark.parametrize(
    "cfg, valid, message",
    [
        ({}, [], "file: leaves no example for valid"),
        ({}, [example(7, "p", "\ud800")], "valid example 7: text is not valid Unicode"),
        ({"target_length": 5, "block_size": 5}, [example(7, "p", "t")], "none of the 1 train pairs fits"),
        ({"target_length": 5, "block_size": 9}, [example(7, "p", "t" * 5)], "none of the 1 valid pairs fits"),
        ({"tokenizer": "gtp2"}, [example(7, "p", "t")], "did you mean 'gpt2'"),
    ],
)
def test_a_set_that_cannot_be_is_not_written(tmp_path, cfg, valid, message):
    with pytest.raises(ValueError, match=message):
        write_set(SetConfig(source="file", name="s", out=str(tmp_path), **cfg), [example(1, "p", "t")], valid, "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cfg", [{"name": ""}, {"name": "../up"}, {"target_length": 1}, {"block_size": -1}])
def test_settings_that_make_no_sense_are_refused(cfg):
    with pytest.raises(ValueError, match="plain folder name|target_length must be"):
        SetConfig(**{"name": "s"} | cfg)
