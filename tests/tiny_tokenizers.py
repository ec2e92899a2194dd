"""Small tokenizer.json files of both kinds, for the tests of hf/."""

import json

from data.tokenizer import ALPHABET

FLAGS = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
EOS = 259  # <|endoftext|> of byte_level()


def byte_level(**changes) -> dict:
    """Return a tokenizer with ids 0-255 for the bytes, then th, the, " the" and an end of text."""
    vocab = {character: byte for byte, character in enumerate(ALPHABET)}
    vocab |= {"th": 256, "the": 257, "Ġthe": 258}
    split = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    merges = [["t", "h"], ["th", "e"], ["Ġ", "the"]]
    found = {
        "version": "1.0",
        "added_tokens": [{"id": EOS, "content": "<|endoftext|>"} | FLAGS],
        "pre_tokenizer": split,
        "decoder": split,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    return found | changes


def with_added(content: str, **flags) -> dict:
    found = byte_level()
    found["added_tokens"].append({"id": EOS + 1, "content": content} | FLAGS | flags)
    return found


def byte_fallback(metaspace: bool = False, bos: bool = False) -> dict:
    """Return a tokenizer like Llama 2's: "▁" is a space, and one stands before the first word."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    vocab |= {token: 259 + i for i, token in enumerate(["▁", "t", "h", "e", "th", "the", "▁the"])}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizers = [{"type": "Prepend", "prepend": "▁"}, spaces]
    splitter = dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)
    found = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": c} | FLAGS for c, i in list(vocab.items())[:3]],
        "normalizer": None if metaspace else {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": splitter if metaspace else None,
        "model": dict(type="BPE", unk_token="<unk>", fuse_unk=True, byte_fallback=True, vocab=vocab)
        | {"merges": [["t", "h"], ["th", "e"], ["▁", "the"]]},
    }
    if bos:
        first = [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        pair = [*first, {"Sequence": {"id": "B", "type_id": 0}}]
        found["post_processor"] = dict(type="TemplateProcessing", single=first, pair=pair)
        found["post_processor"]["special_tokens"] = special
    return found


def write(folder, found: dict):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path
