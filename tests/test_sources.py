"""data/sources.py: downloads are whole or absent, lines end at a newline, misfits are counted."""

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
from data.loader import open_dataset
from data.sources import SetConfig, local, read_json_lines, read_lines, read_text, write_set

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
        server.asked = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_url_is_downloaded_once_and_kept_under_its_host_and_path(server, tmp_path):
    url = f"{server.url}/set/a%20b.gz"
    path = local(url, {url: SHA})
    assert path.endswith(f"127.0.0.1:{server.server_port}/set/a b.gz")
    assert [*(tmp_path / path).parent.iterdir()] == [tmp_path / path]
    assert (tmp_path / path).read_bytes() == BODY
    assert local(f"{url}::member", {url: SHA}) == f"{path}::member" and len(server.asked) == 1


@pytest.mark.parametrize(
    "path, sha256, message",
    [
        ("/gone", "", "404"),
        ("/broken", "", "got only 5113 out of 5120 bytes"),
        ("/whole", "0" * 64, "its sha256 is not 0000"),
        (":1/x.gz", "", "refused"),
    ],
)
def test_a_partial_or_wrong_download_is_not_kept(server, tmp_path, path, sha256, message):
    url = server.url.rpartition(":")[0] + path if path.startswith(":") else server.url + path
    with pytest.raises(ValueError, match=f"^{url}: cannot be downloaded .*{message}.*--source"):
        local(url, {url: sha256})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


TEXT = "\ufeffone\r\ntwo\u2028still two\x0c\rand on\n\nlast é"
LINES = ["one", "two\u2028still two\x0c\rand on", "", "last é"]


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_every_wrapping_gives_the_same_lines(tmp_path):
    raw = TEXT.encode()
    (tmp_path / "a.txt").write_bytes(raw)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw))
    write_tar(tmp_path / "a.tgz", {"other": b"x" * 3000, "in/a.txt": raw})
    write_tar(tmp_path / "a.tar", {"./b.txt.gz": gzip.compress(raw), "other": b"y"})
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("_about.txt", "licence")
        archive.writestr("fra.txt", raw)
    for name in ("a.txt", "a.txt.gz", "a.zip", "a.tgz::in/a.txt", "a.tar::b.txt.gz"):
        assert list(read_lines(str(tmp_path / name))) == LINES


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_texts_are_equal_whatever_their_line_ends(tmp_path, end):
    raw = f"\ufeffone{end}{end}two".encode()
    for name, content in (("a", raw), ("b.gz", gzip.compress(raw)), ("c", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name) == "one\n\ntwo"
    (tmp_path / "d.jsonl").write_bytes(f'{{"a": 1}}{end}{end}2'.encode())
    assert list(read_json_lines(tmp_path / "d.jsonl")) == [(1, {"a": 1}), (3, 2)]


def test_damaged_files_are_named_in_one_line(tmp_path):
    raw = "\n".join(hashlib.sha256(bytes(i)).hexdigest() for i in range(2000)).encode()
    (tmp_path / "cut.gz").write_bytes(gzip.compress(raw)[:-5000])
    (tmp_path / "latin.txt").write_bytes(b"one\ncaf\xe9\n")
    write_tar(tmp_path / "whole.tgz", {"m": raw})
    (tmp_path / "cut.tgz").write_bytes((tmp_path / "whole.tgz").read_bytes()[:-5000])
    (tmp_path / "no.zip").write_bytes(b"PK plain")
    for name, message in [
        ("cut.gz", "cut.gz: cannot be read"),
        ("cut.tgz::m", "cut.tgz::m: cannot be read"),
        ("whole.tgz::absent", "has no member 'absent'"),
        ("latin.txt", "latin.txt, line 2: not UTF-8 text .byte 3"),
        ("no.zip", "no.zip: cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            list(read_lines(str(tmp_path / name)))
        assert "\n" not in str(error.value)


def test_a_hash_holds_out_its_share_whatever_case_and_punctuation():
    held = [sources.is_held_out(f"sentence {i}", 0.2) for i in range(4000)]
    assert 0.18 < np.mean(held) < 0.22
    assert held == [sources.is_held_out(f"Sentence, {i}!", 0.2) for i in range(4000)]
    marks = ("?", "!", "...", "?!", "–", "¿", ";", ":", "\ud800")
    assert len({sources.is_held_out(mark, 0.5) for mark in marks}) == 2


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
    assert [data.text(i) for i in range(len(data))] == [tuple(e.values()) for e in train[:198]]
    assert open_dataset(tmp_path / "s", "valid").text(0) == ("p", "t")
    assert (data.target_length, data.block_size) == (199, 200 + 199)
    counts = {"train": {"empty": 0, "too_long": 2}, "valid": {"empty": 2, "too_long": 2}}
    assert data.meta["left_out"] == counts
    assert (data.meta["command"], data.meta["note"]) == ("python -m data.x --a", "free")
    assert f"left_out: {counts}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "cfg, valid, message",
    [
        ({}, [example("p", "")], "no valid pair fits"),
        ({}, [example("p", "\ud800", where="f, line 7")], "surrogates not allowed.*f, line 7"),
        ({"name": "../up"}, [example("p", "t")], "plain folder name"),
        ({"target_length": 5, "block_size": 5}, [example("p", "t")], "no train pair fits"),
    ],
)
def test_a_set_that_no_training_can_use_is_not_written(tmp_path, cfg, valid, message):
    cfg = SetConfig(**{"name": "s", "out": str(tmp_path)} | cfg)
    with pytest.raises(ValueError, match=message):
        write_set(cfg, {"train": [example("p", "t")], "valid": valid}, ["data.x"])
    assert not list(tmp_path.iterdir())
