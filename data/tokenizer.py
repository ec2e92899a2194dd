"""Text to token ids and back: raw bytes or GPT-2's byte-pair encoding, behind one class.

Reserved ids stand at the end of the vocabulary, so that "ordinary" is one comparison, id < n_ordinary:

    0 .. n_ordinary - 1 | pad | sep | mask | sentinel 0, sentinel 1, .. | (end: vocab_size)

Noise draws ordinary ids and pad. Samplers never emit sep, mask or sentinels.
"""

import difflib
import functools
from collections.abc import Callable, Iterable

import numpy as np

MASK_MARK = "▁"  # how a mask shows in decoded text (U+2581), one column wide


class Tokenizer:
    """One vocabulary. Attributes: name, n_ordinary, vocab_size, pad_id, sep_id, mask_id, n_sentinels."""

    def __init__(self, name: str, pieces: list[bytes], vocab_size: int, encode_ordinary: Callable[[str], list[int]]):
        """pieces[i] is the bytes of ordinary token i; the ids from len(pieces) to vocab_size are reserved."""
        self.name, self.n_ordinary, self.vocab_size = name, len(pieces), vocab_size
        self.pad_id, self.sep_id, self.mask_id = (self.n_ordinary + i for i in range(3))
        self.n_sentinels = vocab_size - self.mask_id - 1
        self._encode_ordinary = encode_ordinary
        marks = ["", "", MASK_MARK, *(f"<{i}>" for i in range(self.n_sentinels))]
        self._pieces = [*pieces, *(mark.encode() for mark in marks)]
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
        return b"".join([self._pieces[i] for i in ids]).decode("utf-8", errors="replace")

    def piece(self, i: int) -> bytes:
        """The bytes that one id stands for; they may be text only together with those of its neighbours."""
        (i,) = self._checked([i])
        return self._pieces[i]

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


@functools.cache
def get_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`, 'bytes' or 'gpt2'. Raises ValueError for another or if GPT-2's files are missing."""
    if name not in TOKENIZERS:
        near = difflib.get_close_matches(name, TOKENIZERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"tokenizer must be one of {', '.join(map(repr, TOKENIZERS))}, got {name!r}{hint}")
    return TOKENIZERS[name]()


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
