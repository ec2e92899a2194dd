"""Read a Hugging Face tokenizer.json through the `tokenizers` package.

Supported are byte-pair encodings of bytes, of two kinds:

    byte level       a visible character stands for each byte, as in GPT-2: "Ġthe" is " the"
    byte fallback    "▁the" is " the", and "<0x0A>" is a byte that no other token has

The file that we keep is the source's file with our reserved tokens after its last id
(<|ar2diff_pad|>, ...) and with one more entry, "ar2diff", for chats (hf/chat.py).

decode(encode(text)) == text, or the text is refused. Four rules of the source are therefore
ignored, except in a chat: a space before the first word, NFC normalisation, BPE dropout, and added
tokens that remove the spaces next to them.
"""

import copy
import functools
import itertools
import json
import os

from configurator import require
from data.tokenizer import ALPHABET, Tokenizer, padded_size, reserved_tokens
from hf import explained, optional

SPACE = "▁"  # how byte-fallback vocabularies write a space
PAD = "<|ar2diff_pad|>"
MAX_ID = 1 << 24
BYTE_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
PROBE = " A  probe: nai\u0308ve, don't WON'T,\n\ttwo \r\n\n   1234.5  "


class HFTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json.

    bos_ids: the ids that the source puts before every text. special_ids: no text is encoded to
    them. info: what a chat needs. sep_id is -1: slot 0 of a target is the last token of the prompt.
    """

    def __init__(self, name: str, text: str):
        found = json.loads(extend(text))
        self.info = found.pop("ar2diff", {})
        self.source = found
        splitters = _parts(found, "pre_tokenizer")
        self.byte_level = any(part.get("type") == "ByteLevel" for part in splitters)
        model = found["model"]
        kind = model.get("type", "BPE")
        fallback = model.get("byte_fallback") and model["vocab"].keys() >= set(BYTE_FALLBACK)
        supported = "byte-level BPE, or BPE with byte_fallback and the tokens <0x00> to <0xFF>"
        fault = f"this {kind} tokenizer is not supported; supported: {supported}"
        require(kind == "BPE" and (self.byte_level or fallback), fault)
        self._backend = load_backend(_lossless(found))
        self._backend.encode_special_tokens = True
        for token in found["added_tokens"]:
            known = self._backend.token_to_id(token["content"]) == token["id"]
            require(known, f"the added token {token['content']!r} gets no id {token['id']}")
        pieces = _pieces(found, self.byte_level)
        n_ordinary = self._backend.token_to_id(PAD)
        super().__init__(name, pieces[:n_ordinary], len(pieces), self._encode, text)
        self.sep_id = -1
        self.special_ids = [t["id"] for t in found["added_tokens"] if t.get("special")]
        whole = self._backend.encode("a")
        self.bos_ids = whole.ids[: whole.special_tokens_mask.index(0)]
        self.encode(PROBE)

    @functools.cached_property
    def chat_backend(self):
        """The tokenizers.Tokenizer that also parses special tokens."""
        return load_backend(self.source)

    def _encode(self, text: str) -> list[int]:
        # Byte fallback would decode the character "▁" as a space, so it is encoded as bytes.
        parts = [text] if self.byte_level else text.split(SPACE)
        ids = [self._backend.encode(part, add_special_tokens=False).ids for part in parts]
        for i in range(1, len(ids)):
            ids[i] = [self._backend.token_to_id(BYTE_FALLBACK[b]) for b in SPACE.encode()] + ids[i]
        ids = list(itertools.chain(*ids))
        if b"".join(map(self.pieces.__getitem__, ids)) != text.encode():
            back = self.decode(ids)
            i = len(os.path.commonprefix([text, back]))
            problem = f"changes text: {text[i : i + 20]!r} comes back as {back[i : i + 20]!r}"
            remedy = "remove it from the text, or use another tokenizer"
            raise ValueError(f"tokenizer {self.name!r} {problem}; {remedy}")
        return ids


def extend(text: str, rows: int = 0, info: dict | None = None) -> str:
    """Return the tokenizer.json with reserved tokens, at least up to `rows` ids, and with info.

    Raises ValueError if the text is not the JSON of a byte-pair tokenizer.
    """
    with explained("not the JSON of a byte-pair tokenizer"):
        found = json.loads(text)
        added = found.setdefault("added_tokens", [])
        ids = [*found["model"]["vocab"].values(), *(token["id"] for token in added)]
        require(all(type(i) is int and 0 <= i < MAX_ID for i in ids), "an id is no small number")
        require(all(type(token["content"]) is str for token in added), "a token has no text")
        _lossless(found)  # fails if another part has the wrong type
    if all(token["content"] != PAD for token in added):
        n = 1 + max(ids, default=-1)
        found["added_tokens"] = added + reserved_tokens(n, padded_size(n, rows))
    if info:
        found["ar2diff"] = info
    return json.dumps(found, ensure_ascii=False)


def load_backend(found: dict):
    """Return the tokenizers.Tokenizer of this JSON. Raises ValueError if the package refuses it."""
    tokenizers = optional("tokenizers")
    with explained("the package tokenizers cannot read it"):
        whole = {"truncation": None, "padding": None}
        return tokenizers.Tokenizer.from_str(json.dumps(found | whole))


def _parts(found: dict, name: str) -> list[dict]:
    """Return the members of the normalizer or pre-tokenizer: itself, unless it is a sequence."""
    component = found.get(name) or {}
    return component.get("normalizers") or component.get("pretokenizers") or [component]


def _lossless(found: dict) -> dict:
    """Return the JSON without the four rules that change a text (see the top of this file)."""
    model = found["model"] | {"dropout": None}
    found = copy.deepcopy(found | {"model": {}}) | {"model": model}
    normalizers = _parts(found, "normalizer")
    kept = [part for part in normalizers if part.get("type") not in (None, "Prepend", "NFC")]
    found["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in _parts(found, "pre_tokenizer"):
        if part.get("type") in ("ByteLevel", "Metaspace"):
            part |= {"add_prefix_space": False, "prepend_scheme": "never"}
    for token in found["added_tokens"]:
        token["lstrip"] = token["rstrip"] = False
    return found


def _pieces(found: dict, byte_level: bool) -> list[bytes]:
    """Return the bytes of each id; b"" for an id that is not used."""
    single = ALPHABET if byte_level else BYTE_FALLBACK
    byte_of = {token: bytes([byte]) for byte, token in enumerate(single)}
    pieces = [b""] * (1 + max(token["id"] for token in found["added_tokens"]))
    for token, i in found["model"]["vocab"].items():
        units = token if byte_level else [token]
        spelled = token if byte_level else token.replace(SPACE, " ")
        known = byte_of.keys() >= set(units)
        pieces[i] = b"".join(map(byte_of.get, units)) if known else spelled.encode()
    for token in found["added_tokens"]:
        pieces[token["id"]] = token["content"].encode()
    return pieces
