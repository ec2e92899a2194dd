"""Text to token ids and back: raw bytes, GPT-2's byte-pair encoding or a tokenizer.json, behind one class.

Reserved ids stand at the end of the vocabulary, so that "ordinary" is one comparison, id < n_ordinary:

    0 .. n_ordinary - 1 | pad | sep | mask | sentinel 0, sentinel 1, .. | (end: vocab_size)

Noise draws ordinary ids and pad. Samplers never emit sep, mask or sentinels.

A name says which tokenizer it is, in a checkpoint and in a data set alike:

    bytes, gpt2                  by heart
    tokenizer.json@1f3a9c0b2d4e  a file, by the hash of its content; it lies beside the checkpoint and in the set
    ids-32000-32128              none: a text is ids, as in "1 15043 3186"; 32,000 of them, 32,128 with the reserved

so equal names are equal tokenizers, wherever the files are. To prepare data, a file is given by its path.
"""

import difflib
import functools
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from data import tokenizer_json

FILE = "tokenizer.json"
MASK_MARK = "▁"  # how a mask shows in decoded text (U+2581), one column wide


class Tokenizer:
    """One vocabulary. Attributes: name, n_ordinary, vocab_size, pad_id, sep_id, mask_id, n_sentinels, pieces, file."""

    def __init__(
        self,
        name: str,
        pieces: list[bytes],
        vocab_size: int,
        encode_ordinary: Callable[[str], list[int]],
        file: str = "",
    ):
        """pieces[i] is the bytes of ordinary token i; the ids from len(pieces) to vocab_size are reserved.

        file: the text of the tokenizer.json that this is; whoever writes the name keeps it beside.
        """
        self.name, self.n_ordinary, self.vocab_size, self.file = name, len(pieces), vocab_size, file
        self.pad_id, self.sep_id, self.mask_id = (self.n_ordinary + i for i in range(3))
        self.n_sentinels = vocab_size - self.mask_id - 1
        self._encode_ordinary = encode_ordinary
        marks = ["", "", MASK_MARK, *(f"<{i}>" for i in range(self.n_sentinels))]
        self.pieces = [*pieces, *(mark.encode() for mark in marks)]
        # A mark is for the eye only: it is no text, so it counts no bytes.
        self._n_bytes = np.array([len(piece) for piece in pieces] + [0] * len(marks))

    def encode(self, text: str) -> list[int]:
        """Ordinary ids of the text. What spells a special token, such as <|endoftext|>, is text like any other.

        Raises ValueError on a lone surrogate, which is how Python carries a byte that was not UTF-8.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text is not valid Unicode: lone surrogate at character {error.start}; pass UTF-8"
            ) from None
        return self._encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids (list, array or 1-d tensor). Bytes that are not UTF-8 become U+FFFD.

        pad and sep -> "", mask -> MASK_MARK, sentinel i -> "<i>". Raises ValueError on an id outside the vocabulary.
        """
        ids = self._checked(ids)
        return b"".join([self.pieces[i] for i in ids]).decode("utf-8", errors="replace")

    def piece(self, i: int) -> bytes:
        """The bytes that one id stands for; they may be text only together with those of its neighbours."""
        (i,) = self._checked([i])
        return self.pieces[i]

    def n_bytes(self, ids: Iterable[int]) -> int:
        """How many bytes of text the ids stand for; reserved ids count 0. Bits per byte = nats / ln 2 / n_bytes."""
        return int(self._n_bytes[self._checked(ids)].sum())

    def sentinel(self, i: int) -> int:
        """Id of the i-th sentinel, counted from 0. Raises ValueError when there are not so many."""
        if not 0 <= i < self.n_sentinels:
            raise ValueError(f"tokenizer {self.name!r} has sentinels 0 to {self.n_sentinels - 1}, got {i}")
        return self.mask_id + 1 + i

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = ids.tolist() if hasattr(ids, "tolist") else [int(i) for i in ids]
        # Python would read a negative id from the end of the table without a word.
        if ids and not (0 <= min(ids) and max(ids) < self.vocab_size):
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {bad} is outside the vocabulary of {self.name!r}, 0 to {self.vocab_size - 1}")
        return ids


