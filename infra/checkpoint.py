"""Checkpoints: tensors and plain values in one file, written atomically, read without running code.

Always: format, step, model, model_config, tokenizer (name). Of a training: train_config (flat),
optimizer, best_loss, fingerprint (of the data). No random state and no loader position: both are
functions of (seed, step).
"""

import contextlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import from_stored, one_line, require
from data.tokenizer import FILE, Tokenizer, get_tokenizer
from model import ModelConfig, Transformer, model_from_state_dict

FORMAT = 2  # raise it if a field changes its meaning
FIELDS = {"step": int, "model": dict, "model_config": dict, "tokenizer": str}


class CorruptCheckpoint(ValueError):
    """The file is not what was written."""


def save(path, model, /, step: int, tokenizer: str, keep_last: int = 1, **fields) -> None:
    """Write a checkpoint. A reader finds the old file or the new one, also after a power cut.

    keep_last: with 2, the previous file stays as ckpt.1.pt.
    fields: saved too. The field `model` replaces the weights of a model that holds only shards.
    """
    if tokenizer.startswith(f"{FILE}@"):  # it is a file: keep a copy next to the checkpoint
        text = get_tokenizer(tokenizer).file.encode()
        write_atomically(Path(path).with_name(FILE), lambda file: file.write(text))
    state = dict(format=FORMAT, step=step, model_config=asdict(model.cfg), tokenizer=tokenizer)
    state |= {"model": model.state_dict()} | fields
    write_atomically(path, lambda file: torch.save(state, file), keep_last)


def load(path: str | Path, device: str = "cpu") -> dict:
    """Return the fields. Raises CorruptCheckpoint if damaged, ValueError if missing or not ours."""
    path = Path(path).expanduser()
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        nearby = sorted(folder.glob("*.pt")) or sorted(Path("out").glob("*/*.pt"))
        hint = f"; available: {', '.join(map(str, nearby[:8]))}" if nearby else ""
        raise ValueError(f"{path}: no such checkpoint{hint}")
    with open(path, "rb") as file:
        _check_bytes(path, file)
        try:
            state = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # a foreign pickle, or too little memory
            reason = one_line(error)[:160]
            raise ValueError(f"{path}: cannot be read as a checkpoint: {reason}") from None
    try:
        _check_fields(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return state


def load_model(path: str | Path, device: str = "cpu") -> tuple[Transformer, Tokenizer, dict]:
    """Return (model in eval mode, tokenizer, all fields) of a checkpoint."""
    path = Path(path).expanduser()
    state = load(path, device)
    try:
        tokenizer = get_tokenizer(state["tokenizer"], path.parent)
        model = model_from_state_dict(ModelConfig(**state["model_config"]), state["model"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return model.to(device).eval(), tokenizer, state


def write_atomically(path: str | Path, write: Callable, keep_last: int = 1) -> None:
    """Let write(file) fill a temporary file, then rename it. An error leaves path unchanged."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep_last > 1 and path.exists():
            backup_path(path).unlink(missing_ok=True)
            try:
                os.link(path, backup_path(path))  # a second name: path exists at every moment
            except OSError:  # this file system has no hard links
                os.replace(path, backup_path(path))
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some systems cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or one_line(error)[:160]
        raise OSError(f"{path}: not written ({reason}); the previous file is unchanged") from None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder. At the end it replaces `folder`, unless there was an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        new = Path(scratch, "new")
        new.mkdir()
        yield new
        if folder.exists():
            folder.rename(Path(scratch, "old"))  # a folder with files cannot be replaced
        new.rename(folder)


def backup_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.1{path.suffix}")


def _check_bytes(path: Path, file) -> None:
    """Compare the CRC-32 of each record of the zip file, which torch.load does not."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        reason = f"wrong checksum of {bad}" if bad else ""
    except Exception as error:  # damaged bytes raise nearly anything
        reason = one_line(error)[:160] or type(error).__name__
    file.seek(0)
    if reason:
        backup = backup_path(path)
        remedy = f"use {backup}" if backup.exists() else "use another checkpoint"
        raise CorruptCheckpoint(f"{path}: damaged or not a checkpoint ({reason}); {remedy}")


def _check_fields(state) -> None:
    """Validate all fields that every reader needs. Add missing settings of the model."""
    found = state.get("format") if isinstance(state, dict) else None
    readable = type(found) is int and found == FORMAT
    require(readable, f"checkpoint format {str(found)[:40]}, this code reads {FORMAT}")
    for name, kind in FIELDS.items():
        fits = isinstance(state.get(name), kind) and state[name] != {}
        require(fits, f"field {name!r} is missing or not of type {kind.__name__}")
    require(isinstance(state.get("train_config", {}), dict), "train_config is no dict")
    state["model_config"] = asdict(from_stored(ModelConfig, state["model_config"], "model_config"))
