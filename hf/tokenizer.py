"""A tokenizer.json of Hugging Face as ours: read through the `tokenizers` package, with our reserved ids at its end.

Read are the two kinds that Llama, Qwen, SmolLM, Mistral and GPT-2 come with, both byte-pair encodings of all bytes:

    byte level       a character stands for a byte, as GPT-2 writes them: "Ġthe" is " the"
    byte fallback    "▁the" is " the", and "<0x0A>" is a byte that no other token has

Ours is the same file with special tokens added behind its last id, so that it says all there is to know:
<|ar2diff_pad|>, <|ar2diff_sep|>, <|ar2diff_mask|>, <|ar2diff_0|>, <|ar2diff_1|>, ..
"""

import json
import re
from collections.abc import Callable

LEAST_RESERVED, MULTIPLE = 32, 128  # sizes that are whole 128s are faster
FIRST = "<|ar2diff_pad|>"
# How GPT-2 cuts a text into words before it merges: contractions, letters, digits, the rest, spaces.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PROBE = "A probe: naïve 日本 🙂,\n\ttwo  spaces and 42."


def padded_size(n_ordinary: int, rows: int = 0) -> int:
    """Ids in all, the reserved ones included: whole 128s that hold them and as many as an embedding has rows."""
    return -(-max(n_ordinary + LEAST_RESERVED, rows) // MULTIPLE) * MULTIPLE


def parse(text: str, where: str) -> dict:
    """The JSON of a tokenizer. Raises ValueError, naming `where`, if it is none."""
    try:
        found = json.loads(text)
        added = found.setdefault("added_tokens", [])
        ids = [*found["model"]["vocab"].values(), *(token["id"] for token in added)]
        good = all(type(i) is int and 0 <= i < 1 << 24 for i in ids) and all(type(t["content"]) is str for t in added)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{where}: not the JSON of a byte-pair tokenizer")
    return found


def n_ids(found: dict) -> int:
    """Ids without our reserved ones. There may be holes below."""
    ours = [token["id"] for token in found["added_tokens"] if token["content"] == FIRST]
    return ours[0] if ours else 1 + max([*found["model"]["vocab"].values(), *_added(found)], default=-1)


def has_reserved(found: dict) -> bool:
    return any(token["content"] == FIRST for token in found["added_tokens"])


def special_ids(found: dict) -> set[int]:
    """Ids that no text is encoded to."""
    return {token["id"] for token in found["added_tokens"] if token.get("special")}


def extended(found: dict, vocab_size: int) -> str:
    """The JSON text with our reserved ids from n_ids to vocab_size."""
    n = n_ids(found)
    names = ["pad", "sep", "mask", *range(vocab_size - n - 3)]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    ours = [{"id": n + i, "content": f"<|ar2diff_{name}|>"} | flags for i, name in enumerate(names)]
    return json.dumps(found | {"added_tokens": found["added_tokens"] + ours}, ensure_ascii=False)


def read(text: str, where: str) -> tuple[list[bytes], int, Callable[[str], list[int]]]:
    """(bytes of each ordinary id, number of all ids, encode) of a tokenizer.json that has our reserved ids.

    encode adds nothing to a text, no start token and no space before its first word, though Llama 2's own would: so
    texts can be cut anywhere, and what the parts are decoded to is the text. Raises ValueError, naming `where`, on a
    file that cannot be read so, and if `tokenizers` is missing and tiktoken cannot read it either.
    """
    found = parse(text, where)
    pieces, vocab_size = pieces_of(found, where), 1 + max(_added(found))
    _without_first_space(found)
    encode = _encoder(found, pieces, where)
    if b"".join(pieces[i] for i in encode(PROBE)) != PROBE.encode():
        raise ValueError(f"{where}: loses text: {PROBE!r} comes back changed")
    return pieces, vocab_size, encode


def _encoder(found: dict, pieces: list[bytes], where: str) -> Callable[[str], list[int]]:
    try:
        import tokenizers
    except ImportError:
        ranks = ranks_of(found, pieces)
        if ranks is None:
            raise ValueError(f"{where}: this tokenizer.json needs tokenizers: pip install tokenizers") from None
        import tiktoken

        return tiktoken.Encoding(where, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={}).encode_ordinary
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(found))
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{where}: tokenizers cannot read it ({str(error).splitlines()[0][:100]})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # what spells a special token is text like any other
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def ranks_of(found: dict, pieces: list[bytes]) -> dict[bytes, int] | None:
    """Bytes -> id of a tokenizer that tiktoken cuts alike; None for another.

    tiktoken merges those two neighbours first whose bytes have the lowest id; `tokenizers` follows a list of merges.
    They agree where the list is the one that the ids imply, and the text is first cut as GPT-2 cuts it.
    """
    model, cut = found["model"], found.get("pre_tokenizer") or {}
    used = {i for token, i in model["vocab"].items() if i not in special_ids(found)}
    ranks = {pieces[i]: i for i in sorted(used)}
    merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges", [])]
    plain = not found.get("normalizer") and cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
    plain = plain and not (model.get("dropout") or model.get("ignore_merges") or cut.get("add_prefix_space"))
    if not plain or len(ranks) != len(used) or any(bytes([byte]) not in ranks for byte in range(256)):
        return None
    if merges != [[_visible(part) for part in _halves(piece, ranks)] for piece in ranks if len(piece) > 1]:
        return None
    return ranks


