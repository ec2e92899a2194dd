"""Files for the tests of data/."""

import gzip
import json
from pathlib import Path

from data.loader import open_dataset


def write(path: Path, content) -> str:
    """Write bytes, text, a JSON object, or a list as lines of JSON. A name in .gz is gzipped."""
    if isinstance(content, list):
        content = "".join(json.dumps(item) + "\n" for item in content)
    if isinstance(content, dict):
        content = json.dumps(content)
    raw = content if isinstance(content, bytes) else content.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return str(path)


def texts(folder: Path) -> list[list[tuple[str, str]]]:
    """Return the (prefix, target) texts of train and of valid."""
    splits = [open_dataset(folder, split) for split in ("train", "valid")]
    return [[data.text(i) for i in range(len(data))] for data in splits]
