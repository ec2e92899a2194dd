"""Other people's weights, in and out: Hugging Face folders, GGUF files, tokenizers, chats.

Only functions of the core may import this package: it needs packages that requirements.txt lacks.
"""

import contextlib
import importlib
import json
from pathlib import Path

import configurator


def optional(package: str):
    """Import an optional package. Raises ValueError with the pip command if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise ValueError(f"the package {name} is missing; run: pip install {name}") from None


@contextlib.contextmanager
def explained(problem: str):
    """Make one line of whatever another package raises: ValueError(problem: reason)."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{problem}: {configurator.one_line(error)[:160]}") from None


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ValueError if git cloned only the pointer to a large file."""
    pointer = b"version https://git-lfs"
    with open(path, "rb") as file:
        fault = f"{path.name}: a git-LFS pointer; run `git lfs pull` in its folder"
        configurator.require(file.read(len(pointer)) != pointer, fault)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file of a Hugging Face folder."""
    with explained(f"{path.name} of a Hugging Face folder"):
        text = path.read_text(encoding="utf-8")
    refuse_lfs_pointer(path)
    return text


def read_json(path: Path) -> dict:
    """Return the JSON object of a file. Raises ValueError if there is none."""
    text = read_text(path)
    with explained(f"{path.name}: no JSON object"):
        found = json.loads(text)
        configurator.require(isinstance(found, dict), f"got {type(found).__name__}")
    return found
