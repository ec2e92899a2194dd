"""Convert text to token ids and back.

Each vocabulary ends with the reserved ids, so that "ordinary" is one comparison, id < n_ordinary:

    0 .. n_ordinary - 1 | pad | sep | mask | sentinel 0, sentinel 1, .. | (end: vocab_size)

Noise draws ordinary ids and pad. Samplers never output sep, mask or a sentinel.

Checkpoints and data sets store the name of their tokenizer:

    bytes, gpt2                  built in
    tokenizer.json@1f3a9c0b2d4e  a file, by the hash of its content. A copy lies next to each
                                 checkpoint and in each data set that uses it.
    ids-32000-32128              no tokenizer: a text is a list of ids, such as "1 15043 3186".
                                 32,000 ordinary ids, 32,128 with the reserved ones.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from configurator import require, suggest

FILE = "tokenizer.json"
MASK_MARK = "▁"  # a mask in decoded text (U+2581)
MIN_RESERVED = 32
MULTIPLE = 128  # matrix products are faster if the vocabulary is a multiple of 128
# How data.bpe cuts a text into words before it merges: GPT-2's rule, for `tokenizers` and tiktoken.
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LOADED = {}  # tokenizers of files by name: equal names mean equal content
PATH_HINT = f"a tokenizer is bytes, gpt2, or the path of a {FILE}"


class Tokenizer:
    """One vocabulary, from the bytes of each ordinary id.

    Attributes: name, n_ordinary, vocab_size, pad_id, sep_id, mask_id, sentinels (ids),
    pieces (the bytes of each id), file (the text of its tokenizer.json, or "").
    """

    def __init__(self, name: str, pieces: list[bytes], vocab_size: int, encode: Callable, file=""):
        self.name = name
        self.n_ordinary = len(pieces)
        self.vocab_size = vocab_size
        self.pad_id = self.n_ordinary
        self.sep_id = self.n_ordinary + 1
        self.mask_id = self.n_ordinary + 2
        self.sentinels = range(self.mask_id + 1, vocab_size)
        self.file = file
        self.bos_ids: list[int] = []  # what imported weights read before every text
        self._encode_ordinary = encode
        marks = ["", "", MASK_MARK, *(f"<{i}>" for i in range(len(self.sentinels)))]
        self.pieces = [*pieces, *(mark.encode() for mark in marks)]

    def encode(self, text: str) -> list[int]:
        """Return the ordinary ids of the text. A special token in it, such as </s>, is text.

        Raises ValueError on a lone surrogate: Python's form of a byte that is not UTF-8.
        """
        text.encode("utf-8")  # tiktoken would replace the surrogate
        return self._encode_ordinary(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text that a sequence begins with."""
        return self.bos_ids + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids (list, array or 1-d tensor). Invalid UTF-8 becomes U+FFFD.

        pad and sep -> "", mask -> MASK_MARK, sentinel i -> "<i>".
        """
        ids = np.asarray(ids, dtype=np.int64).tolist()
        return b"".join(map(self.piece, ids)).decode("utf-8", errors="replace")

    def piece(self, i: int) -> bytes:
        """Return the bytes of one id. A character may need the bytes of several ids."""
        if not 0 <= i < self.vocab_size:  # Python accepts negative indices
            limits = f"the vocabulary of {self.name!r}, 0 to {self.vocab_size - 1}"
            raise ValueError(f"token id {i} is outside {limits}")
        return self.pieces[i]


def get_tokenizer(name: str, folder: str | Path | None = None) -> Tokenizer:
    """Return the tokenizer with this name, or the one in the file or folder at this path.

    folder: where to find the file of a name such as tokenizer.json@1f3a9c0b2d4e.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    if name in _LOADED:
        return _LOADED[name]
    if ids := re.fullmatch("ids-([0-9]{1,8})-([0-9]{1,8})", name):
        return _ids(name, int(ids[1]), int(ids[2]))
    stored = name.startswith(f"{FILE}@")
    path = Path(folder or "", FILE) if stored else Path(name)
    path = path.expanduser()
    if path.is_dir():
        path = path / FILE
    unknown = f"unknown tokenizer {name!r}{suggest(name, BUILT_IN)}; {PATH_HINT}"
    require(path.suffix == ".json", unknown)
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        raise ValueError(f"{path}: no such file, or not UTF-8; {PATH_HINT}") from None
    tokenizer = tokenizer_from_json(text, str(path))
    replaced = f"{path}: was replaced: it is {tokenizer.name!r}, expected {name!r}"
    require(tokenizer.name == name or not stored, replaced)
    return tokenizer


