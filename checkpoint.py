"""The file format of a checkpoint: tensors and plain values, written atomically, read without unpickling code.

Fields: format, step, model (state_dict), model_config, tokenizer (name), train_config, optimizer, best_loss,
fingerprint (of the data), converted_from. No random state and no loader position: both are functions of (seed, step).
"""

import os
from dataclasses import asdict
from pathlib import Path

import torch

from data.tokenizer import FILE, Tokenizer, get_tokenizer
from encdec import build_model
from model import ModelConfig, Transformer

FORMAT = 1  # raise when a field changes its meaning; load() refuses other numbers


def save(path: str | Path, model: Transformer, step: int, tokenizer: str, **rest) -> None:
    """Write one checkpoint. A reader sees the old file or the new one, never half of one, also after a power cut."""
    state = dict(
        format=FORMAT, step=step, model=model.state_dict(), model_config=asdict(model.cfg), tokenizer=tokenizer
    )
    keep_tokenizer(tokenizer, Path(path).parent)
    write_atomically(path, lambda file: torch.save(state | rest, file))


def keep_tokenizer(name: str, folder: Path) -> None:
    """Put a tokenizer that is a file beside what names it; nothing for the others."""
    if name.startswith(f"{FILE}@"):
        text, path = get_tokenizer(name).file.encode(), folder / FILE
        if not path.is_file() or path.read_bytes() != text:
            write_atomically(path, lambda file: file.write(text))


def write_atomically(path: str | Path, write) -> None:
    """Let write(file) fill a temporary file, then put it in the place of path. What fails leaves path as it was."""
    path = Path(path)
    half = path.with_name(path.name + ".tmp")
    try:
        with open(half, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        half.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error}); what stood there before is untouched") from None


def load(path: str | Path, device: str = "cpu") -> dict:
    """The fields of a checkpoint. Raises ValueError, one line, where it is missing, truncated or of another format."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a checkpoint in it, such as {path / 'ckpt.pt'}")
    if not path.exists():
        near = sorted(str(p) for p in path.parent.glob("*.pt")) or sorted(str(p) for p in Path("out").glob("*/*.pt"))
        raise ValueError(f"{path}: no such checkpoint" + (f"; there are: {', '.join(near[:8])}" if near else ""))
    with open(path, "rb") as file:  # what cannot be opened is an OSError that says why
        try:
            state = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # damaged bytes raise nearly anything, also OSError, IndexError and struct.error
            reason = (str(error).strip() or type(error).__name__).split("\n")[0][:120]
            raise ValueError(f"{path}: not a readable checkpoint (truncated, or not ours): {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: checkpoint format {found}, this code reads {FORMAT}")
    return state


def load_model(path: str | Path, device: str = "cpu") -> tuple[Transformer, Tokenizer, dict]:
    """(model in eval mode, tokenizer, all fields) of a checkpoint."""
    state = load(path, device)
    tokenizer = get_tokenizer(state["tokenizer"], Path(path).parent)
    try:
        model = build_model(ModelConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{path}: its weights do not fit its settings: {str(error).splitlines()[-1].strip()}"
        ) from None
    if tokenizer.vocab_size != model.cfg.vocab_size:
        raise ValueError(
            f"{path}: the model has {model.cfg.vocab_size} tokens, tokenizer {tokenizer.name!r} {tokenizer.vocab_size}"
        )
    return model.to(device).eval(), tokenizer, state
