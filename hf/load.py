"""Weights of other people's models: Hugging Face folders in and out, without transformers.

A folder is config.json, model.safetensors (or shards with an index) and tokenizer.json. families.py says which there
are and what is called how. What cannot be read is refused by name before a weight is, and every tensor of a folder is
accounted for: none missing, none left over, each of the shape that config.json asks for.

The embedding grows by rows for pad, separator, mask and sentinels (data/tokenizer.py); no row of an id that a text may
hold changes, so neither does its logit. A new row is the mean of the rows of all ordinary ids: its logit is the mean of
theirs, so its probability is at most 1 / n_ordinary (the mean of exponentials is no less than the exponential of the
mean), and what is said of text stays as it is, but for a factor of at least 1 - n_new / n_ordinary. Pad is the
exception: it ends a text, so where the source names an id for that (eos), pad's row starts as a copy of its row, and no
text holds eos.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data import tokenizer_json
from data.tokenizer import FILE, Tokenizer, file_text, from_json, get_tokenizer
from encdec import assemble, model_without_weights
from families import FAMILIES, Config, Family, family_name, family_of, refuse_window
from model import ADDED_BY_CONVERSION, ModelConfig, Transformer

LONGEST = 4096  # tokens: what block_size=0 means at most; rotations reach further, but their table costs memory
TARGET = 128  # tokens: what target_length=0 means at most
SHARD = 5 * 10**9  # bytes of one exported file
CHUNK = 1 << 25  # bytes of a tensor that are mapped at a time
NUMBERS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
KEPT = {"target_length": int, "eos_id": int, "dropout": float, "prefix_attention": str}  # of ours, in config.json


# Where the weights are


def folder_of(name: str) -> Path | None:
    """The Hugging Face folder that a path or a hub name means, fetched if need be; None: a checkpoint of ours.

    Raises ValueError where it is neither.
    """
    path = Path(name)
    if path.is_dir():
        return None if (path / "ckpt.pt").exists() and not (path / "config.json").exists() else path
    if path.suffix == ".safetensors":
        raise ValueError(f"{name}: name the folder, which also says what the weights mean (config.json)")
    if path.suffix in (".bin", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"):
        raise ValueError(f"{name}: {_SAFE_WAY}")
    if path.exists() or path.suffix == ".pt":
        return None
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not path.parent.exists():
        return _fetch(name)
    raise ValueError(f"{name}: no such folder or checkpoint, and no hub name, as in openai-community/gpt2")


_SAFE_WAY = (
    "only safetensors are read: a pickle may run any code when it is opened. Take the model's safetensors files, or, "
    "if you trust it, write them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


def _fetch(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{name}: no such folder; to fetch it from the hub: pip install huggingface_hub, or give a folder that you "
            "have downloaded"
        ) from None
    try:
        wanted = dict(allow_patterns=["*.safetensors", "*.json"], ignore_patterns=["*/*", "consolidated*"])
        return Path(huggingface_hub.snapshot_download(name, **wanted))
    except Exception as error:  # of many kinds, also of the HTTP library below it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"{name}: no such folder, and not fetched from the hub: {reason}") from None


class Shards:
    """The tensors of a folder, by name: where each lies, its shape and number format. None is read yet."""

    def __init__(self, folder: Path):
        self.file: dict[str, Path] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.dtype: dict[str, torch.dtype] = {}
        index = folder / "model.safetensors.index.json"
        promised = self._promised(index) if index.exists() else {}
        for path in [folder / name for name in sorted(set(promised.values()))] or [folder / "model.safetensors"]:
            self._read_header(path)
        missing = [name for name in promised if name not in self.file]
        if missing:
            raise ValueError(f"{index}: names {_some(missing)}, which its files do not hold")

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """One tensor, or some rows of it, memory-mapped: the pages are given back when it goes."""
        with safe_open(self.file[name], "pt") as file:
            return file.get_tensor(name) if end is None else file.get_slice(name)[start:end]

    def _promised(self, index: Path) -> dict[str, str]:
        found = _read_json(index).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(f, str) and Path(f).name == f for f in found.values()):
            raise ValueError(f"{index}: weight_map must name files of this folder")
        return found

    def _read_header(self, path: Path) -> None:
        if not path.is_file():
            others = [p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack")]
            if others and not any(path.parent.glob("*.safetensors")):
                raise ValueError(f"{path.parent}: holds {others[0]} and no safetensors; {_SAFE_WAY}")
            raise ValueError(f"{path}: no such file; the folder is not complete, download it again")
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    if part.get_dtype() not in NUMBERS:
                        raise ValueError(
                            f"{path}: {name} holds {part.get_dtype()} numbers; can be read: {', '.join(NUMBERS)}"
                        )
                    self.file[name], self.shape[name] = path, tuple(part.get_shape())
                    self.dtype[name] = NUMBERS[part.get_dtype()]
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated, or no safetensors file ({str(error).splitlines()[0]})") from None


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a Hugging Face folder has one") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wants a JSON object, got {type(found).__name__}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# In


class Imported(NamedTuple):
    model: Transformer  # AR, its weights in the folder's number formats
    tokenizer: Tokenizer
    notes: list[str]  # what a user should know, a line each


def read_folder(folder: Path, block_size: int = 0, target_length: int = 0) -> Imported:
    """The model of a Hugging Face folder, as an AR model of ours.

    block_size 0: what the source can read, at most LONGEST tokens; target_length 0: half of that, at most TARGET.
    The peak of memory is the weights and a few megabytes. Raises ValueError, one line, for what cannot be read, before
    any weight is.
    """
    config = Config(_read_json(folder / "config.json"), str(folder / "config.json"))
    family, shards = family_of(config), Shards(folder)
    settings, context = family.settings(config)
    rows = config.get("vocab_size", int)
    tokenizer, ours, notes = _tokenizer_of(folder, config, rows)
    block_size = block_size or (context if ours else min(context, LONGEST))
    refuse_window(config, block_size)
    if block_size > context:
        if settings["position"] == "learned":
            raise ValueError(f"{folder} has {context} learned positions: block_size={block_size} cannot be had")
        notes.append(f"block_size={block_size}: the source never read more than {context} tokens at once")
    settings |= dict(block_size=block_size, target_length=target_length or min(TARGET, block_size // 2))
    if settings["target_length"] < 2 or settings["target_length"] >= block_size:
        raise ValueError(f"target_length must be 2 to block_size - 1 = {block_size - 1}, got {target_length}")
    settings |= {name: getattr(tokenizer, name) for name in ("vocab_size", "n_ordinary", "pad_id", "sep_id", "mask_id")}
    settings["eos_id"] = _eos(config, tokenizer)
    settings |= {name: ours[name] for name in KEPT if ours and (name != "target_length" or not target_length)}
    try:
        cfg = ModelConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{config.where}: {error}") from None
    weights = {name: _load(shards, *where) for name, where in _account(family, cfg, shards, rows, context).items()}
    if not ours:
        for name in weights.keys() & {"tok.weight", "head.weight"}:
            _fill_reserved(weights[name], rows, cfg)
    if cfg.tie_weights:
        weights["head.weight"] = weights["tok.weight"]
    return Imported(assemble(cfg, weights), tokenizer, notes)


def _tokenizer_of(folder: Path, config: Config, rows: int) -> tuple[Tokenizer, dict, list[str]]:
    """(tokenizer, what an export of ours keeps beside, notes)."""
    ours, notes, path = config.get("ar2diff", dict, {}), [], folder / FILE
    kept = Config(ours, config.where)
    found = {name: kept.get(name, kind) for name, kind in KEPT.items()} if ours else {}
    if ours:
        tokenizer = get_tokenizer(kept.get("tokenizer", str), folder)
    elif path.exists():
        tokenizer = _from_file(path, config, rows, notes)
    else:
        tokenizer = _without_file(config, rows, notes)
    fault = tokenizer.n_ordinary > rows or (rows > tokenizer.vocab_size) or (ours and rows != tokenizer.vocab_size)
    if fault:
        raise ValueError(
            f"{folder}: its tokenizer does not fit: {tokenizer.n_ordinary:,} ids ({tokenizer.vocab_size:,} with the "
            f"reserved ones) for an embedding of {rows:,} rows"
        )
    return tokenizer, found, notes


def _without_file(config: Config, rows: int, notes: list[str]) -> Tokenizer:
    if config.found["model_type"] == "gpt2" and rows == 50257:
        try:
            found = get_tokenizer("gpt2")
        except ValueError as error:
            notes.append(f"no tokenizer.json in the folder, so token ids are read and written: {error}")
        else:
            notes.append("no tokenizer.json in the folder: 50,257 ids are taken to be GPT-2's own")
            return found
    else:
        notes.append("no tokenizer.json in the folder: token ids are all there is to read and to write")
    return get_tokenizer(f"ids-{rows}-{tokenizer_json.padded_size(rows)}")


def _from_file(path: Path, config: Config, rows: int, notes: list[str]) -> Tokenizer:
    text = file_text(path)
    found = tokenizer_json.parse(text, str(path))
    if config.found["model_type"] == "gpt2" and tokenizer_json.n_ids(found) == 50257:
        try:
            gpt2 = get_tokenizer("gpt2")
        except ValueError as error:
            notes.append(f"{path} is read instead: {error}")
        else:
            if gpt2.pieces[:50257] == tokenizer_json.pieces_of(found, str(path)) and rows <= gpt2.vocab_size:
                return gpt2
    return from_json(text, str(path), rows)


def _eos(config: Config, tokenizer: Tokenizer) -> int:
    """The id that ends a text in the source, if it is one that no text is encoded to; -1 where there is none."""
    eos = config.found.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if tokenizer.name == "gpt2":
        special = {50256}
    else:
        special = tokenizer_json.special_ids(json.loads(tokenizer.file)) if tokenizer.file else set()
    return eos if isinstance(eos, int) and eos in special and eos < tokenizer.n_ordinary else -1


class Place(NamedTuple):
    """Where one of our tensors comes from."""

    shape: tuple[int, ...]  # of ours
    theirs: list[str]  # its rows, in order
    transposed: bool


def _account(family: Family, cfg: ModelConfig, shards: Shards, rows: int, context: int) -> dict[str, tuple]:
    """The place of each of our tensors. Every name of theirs and every shape is checked, and no weight read."""
    ours = {name: tuple(like.shape) for name, like in model_without_weights(cfg).state_dict().items()}
    if cfg.tie_weights:
        del ours["head.weight"]
    folder = next(iter(shards.file.values()), Path("the folder")).parent
    bare = not any(name.startswith(family.prefix) for name in shards.file)
    lengths = {"tok.weight": rows, "head.weight": rows, "pos.weight": context}
    places, wanted = {}, {}
    for name, shape in ours.items():
        names = [n.removeprefix(family.prefix) if bare else n for n in family.names(name)]
        turned = family.transposed and name.startswith("blocks.") and len(shape) == 2
        for theirs, size in zip(names, _row_counts(lengths.get(name, shape[0]), len(names), cfg)):
            wanted[theirs] = (size, *shape[1:])[:: -1 if turned else 1]
        places[name] = Place(shape, names, turned)
    missing = [name for name in wanted if name not in shards.file]
    if missing:
        raise ValueError(f"{folder}: no tensor {_some(missing)}, which config.json asks for")
    for name, shape in wanted.items():
        if shards.shape[name] != shape:
            found = f"has shape {shards.shape[name]}, config.json asks for {shape}"
            raise ValueError(f"{shards.file[name]}: {name} {found}")
    left = [name for name in shards.file if name not in wanted and not re.fullmatch(family.buffers, name)]
    if cfg.tie_weights and "lm_head.weight" in left:  # written beside the embedding that it is tied to
        if not torch.equal(shards.read("lm_head.weight"), shards.read(places["tok.weight"].theirs[0])):
            raise ValueError(f"{folder}: config.json ties lm_head.weight to the embedding, but they differ")
        left.remove("lm_head.weight")
    if left:
        raise ValueError(f"{folder}: has {_some(left)}, for which config.json has no place")
    return places


def _row_counts(total: int, n: int, cfg: ModelConfig) -> list[int]:
    """How many rows of one of our tensors each of its n parts has: queries, keys and values, or gate and up."""
    if n == 3:
        return [cfg.n_head * cfg.head_size, cfg.kv_heads * cfg.head_size, cfg.kv_heads * cfg.head_size]
    return [total // n] * n


def _load(shards: Shards, shape: tuple[int, ...], theirs: list[str], transposed: bool) -> Tensor:
    dtype = functools.reduce(torch.promote_types, (shards.dtype[name] for name in theirs))
    whole, at = torch.empty(shape, dtype=dtype), 0
    few = max(1, CHUNK * len(whole) // whole.nbytes)  # rows that are mapped at a time
    for name in theirs:
        if transposed:
            whole.copy_(shards.read(name).T)
            continue
        n = min(shards.shape[name][0], len(whole) - at)  # of learned positions fewer may be wanted
        for start in range(0, n, few):
            rows = shards.read(name, start, min(start + few, n))
            whole[at + start : at + start + len(rows)] = rows
        at += n
    return whole


def _fill_reserved(table: Tensor, rows: int, cfg: ModelConfig) -> None:
    """Rows of the reserved ids, in place: see above. Rows that the source has beyond its tokenizer's ids, and that no
    id ever used, become ours too; those of sentinels keep what they hold."""
    n = cfg.n_ordinary
    mean = sum(part.sum(0, dtype=torch.float64) for part in table[:n].split(1024)) / n
    table[rows:] = table[[cfg.pad_id, cfg.sep_id, cfg.mask_id]] = mean.to(table.dtype)
    if cfg.eos_id >= 0:
        table[cfg.pad_id] = table[cfg.eos_id]


# Out


def write_folder(folder: Path, state: dict, tokenizer: Tokenizer, overwrite: bool = False) -> list[str]:
    """Write the AR-shaped weights of a checkpoint as a Hugging Face folder; returns lines of what that means.

    state: what checkpoint.load returns. Read back with read_folder it is the same, bit for bit. What a conversion
    added has no place there and is left out. The folder appears whole or not at all. Raises ValueError where no
    family fits or the folder is there already.
    """
    m = ModelConfig(**state["model_config"])
    family = FAMILIES[family_name(m)]
    if folder.exists() and not (overwrite and (folder / "config.json").is_file()):
        raise ValueError(f"{folder} is there already; name another --export, or say --overwrite where it is an export")
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        _write_shards(scratch, _their_tensors(state["model"], family, m))
        config = family.config(m) | _common_config(m, state["model"]["tok.weight"].dtype)
        kept = {name: getattr(m, name) for name in KEPT} | {"tokenizer": tokenizer.name}
        kept["prefix_attention"] = m.prefix_attention if m.paradigm == "ar" else "causal"
        _write_json(scratch / "config.json", config | {"ar2diff": kept})
        notes = _write_tokenizer(scratch, tokenizer, m)
        old = scratch.with_suffix(".old")
        if folder.exists():
            folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder}: not written ({error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    left = sorted({name.split(".")[0] for name in state["model"]} & set(ADDED_BY_CONVERSION))
    if m.paradigm == "diffusion":
        notes.append(
            f"a diffusion model's weights, which others read left to right; left out: {', '.join(left) or '-'}"
        )
    elif m.prefix_attention != "causal":
        notes.append(f"this model reads its prefix {m.prefix_attention}; others will read it left to right")
    return notes


def _their_tensors(weights: dict[str, Tensor], family: Family, m: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Their names and tensors, one of ours at a time: views where the layout allows it."""
    for name, tensor in weights.items():
        if name.split(".")[0] in ADDED_BY_CONVERSION or (m.tie_weights and name == "head.weight"):
            continue
        names = family.names(name)
        parts = tensor.split(_row_counts(len(tensor), len(names), m))
        turned = family.transposed and name.startswith("blocks.") and tensor.dim() == 2
        yield from zip(names, (part.T.contiguous() if turned else part.contiguous() for part in parts))


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """model.safetensors, or files of at most SHARD bytes (or one tensor) with an index. One is in memory at a time."""
    files, sizes, held = [], [], {}

    def flush():
        files.append(list(held))
        sizes.append(sum(t.nbytes for t in held.values()))
        save_file(held, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD:
            flush()
        held[name] = tensor
    flush()
    if len(files) == 1:
        (folder / "1.safetensors").rename(folder / "model.safetensors")
        return
    final = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for i, name in enumerate(final, start=1):
        (folder / f"{i}.safetensors").rename(folder / name)
    where = {name: file for file, names in zip(final, files) for name in names}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def _common_config(m: ModelConfig, dtype: torch.dtype) -> dict:
    return dict(
        vocab_size=m.vocab_size,
        tie_word_embeddings=m.tie_weights,
        torch_dtype=str(dtype).removeprefix("torch."),
        bos_token_id=None,
        eos_token_id=m.pad_id,  # what ends a text here
        pad_token_id=m.pad_id,
    )


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, m: ModelConfig) -> list[str]:
    text = tokenizer.file
    if tokenizer.name in ("bytes", "gpt2"):
        ordinary = tokenizer.pieces[: tokenizer.n_ordinary]
        special = {50256: "<|endoftext|>"} if tokenizer.name == "gpt2" else {}
        found = tokenizer_json.byte_level_json(ordinary, special, split_words=tokenizer.name == "gpt2")
        text = tokenizer_json.extended(found, tokenizer.vocab_size)
    if not text:
        return ["no tokenizer is written: this model has none, its texts are ids"]
    (folder / FILE).write_text(text, encoding="utf-8")
    marks = {f"{name}_token": f"<|ar2diff_{name}|>" for name in ("pad", "sep", "mask")}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": marks["pad_token"]} | marks
    _write_json(folder / "tokenizer_config.json", about | {"model_max_length": m.block_size})
    return []


