"""Read a GGUF file through the `gguf` package as if it were a Hugging Face folder.

The package parses the file, dequantises to float32 and knows llama.cpp's tensor names. Three
changes of llama.cpp are undone here: the order of Llama's rows of queries and keys, GPT-2's
transposed matrices, and Llama 3's RoPE scaling as a tensor.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import BYTE_LEVEL
from hf import refuse_lfs_pointer, require
from hf.layouts import FAMILIES, Config
from hf.tokenizer import BYTE_FALLBACK, SPACE

# config.json -> the field after the name of the architecture.
GPT2_FIELDS = dict(n_layer="block_count", n_head="attention.head_count", n_embd="embedding_length")
GPT2_FIELDS |= dict(n_inner="feed_forward_length", n_positions="context_length")
GPT2_FIELDS |= dict(layer_norm_epsilon="attention.layer_norm_epsilon")
LLAMA_FIELDS = dict(num_hidden_layers="block_count", num_attention_heads="attention.head_count")
LLAMA_FIELDS |= dict(num_key_value_heads="attention.head_count_kv", head_dim="attention.key_length")
LLAMA_FIELDS |= dict(hidden_size="embedding_length", intermediate_size="feed_forward_length")
LLAMA_FIELDS |= dict(max_position_embeddings="context_length", rope_theta="rope.freq_base")
LLAMA_FIELDS |= dict(rms_norm_eps="attention.layer_norm_rms_epsilon")
LLAMA_FIELDS |= dict(sliding_window="attention.sliding_window")
FIELDS = {"gpt2": GPT2_FIELDS} | dict.fromkeys(("llama", "qwen2", "qwen3"), LLAMA_FIELDS)
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens

# How a text is cut into words, by the name that the file gives (tokenizer.ggml.pre).
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = {"gpt-2": [], "smollm": [SINGLE_DIGITS]}
WORDS |= dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), LLAMA3_WORDS)
WORDS |= dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2_WORDS)


class GGUFFile:
    """A GGUF file with the attributes and methods of hf.load.Folder."""

    def __init__(self, path: Path):
        gguf = require("gguf")
        refuse_lfs_pointer(path)
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # numpy fails in many ways on a truncated file
            reason = (str(error) or type(error).__name__).splitlines()[0][:100]
            raise ValueError(f"{path}: truncated, or not a GGUF file ({reason})") from None
        self.arch = self._fields.get("general.architecture")
        if self.arch not in FIELDS:
            known = ", ".join(FIELDS)
            raise ValueError(f"{path}: architecture {self.arch!r} is not one of {known}")
        for name in ("split.count", f"{self.arch}.expert_count"):
            if self._fields.get(name, 0) > 1:
                raise ValueError(f"{path}: {name}={self._fields[name]} is not supported")
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = Config(self._config(), str(path))

    def _field(self, name: str, default=None):
        return self._fields.get(f"{self.arch}.{name}", default)

    def _config(self) -> dict:
        """Return the settings under the names of config.json."""
        if "token_embd.weight" not in self._tensors:
            raise ValueError(f"{self.path}: lacks the tensor token_embd.weight")
        values = {name: self._field(field) for name, field in FIELDS[self.arch].items()}
        values = {name: value for name, value in values.items() if value is not None}
        values |= dict(
            model_type="mistral" if self._field("attention.sliding_window") else self.arch,
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            tie_word_embeddings="output.weight" not in self._tensors,
            eos_token_id=self._fields.get("tokenizer.ggml.eos_token_id"),
        )
        if self.arch == "gpt2":
            return values
        c = Config(values, str(self.path))
        heads = max(c.get("num_attention_heads", int), 1)
        head_dim = max(c.get("head_dim", int, c.get("hidden_size", int) // heads), 1)
        values = {"num_key_value_heads": heads} | values | {"head_dim": head_dim}
        values["partial_rotary_factor"] = self._field("rope.dimension_count", head_dim) / head_dim
        if self._field("rope.scaling.type", "none") != "none":
            values["rope_scaling"] = {"rope_type": self._field("rope.scaling.type")}
        if "rope_freqs.weight" in self._tensors:
            base = c.get("rope_theta", float, 10000.0)
            values["rope_scaling"] = self._llama3_scaling(base, head_dim)
        if self.arch == "llama":
            values["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
            values["mlp_bias"] = "blk.0.ffn_up.bias" in self._tensors
        return values

    def _llama3_scaling(self, base: float, head_dim: int) -> dict:
        """Return Llama 3's settings if they give the divisors in the tensor rope_freqs.weight."""
        divisors = self._dequantize("rope_freqs.weight").flatten().double()
        factor = round(divisors.max().item())
        turns = 8192 / (2 * math.pi) * base ** (-torch.arange(0, head_dim, 2).double() / head_dim)
        smooth = ((turns - 1) / 3).clamp(0, 1)  # 1 turn or fewer is slow, 4 or more are fast
        expected = 1 / (smooth + (1 - smooth) / factor)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
            raise ValueError(f"{self.path}: rope_freqs.weight is not Llama 3's RoPE scaling")
        scaling = dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0)
        return scaling | dict(original_max_position_embeddings=8192)

    def open_weights(self) -> None:
        """Name the tensors as Hugging Face does. Raises ValueError if one cannot be dequantised."""
        gguf = require("gguf")
        for kind in {tensor.tensor_type for tensor in self._tensors.values()}:
            try:
                n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
                gguf.dequantize(np.zeros((1, n_bytes), np.uint8), kind)
            except (KeyError, NotImplementedError):
                raise ValueError(f"{self.path}: cannot dequantise {kind.name}") from None
        family = FAMILIES[self.config.values["model_type"]]
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        n_layer = min(self._field("block_count", 0), 1000)  # ModelConfig refuses more
        short = gguf.get_tensor_name_map(arch, n_layer)
        self._short = {}
        for names in family.modules.values():
            for name in (n.replace("#", str(i)) for n in names for i in range(n_layer)):
                for part in (".weight", ".bias"):
                    self._short[name + part] = f"{short.get_name(name)}{part}"
        known = {short: name for name, short in self._short.items()}
        tensors = {known.get(n, n): t for n, t in self._tensors.items() if n != "rope_freqs.weight"}
        self.shape = {n: tuple(t.shape[::-1].tolist()) for n, t in tensors.items()}
        if self.arch == "gpt2":
            turned = [name for name in tensors if ".h." in name]
            self.shape |= {name: self.shape[name][::-1] for name in turned}
        self.file = dict.fromkeys(tensors, self.path)
        self.dtype = dict.fromkeys(tensors, torch.float32)

    def _dequantize(self, short: str, start: int = 0, end: int | None = None) -> Tensor:
        tensor = self._tensors[short]
        shape = tensor.data[start:end].shape
        offset = tensor.data_offset + start * tensor.data.strides[0]
        # Not tensor.data itself: its pages, which are mapped, would stay in memory.
        packed = np.fromfile(self.path, tensor.data.dtype, math.prod(shape), offset=int(offset))
        packed = packed.reshape(shape)
        return torch.from_numpy(require("gguf").dequantize(packed, tensor.tensor_type))

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Return rows of a tensor in float32."""
        short = self._short[name]
        if self.arch == "gpt2" and ".h." in name and len(self.shape[name]) == 2:
            return self._dequantize(short).T[start:end]
        if self.arch != "llama" or not (".attn_q." in short or ".attn_k." in short):
            return self._dequantize(short, start, end)
        # Within a head, llama.cpp alternates the rows of the two halves that RoPE rotates.
        whole = self._dequantize(short)
        rest = whole.shape[1:]
        heads = whole.view(-1, self.config.values["head_dim"] // 2, 2, *rest)
        return heads.transpose(1, 2).reshape(-1, *rest)[start:end]

    def tokenizer_json(self, notes: list[str]) -> tuple[str, dict]:
        """Return a tokenizer.json, made from the fields of the file, and what a chat needs."""
        fields = {n.removeprefix("tokenizer.ggml."): v for n, v in self._fields.items()}
        tokens = fields.get("tokens")
        if not tokens:
            raise ValueError(f"{self.path}: has no tokenizer (tokenizer.ggml.tokens)")
        types = list(fields.get("token_type") or [1] * len(tokens))
        while types and types[-1] == UNUSED:  # filled up to the rows of the embedding
            types.pop()
        tokens = tokens[: len(types)]
        added = [
            dict(id=i, content=token, special=kind == CONTROL, normalized=False)
            | dict(single_word=False, lstrip=False, rstrip=False)
            for i, (token, kind) in enumerate(zip(tokens, types))
            if kind in (CONTROL, USER_DEFINED)
        ]
        vocab = {token: i for i, token in enumerate(tokens)}
        if fields.get("model") == "gpt2":
            found = self._byte_level(fields, vocab)
        elif fields.get("model") == "llama":
            found = _byte_fallback(fields, vocab)
        else:
            raise ValueError(f"{self.path}: tokenizer {fields.get('model')!r} is not gpt2 or llama")
        found |= {"version": "1.0", "added_tokens": added}
        names = dict(bos_token="bos", eos_token="eos", unk_token="unknown", pad_token="padding")
        ids = {name: fields.get(f"{short}_token_id") for name, short in names.items()}
        special = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
        bos_is_default = fields["model"] == "llama" or fields.get("pre") in ("llama-bpe", "llama3")
        if fields.get("add_bos_token", bos_is_default) and "bos_token" in special:
            found["post_processor"] = _start_with(special["bos_token"], ids["bos_token"])
        ends = {fields.get("eos_token_id"), fields.get("eot_token_id")} - {None}
        info = {"special_tokens": special, "end_ids": sorted(ends)}
        if "tokenizer.chat_template" in self._fields:
            info["chat_template"] = self._fields["tokenizer.chat_template"]
        return json.dumps(found, ensure_ascii=False), info

    def _byte_level(self, fields: dict, vocab: dict[str, int]) -> dict:
        kind = fields.get("pre", "gpt-2" if self.arch == "gpt2" else None)
        if kind not in WORDS:
            known = ", ".join(WORDS)
            raise ValueError(f"{self.path}: unknown pre-tokenizer {kind!r}; supported: {known}")
        words = WORDS[kind]
        if isinstance(words, str):
            split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated"}
            steps = [split | {"invert": False}, BYTE_LEVEL | {"use_regex": False}]
        else:
            steps = [*words, BYTE_LEVEL]
        model = {"type": "BPE", "vocab": vocab, "merges": fields.get("merges", [])}
        model["ignore_merges"] = words == LLAMA3_WORDS
        splitter = {"type": "Sequence", "pretokenizers": steps}
        return {"pre_tokenizer": splitter, "decoder": BYTE_LEVEL, "model": model}


def _byte_fallback(fields: dict, vocab: dict[str, int]) -> dict:
    """Return the JSON of a SentencePiece vocabulary. Its scores imply the order of the merges."""
    merges = []
    for token, score in zip(vocab, fields.get("scores", [])):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        halves = [(a, b) for a, b in halves if a in vocab and b in vocab]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(score, len(a), len(b), a, b) for a, b in halves]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    model = {"type": "BPE", "vocab": vocab, "merges": [merge[3:] for merge in merges]}
    model |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": BYTE_FALLBACK[0] in vocab}
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    if fields.get("add_space_prefix", True):
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    return {"normalizer": {"type": "Sequence", "normalizers": steps}, "model": model}


def _start_with(bos: str, bos_id: int) -> dict:
    """Return the post-processor that puts one token before a text."""
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    single = {"type": "TemplateProcessing", "single": [token, first], "special_tokens": special}
    return single | {"pair": [token, first, second]}
