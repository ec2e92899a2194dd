"""data/tokenizer.py: round trips, reserved ids, and errors that say what to do."""

import json
import os
import subprocess
import sys

import pytest
import torch

import checkpoint
from data import text_file, tokenizer_json
from data import tokenizer as tokenizer_file
from data.loader import open_set
from data.tokenizer import MASK_MARK, get_tokenizer
from model import ModelConfig, Transformer

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


# A tokenizer.json


PIECES = [*(bytes([i]) for i in range(256)), b"th", b"the", b" the", b"12"]


def byte_level(path, name="tokenizer.json"):
    found = tokenizer_json.byte_level_json([*PIECES, b""], {260: "<|endoftext|>"}, split_words=True)
    (path / name).write_text(json.dumps(found), encoding="utf-8")
    return path / name


def byte_fallback(path, normalizer=True):
    """As Llama 2's: spaces are "▁", one of them before the first word, and bytes that no token has are "<0x..>"."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocab |= {token: 259 + i for i, token in enumerate(["▁", "t", "h", "e", "th", "the", "▁the"])}
    before = {"type": "Prepend", "prepend": "▁"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    splitter = (
        None if normalizer else {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    )
    found = {
        "version": "1.0",
        "added_tokens": [
            dict(id=i, content=c, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
            for c, i in list(vocab.items())[:3]
        ],
        "normalizer": {"type": "Sequence", "normalizers": [before, spaces]} if normalizer else None,
        "pre_tokenizer": splitter,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab}
        | {"merges": [["t", "h"], ["th", "e"], ["▁", "the"]]},
    }
    (path / "tokenizer.json").write_text(json.dumps(found), encoding="utf-8")
    return path / "tokenizer.json"


@pytest.mark.parametrize(
    "write",
    [byte_level, byte_fallback, lambda path: byte_fallback(path, normalizer=False)],
    ids=["level", "prepend", "metaspace"],
)
def test_a_tokenizer_json_is_a_tokenizer_like_the_others(write, tmp_path):
    tokenizer = get_tokenizer(str(write(tmp_path)))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT and tokenizer.n_bytes(ids) == len(TEXT.encode())
    assert max(ids) < tokenizer.n_ordinary and tokenizer.encode("") == []
    reserved = [tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.sentinel(0)]
    assert reserved == list(range(tokenizer.n_ordinary, tokenizer.n_ordinary + 4))
    assert tokenizer.vocab_size % 128 == 0 and tokenizer.vocab_size - tokenizer.n_ordinary >= 32
    for special in ("<|endoftext|>", "</s>", "<|ar2diff_pad|>"):  # text like any other
        assert len(tokenizer.encode(special)) > 3 and tokenizer.decode(tokenizer.encode(special)) == special


def test_texts_of_a_tokenizer_json_can_be_cut_anywhere(tmp_path):
    """Llama 2's own encode puts a space before each text, so that two halves would not add up to the whole."""
    tokenizer = get_tokenizer(str(byte_fallback(tmp_path)))
    parts = tokenizer.encode("the the"), tokenizer.encode(" the")
    assert parts == ([264, 265], [265]) and tokenizer.decode(sum(parts, [])) == "the the the"


