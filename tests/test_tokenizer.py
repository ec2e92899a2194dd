"""data/tokenizer.py: text comes back, reserved ids, names."""

import os

import pytest
import tiktoken
import torch
from fuzzing import repeat
from hypothesis import strategies as st

from data import bpe
from data import tokenizer as module
from data.loader import open_dataset, write_stream
from data.tokenizer import MASK_MARK, get_tokenizer, tokenizer_from_json

CACHE = os.environ.get("TIKTOKEN_CACHE_DIR", "")
TEXT = "naïve café, 日本 🙂\n\tdef f(x): return x\0<|endoftext|>"
needs_gpt2 = pytest.mark.skipif(not os.path.isdir(CACHE), reason="TIKTOKEN_CACHE_DIR is not set")


@pytest.fixture(scope="module")
def own_file():
    """A vocabulary of data.bpe."""
    pytest.importorskip("tokenizers", reason="pip install tokenizers")
    return bpe.train(["the text of the book, the end\n" * 50 + TEXT], 300)


@pytest.fixture(params=["bytes", pytest.param("gpt2", marks=needs_gpt2), "own"])
def tokenizer(request):
    if request.param != "own":
        return get_tokenizer(request.param)
    return tokenizer_from_json(request.getfixturevalue("own_file"), "own")


SPECIAL = ["<|endoftext|>", "<|ar2diff_pad|>", "</s>", "\r\n", "\u2028", "\ufeff", MASK_MARK]


def test_every_text_comes_back(tokenizer):
    """Random Unicode with special tokens in it."""

    def check(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(torch.tensor(ids)) == text and ids == tokenizer.encode(text)
        assert b"".join(map(tokenizer.piece, ids)) == text.encode()
        assert all(0 <= i < tokenizer.n_ordinary for i in ids)

    parts = st.lists(st.text(max_size=8) | st.sampled_from(SPECIAL), max_size=8)
    repeat(150, check, parts.map("".join))


def test_reserved_ids_end_the_vocabulary(tokenizer):
    sizes = {"bytes": (256, 288), "gpt2": (50257, 50304)}.get(tokenizer.name, (300, 384))
    assert (tokenizer.n_ordinary, tokenizer.vocab_size) == sizes
    sentinels = tokenizer.sentinels
    reserved = [tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id, *sentinels]
    assert reserved == list(range(tokenizer.n_ordinary, tokenizer.vocab_size))
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    ids = [a, tokenizer.sep_id, tokenizer.mask_id, b, *sentinels[:13:12], tokenizer.pad_id]
    assert tokenizer.decode(ids) == f"a{MASK_MARK}b<0><12>"
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            tokenizer.decode([0, bad])


def test_bytes_that_are_not_utf8(tokenizer):
    with pytest.raises(ValueError, match="position 3: surrogates not allowed"):
        tokenizer.encode("caf\udce9")
    assert get_tokenizer("bytes").decode([97, 0xFF, 98, 0xC3]) == "a\ufffdb\ufffd"


def test_an_unknown_name_is_refused():
    messages = {
        "gtp2": "did you mean 'gpt2'",
        "x": "unknown tokenizer 'x'; available: bytes, gpt2;",
    }
    for name, message in (messages | {"no.json": "no.json: no such file"}).items():
        with pytest.raises(ValueError, match=message):
            get_tokenizer(name)


def test_ids_are_a_tokenizer_of_numbers():
    tokenizer = get_tokenizer("ids-300-384")
    assert tokenizer.encode("5 17\n299") == [5, 17, 299] and tokenizer.decode([5, 17]) == "5 17 "
    assert (tokenizer.n_ordinary, tokenizer.pad_id, tokenizer.vocab_size) == (300, 300, 384)
    for text in ("300", "5 hello", "-1", "\u0663", "9" * 5000):
        with pytest.raises(ValueError, match="numbers from 0 to 299, got"):
            tokenizer.encode(text)


def test_a_file_is_named_by_its_content_wherever_it_lies(own_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ä").mkdir()
    (tmp_path / "ä" / "tokenizer.json").write_text(own_file, encoding="utf-8")
    tokenizer = get_tokenizer("~/ä")
    chunks = {"train": [tokenizer.encode("the end of the book\n" * 30)]}
    write_stream(tmp_path / "set", chunks, "~/ä/tokenizer.json", 8, 16)
    module._LOADED.clear()
    data = open_dataset(tmp_path / "set", "train")
    assert data.tokenizer.name == data.tokenizer_name == tokenizer.name
    assert data.tokenizer.decode(data.tokens).startswith("the end of the book")
    module._LOADED.clear()
    (tmp_path / "set" / "tokenizer.json").write_text(bpe.train(["another one"], 256))
    with pytest.raises(ValueError, match="was replaced"):
        open_dataset(tmp_path / "set", "train")


def test_a_missing_vocabulary_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("/no/network"))
    with pytest.raises(ValueError, match="FileNotFoundError.*set TIKTOKEN_CACHE_DIR"):
        module._gpt2.__wrapped__()  # without its cache
