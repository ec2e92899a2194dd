"""A checkpoint in shards: a folder of the checkpoint's name, which every process writes its share of.

    fields.pt            all that is no tensor of the model or the optimizer, and the SHA-256 of the other files
    .metadata, *.distcp  the tensors, as torch.distributed.checkpoint writes them: which process has which slice

Any number of processes reads it, each what it needs (`restore`), or one reads it whole (`read_whole`, which is what
checkpoint.load does, so that every command takes such a folder). `python sharded.py --source=FOLDER --out=FILE` makes
the single file.
"""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from atomic import SHARDS, Damaged, put_in_place, read_state, sha256, write_state
from configurator import configure, run


@dataclass
class WholeConfig:
    source: str = ""  # the folder
    out: str = ""  # the file


# What the index of the shards is made of. Unpickling it makes these and calls nothing else.
PARTS = {
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
    "torch": ("Size", "device", *(str(t).removeprefix("torch.") for t in (torch.float32, torch.bfloat16, torch.int64))),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}


class _Index(pickle.Unpickler):
    def find_class(self, module, name):
        if name not in PARTS.get(module, ()):
            raise pickle.UnpicklingError(f"holds {module}.{name}, which no index has")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """torch's, but that the index is read without running what stands in it."""

    def read_metadata(self, *_, **__):
        with open(Path(self.path) / ".metadata", "rb") as file:
            index = _Index(file).load()
        index.storage_meta = index.storage_meta or dcp.metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


def save(path: Path, fields: dict, model: nn.Module, optimizers: list, keep: int = 1) -> None:
    """Write a checkpoint, all processes together. A reader sees the old one or the new one, never half of one.

    fields: what is no tensor. keep: see atomic.put_in_place.
    """
    half, leader = path.with_name(path.name + ".tmp"), dist.get_rank() == 0
    if leader:
        shutil.rmtree(half, ignore_errors=True)
    dist.barrier()
    try:
        dcp.save(_tensors(model, optimizers), storage_writer=dcp.FileSystemWriter(half))
    except dcp.api.CheckpointException as error:  # no Exception to torch, so nobody else would catch it
        first = next(iter(error.failures.values()))[0]
        raise OSError(f"{path}: not written ({first}); what stood there before is untouched") from None
    mine = {file.name: _digest(file) for file in half.glob(f"__{dist.get_rank()}_*")}
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, mine)
    if leader:
        files = {".metadata": _digest(half / ".metadata")} | {name: d for part in digests for name, d in part.items()}
        groups = [o.state_dict()["param_groups"] for o in optimizers]
        write_state(half / "fields.pt", fields | {"files": files, "param_groups": groups})
        put_in_place(half, path, keep)
    dist.barrier()


def _tensors(model: nn.Module, optimizers: list) -> dict[str, torch.Tensor]:
    """Everything that is in shards, under one flat name each: model/blocks.0.norm1.weight, optimizer/0/3/exp_avg."""
    found = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{i}/{j}/{name}": tensor for name, tensor in state.items()}
    return found


def is_shards(path: Path) -> bool:
    """Whether a folder is a checkpoint in shards, or what is left of one."""
    return any((path / name).exists() for name in SHARDS)


def read_head(path: Path) -> dict:
    """The fields of a folder without its tensors. Raises Damaged where a file is not what was written."""
    if not is_shards(path):
        raise ValueError(f"{path}: not a checkpoint in shards")
    if not (path / "fields.pt").exists():
        raise Damaged(f"{path / 'fields.pt'}: missing; it is a part of {path}")
    fields = read_state(path / "fields.pt")
    files = fields.get("files")
    if not isinstance(files, dict) or not isinstance(fields.get("param_groups"), list):
        raise ValueError(f"{path}: not a checkpoint in shards")
    for name, digest in files.items():
        file = path / str(name)
        if not file.is_file() or _digest(file) != digest:
            raise Damaged(f"{file}: {'changed' if file.is_file() else 'missing'}; it is a part of {path}")
    return fields


def read_whole(path: Path, device: str = "cpu") -> dict:
    """All fields of a folder, tensors put together: what checkpoint.load returns for a single file."""
    fields = read_head(path)
    flat = _read(path, lambda key, size, dtype: torch.empty(size, dtype=dtype, device=device), no_dist=True)
    state = {key: value for key, value in fields.items() if key not in ("files", "param_groups")}
    state["model"] = {name.removeprefix("model/"): t for name, t in flat.items() if name.startswith("model/")}
    return state | {"optimizer": _optimizer_states(flat, fields["param_groups"])}


def restore(path: Path, model: nn.Module, optimizers: list) -> None:
    """Fill a sharded model and its optimizers, all processes together, each reading its own slices."""
    fields, weights = read_state(path / "fields.pt"), model.state_dict()
    params = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]

    def place(key, size, dtype):
        part, *names = key.split("/")
        if part == "model":
            return weights[names[0]]
        like = params[int(names[0])][int(names[1])]
        return torch.zeros_like(like, dtype=dtype) if like.shape == size else torch.empty(size, dtype=dtype)

    flat = _read(path, place)
    for optimizer, state in zip(optimizers, _optimizer_states(flat, fields["param_groups"])):
        optimizer.load_state_dict(state)


def _read(path: Path, place: Callable, no_dist: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of a folder by name, each read into place(name, size, dtype)."""
    try:
        index = _Reader(path).read_metadata().state_dict_metadata
        kept = {key: entry for key, entry in index.items() if isinstance(entry, TensorStorageMetadata)}
        flat = {key: place(key, entry.size, entry.properties.dtype) for key, entry in kept.items()}
        dcp.load(flat, storage_reader=_Reader(path), no_dist=no_dist)
    except (dcp.api.CheckpointException, Exception) as error:
        raise ValueError(f"{path}: its shards cannot be read: {str(error).splitlines()[0][:120]}") from None
    return flat


def _optimizer_states(flat: dict, groups: list) -> list[dict]:
    found = [{"state": {}, "param_groups": group} for group in groups]
    for key, tensor in flat.items():
        if key.startswith("optimizer/"):
            _, i, j, name = key.split("/")
            found[int(i)]["state"].setdefault(int(j), {})[name] = tensor
    return found


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return sha256(file).decode()


def main(argv: list[str]) -> None:
    """Make the single file of a folder."""
    cfg = configure(WholeConfig, argv)
    if not cfg.source or not cfg.out:
        raise ValueError("want --source=FOLDER, a checkpoint in shards, and --out=FILE, the single file to write")
    state = read_whole(Path(cfg.source))
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write_state(cfg.out, state)
    print(f"{cfg.out}: {cfg.source} in one file, step {state['step']}")


if __name__ == "__main__":
    run(main)
