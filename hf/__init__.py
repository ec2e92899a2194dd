"""Other people's weights, in and out: Hugging Face folders, GGUF files, tokenizers, chats.

Only functions of the core may import this package: it needs packages that requirements.txt lacks.
"""

import importlib
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"


def require(package: str):
    """Import an optional package. Raises ValueError with the pip command if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError:
        name = package.split(".")[0]
        raise ValueError(f"the package {name} is missing; run: pip install {name}") from None


def refuse_lfs_pointer(path: Path) -> None:
    """Raise ValueError if git cloned only the pointer to a large file."""
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path}: a git-LFS pointer, not the file; run `git lfs pull` in {path.parent}"
            )
