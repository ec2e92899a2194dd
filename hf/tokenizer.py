"""Read a Hugging Face tokenizer.json through the `tokenizers` package.

Supported are byte-pair encodings of bytes, of two kinds:

    byte level       a visible character stands for each byte, as in GPT-2: "Ġthe" is " the"
    byte fallback    "▁the" is " the", and "<0x0A>" is a byte that no other token has

The file that we keep is the source's file with our reserved tokens after its last id
(<|ar2diff_pad|>, ...) and with one more entry, "ar2diff", for chats (hf/chat.py).

decode(encode(text)) == text for every text. Four rules of the source are therefore ignored, except
in a chat: a space before the first word, NFC normalisation, BPE dropout, and added tokens that
remove the spaces next to them. A text with a byte that has no token is refused.
"""

import copy
import itertools
import json

from data.tokenizer import ALPHABET, Tokenizer, padded_size, reserved_tokens
from hf import require

SPACE = "▁"  # how byte-fallback vocabularies write a space
PAD = "<|ar2diff_pad|>"
MAX_ID = 1 << 24
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
BYTE_FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]


class HFTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json.

    bos_ids: the ids that the source puts before every text. info: what a chat needs.
    sep_id is -1: slot 0 of a target is the last token of the prompt.
    """

    def __init__(self, name: str, text: str):
        found = json.loads(extend(text))
        self.info = found.pop("ar2diff", {})
        self.source = found
        self.byte_level = _is_byte_level(found)
        _refuse_unsupported(found, self.byte_level)
        vocab = found["model"]["vocab"]
        single = ALPHABET if self.byte_level else BYTE_FALLBACK
        self._no_token = {byte for byte, token in enumerate(single) if token not in vocab}
        self._backend = load_backend(_lossless(found))
        self._backend.encode_special_tokens = True
        vocab_size = 1 + max(token["id"] for token in found["added_tokens"])
        super().__init__(name, _pieces(found, self.byte_level), vocab_size, self._encode, text)
        self.sep_id = -1
        both = self._backend.encode("a")
        leading = itertools.takewhile(lambda pair: pair[1], zip(both.ids, both.special_tokens_mask))
        self.bos_ids = [i for i, _ in leading]
        self._check_round_trip()

    def _encode(self, text: str) -> list[int]:
        lost = self._no_token.intersection(text.encode())
        if lost:
            character = next(c for c in text if lost.intersection(c.encode()))
            raise ValueError(
                f"tokenizer {self.name!r} has no token for {character!r}; remove it from the text"
            )
        if self.byte_level:
            return self._backend.encode(text, add_special_tokens=False).ids
        # Byte fallback would decode the character "▁" as a space, so it is encoded as bytes.
        ids = []
        for i, part in enumerate(text.split(SPACE)):
            if i > 0:
                ids += [self._backend.token_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
            ids += self._backend.encode(part, add_special_tokens=False).ids
        return ids

    def _check_round_trip(self) -> None:
        """Raise ValueError if a probe changes: every byte of UTF-8, spaces, every added token."""
        codes = [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000)]
        readable = [c for c in map(chr, codes) if not self._no_token.intersection(c.encode())]
        added = {t["content"]: t["id"] for t in self.source["added_tokens"]}
        added = {content: i for content, i in added.items() if i < self.n_ordinary}
        for content, i in added.items():
            if self._backend.token_to_id(content) != i:
                raise ValueError(f"the package tokenizers gives {content!r} another id than {i}")
        probes = [
            "".join(readable),
            "A probe: naïve, nai\u0308ve, don't WON'T,\n\ttwo  spaces \r\n\n   and 1234.5  ",
            " leading and trailing  x ",
            *(f"a {content}b  {content}\n {content}" for content in added),
        ]
        for probe in probes:
            back = self.decode(self.encode(probe))
            if back != probe:
                differ = (i for i, (a, b) in enumerate(zip(probe, back)) if a != b)
                at = next(differ, min(len(probe), len(back)))
                was = probe[at : at + 20]
                raise ValueError(
                    f"this tokenizer changes text: {was!r} comes back as {back[at : at + 20]!r}"
                )


def parse(text: str) -> dict:
    """Return the JSON of a byte-pair tokenizer. Raises ValueError if the text is not one."""
    try:
        found = json.loads(text)
        added = found.setdefault("added_tokens", [])
        ids = [*found["model"]["vocab"].values(), *(token["id"] for token in added)]
        good = all(type(i) is int and 0 <= i < MAX_ID for i in ids) and type(added) is list
        good = good and all(type(token["content"]) is str for token in added)
        _lossless(found)  # fails if another part has the wrong type
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise ValueError("not the JSON of a byte-pair tokenizer")
    return found


def extend(text: str, rows: int = 0, info: dict | None = None) -> str:
    """Return the tokenizer.json with reserved tokens, at least up to `rows` ids, and with info."""
    found = parse(text)
    if not any(token["content"] == PAD for token in found["added_tokens"]):
        n = n_ids(found)
        found["added_tokens"] = found["added_tokens"] + reserved_tokens(n, padded_size(n, rows))
    if info:
        found["ar2diff"] = info
    return json.dumps(found, ensure_ascii=False)


def n_ids(found: dict) -> int:
    """Return the number of ids without our reserved ones. Some below it may be unused."""
    for token in found["added_tokens"]:
        if token["content"] == PAD:
            return token["id"]
    added = [token["id"] for token in found["added_tokens"]]
    return 1 + max([*found["model"]["vocab"].values(), *added], default=-1)


def load_backend(found: dict):
    """Return the tokenizers.Tokenizer of this JSON. Raises ValueError if the package refuses it."""
    tokenizers = require("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(found))
    except Exception as error:  # the package raises plain Exception
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"the package tokenizers cannot read it ({reason})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _refuse_unsupported(found: dict, byte_level: bool) -> None:
    model = found["model"]
    kind = model.get("type", "BPE")
    fallback = model.get("byte_fallback") and all(t in model["vocab"] for t in BYTE_FALLBACK)
    if kind != "BPE" or not (byte_level or fallback):
        raise ValueError(
            f"this {kind} tokenizer is not supported; supported: byte-level BPE, and BPE with "
            "byte_fallback and the tokens <0x00> to <0xFF>"
        )


def _parts(component: dict | None) -> list[dict]:
    """Return the members of a normalizer or pre-tokenizer: itself, unless it is a sequence."""
    component = component or {}
    return component.get("normalizers") or component.get("pretokenizers") or [component]


def _is_byte_level(found: dict) -> bool:
    return any(part.get("type") == "ByteLevel" for part in _parts(found.get("pre_tokenizer")))


def _lossless(found: dict) -> dict:
    """Return the JSON without the four rules that change a text (see the top of this file)."""
    model = found["model"] | {"dropout": None}
    found = copy.deepcopy(found | {"model": {}})
    found["model"] = model
    normalizers = _parts(found.get("normalizer"))
    kept = [part for part in normalizers if part.get("type") not in (None, "Prepend", "NFC")]
    found["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in _parts(found.get("pre_tokenizer")):
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
    for token in found["added_tokens"]:
        token["lstrip"] = token["rstrip"] = False
    return found


def _pieces(found: dict, byte_level: bool) -> list[bytes]:
    """Return the bytes of each ordinary id; b"" for an id that is not used."""
    byte_of = {character: byte for byte, character in enumerate(ALPHABET)}
    added = {token["content"]: token["id"] for token in found["added_tokens"]}
    pieces = [b""] * n_ids(found)
    for token, i in found["model"]["vocab"].items():
        if token in added:
            continue
        if byte_level:
            known = all(character in byte_of for character in token)
            pieces[i] = bytes(byte_of[c] for c in token) if known else token.encode()
        elif token in BYTE_FALLBACK:
            pieces[i] = bytes([BYTE_FALLBACK.index(token)])
        else:
            pieces[i] = token.replace(SPACE, " ").encode()
    for content, i in added.items():
        if i < len(pieces):
            pieces[i] = content.encode()
    return pieces
