"""data/bpe.py: a trained vocabulary is the one that merges by hand give, and every reader cuts alike."""

import sys
from pathlib import Path

import pytest

from data import bpe, tokenizer_json
from data.tokenizer import get_tokenizer

pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install tokenizers")
SOURCE = Path(__file__).parents[1] / "data"


def test_the_merges_are_those_found_by_hand():
    # "ab" stands 5 times, then " ab" (a space is part of the word behind it) 4 times; nothing else stands twice.
    pieces = bpe.train(["ab ab ab ab ab xy"], 258)
    assert sorted(pieces[:256]) == [bytes([byte]) for byte in range(256)]
    assert pieces[256:] == [b"ab", b" ab"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.main([f"--source={SOURCE}", "--n_ordinary=700", f"--out={path}"])
    return path


def test_tokenizers_and_tiktoken_cut_a_text_alike(made, monkeypatch):
    text = "\n".join(path.read_text() for path in SOURCE.parent.glob("*.py")) + tokenizer_json.PROBE
    found = made.read_text()
    pieces, size, encode = tokenizer_json.read(found, "made")
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # importing it fails
    again = tokenizer_json.read(found, "made")
    assert again[:2] == (pieces, size) and len(pieces) == 700 and size == 768
    ids = encode(text)
    assert again[2](text) == ids and b"".join(pieces[i] for i in ids) == text.encode()
    assert len(text.encode()) / len(ids) > 2  # its merges are used


def test_a_data_set_and_the_file_name_one_tokenizer(made):
    tokenizer = get_tokenizer(str(made))
    assert tokenizer.n_ordinary == 700 and tokenizer.decode(tokenizer.encode("def f(x):\n    é")) == "def f(x):\n    é"


def changed(found):
    """Tokenizers that tiktoken would cut otherwise: by what is different."""
    first, second, *rest = found["model"]["merges"]
    yield "merges in another order", found | {"model": found["model"] | {"merges": [second, first, *rest]}}
    yield "words cut otherwise", found | {"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}
    yield "a normalizer", found | {"normalizer": {"type": "NFC"}}
    yield "dropout", found | {"model": found["model"] | {"dropout": 0.1}}


def test_without_tokenizers_another_kind_is_refused(made, monkeypatch):
    found = tokenizer_json.parse(made.read_text(), "made")
    assert tokenizer_json.ranks_of(found, tokenizer_json.pieces_of(found, "made")) is not None
    for what, other in changed(found):
        assert tokenizer_json.ranks_of(other, tokenizer_json.pieces_of(other, what)) is None, what
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        tokenizer_json.read(tokenizer_json.json.dumps(other), "other")


def test_what_is_held_out_shapes_nothing(tmp_path):
    (tmp_path / "text.txt").write_text("one two\n" * 30 + "zzqq\n" * 30)
    source, out = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    bpe.main([f"--source={source}", "--n_ordinary=300", "--held_out=0.4", f"--out={out}"])
    pieces = get_tokenizer(str(out)).pieces
    assert b"one" in pieces and not any(b"zz" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--n_ordinary=255"], "n_ordinary must be 256"),
        (["--held_out=1"], "held_out must be"),
        (["--out=vocabulary"], "a .json file"),
        (["--source=nowhere"], "no such path"),
    ],
)
def test_bad_settings_are_one_line_and_write_nothing(argv, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        bpe.main(argv)
    assert not list(tmp_path.iterdir())
