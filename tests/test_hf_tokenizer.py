"""hf/tokenizer.py and hf/chat.py: every text comes back, the ids are those of transformers."""

import json
import random

import pytest
from tiny_tokenizers import EOS, byte_fallback, byte_level, with_added, write

from data.tokenizer import BYTE_LEVEL, MASK_MARK, get_tokenizer
from hf.chat import chat_ids, folder_info, render
from hf.tokenizer import HFTokenizer, extend


def tokenizer_of(found: dict) -> HFTokenizer:
    return HFTokenizer("tiny", json.dumps(found))


NFC = {"type": "NFC"}
KINDS = {
    "byte level": byte_level(),
    "prepend": byte_fallback(),
    "metaspace": byte_fallback(metaspace=True),
    "with BOS": byte_fallback(bos=True),
    "strips spaces": with_added("<call>", lstrip=True, rstrip=True, special=False),
    "not ASCII": with_added("café", special=False),
    "dropout": byte_level(model=byte_level()["model"] | {"dropout": 0.5}),
    "nfc": byte_level(normalizer={"type": "Sequence", "normalizers": [NFC]}),
    "prefix space": byte_level(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}),
}


@pytest.mark.parametrize("found", KINDS.values(), ids=KINDS)
def test_every_text_comes_back_and_has_one_encoding(found):
    tokenizer = tokenizer_of(found)
    numbers = random.Random(0)
    added = [token["content"] for token in found["added_tokens"]]
    for _ in range(300):
        codes = [numbers.choice((32, 10, 0x2581, numbers.randrange(0xD800))) for _ in range(20)]
        words = [chr(code) for code in [*codes, numbers.randrange(0xE000, 0x110000)]]
        words += [*numbers.choices(added, k=2), "the  the"]
        numbers.shuffle(words)
        text = "".join(words)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.piece, ids)) == text.encode()
        assert tokenizer.encode(text) == ids
        assert max(ids) < tokenizer.n_ordinary


@pytest.mark.parametrize("found", [byte_level(), byte_fallback(bos=True)], ids=["bytes", "bos"])
def test_the_ids_are_those_of_transformers(found, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = str(write(tmp_path, found))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    text = " the  theatre and the rest, naïve\n"
    tokenizer = tokenizer_of(found)
    # Llama 2's own tokenizer puts a space before a text. Ours can be cut anywhere.
    expected = theirs.encode(text if tokenizer.byte_level else text[1:])
    assert tokenizer.encode_prompt(text) == expected
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_reserved_ids_follow_the_last_id_and_text_never_has_them():
    tokenizer = tokenizer_of(byte_level())
    assert (tokenizer.n_ordinary, tokenizer.vocab_size) == (260, 384)
    assert (tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id) == (260, -1, 262)
    assert tokenizer.decode([97, 260, 262, 263, 98]) == f"a{MASK_MARK}<0>b"
    for special in ("<|endoftext|>", "<|ar2diff_pad|>"):
        ids = tokenizer.encode(special)
        assert len(ids) > 3 and tokenizer.decode(ids) == special
    assert extend(tokenizer.file) == extend(extend(tokenizer.file))
    assert json.loads(extend(tokenizer.file, rows=500))["added_tokens"][-1]["id"] == 511


BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
MODEL = byte_level()["model"]
NO_SPACES = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}]}
NO_SPACES["pretokenizers"].append(byte_level()["pre_tokenizer"])
QUOTES = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
CUT = {"type": "Split", "pattern": {"Regex": "日本"}, "behavior": "Removed", "invert": False}
CUT = {"type": "Sequence", "pretokenizers": [CUT, byte_level()["pre_tokenizer"]]}
NO_Q = {("unreachable" if token == "Q" else token): i for token, i in MODEL["vocab"].items()}


CHANGED = {
    "a Question": (dict(model=MODEL | {"vocab": NO_Q}), "'Question' comes back as 'uestion'"),
    "say ``yes": (dict(normalizer=QUOTES), "'``yes' comes back as '\"yes'"),
    "in 日本 now": (dict(pre_tokenizer=CUT), "'日本 now' comes back as ' now'"),
}


@pytest.mark.parametrize("text", CHANGED)
def test_a_text_that_the_tokenizer_changes_is_refused(text):
    changes, message = CHANGED[text]
    tokenizer = tokenizer_of(byte_level(**changes))
    assert tokenizer.decode(tokenizer.encode("any other text")) == "any other text"
    with pytest.raises(ValueError, match=f"changes text: {message}; remove it"):
        tokenizer.encode(text)


REFUSED = {
    "no JSON": ("{", "not the JSON of a byte-pair tokenizer"),
    "huge id": ({"model": BPE | {"vocab": {"a": 1e12}}}, "not the JSON"),
    "wordpiece": ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "WordPiece .* not support"),
    "some bytes": ({"model": BPE | {"byte_fallback": True}}, "this BPE tokenizer is not supported"),
    "merges": (byte_level(model=MODEL | {"merges": 3}), "tokenizers cannot read it"),
    "lowercase": (byte_level(normalizer={"type": "Lowercase"}), "changes text: 'A"),
    "nfkc": (byte_level(normalizer={"type": "NFKC"}), "changes text"),
    "drops spaces": (byte_level(pre_tokenizer=NO_SPACES), "changes text"),
}


@pytest.mark.parametrize("found, message", REFUSED.values(), ids=REFUSED)
def test_other_tokenizers_are_refused_in_one_line(found, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        get_tokenizer(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


# Chats

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|endoftext|>{{ m.role }}\n{% generation %}"
    "{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)
MESSAGES = [{"role": "user", "content": "the <|endoftext|> ✓"}]


def chat_tokenizer(folder, template: str, **settings) -> HFTokenizer:
    settings |= {"bos_token": {"content": "the"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    info = folder_info(folder, {"eos_token_id": [EOS, 3]})
    return HFTokenizer("chat", extend(json.dumps(byte_level()), info=info))


def test_a_chat_is_rendered_and_encoded_as_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = chat_tokenizer(tmp_path, TEMPLATE)
    write(tmp_path, byte_level())
    path = str(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=path, bos_token="the")
    theirs.chat_template = TEMPLATE
    expected = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert render(ours, MESSAGES) == expected
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert chat_ids(ours, MESSAGES) == ids and ids.count(EOS) == 3
    assert ours.info["end_ids"] == [EOS, 3]
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert folder_info(tmp_path, {})["chat_template"] == "newer"


TEMPLATES = {
    "{{ raise_exception('roles must alternate') }}": "template fails: roles must alternate",
    "{{ messages.append(1) }}": "chat template fails",  # the sandbox
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}": "chat template fails: .*recursion",
    "": "has no chat template",
}


@pytest.mark.parametrize("template, message", TEMPLATES.items())
def test_a_template_that_fails_is_one_line(template, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        chat_ids(chat_tokenizer(tmp_path, template), MESSAGES)
    assert "\n" not in str(error.value)


DAMAGED = [
    ("tokenizer_config.json", b"[]"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
    ("chat_template.jinja", b"caf\xe9"),
]


@pytest.mark.parametrize("name, content", DAMAGED)
def test_a_damaged_file_of_a_chat_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name) as error:
        folder_info(tmp_path, {})
    assert "\n" not in str(error.value)
