"""Checkpoints: tensors and plain values in one file, written atomically, read without running code.

Fields: format, step, model (state_dict), model_config, tokenizer (name), and for a training also
train_config (flat), optimizer, best_loss, fingerprint (of the data), converted_from. There is no
random state and no loader position, because both are functions of (seed, step).
"""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from configurator import from_stored, one_line
from data.tokenizer import FILE, Tokenizer, get_tokenizer
from model import ModelConfig, Transformer, build_model

FORMAT = 2  # raise it if a field changes its meaning
FIELDS = {"step": int, "model": dict, "model_config": dict, "tokenizer": str}  # always present


class CorruptCheckpoint(ValueError):
    """The bytes of a checkpoint are not the bytes that were written."""


def save(
    path: str | Path,
    model: Transformer,
    step: int,
    tokenizer: str,
    keep_last: int = 0,
    weights: dict | None = None,
    **rest,
) -> None:
    """Write a checkpoint. A reader finds the old file or the new one, also after a power cut.

    keep_last: how many files stay: ckpt.pt, ckpt.1.pt, ..; 0 or 1: no backup.
    weights: the whole state_dict, if the model holds only shards of it.
    """
    path = Path(path)
    keep_tokenizer(tokenizer, path.parent)
    state = dict(format=FORMAT, step=step, model_config=asdict(model.cfg), tokenizer=tokenizer)
    state["model"] = model.state_dict() if weights is None else weights
    write_atomically(path, lambda file: torch.save(state | rest, file), keep_last)


def load(path: str | Path, device: str = "cpu") -> dict:
    """Return the fields of a checkpoint.

    Raises CorruptCheckpoint if the file is damaged, ValueError if it is missing or not ours.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        nearby = sorted(path.parent.glob("*.pt")) or sorted(Path("out").glob("*/*.pt"))
        hint = f"; available: {', '.join(map(str, nearby[:8]))}" if nearby else ""
        raise ValueError(f"{path}: no such checkpoint{hint}")
    with open(path, "rb") as file:
        _check_bytes(path, file)
        try:
            state = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # a foreign pickle, or too little memory
            raise ValueError(
                f"{path}: cannot be read as a checkpoint: {_first_line(error)}"
            ) from None
    return _checked(path, state)


def load_model(path: str | Path, device: str = "cpu") -> tuple[Transformer, Tokenizer, dict]:
    """Return (model in eval mode, tokenizer, all fields) of a checkpoint."""
    path = Path(path).expanduser()
    state = load(path, device)
    tokenizer = get_tokenizer(state["tokenizer"], path.parent)
    try:
        model = build_model(ModelConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{path}: its weights do not fit its settings: {reason}") from None
    if tokenizer.vocab_size != model.cfg.vocab_size:
        raise ValueError(
            f"{path}: the model has {model.cfg.vocab_size} tokens, "
            f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size}"
        )
    return model.to(device).eval(), tokenizer, state


def keep_tokenizer(name: str, folder: Path) -> None:
    """Copy a tokenizer that is a file next to the checkpoints that name it."""
    if not name.startswith(f"{FILE}@"):
        return
    text = get_tokenizer(name).file.encode()
    path = folder / FILE
    if not path.is_file() or path.read_bytes() != text:
        write_atomically(path, lambda file: file.write(text))


def write_atomically(path: str | Path, write: Callable, keep_last: int = 0) -> None:
    """Let write(file) fill a temporary file, then rename it to path. Errors leave path unchanged."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        _rotate(path, keep_last)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise OSError(f"{path}: not written ({reason}); the previous file is unchanged") from None


def backup_path(path: Path, n: int) -> Path:
    """Return the name of the n-th backup: ckpt.pt, ckpt.1.pt, ckpt.2.pt, .."""
    return path.with_name(f"{path.stem}.{n}{path.suffix}") if n else path


def sha256_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rotate(path: Path, keep_last: int) -> None:
    """Move each backup one place on. path itself gets a second name, so that it always exists."""
    for n in range(keep_last - 1, 0, -1):
        source = backup_path(path, n - 1)
        target = backup_path(path, n)
        if not source.exists():
            continue
        target.unlink(missing_ok=True)
        if n > 1:
            os.replace(source, target)
            continue
        try:
            os.link(source, target)
        except OSError:  # this file system has no hard links
            os.replace(source, target)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _check_bytes(path: Path, file) -> None:
    """Compare the CRC-32 of each record of the zip file. torch.load does not."""
    try:
        with zipfile.ZipFile(file) as archive:
            bad = archive.testzip()
        reason = f"the checksum of its record {bad} is wrong" if bad else ""
    except Exception as error:  # damaged bytes raise nearly anything
        reason = _first_line(error)
    file.seek(0)
    if reason:
        backup = backup_path(path, 1)
        remedy = f"use {backup}" if backup.exists() else "use another checkpoint"
        raise CorruptCheckpoint(f"{path}: damaged or not a checkpoint ({reason}); {remedy}")


def _checked(path: Path, state) -> dict:
    """Return the state if it has the fields of a checkpoint. Raises ValueError if not."""
    found = state.get("format") if isinstance(state, dict) else None
    if type(found) is not int or found != FORMAT:
        raise ValueError(f"{path}: checkpoint format {str(found)[:40]}, this code reads {FORMAT}")
    for name, kind in FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: field {name!r} is missing or not of type {kind.__name__}")
    if state["step"] < 0 or not isinstance(state.get("train_config", {}), dict):
        raise ValueError(f"{path}: field 'step' or 'train_config' is not valid")
    if not all(isinstance(name, str) for name in state["model"]):
        raise ValueError(f"{path}: a weight has no name")
    from_stored(ModelConfig, state["model_config"], f"{path}, model_config")
    return state


def _first_line(error: Exception) -> str:
    return one_line(error).split("\\n")[0][:120] or type(error).__name__
