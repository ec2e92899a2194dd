"""Write the autoregressive weights of a checkpoint as a Hugging Face folder.

Read back with load_hf, the model is the same, bit for bit. Layers that a conversion added are left
out. So are the rows of the reserved ids if they are still as the import made them: the export of an
untouched import has the tensors and the tokenizer of its source.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import ALPHABET, FILE, Tokenizer, reserved_tokens
from hf import require
from hf.layouts import FAMILIES, Family, family_name
from hf.load import KEPT, mean_row, row_counts
from hf.tokenizer import BYTE_LEVEL, HFTokenizer
from model import NEW_MODULES, ModelConfig


def export_folder(
    folder: Path, state: dict, tokenizer: Tokenizer, overwrite: bool = False
) -> list[str]:
    """Write a folder, whole or not at all; return notes for the user, one line each.

    state: what infra.checkpoint.load returns. Raises ValueError if no family fits or if the folder
    exists.
    """
    save_file = require("safetensors.torch").save_file
    m = ModelConfig(**state["model_config"])
    family = FAMILIES[family_name(m)]
    if folder.exists() and not (overwrite and (folder / "config.json").is_file()):
        raise ValueError(f"{folder} exists; use another --export, or --overwrite an older export")
    weights = {n: t for n, t in state["model"].items() if n.split(".")[0] not in NEW_MODULES}
    rows = _rows_without_reserved(weights, m)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = scratch.with_suffix(".old")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        tensors = dict(_their_tensors(weights, family, m, rows))
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / "model.safetensors").chmod(0o644)  # the package writes 0o600
        notes = _write_tokenizer(scratch, tokenizer, m, rows)
        config = family.config(m) | _common_config(weights, tokenizer, m, rows)
        _write_json(scratch / "config.json", config)
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, require("safetensors").SafetensorError) as error:
        raise OSError(f"{folder}: not written ({error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    left_out = sorted({name.split(".")[0] for name in state["model"].keys() - weights.keys()})
    if m.paradigm == "diffusion":
        names = ", ".join(left_out) or "nothing"
        notes.append(f"a diffusion model; other programs read it left to right; left out: {names}")
    elif m.prefix_attention != "causal":
        notes.append(f"other programs read the prefix left to right, not {m.prefix_attention}")
    return notes


def _rows_without_reserved(weights: dict[str, Tensor], m: ModelConfig) -> int:
    """Return the rows of the embedding to export: all, unless the reserved ones are untouched."""
    if m.sep_id >= 0:
        return m.vocab_size
    rows = m.n_ordinary
    for name in weights.keys() & {"tok.weight", "head.weight"}:
        table = weights[name].float()
        mean = mean_row(weights[name], m).float()
        pad = table[m.eos_id] if m.eos_id >= 0 else mean
        expected = mean.expand(m.vocab_size - m.n_ordinary, -1).clone()
        expected[m.pad_id - m.n_ordinary] = pad
        close = torch.isclose(table[m.n_ordinary :], expected, rtol=1e-5, atol=1e-8).all(1)
        if not close[[m.pad_id - m.n_ordinary, m.mask_id - m.n_ordinary]].all():
            return m.vocab_size
        different = (~close).nonzero().flatten().tolist()
        rows = max([rows, *(m.n_ordinary + 1 + i for i in different)])
    return rows


def _their_tensors(
    weights: dict[str, Tensor], family: Family, m: ModelConfig, rows: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield their names and tensors. Views if the layout allows it."""
    for name, tensor in weights.items():
        if m.tie_weights and name == "head.weight":
            continue
        if name in ("tok.weight", "head.weight"):
            tensor = tensor[:rows]
        names = family.names(name)
        transposed = family.transposed and name.startswith("blocks.") and tensor.dim() == 2
        parts = tensor.split(row_counts(len(tensor), len(names), m))
        for theirs, part in zip(names, parts, strict=True):
            yield theirs, (part.T if transposed else part).contiguous()


def _common_config(
    weights: dict[str, Tensor], tokenizer: Tokenizer, m: ModelConfig, rows: int
) -> dict:
    """Return the settings that all families share, with ours under "ar2diff"."""
    kept = {name: getattr(m, name) for name in (*KEPT, "target_length")}
    kept["tokenizer"] = tokenizer.name
    kept["prefix_attention"] = m.prefix_attention if m.paradigm == "ar" else "causal"
    end = m.pad_id  # ends a text of ours
    if isinstance(tokenizer, HFTokenizer):
        kept["info"] = tokenizer.info
    if rows < m.vocab_size:
        end = m.eos_id if m.eos_id >= 0 else None
    return dict(
        vocab_size=rows,
        tie_word_embeddings=m.tie_weights,
        torch_dtype=str(weights["tok.weight"].dtype).removeprefix("torch."),
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        ar2diff=kept,
    )


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, m: ModelConfig, rows: int) -> list[str]:
    text = tokenizer.file
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": m.block_size}
    if tokenizer.name in ("bytes", "gpt2"):
        text = json.dumps(_byte_level_json(tokenizer), ensure_ascii=False)
    if not text:
        return ["no tokenizer is written, because the texts of this model are token ids"]
    if isinstance(tokenizer, HFTokenizer):
        about |= tokenizer.info.get("special_tokens", {})
        template = tokenizer.info.get("chat_template")
        about |= {"chat_template": template} if template else {}
        found = tokenizer.source
        if rows < m.vocab_size:
            added = [t for t in found["added_tokens"] if t["id"] < tokenizer.n_ordinary]
            found = found | {"added_tokens": added}
        text = json.dumps(found, ensure_ascii=False)
    if rows == m.vocab_size:
        about |= {f"{name}_token": f"<|ar2diff_{name}|>" for name in ("pad", "sep", "mask")}
        about["eos_token"] = about["pad_token"]
    (folder / FILE).write_text(text, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", about)
    return []


def _byte_level_json(tokenizer: Tokenizer) -> dict:
    """Return the tokenizer.json of a built-in tokenizer, whose ids are merge ranks."""
    end = {50256: "<|endoftext|>"} if tokenizer.name == "gpt2" else {}
    pieces = tokenizer.pieces[: tokenizer.n_ordinary]
    ranks = {piece: i for i, piece in enumerate(pieces) if i not in end}

    def visible(piece: bytes) -> str:
        return "".join(ALPHABET[byte] for byte in piece)

    added = reserved_tokens(tokenizer.n_ordinary, tokenizer.vocab_size)
    added = [added[0] | {"id": i, "content": content} for i, content in end.items()] + added
    split = BYTE_LEVEL | {"use_regex": tokenizer.name == "gpt2"}
    merged = [piece for piece in ranks if len(piece) > 1]
    merges = [[visible(part) for part in _halves(piece, ranks)] for piece in merged]
    model = {"type": "BPE", "vocab": {visible(p): i for p, i in ranks.items()}, "merges": merges}
    parts = {"pre_tokenizer": split, "decoder": BYTE_LEVEL, "model": model}
    return {"version": "1.0", "added_tokens": added} | parts


def _halves(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two tokens that merge to this one: what all merges of lower rank leave."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 2:
        pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
        parts[i : i + 2] = [pairs[i]]
    return parts


def _write_json(path: Path, found: dict) -> None:
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