def get_tokenizer(name: str, beside: str | Path | None = None) -> Tokenizer:
    """The tokenizer of that name, or that a tokenizer.json (or a folder with one) at that path is.

    beside: the folder where the file of such a name lies, if it was not read before. A file without our reserved ids
    is read as if it had them. Raises ValueError for another name, or if a file is missing or is not what its name says.
    """
    if name in TOKENIZERS:
        return _by_heart(name)
    if name.startswith(f"{FILE}@"):
        if name not in _READ and beside is None:
            raise ValueError(f"tokenizer {name!r} is a file; name it by its path, such as out/run/{FILE}")
        return _READ[name] if name in _READ else _named_file(Path(beside) / FILE, name)
    ids = re.fullmatch("ids-([0-9]{1,8})-([0-9]{1,8})", name)
    if ids:
        return _ids(name, *map(int, ids.groups()))
    path = Path(name) / FILE if Path(name).is_dir() else Path(name)
    if path.suffix == ".json":
        return _read_file(path)
    near = difflib.get_close_matches(name, TOKENIZERS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    known = ", ".join(map(repr, TOKENIZERS))
    raise ValueError(f"tokenizer must be the path of a {FILE} or one of {known}, got {name!r}{hint}")


@functools.cache
def _by_heart(name: str) -> Tokenizer:
    return TOKENIZERS[name]()


_READ: dict[str, Tokenizer] = {}  # files by name, which is by content: what was read once need not be found again


def _named_file(path: Path, name: str) -> Tokenizer:
    found = _read_file(path)
    if found.name != name:
        raise ValueError(f"{path} is {found.name!r}, wanted is {name!r}: another file has taken its place")
    return found


def _read_file(path: Path) -> Tokenizer:
    return from_json(file_text(path), str(path))


def file_text(path: Path) -> str:
    """The text of a tokenizer.json. Raises ValueError where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        fault = "no such file" if isinstance(error, FileNotFoundError) else "not UTF-8"
        known = ", ".join(TOKENIZERS)
        raise ValueError(f"{path}: {fault}; a tokenizer is the path of a {FILE}, or one of {known}") from None


def from_json(text: str, where: str, rows: int = 0) -> Tokenizer:
    """The tokenizer of a tokenizer.json; where it lacks our reserved ids they are added, up to `rows` ids or more."""
    found = tokenizer_json.parse(text, where)
    if not tokenizer_json.has_reserved(found):
        text = tokenizer_json.extended(found, tokenizer_json.padded_size(tokenizer_json.n_ids(found), rows))
    name = f"{FILE}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if name not in _READ:
        _READ[name] = Tokenizer(name, *tokenizer_json.read(text, where), text)
    return _READ[name]


@functools.cache
def _ids(name: str, n_ordinary: int, vocab_size: int) -> Tokenizer:
    """Weights without a tokenizer: their ids are all that there is to read and to write."""

    def encode(text: str) -> list[int]:
        words = text.split()
        bad = next((word for word in words if not (word.isdecimal() and int(word) < n_ordinary)), None)
        if bad is not None:
            raise ValueError(f"tokenizer {name!r} reads token ids, numbers from 0 to {n_ordinary - 1}, got {bad!r}")
        return [int(word) for word in words]

    if vocab_size < n_ordinary + 3:
        raise ValueError(f"tokenizer {name!r}: no room for pad, separator and mask behind {n_ordinary} ids")
    return Tokenizer(name, [f"{i} ".encode() for i in range(n_ordinary)], vocab_size, encode)


def _bytes() -> Tokenizer:
    """Every byte of the UTF-8 text is a token: 256 ordinary ids and 32 reserved."""
    return Tokenizer("bytes", [bytes([i]) for i in range(256)], 288, lambda text: list(text.encode("utf-8")))


def _gpt2() -> Tokenizer:
    """GPT-2's own 50,257 ids, so that its weights fit, and 47 reserved: 50,304, a multiple of 128, is faster."""
    try:
        import tiktoken
    except ImportError:
        raise ValueError("tokenizer 'gpt2' needs tiktoken: pip install tiktoken") from None
    try:
        bpe = tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # no network, or a damaged file
        raise ValueError(
            "tokenizer 'gpt2' could not load GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR to a folder with tiktoken's "
            f"two cached files, or connect to the internet once ({type(error).__name__})"
        ) from None
    pieces = [bpe.decode_single_token_bytes(i) for i in range(bpe.n_vocab)]
    return Tokenizer("gpt2", pieces, 50304, bpe.encode_ordinary)


TOKENIZERS = {"bytes": _bytes, "gpt2": _gpt2}
