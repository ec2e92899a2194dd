"""What ar2diff.py does with other people's weights: import, check on a text, export.

Read back with load_hf, an export is the same model, bit for bit. Layers that a conversion added are
left out. So are the rows of the reserved ids if they are still as the import made them: the export
of an untouched import has the tensors and the tokenizer of its source.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from configurator import require
from data.objectives import Batch
from data.tokenizer import ALPHABET, BYTE_LEVEL, FILE, Tokenizer, get_tokenizer, reserved_tokens
from hf import explained, optional
from hf.layouts import FAMILIES, Family, write_settings
from hf.load import KEPT, fill_reserved, load_hf, resolve_source, row_counts
from hf.tokenizer import extend
from infra.checkpoint import load, new_folder
from model import NEW_MODULES, ModelConfig, split_prompt

# The text that --check reads if none is given.
TEXT = "The harbour was quiet. Two boats lay at the quay, and a man in a blue coat mended a net. "


def import_source(name: str, block_size: int, target_length: int):
    """Read weights and print what was found. Returns (model, tokenizer, "", name, path)."""
    path = resolve_source(name)
    model, tokenizer = load_hf(path, block_size, target_length)
    dtype = str(model.tok.weight.dtype).removeprefix("torch.")
    size = f"{sum(p.numel() for p in model.parameters()):,} weights, {dtype}"
    lengths = f"block_size {model.cfg.block_size}, target_length {model.cfg.target_length}"
    print(f"{name}: {size} | {lengths} | {tokenizer.name}")
    return model, tokenizer, "", name, path


def text_batch(text: str, tokenizer: Tokenizer, cfg: ModelConfig) -> Batch:
    """Cut two rows from a text, at its start and its middle, repeated to fill the targets."""
    ids = tokenizer.encode(text or TEXT)
    T = cfg.target_length
    P = min(32, cfg.block_size - T)
    require(ids, "--check needs a text, but the tokenizer makes nothing of --prompt")
    starts = (0, len(ids) // 2)
    rows = torch.tensor([(ids[start:] + ids * (P + T))[: P + T - 1] for start in starts])
    prefix, first = split_prompt(rows[:, :P], cfg)
    return Batch(prefix, torch.cat([first, rows[:, P:]], dim=1), torch.arange(2))


def export(source: str, folder: Path, overwrite: bool) -> None:
    """Write the AR weights of a checkpoint as a Hugging Face folder, whole or not at all.

    Raises ValueError if no family fits or if the folder exists.
    """
    save_file = optional("safetensors.torch").save_file
    state = load(source)
    tokenizer = get_tokenizer(state["tokenizer"], Path(source).parent)
    m = ModelConfig(**state["model_config"])
    free = not folder.exists() or (overwrite and (folder / "config.json").is_file())
    require(free, f"{folder} exists; use another --export, or --overwrite an older export")
    skipped = (*NEW_MODULES, "head") if m.tie_weights else NEW_MODULES
    weights = {n: t for n, t in state["model"].items() if n.split(".")[0] not in skipped}
    rows = _rows_without_reserved(weights, m)
    config = _config(weights, tokenizer, m, rows)
    files = _tokenizer_files(tokenizer, m, rows) | {"config.json": config}
    tensors = _their_tensors(weights, FAMILIES[config["model_type"]], m, rows)
    with explained(f"{folder}: not written"), new_folder(folder) as new:
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        (new / "model.safetensors").chmod(0o644)  # the package writes 0o600
        for name, content in files.items():
            text = json.dumps(content, indent=None if name == FILE else 2, ensure_ascii=False)
            (new / name).write_text(text + "\n", encoding="utf-8")
    print(f"{folder}: {source} step {state['step']} as a Hugging Face folder")
    if FILE not in files:
        print(f"note: no {FILE} is written; the tokenizer of this model is {tokenizer.name}")
    if m.prefix_attention != "causal" or m.target_attention != "causal":
        left_out = [name for name in NEW_MODULES if f"{name}.weight" in state["model"]]
        print(f"note: other programs read it left to right; left out: {', '.join(left_out) or '-'}")


def _rows_without_reserved(weights: dict[str, Tensor], m: ModelConfig) -> int:
    """Return the rows of the embedding to export: all, unless the reserved ones are untouched."""
    if m.sep_id >= 0:
        return m.vocab_size
    rows = m.n_ordinary
    for name in weights.keys() & {"tok.weight", "head.weight"}:
        expected = weights[name].clone()
        fill_reserved(expected, m.n_ordinary, m)
        same = torch.isclose(weights[name].float(), expected.float(), rtol=1e-5, atol=1e-8).all(1)
        if not same[[m.pad_id, m.mask_id]].all():
            return m.vocab_size
        rows = max([rows, *(1 + (~same).nonzero().flatten()).tolist()])
    return rows


def _their_tensors(weights: dict, family: Family, m: ModelConfig, rows: int) -> dict[str, Tensor]:
    """Return the tensors under their names. Views if the layout allows it."""
    found = {}
    for name, tensor in weights.items():
        if name in ("tok.weight", "head.weight"):
            tensor = tensor[:rows]
        names = family.names(name)
        parts = tensor.split(row_counts(len(tensor), len(names), m))
        if family.is_transposed(name, tensor.dim()):
            parts = [part.T for part in parts]
        found |= {theirs: part.contiguous() for theirs, part in zip(names, parts)}
    return found


def _config(weights: dict, tokenizer: Tokenizer, m: ModelConfig, rows: int) -> dict:
    """Return the config.json. What the families do not have is under "ar2diff"."""
    kept = {name: getattr(m, name) for name in (*KEPT, "target_length")}
    kept |= {"tokenizer": tokenizer.name, "info": getattr(tokenizer, "info", {})}
    kept["prefix_attention"] = m.prefix_attention if m.paradigm == "ar" else "causal"
    eos = m.eos_id if m.eos_id >= 0 else None
    end = eos if rows < m.vocab_size else m.pad_id  # pad ends a text of ours
    dtype = str(weights["tok.weight"].dtype).removeprefix("torch.")
    common = dict(vocab_size=rows, torch_dtype=dtype, ar2diff=kept)
    common |= dict(bos_token_id=None, eos_token_id=end, pad_token_id=end)
    return write_settings(m) | common


def _tokenizer_files(tokenizer: Tokenizer, m: ModelConfig, rows: int) -> dict[str, dict]:
    """Return tokenizer.json and tokenizer_config.json; nothing for token ids and for gpt2."""
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": m.block_size}
    if tokenizer.name == "bytes":
        vocab = {character: byte for byte, character in enumerate(ALPHABET)}
        added = reserved_tokens(tokenizer.n_ordinary, tokenizer.vocab_size)
        found = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}}
        found |= {"pre_tokenizer": BYTE_LEVEL, "decoder": BYTE_LEVEL, "added_tokens": added}
    elif tokenizer.file:
        found = json.loads(extend(tokenizer.file))
    else:
        return {}
    info = found.pop("ar2diff", {})
    about |= info.get("special_tokens", {})
    about |= {name: value for name, value in info.items() if name == "chat_template"}
    if rows == m.vocab_size:
        about |= {f"{name}_token": f"<|ar2diff_{name}|>" for name in ("pad", "sep", "mask")}
        about["eos_token"] = about["pad_token"]
    else:
        found["added_tokens"] = [t for t in found["added_tokens"] if t["id"] < m.n_ordinary]
    return {FILE: found, "tokenizer_config.json": about}
