"""Other people's weights, in and out: Hugging Face folders, GGUF files, tokenizers, chats.

Only functions of the core may import this package: it needs packages that requirements.txt lacks.
"""

import importlib
import json
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"


def require(package: str):
    """Import an optional package. Raises ValueError with the pip command if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise ValueError(f"the package {name} is missing; run: pip install {name}") from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ValueError if git cloned only the pointer to a large file."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            remedy = f"run `git lfs pull` in {path.parent}"
            raise ValueError(f"{path}: a git-LFS pointer, not the file; {remedy}")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises ValueError, with the path, if it is none."""
    try:
        refuse_lfs_pointer(path)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; a Hugging Face folder has one") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> dict:
    """Return the JSON object of a file. Raises ValueError if there is none."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({first_line(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(found).__name__}")
    return found
