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
import os

from data.tokenizer import ALPHABET, Tokenizer, padded_size, reserved_tokens
from hf import LFS_POINTER, first_line, require

SPACE = "▁"  # how byte-fallback vocabularies write a space
PAD = "<|ar2diff_pad|>"
MAX_ID = 1 << 24
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
        splitters = _parts(found.get("pre_tokenizer"))
        self.byte_level = any(part.get("type") == "ByteLevel" for part in splitters)
        model = found["model"]
        fallback = model.get("byte_fallback") and model["vocab"].keys() >= set(BYTE_FALLBACK)
        if model.get("type", "BPE") != "BPE" or not (self.byte_level or fallback):
            raise ValueError(
                f"this {model.get('type')} tokenizer is not supported; supported: byte-level BPE, "
                "and BPE with byte_fallback and the tokens <0x00> to <0xFF>"
            )
        for part in [*_parts(found.get("normalizer")), *splitters]:
            spaces = part.get("pattern") == {"String": " "} and part.get("content") == SPACE
            replaces = part.get("type") == "Replace" and not spaces
            if replaces or part.get("behavior") == "Removed":
                fault = f"it replaces or removes {part.get('pattern')}"
                raise ValueError(f"this tokenizer changes text: {fault}")
        single = ALPHABET if self.byte_level else BYTE_FALLBACK
        self._no_token = {i for i, token in enumerate(single) if token not in model["vocab"]}
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
            problem = f"has no token for {character!r}; remove it from the text"
            raise ValueError(f"tokenizer {self.name!r} {problem}")
        # Byte fallback would decode the character "▁" as a space, so it is encoded as bytes.
        parts = [text] if self.byte_level else text.split(SPACE)
        ids = [self._backend.encode(part, add_special_tokens=False).ids for part in parts]
        for i in range(1, len(ids)):
            ids[i] = [self._backend.token_to_id(BYTE_FALLBACK[b]) for b in SPACE.encode()] + ids[i]
        return list(itertools.chain(*ids))

    def _check_round_trip(self) -> None:
        """Raise ValueError if a probe changes: every byte of UTF-8, spaces, every added token."""
        codes = [*range(0x800), *range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000)]
        readable = [c for c in map(chr, codes) if not self._no_token.intersection(c.encode())]
        probes = [
            "".join(readable),
            " A  probe: nai\u0308ve, don't WON'T,\n\ttwo \r\n\n   1234.5  ",
        ]
        for token in (t for t in self.source["added_tokens"] if t["id"] < self.n_ordinary):
            content = token["content"]
            if self._backend.token_to_id(content) != token["id"]:
                raise ValueError(f"the added token {content!r} does not have the id {token['id']}")
            probes.append(f"a {content}b  {content}\n {content}")
        for probe in probes:
            back = self.decode(self.encode(probe))
            if back != probe:
                i = len(os.path.commonprefix([probe, back]))
                fault = f"{probe[i : i + 20]!r} comes back as {back[i : i + 20]!r}"
                raise ValueError(f"this tokenizer changes text: {fault}")


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
    if text.startswith(LFS_POINTER.decode()):
        raise ValueError("a git-LFS pointer, not the file; run `git lfs pull`")
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
    added = {token["content"]: token["id"] for token in found["added_tokens"]}
    ids = [*found["model"]["vocab"].values(), *added.values()]
    return added.get(PAD, 1 + max(ids, default=-1))


def load_backend(found: dict):
    """Return the tokenizers.Tokenizer of this JSON. Raises ValueError if the package refuses it."""
    tokenizers = require("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(found))
    except Exception as error:  # the package raises plain Exception
        reason = f"the package tokenizers cannot read it ({first_line(error)})"
        raise ValueError(reason) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parts(component: dict | None) -> list[dict]:
    """Return the members of a normalizer or pre-tokenizer: itself, unless it is a sequence."""
    component = component or {}
    return component.get("normalizers") or component.get("pretokenizers") or [component]


def _lossless(found: dict) -> dict:
    """Return the JSON without the four rules that change a text (see the top of this file)."""
    model = found["model"] | {"dropout": None}
    found = copy.deepcopy(found | {"model": {}}) | {"model": model}
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
    single = ALPHABET if byte_level else BYTE_FALLBACK
    byte_of = {token: bytes([byte]) for byte, token in enumerate(single)}
    pieces = [b""] * n_ids(found)
    for token, i in found["model"]["vocab"].items():
        if byte_level and byte_of.keys() >= set(token):
            pieces[i] = b"".join(byte_of[character] for character in token)
        elif byte_level:
            pieces[i] = token.encode()
        else:
            pieces[i] = byte_of.get(token, token.replace(SPACE, " ").encode())
    for token in found["added_tokens"]:
        if token["id"] < len(pieces):
            pieces[token["id"]] = token["content"].encode()
    return pieces
