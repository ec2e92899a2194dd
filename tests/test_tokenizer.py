"""data/tokenizer.py: round trips, reserved ids, and errors that say what to do."""

import os
import subprocess
import sys

import pytest
import torch

from data.tokenizer import MASK_MARK, get_tokenizer

CACHE = os.environ.get("TIKTOKEN_CACHE_DIR", "")
TEXT = "naïve café, 日本 🙂\n\tdef f(x): return x\0<|endoftext|>"

needs_gpt2 = pytest.mark.skipif(not os.path.isdir(CACHE), reason="TIKTOKEN_CACHE_DIR names no folder")


@pytest.fixture(params=["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def tokenizer(request, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", CACHE)
    return get_tokenizer(request.param)


def test_text_survives_the_round_trip_in_ordinary_ids(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(torch.tensor(ids)) == TEXT
    assert max(ids) < tokenizer.n_ordinary
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_bytes_are_counted_as_the_text_has_them(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert tokenizer.n_bytes(ids) == len(TEXT.encode())
    reserved = [tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.sentinel(0)]
    assert tokenizer.n_bytes(ids + reserved) == len(TEXT.encode())
    assert tokenizer.n_bytes([]) == 0


def test_the_pieces_of_the_ids_are_the_bytes_of_the_text(tokenizer):
    assert b"".join(map(tokenizer.piece, tokenizer.encode(TEXT))) == TEXT.encode()
    assert tokenizer.piece(tokenizer.pad_id) == b"" and tokenizer.piece(tokenizer.mask_id) == MASK_MARK.encode()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.piece(-1)


def test_sizes_are_the_documented_ones(tokenizer):
    want = {"bytes": (256, 288), "gpt2": (50257, 50304)}[tokenizer.name]
    assert (tokenizer.n_ordinary, tokenizer.vocab_size) == want


def test_reserved_ids_end_the_vocabulary_and_none_is_used_twice(tokenizer):
    sentinels = [tokenizer.sentinel(i) for i in range(tokenizer.n_sentinels)]
    reserved = [tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id, *sentinels]
    assert reserved == list(range(tokenizer.n_ordinary, tokenizer.vocab_size))
    for i in (-1, tokenizer.n_sentinels):
        with pytest.raises(ValueError, match="sentinels 0 to"):
            tokenizer.sentinel(i)


def test_reserved_ids_decode_to_nothing_or_to_a_visible_mark(tokenizer):
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    ids = [a, tokenizer.sep_id, tokenizer.mask_id, b, tokenizer.sentinel(0), tokenizer.sentinel(12), tokenizer.pad_id]
    assert tokenizer.decode(ids) == f"a{MASK_MARK}b<0><12>"


def test_an_id_outside_the_vocabulary_is_refused(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            tokenizer.decode([0, bad])


def test_a_lone_surrogate_is_refused_in_one_line(tokenizer):
    with pytest.raises(ValueError, match="not valid Unicode") as error:
        tokenizer.encode("caf\udce9")
    assert "\n" not in str(error.value)


def test_gpt2_ids_are_those_of_gpt2(monkeypatch):
    """Known from the original release: "Hello world" is 15496 995."""
    if not os.path.isdir(CACHE):
        pytest.skip("no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR names no folder")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", CACHE)
    assert get_tokenizer("gpt2").encode("Hello world") == [15496, 995]


def test_bytes_that_are_not_utf8_become_replacement_characters():
    assert get_tokenizer("bytes").decode([97, 0xFF, 98, 0xC3]) == "a�b�"


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'gpt2'"):
        get_tokenizer("gtp2")
    with pytest.raises(ValueError, match="'bytes', 'gpt2', got 'wordpiece'$"):
        get_tokenizer("wordpiece")


def test_a_missing_vocabulary_is_one_line_that_says_what_to_set(tmp_path):
    """With an empty cache and no network (a proxy that refuses) the way out is named, without a traceback."""
    code = "from data.tokenizer import get_tokenizer\ntry: get_tokenizer('gpt2')\nexcept ValueError as e: print(e)"
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "TIKTOKEN_CACHE_DIR": str(tmp_path), "no_proxy": "", "NO_PROXY": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1
    assert "TIKTOKEN_CACHE_DIR" in done.stdout or "pip install tiktoken" in done.stdout
