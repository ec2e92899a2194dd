"""Read a GGUF file through the `gguf` package as if it were a Hugging Face folder.

The package parses the file, dequantises to float32 and knows llama.cpp's tensor names. Two
changes of llama.cpp are undone here: the order of Llama's rows of queries and keys, and Llama 3's
RoPE scaling as a tensor. Vocabularies are byte-level; SentencePiece's need the model's folder.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configurator import require
from data.tokenizer import BYTE_LEVEL, reserved_tokens
from hf import explained, optional, refuse_lfs_pointer
from hf.layouts import FAMILIES, one_of, read_settings, typed

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens
ROLES = dict(bos_token="bos", eos_token="eos", unk_token="unknown", pad_token="padding")

# How a text is cut into words, by the name that the file gives (tokenizer.ggml.pre).
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = BYTE_LEVEL | {"use_regex": False}
LLAMA3 = [SPLIT | {"pattern": {"Regex": LLAMA3_WORDS}}, BYTES]
QWEN2 = [SPLIT | {"pattern": {"Regex": LLAMA3_WORDS.replace("{1,3}", "")}}, BYTES]
SMOLLM = [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]
WORDS = {"gpt-2": [BYTE_LEVEL], "smollm": SMOLLM, "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2}
WORDS |= {"llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3}


class GGUFFile:
    """A GGUF file with the attributes and methods of hf.load.Folder."""

    def __init__(self, path: Path):
        gguf = optional("gguf")
        refuse_lfs_pointer(path)
        self._path = path
        with explained("truncated, or not a GGUF file"):
            reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.shape = {n: tuple(t.shape[::-1].tolist()) for n, t in self._tensors.items()}
        self._arch = one_of(self._fields, "general.architecture", "llama", "gpt2", "qwen2", "qwen3")
        one_of(self._fields, "split.count", 0, 1)
        one_of(self._fields, f"{self._arch}.expert_count", 0, 1)
        one_of(self._fields, f"{self._arch}.rope.scaling.type", "none")
        # The package gives GPT-2's matrices as (out, in), as ours are.
        self.family = FAMILIES[self._arch]._replace(transposed=False)
        self.config = self._config()
        self.settings = read_settings(self.config)
        n_layer, n_head, n_embd = (self.settings[name] for name in ("n_layer", "n_head", "n_embd"))
        self._head_dim = self.settings.get("head_dim") or n_embd // max(n_head, 1)
        one_of(self._fields, f"{self._arch}.rope.dimension_count", self._head_dim)
        if "rope_freqs.weight" in self._tensors:
            self.settings["rope_factor"] = self._llama3_rope()
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self._arch)
        self._map = gguf.get_tensor_name_map(arch, min(n_layer, 1000))  # ModelConfig refuses more

    def _config(self) -> dict:
        """Return the settings under the names of config.json."""
        fields = {n.removeprefix(f"{self._arch}."): v for n, v in self._fields.items()}
        values = {"model_type": self._arch, "layer_types": ["sliding_attention"]}
        for row in self.family.settings():
            values[row.theirs[self.family.column].split()[0]] = fields.get(row.gguf)
        values["sliding_window"] = fields.get("attention.sliding_window")
        values["eos_token_id"] = fields.get("tokenizer.ggml.eos_token_id")
        values["tie_word_embeddings"] = "output.weight" not in self.shape
        values["attention_bias"] = "blk.0.attn_q.bias" in self.shape
        return values

    def names(self, ours: str) -> list[str]:
        """Return the names of the tensors for one of ours."""
        theirs = [name.rpartition(".") for name in self.family.names(ours)]
        return [f"{self._map.get_name(module)}.{part}" for module, _, part in theirs]

    def _llama3_rope(self) -> float:
        """Return rope_factor. Llama 3's other settings are the defaults of ModelConfig."""
        divisors = self._dequantize("rope_freqs.weight").flatten().double()
        factor = divisors.max().round().item()
        pairs = torch.arange(0, self._head_dim, 2).double() / self._head_dim
        turns = 8192 / (2 * math.pi) * self.settings["rope_base"] ** -pairs
        smooth = ((turns - 1) / 3).clamp(0, 1)  # 1 turn or fewer is slow, 4 or more are fast
        expected = 1 / (smooth + (1 - smooth) / factor)
        same = divisors.shape == expected.shape and torch.allclose(divisors, expected, rtol=1e-3)
        require(same, "rope_freqs.weight is not Llama 3's RoPE scaling")
        return factor

    def _dequantize(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        data = tensor.data
        # Not data itself: its pages, which are mapped, would stay in memory.
        packed = np.fromfile(self._path, data.dtype, data.size, offset=int(tensor.data_offset))
        packed = packed.reshape(data.shape)
        with explained(name):
            return torch.from_numpy(optional("gguf").dequantize(packed, tensor.tensor_type))

    def read(self, name: str) -> Tensor:
        """Return a tensor in float32."""
        tensor = self._dequantize(name)
        if self._arch != "llama" or not re.search(r"\.attn_[qk]\.", name):
            return tensor
        # Within a head, llama.cpp alternates the rows of the two halves that RoPE rotates.
        heads = tensor.view(-1, self._head_dim // 2, 2, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)

    def tokenizer_json(self) -> tuple[str, dict]:
        """Return a tokenizer.json, made from the fields of the file, and what a chat needs."""
        one_of(self._fields, "tokenizer.ggml.model", "gpt2")
        fields = {n.removeprefix("tokenizer.ggml."): v for n, v in self._fields.items()}
        for name in ("tokens", "token_type", "merges"):
            require(fields.get(name), f"has no tokenizer.ggml.{name}; convert the model again")
        types = fields["token_type"]
        while types and types[-1] == UNUSED:  # filled up to the rows of the embedding
            types.pop()
        tokens = fields["tokens"][: len(types)]
        vocab = {token: i for i, token in enumerate(tokens)}
        typed(fields, "pre", str, "gpt-2" if self._arch == "gpt2" else None)
        splitters = WORDS[one_of(self._fields, "tokenizer.ggml.pre", *WORDS)]
        model = dict(type="BPE", vocab=vocab, merges=fields["merges"])
        model["ignore_merges"] = splitters == LLAMA3
        splitter = {"type": "Sequence", "pretokenizers": splitters}
        found = {"pre_tokenizer": splitter, "decoder": BYTE_LEVEL, "model": model}
        flags = reserved_tokens(0, 3)[0]
        added = [
            flags | dict(id=i, content=token, special=type_ == CONTROL)
            for i, (token, type_) in enumerate(zip(tokens, types))
            if type_ in (CONTROL, USER_DEFINED)
        ]
        found |= {"version": "1.0", "added_tokens": added}
        ids = {role: fields.get(f"{name}_token_id", len(tokens)) for role, name in ROLES.items()}
        special = {role: tokens[i] for role, i in ids.items() if i < len(tokens)}
        bos_is_default = fields.get("pre") in ("llama-bpe", "llama3")
        if fields.get("add_bos_token", bos_is_default) and "bos_token" in special:
            bos = special["bos_token"]
            first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
            single = [{"SpecialToken": {"id": bos, "type_id": 0}}, first]
            table = {bos: {"id": bos, "ids": [ids["bos_token"]], "tokens": [bos]}}
            parts = dict(single=single, pair=[*single, second], special_tokens=table)
            found["post_processor"] = {"type": "TemplateProcessing"} | parts
        ends = {fields.get("eos_token_id"), fields.get("eot_token_id")} - {None}
        template = fields.get("tokenizer.chat_template", "")
        info = {"special_tokens": special, "end_ids": sorted(ends), "chat_template": template}
        return json.dumps(found, ensure_ascii=False), info
