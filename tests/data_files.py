"""Files for the tests of data/."""

import gzip
import io
import json
import tarfile
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


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, raw in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))


def texts(folder: Path) -> list[list[tuple[str, str]]]:
    """Return the (prefix, target) texts of train and of valid."""
    splits = [open_dataset(folder, split) for split in ("train", "valid")]
    return [[data.text(i) for i in range(len(data))] for data in splits]
