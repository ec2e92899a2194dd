"""Read a GGUF file through the `gguf` package as if it were a Hugging Face folder.

The package parses the file, dequantises to float32 and knows llama.cpp's tensor names. Two
changes of llama.cpp are undone here: the order of Llama's rows of queries and keys, and Llama 3's
RoPE scaling as a tensor.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.tokenizer import BYTE_LEVEL, reserved_tokens
from hf import first_line, refuse_lfs_pointer, require
from hf.layouts import FAMILIES, LLAMA3_ROPE, Config, read_settings
from hf.tokenizer import BYTE_FALLBACK, SPACE

ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3")
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens

# How a text is cut into words, by the name that the file gives (tokenizer.ggml.pre).
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
WORDS = {"gpt-2": [], "smollm": [{"type": "Digits", "individual_digits": True}]}
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
            reason = f"truncated, or not a GGUF file ({first_line(error)})"
            raise ValueError(f"{path}: {reason}") from None
        self.arch = self._fields.get("general.architecture")
        if self.arch not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(f"{path}: architecture {self.arch!r} is not one of {known}")
        for name in ("split.count", f"{self.arch}.expert_count"):
            if self._fields.get(name, 0) not in (0, 1):
                raise ValueError(f"{path}: {name}={self._fields[name]} is not supported")
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        # The package gives GPT-2's matrices as (out, in), as ours are.
        self.family = replace(FAMILIES[self.arch], transposed=False)
        self.config = Config(self._config(), str(path))

    def _field(self, name: str, default=None):
        return self._fields.get(f"{self.arch}.{name}", default)

    def _config(self) -> dict:
        """Return the settings under the names of config.json."""
        if "token_embd.weight" not in self._tensors:
            raise ValueError(f"{self.path}: lacks the tensor token_embd.weight")
        rows = [row for row in self.family.settings if row.gguf]
        values = {row.theirs.split()[0]: self._field(row.gguf) for row in rows}
        window = self._field("attention.sliding_window")
        values |= dict(
            model_type=self.arch,
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            tie_word_embeddings="output.weight" not in self._tensors,
            eos_token_id=self._fields.get("tokenizer.ggml.eos_token_id"),
            sliding_window=window,
            use_sliding_window=window is not None,
        )
        if self.arch == "gpt2":
            return values
        if self.arch == "llama":
            values["attention_bias"] = "blk.0.attn_q.bias" in self._tensors
            values["mlp_bias"] = "blk.0.ffn_up.bias" in self._tensors
        settings = read_settings(Config(values, str(self.path)))
        n_head = max(settings["n_head"], 1)
        self._head_dim = max(settings["head_dim"] or settings["n_embd"] // n_head, 1)
        turned = self._field("rope.dimension_count", self._head_dim)
        values["partial_rotary_factor"] = turned / self._head_dim
        kind = self._field("rope.scaling.type", "none")
        values["rope_type"] = "default" if kind == "none" else kind
        if "rope_freqs.weight" in self._tensors:
            values |= self._llama3_rope(settings["rope_base"])
        return values

    def _llama3_rope(self, base: float) -> dict:
        """Return Llama 3's settings if they give the divisors in the tensor rope_freqs.weight."""
        divisors = self._dequantize("rope_freqs.weight").flatten().double()
        factor = divisors.max().round().item()
        D = self._head_dim
        turns = 8192 / (2 * math.pi) * base ** (-torch.arange(0, D, 2).double() / D)
        smooth = ((turns - 1) / 3).clamp(0, 1)  # 1 turn or fewer is slow, 4 or more are fast
        expected = 1 / (smooth + (1 - smooth) / factor)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
            raise ValueError(f"{self.path}: rope_freqs.weight is not Llama 3's RoPE scaling")
        names = [row.theirs for row in LLAMA3_ROPE]
        return dict(zip(names, (factor, 1.0, 4.0, 8192)), rope_type="llama3")

    def open_weights(self) -> None:
        """Name the tensors as Hugging Face does. Raises ValueError if one cannot be dequantised."""
        gguf = require("gguf")
        for kind in {tensor.tensor_type for tensor in self._tensors.values()}:
            try:
                n_bytes = gguf.GGML_QUANT_SIZES[kind][1]
                gguf.dequantize(np.zeros((1, n_bytes), np.uint8), kind)
            except (KeyError, NotImplementedError):
                raise ValueError(f"{self.path}: cannot dequantise {kind.name}") from None
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        n_layer = min(self._field("block_count"), 1000)  # ModelConfig refuses more
        short = gguf.get_tensor_name_map(arch, n_layer)
        for names in self.family.modules.values():
            for name in (n.replace("#", str(i)) for n in names for i in range(n_layer)):
                for part in (".weight", ".bias"):
                    old = f"{short.get_name(name)}{part}"
                    if old in self._tensors:
                        self._tensors[name + part] = self._tensors.pop(old)
        self._tensors.pop("rope_freqs.weight", None)
        self.shape = {n: tuple(t.shape[::-1].tolist()) for n, t in self._tensors.items()}

    def _dequantize(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        data = tensor.data
        # Not data itself: its pages, which are mapped, would stay in memory.
        packed = np.fromfile(self.path, data.dtype, data.size, offset=int(tensor.data_offset))
        packed = packed.reshape(data.shape)
        return torch.from_numpy(require("gguf").dequantize(packed, tensor.tensor_type))

    def read(self, name: str) -> Tensor:
        """Return a tensor in float32."""
        tensor = self._dequantize(name)
        if self.arch != "llama" or not (".q_proj." in name or ".k_proj." in name):
            return tensor
        # Within a head, llama.cpp alternates the rows of the two halves that RoPE rotates.
        heads = tensor.view(-1, self._head_dim // 2, 2, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)

    def tokenizer_json(self) -> tuple[str, dict]:
        """Return a tokenizer.json, made from the fields of the file, and what a chat needs."""
        fields = {n.removeprefix("tokenizer.ggml."): v for n, v in self._fields.items()}
        tokens = fields.get("tokens")
        if not tokens:
            raise ValueError(f"{self.path}: has no tokenizer (tokenizer.ggml.tokens)")
        order = {"gpt2": "merges", "llama": "scores"}.get(fields.get("model"))
        if order and not fields.get(order):  # each text would become single bytes
            raise ValueError(f"{self.path}: has no tokenizer.ggml.{order}; convert the model again")
        types = list(fields.get("token_type") or [1] * len(tokens))
        while types and types[-1] == UNUSED:  # filled up to the rows of the embedding
            types.pop()
        tokens = tokens[: len(types)]
        flags = reserved_tokens(0, 3)[0]
        added = [
            flags | dict(id=i, content=token, special=kind == CONTROL)
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
            bos = special["bos_token"]
            token = {"SpecialToken": {"id": bos, "type_id": 0}}
            first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
            found["post_processor"] = dict(
                type="TemplateProcessing",
                single=[token, first],
                pair=[token, first, second],
                special_tokens={bos: {"id": bos, "ids": [ids["bos_token"]], "tokens": [bos]}},
            )
        ends = {fields.get("eos_token_id"), fields.get("eot_token_id")} - {None}
        template = fields.get("tokenizer.chat_template", "")
        info = {"special_tokens": special, "end_ids": sorted(ends), "chat_template": template}
        return json.dumps(found, ensure_ascii=False), info

    def _byte_level(self, fields: dict, vocab: dict[str, int]) -> dict:
        kind = fields.get("pre", "gpt-2" if self.arch == "gpt2" else None)
        if kind not in WORDS:
            known = ", ".join(WORDS)
            raise ValueError(f"{self.path}: unknown pre-tokenizer {kind!r}; supported: {known}")
        steps = [*WORDS[kind], BYTE_LEVEL]
        if isinstance(WORDS[kind], str):
            split = {"type": "Split", "pattern": {"Regex": WORDS[kind]}, "behavior": "Isolated"}
            steps = [split | {"invert": False}, BYTE_LEVEL | {"use_regex": False}]
        model = {"type": "BPE", "vocab": vocab, "merges": fields.get("merges", [])}
        model["ignore_merges"] = WORDS[kind] == LLAMA3_WORDS
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
