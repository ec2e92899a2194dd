"""The file format of a checkpoint: tensors and plain values, written atomically, read without unpickling code.

Fields: format, step, model (state_dict), model_config, tokenizer (name), train_config, optimizer, best_loss,
fingerprint (of the data), converted_from, made_on. No random state and no loader position: both are functions of
(seed, step).

Under FSDP a checkpoint is a folder of the same name: see sharded.py.
"""

from dataclasses import asdict
from pathlib import Path

from atomic import read_state, write_state
from atomic import write_atomically as write_atomically  # eval/ takes it from here
from configurator import checked
from data.tokenizer import FILE, Tokenizer, get_tokenizer
from encdec import build_model
from model import ModelConfig, Transformer

FORMAT = 1  # raise when a field changes its meaning; load() refuses other numbers
FIELDS = {"step": int, "model": dict, "model_config": dict, "tokenizer": str}  # what every checkpoint has


def save(path: str | Path, model: Transformer, step: int, tokenizer: str, keep: int = 0, **rest) -> None:
    """Write one checkpoint. A reader sees the old file or the new one, never half of one, also after a power cut.

    keep: so many files stay, the new one included; see atomic.history.
    """
    keep_tokenizer(tokenizer, Path(path).parent)
    write_state(path, head(model, step, tokenizer) | {"model": model.state_dict()} | rest, keep)


def head(model: Transformer, step: int, tokenizer: str) -> dict:
    """The fields that every checkpoint has, but for the weights."""
    return dict(format=FORMAT, step=step, model_config=asdict(model.cfg), tokenizer=tokenizer)


def keep_tokenizer(name: str, folder: Path) -> None:
    """Put a tokenizer that is a file beside what names it; nothing for the others."""
    if name.startswith(f"{FILE}@"):
        text, path = get_tokenizer(name).file.encode(), folder / FILE
        if not path.is_file() or path.read_bytes() != text:
            write_atomically(path, lambda file: file.write(text))


def load(path: str | Path, device: str = "cpu") -> dict:
    """The fields of a checkpoint, whole also where it was written in shards.

    Raises ValueError, one line, where it is missing, of another format or lacks a field; Damaged, which is one, where
    it is truncated or changed.
    """
    path = Path(path)
    if path.is_dir():
        from sharded import is_shards, read_whole  # torch's distributed checkpoints take a second to import

        if is_shards(path):
            return _checked(path, read_whole(path, device))
        raise ValueError(f"{path} is a folder; name a checkpoint in it, such as {path / 'ckpt.pt'}")
    if not path.exists():
        near = sorted(str(p) for p in path.parent.glob("*.pt")) or sorted(str(p) for p in Path("out").glob("*/*.pt"))
        raise ValueError(f"{path}: no such checkpoint" + (f"; there are: {', '.join(near[:8])}" if near else ""))
    return _checked(path, read_state(path, device))


def _checked(path: Path, state: dict) -> dict:
    """The same fields, if they are those of a checkpoint. What they hold may still not fit together."""
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if type(found) is not int or found != FORMAT:
        found = found if isinstance(found, int | str | None) else type(found).__name__
        raise ValueError(f"{path}: checkpoint format {found}, this code reads {FORMAT}")
    for name, kind in FIELDS.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path}: its field {name!r} is missing or no {kind.__name__}")
    if state["step"] < 0:
        raise ValueError(f"{path}: its step is {state['step']}")
    if not isinstance(state.get("train_config", {}), dict):
        raise ValueError(f"{path}: its field 'train_config' is no dict")
    if not all(isinstance(name, str) for name in state["model"]):
        raise ValueError(f"{path}: its weights have no names")
    checked(ModelConfig, state["model_config"], f"{path}, model_config")
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