def test_the_name_of_a_file_is_its_content_and_it_is_found_beside(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first, second = get_tokenizer(str(byte_level(tmp_path / "a"))), get_tokenizer(str(byte_fallback(tmp_path / "b")))
    assert first.name != second.name and first.name.startswith("tokenizer.json@")
    assert get_tokenizer(str(tmp_path / "a")) is first  # a folder that has one will do
    (tmp_path / "tokenizer.json").write_text(first.file, encoding="utf-8")
    assert get_tokenizer(str(tmp_path / "tokenizer.json")) is first  # with the reserved ids it is the same
    tokenizer_file._READ.clear()
    assert get_tokenizer(first.name, tmp_path).name == first.name
    tokenizer_file._READ.clear()
    with pytest.raises(ValueError, match="another file has taken its place"):
        get_tokenizer(second.name, tmp_path)
    with pytest.raises(ValueError, match="is a file; name it by its path"):
        get_tokenizer(second.name)


def test_a_checkpoint_and_a_set_keep_the_file_beside_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    byte_level(tmp_path)
    (tmp_path / "text.txt").write_text("the end of the line\n" * 30)
    text_file.main(
        ["--input=text.txt", "--name=mine", "--tokenizer=tokenizer.json", "--block_size=16", "--target_length=8"]
    )
    tokenizer_file._READ.clear()
    held = open_set("out/data/mine", "valid")
    name = held.tokenizer_name
    assert name.startswith("tokenizer.json@") and held.tokenizer.decode(held.tokens[:4]) == "the en"
    sizes = dict(n_layer=1, n_head=1, n_embd=4, block_size=16, target_length=8)
    ids = {key: getattr(held.tokenizer, key) for key in ("vocab_size", "n_ordinary", "pad_id", "sep_id", "mask_id")}
    os.mkdir("run")
    checkpoint.save("run/ckpt.pt", Transformer(ModelConfig(**sizes, **ids)), 0, name)
    os.rename("run", "elsewhere")
    tokenizer_file._READ.clear()
    _, tokenizer, _ = checkpoint.load_model("elsewhere/ckpt.pt")
    assert tokenizer.name == name and tokenizer.encode("the") == [257]
    os.remove("elsewhere/tokenizer.json")
    tokenizer_file._READ.clear()
    with pytest.raises(ValueError, match="elsewhere/tokenizer.json: no such file"):
        checkpoint.load_model("elsewhere/ckpt.pt")


@pytest.mark.parametrize(
    "text, says",
    [
        ("{", "not the JSON of a byte-pair tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": 1e12}}}', "not the JSON of a byte-pair tokenizer"),
        ('{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}', "not the JSON of a byte-pair tokenizer"),
        ('{"model": {"type": "WordPiece", "vocab": {"a": 0}}}', "a WordPiece tokenizer; wanted is byte-pair encoding"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', "a BPE tokenizer; wanted is .* of all bytes"),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 3}, "decoder": {"type": "ByteLevel"}}',
            "cannot read it",
        ),
    ],
    ids=["no json", "huge id", "unigram", "wordpiece", "characters", "merges"],
)
def test_another_kind_of_tokenizer_is_refused_in_one_line(text, says, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=says) as error:
        get_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path):
    found = json.loads(byte_level(tmp_path).read_text())
    found["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="loses text"):
        get_tokenizer(str(tmp_path / "tokenizer.json"))


def test_without_the_package_a_tokenizer_json_says_what_to_install(tmp_path, monkeypatch):
    path = byte_fallback(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    tokenizer_file._READ.clear()
    with pytest.raises(ValueError, match="pip install tokenizers"):
        get_tokenizer(str(path))
    with pytest.raises(ValueError, match="nowhere.json: no such file"):
        get_tokenizer("nowhere.json")


@pytest.mark.slow  # finds 50,000 merges, 3 s
def test_gpt2_written_as_a_tokenizer_json_encodes_as_gpt2(monkeypatch, tmp_path):
    """Merges are found anew from the ranks; the oracle is tiktoken."""
    if not os.path.isdir(CACHE):
        pytest.skip("no GPT-2 vocabulary: TIKTOKEN_CACHE_DIR names no folder")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", CACHE)
    gpt2 = get_tokenizer("gpt2")
    found = tokenizer_json.byte_level_json(gpt2.pieces[:50257], {50256: "<|endoftext|>"}, split_words=True)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json.extended(found, 50304), encoding="utf-8")
    again = get_tokenizer(str(tmp_path))
    assert again.encode(TEXT * 3) == gpt2.encode(TEXT * 3)
    for name in ("vocab_size", "n_ordinary", "pad_id", "sep_id", "mask_id", "n_sentinels"):
        assert getattr(again, name) == getattr(gpt2, name)


def test_ids_alone_are_a_tokenizer_of_numbers():
    tokenizer = get_tokenizer("ids-300-384")
    assert tokenizer.encode("5 17\n299") == [5, 17, 299] and tokenizer.decode([5, 17]) == "5 17 "
    assert (tokenizer.n_ordinary, tokenizer.pad_id, tokenizer.vocab_size) == (300, 300, 384)
    for text in ("300", "5 hello", "-1"):
        with pytest.raises(ValueError, match="numbers from 0 to 299, got"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="no room for pad"):
        get_tokenizer("ids-300-302")
