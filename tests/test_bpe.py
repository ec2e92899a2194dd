"""data/bpe.py: the merges are those found by hand, and each reader encodes alike."""

import json
from pathlib import Path

import pytest

from data import bpe
from data.tokenizer import BYTE_LEVEL, Tokenizer, get_tokenizer, tokenizer_from_json

tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
SOURCE = Path(__file__).parents[1] / "data"


def test_the_merges_are_those_found_by_hand():
    """ "ab" occurs 5 times, then " ab" 4 times; nothing else occurs twice."""
    tokenizer = tokenizer_from_json(bpe.train(["ab ab ab ab ab xy"], 258), "trained")
    pieces = tokenizer.pieces[:258]
    assert sorted(pieces[:256]) == [bytes([byte]) for byte in range(256)]
    assert pieces[256:] == [b"ab", b" ab"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.main([f"--source={SOURCE}", "--n_ordinary=700", f"--out={path}"])
    return path


def test_tiktoken_and_tokenizers_encode_alike(trained):
    """Ours reads the file with tiktoken. The oracle is the package `tokenizers`."""
    ours = get_tokenizer(str(trained))
    assert type(ours) is Tokenizer and (ours.n_ordinary, ours.vocab_size) == (700, 768)
    oracle = tokenizers.Tokenizer.from_file(str(trained))
    text = "\n".join(path.read_text() for path in SOURCE.parent.glob("*.py")) + "naïve 日本 🙂\n\n"
    ids = ours.encode(text)
    assert ids == oracle.encode(text).ids and oracle.decode(ids) == ours.decode(ids) == text
    assert len(text.encode()) / len(ids) > 2  # merges are used


NFC = {"normalizer": {"type": "NFC"}}


@pytest.mark.parametrize("change", [{"pre_tokenizer": BYTE_LEVEL | {"use_regex": False}}, NFC])
def test_a_file_that_tiktoken_would_encode_otherwise_goes_to_tokenizers(trained, change):
    content = json.loads(trained.read_text()) | change
    tokenizer = tokenizer_from_json(json.dumps(content), "changed")
    assert type(tokenizer) is not Tokenizer
    assert tokenizer.decode(tokenizer.encode("def f(x):\n    é")) == "def f(x):\n    é"


def test_held_out_text_is_not_read(tmp_path):
    (tmp_path / "text.txt").write_text("one two\n" * 30 + "zzqq\n" * 30)
    flags = ["--n_ordinary=300", "--held_out=0.4", f"--out={tmp_path / 'tokenizer.json'}"]
    bpe.main([f"--source={tmp_path / 'text.txt'}", *flags])
    pieces = get_tokenizer(str(tmp_path)).pieces
    assert b"one" in pieces and not any(b"zz" in piece for piece in pieces)
    pairs = "".join(f"one {i}\tdeux {i}\tzzqq\n" for i in range(60))  # the third field is no text
    (tmp_path / "pairs.tsv").write_text(pairs)
    bpe.main([f"--pairs={tmp_path / 'pairs.tsv'}", *flags])
    pieces = get_tokenizer(str(tmp_path)).pieces
    assert b"one" in pieces and b"deux" in pieces and not any(b"zz" in p for p in pieces)