def tokenizer_from_json(text: str, source: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json. source: where the text is from, for errors."""
    name = f"{FILE}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if name not in _LOADED:
        try:
            tokenizer = _parse(name, text)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        # A foreign file gets our reserved ids, and with them another name.
        _LOADED[name] = _LOADED[tokenizer.name] = tokenizer
    return _LOADED[name]


def _parse(name: str, text: str) -> Tokenizer:
    """Load one of our own vocabularies with tiktoken, any other with the `tokenizers` package."""
    try:
        content = json.loads(text)
        pieces = _own_pieces(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pieces = []
    if not pieces:
        from hf.tokenizer import HFTokenizer

        return HFTokenizer(name, text)
    import tiktoken

    ranks = {piece: i for i, piece in enumerate(pieces)}
    encoding = tiktoken.Encoding(name, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    vocab_size = len(pieces) + len(content["added_tokens"])
    return Tokenizer(name, pieces, vocab_size, encoding.encode_ordinary, text)


def _own_pieces(content: dict) -> list[bytes]:
    """Return the bytes of each id of a file that data.bpe wrote. Empty for any other file.

    In such a file ids are merge ranks: the merge of rank r has the id 256 + r.
    """
    model = content["model"]
    alphabet = sorted(ALPHABET, key=model["vocab"].__getitem__)
    tokens = alphabet + ["".join(merge) for merge in model["merges"]]
    added = content["added_tokens"]
    own = (
        model["vocab"] == {token: i for i, token in enumerate(tokens)}
        and added == reserved_tokens(len(tokens), len(tokens) + len(added))
        and content["pre_tokenizer"] == BYTE_LEVEL
        and not (content["normalizer"] or model["dropout"] or model["ignore_merges"])
    )
    byte_of = {character: byte for byte, character in enumerate(ALPHABET)}
    return [bytes(byte_of[c] for c in token) for token in tokens] if own else []


def reserved_tokens(n_ordinary: int, vocab_size: int) -> list[dict]:
    """Return the reserved ids in the form of a tokenizer.json's added_tokens."""
    names = ["pad", "sep", "mask", *range(vocab_size - n_ordinary - 3)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": n_ordinary + i, "content": f"<|ar2diff_{name}|>"} | flags | {"special": True}
        for i, name in enumerate(names)
    ]


def padded_size(n_ordinary: int, rows: int = 0) -> int:
    """Return a vocabulary size with room for the reserved ids and for `rows` embeddings."""
    return -(-max(n_ordinary + MIN_RESERVED, rows) // MULTIPLE) * MULTIPLE


# GPT-2's character for each byte: itself, or from U+0100 on if it is invisible.
_others = itertools.count(256)
_visible = (byte if byte > 32 and chr(byte).isprintable() else next(_others) for byte in range(256))
ALPHABET = "".join(map(chr, _visible))


@functools.cache
def _ids(name: str, n_ordinary: int, vocab_size: int) -> Tokenizer:
    """Read and write plain ids, for weights without a tokenizer."""

    def encode(text: str) -> list[int]:
        for word in text.split():
            if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= n_ordinary:
                limits = f"numbers from 0 to {n_ordinary - 1}"
                raise ValueError(f"tokenizer {name!r} reads {limits}, got {word[:20]!r}")
        return [int(word) for word in text.split()]

    return Tokenizer(name, [f"{i} ".encode() for i in range(n_ordinary)], vocab_size, encode)


@functools.cache
def _bytes() -> Tokenizer:
    """Every byte of the UTF-8 text is a token: 256 ordinary ids and 32 reserved."""
    pieces = [bytes([i]) for i in range(256)]
    return Tokenizer("bytes", pieces, 288, lambda text: list(text.encode("utf-8")))


@functools.cache
def _gpt2() -> Tokenizer:
    """GPT-2's 50,257 ids, so that its weights fit, and 47 reserved."""
    import tiktoken

    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a damaged file
        raise ValueError(
            f"cannot load GPT-2's vocabulary ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to "
            "a folder with tiktoken's two cached files, or connect to the internet once"
        ) from None
    pieces = [bpe.decode_single_token_bytes(i) for i in range(bpe.n_vocab)]
    return Tokenizer("gpt2", pieces, 50304, bpe.encode_ordinary)


BUILT_IN = {"bytes": _bytes, "gpt2": _gpt2}
