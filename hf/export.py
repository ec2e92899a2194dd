"""Write the autoregressive weights of a checkpoint as a Hugging Face folder.

Read back with load_hf, the model is the same, bit for bit. Layers that a conversion added are left
out. So are the rows of the reserved ids if they are still as the import made them: the export of an
untouched import has the tensors and the tokenizer of its source.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from data.tokenizer import ALPHABET, BYTE_LEVEL, FILE, Tokenizer, reserved_tokens
from hf import require
from hf.layouts import FAMILIES, family_name, write_settings
from hf.load import KEPT, fill_reserved, row_counts
from hf.tokenizer import HFTokenizer
from model import NEW_MODULES, ModelConfig


def export_folder(folder: Path, state: dict, tokenizer: Tokenizer, overwrite=False) -> list[str]:
    """Write a folder, whole or not at all; return notes for the user, one line each.

    state: what infra.checkpoint.load returns. Raises ValueError if no family fits or if the folder
    exists.
    """
    save_file = require("safetensors.torch").save_file
    m = ModelConfig(**state["model_config"])
    kind = family_name(m)
    if folder.exists() and not (overwrite and (folder / "config.json").is_file()):
        raise ValueError(f"{folder} exists; use another --export, or --overwrite an older export")
    weights = {n: t for n, t in state["model"].items() if n.split(".")[0] not in NEW_MODULES}
    rows = _rows_without_reserved(weights, m)
    config = write_settings(m, kind) | _common_config(weights, tokenizer, m, rows)
    files = _tokenizer_files(tokenizer, m, rows) | {"config.json": config}
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = scratch.with_suffix(".old")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        tensors = _their_tensors(weights, kind, m, rows)
        save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / "model.safetensors").chmod(0o644)  # the package writes 0o600
        for name, content in files.items():
            text = json.dumps(content, indent=None if name == FILE else 2, ensure_ascii=False)
            (scratch / name).write_text(text + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, require("safetensors").SafetensorError) as error:
        raise OSError(f"{folder}: not written ({error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    notes = []
    if FILE not in files:
        notes.append(f"no {FILE} is written; the tokenizer of this model is {tokenizer.name}")
    if m.paradigm == "diffusion":
        left_out = sorted({name.split(".")[0] for name in state["model"].keys() - weights.keys()})
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
        expected = weights[name].clone()
        fill_reserved(expected, m.n_ordinary, m)
        same = torch.isclose(weights[name].float(), expected.float(), rtol=1e-5, atol=1e-8).all(1)
        different = (~same).nonzero().flatten().tolist()
        if m.pad_id in different or m.mask_id in different:
            return m.vocab_size
        rows = max([rows, *(i + 1 for i in different)])
    return rows


def _their_tensors(weights: dict, kind: str, m: ModelConfig, rows: int) -> dict[str, Tensor]:
    """Return the tensors under their names. Views if the layout allows it."""
    family = FAMILIES[kind]
    found = {}
    for name, tensor in weights.items():
        if m.tie_weights and name == "head.weight":
            continue
        if name in ("tok.weight", "head.weight"):
            tensor = tensor[:rows]
        names = family.names(name)
        parts = tensor.split(row_counts(len(tensor), len(names), m))
        if family.is_transposed(name, tensor.dim()):
            parts = [part.T for part in parts]
        found |= {theirs: part.contiguous() for theirs, part in zip(names, parts)}
    return found


def _common_config(weights: dict, tokenizer: Tokenizer, m: ModelConfig, rows: int) -> dict:
    """Return the settings that all families share, with ours under "ar2diff"."""
    kept = {name: getattr(m, name) for name in (*KEPT, "target_length")}
    kept["tokenizer"] = tokenizer.name
    kept["prefix_attention"] = m.prefix_attention if m.paradigm == "ar" else "causal"
    if isinstance(tokenizer, HFTokenizer):
        kept["info"] = tokenizer.info
    end = m.pad_id  # ends a text of ours
    if rows < m.vocab_size:
        end = m.eos_id if m.eos_id >= 0 else None
    return dict(
        vocab_size=rows,
        torch_dtype=str(weights["tok.weight"].dtype).removeprefix("torch."),
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
        ar2diff=kept,
    )


def _tokenizer_files(tokenizer: Tokenizer, m: ModelConfig, rows: int) -> dict[str, dict]:
    """Return tokenizer.json and tokenizer_config.json; nothing for token ids and for gpt2."""
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": m.block_size}
    if tokenizer.name == "bytes":
        vocab = {character: byte for byte, character in enumerate(ALPHABET)}
        added = reserved_tokens(tokenizer.n_ordinary, tokenizer.vocab_size)
        found = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}}
        found |= {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "added_tokens": added}
    elif tokenizer.file:
        found = json.loads(tokenizer.file)
    else:
        return {}
    if isinstance(tokenizer, HFTokenizer):
        about |= tokenizer.info.get("special_tokens", {})
        about |= {k: v for k, v in tokenizer.info.items() if k == "chat_template"}
        found = tokenizer.source
    if rows == m.vocab_size:
        about |= {f"{name}_token": f"<|ar2diff_{name}|>" for name in ("pad", "sep", "mask")}
        about["eos_token"] = about["pad_token"]
    else:
        added = [token for token in found["added_tokens"] if token["id"] < m.n_ordinary]
        found = found | {"added_tokens": added}
    return {FILE: found, "tokenizer_config.json": about}