def _write_json(path: Path, found: dict) -> None:
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Proof


@torch.no_grad()
def parity(folder: Path, model: Transformer, ids: Tensor) -> list[tuple[str, str, bool]]:
    """(claim, what was measured, whether it holds): our logits (float32) of ids (B, T) against transformers' own.

    model: what read_folder made of the folder. Also what rounding to half the bits costs, so that it is not taken for
    an error: the same weights, the same code, computed once in float32 and once in the smaller format.
    """
    ids = torch.where(ids < model.cfg.n_ordinary, ids, 0)  # the source has no pad of ours
    nothing = ids[:, :0]
    ours = as_float32(model)(nothing, ids)
    size = ours.abs().max().item()
    rows, dtype = [], model.tok.weight.dtype
    try:
        theirs = reference_logits(folder, ids)
        why = "pip install transformers"
    except Exception as error:  # of whatever it lacks
        theirs, why = None, f"transformers fails: {(str(error) or type(error).__name__).splitlines()[0][:80]}"
    if theirs is None:
        measured = f"not compared: {why}. Names and shapes all fit"
        rows.append(("float32: the logits are those of transformers", measured, True))
        error = None
    else:
        n = model.cfg.n_ordinary  # behind them a source may have rows that no id used, and some are ours now
        difference = (ours[..., :n] - theirs[..., :n]).abs()
        error = difference.max().item()
        measured = f"max {error:.1e}, mean {difference.mean().item():.1e}, of logits up to {size:.3g}"
        rows.append(("float32: the logits are those of transformers", measured, error <= 1e-4 * max(size, 1.0)))
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    small = assemble(model.cfg, {name: tensor.to(half) for name, tensor in model.state_dict().items()})
    moved = (small(nothing, ids).float() - ours).abs()
    name = str(half).removeprefix("torch.")
    what = f"max {moved.max().item():.1e}, mean {moved.mean().item():.1e}: rounding, no error"
    if error is not None:
        what += f" ({moved.max().item() / max(error, 1e-12):,.0f} times the line above)"
    rows.append((f"{name}: what computing in it moves them", what, bool(moved.isfinite().all())))
    return rows


def as_float32(model: Transformer) -> Transformer:
    """The model with float32 weights; itself where it has them."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    return assemble(model.cfg, {name: tensor.float() for name, tensor in model.state_dict().items()})


@torch.no_grad()
def reference_logits(folder: Path, ids: Tensor, **inputs) -> Tensor | None:
    """What transformers says of ids (B, T), in float32, from the folder itself; None where it is not installed."""
    theirs = reference_model(folder)
    return None if theirs is None else theirs(ids, **inputs).logits


def reference_model(folder: Path):
    """transformers' own network of a folder, float32; None where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    how = dict(dtype=torch.float32, local_files_only=True)  # .float() afterwards would find rotations already rounded
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