def pieces_of(found: dict, where: str) -> list[bytes]:
    """The bytes of each id below n_ids; of one that does not exist none."""
    kinds, model = _kinds(found), found["model"]
    if model.get("type", "BPE") != "BPE" or not ("ByteLevel" in kinds or model.get("byte_fallback")):
        raise ValueError(f"{where}: a {model.get('type')} tokenizer; wanted is byte-pair encoding of all bytes")
    to_bytes = _byte_level if "ByteLevel" in kinds else _byte_fallback
    pieces = [b""] * n_ids(found)
    for token, i in model["vocab"].items():
        pieces[i] = to_bytes(token)
    for i, content in _added(found).items():
        if i < len(pieces):
            pieces[i] = content.encode()
    return pieces


def byte_level_json(pieces: list[bytes], special: dict[int, str], split_words: bool) -> dict:
    """The JSON of a byte-level tokenizer whose ids are ranks: of two neighbours, those merge first whose id is lowest.

    special: ids that are no merges. split_words: cut a text into words first, as GPT-2 does.
    """
    ranks = {piece: i for i, piece in enumerate(pieces) if i not in special}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split_words}
    merges = [[_visible(part) for part in _halves(piece, ranks)] for piece in ranks if len(piece) > 1]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": content} | flags for i, content in special.items()],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {_visible(piece): i for piece, i in ranks.items()}, "merges": merges},
    }


def _halves(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that are merged to this one: what the merges of lower rank leave of it."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _added(found: dict) -> dict[int, str]:
    return {token["id"]: token["content"] for token in found["added_tokens"]}


def _kinds(found: dict) -> set[str]:
    """Types of the pre-tokenizers and decoders, those in a sequence too."""
    parts = [found.get(name) or {} for name in ("pre_tokenizer", "decoder")]
    nested = [p for part in parts for key in ("pretokenizers", "decoders") for p in part.get(key, [])]
    return {part.get("type") for part in parts + nested}


def _without_first_space(found: dict) -> None:
    normalizer, splitter = found.get("normalizer") or {}, found.get("pre_tokenizer") or {}
    if normalizer.get("type") == "Prepend":
        found["normalizer"] = None
    elif normalizer.get("type") == "Sequence":
        normalizer["normalizers"] = [part for part in normalizer["normalizers"] if part.get("type") != "Prepend"]
    for part in (splitter, *splitter.get("pretokenizers", [])):
        if part.get("type") == "Metaspace":
            part |= {"prepend_scheme": "never"}
            part.pop("add_prefix_space", None)
        elif part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False


def _alphabet() -> list[str]:
    """The character of each byte in GPT-2's vocabulary: itself where it can be seen, else the next free from 256 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + hidden.index(byte)) for byte in range(256)]


ALPHABET = _alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def _visible(piece: bytes) -> str:
    return "".join(ALPHABET[byte] for byte in piece)


def _byte_level(token: str) -> bytes:
    if all(character in BYTE_OF for character in token):
        return bytes(BYTE_OF[character] for character in token)
    return token.encode()  # a token that was added later is written as it is


def _byte_fallback(token: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
