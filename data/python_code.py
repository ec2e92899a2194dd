"""The Python source on this machine: a stream to pretrain on.

    python -m data.python_code [--source=stdlib|PATH] [--tokenizer=bytes|gpt2|PATH]

"stdlib" is the standard library of the Python that runs this: equal for equal versions. Writes the
data set python_code.

Whole files are held out, by a hash of their path. Tests, demos and generated tables are left out.
So are near-duplicates: files that differ only in comments and spaces.
"""

import platform
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from configurator import configure, require, run, setting
from data.sources import SetConfig, hash_number, percent, write_texts
from data.syntax import parse_python

HELD_OUT = 10  # percent of the files
MAX_FILE = 400_000  # bytes; longer files are tables written by programs
# Folders without code worth learning: tests, demos, generated tables, copies of other packages.
SKIPPED = set(
    "__pycache__ test tests testing idle_test lib2to3 turtledemo ensurepip encodings "
    "pydoc_data".split()
)
PACKAGES = {"site-packages", "dist-packages"}  # inside the standard library's folder
TEST_FILE = r"test_|_?test\.py|conftest|.*_test\.py"


@dataclass
class PythonCodeConfig(SetConfig):
    source: str = setting("stdlib", "stdlib, or a folder", path=True)
    name: str = setting("python_code", "the data set becomes the folder out/name")


def read_corpus(source: str) -> tuple[dict[str, list[str]], Counter]:
    """Return the files of each split, sorted by path, and how many were dropped, by reason."""
    files = {"train": [], "valid": []}
    dropped = Counter()
    seen = set()
    root = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    require(root.exists(), f"--source must be stdlib or a path; {source!r} does not exist")
    paths = list(_walk(root, dropped))
    # Training files first: of equal files in both splits, the held-out one is dropped.
    for split, path in sorted(paths, key=lambda item: item[0]):
        text = _read(path)
        if not text or parse_python(text) is None:
            dropped["files that are empty or no Python of this version"] += 1
        elif not _is_new(text, seen):
            dropped["files near-duplicate"] += 1
        else:
            files[split].append(text)
    return files, dropped


def split_of(path: str) -> str:
    """Return 'train' or 'valid'. path: inside its source folder, so equal on all machines."""
    return "valid" if percent(path) < HELD_OUT else "train"


def _walk(root: Path, dropped: Counter) -> Iterator[tuple[str, Path]]:
    """Yield the split and the path of the .py files below root in sorted order."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        folders = set(inside.parts[:-1])
        if folders & PACKAGES or not path.is_file():
            continue
        table = path.stat().st_size > MAX_FILE
        if table or folders & SKIPPED or re.match(TEST_FILE, path.name):
            dropped["files of tests, demos, tables"] += 1
        else:
            yield split_of(inside.as_posix()), path


def _read(path: Path) -> str:
    """Return the text in the encoding that the file declares, or "" if it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        text.encode("utf-8")
        return text
    except (OSError, SyntaxError, UnicodeError, LookupError):
        return ""


def _is_new(text: str, seen: set[int]) -> bool:
    """Whether no near-duplicate of the text was seen."""
    lines = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
    number = hash_number("".join("".join(lines).split()))
    is_new = number not in seen
    seen.add(number)
    return is_new


def main(argv: list[str]) -> None:
    cfg = configure(PythonCodeConfig, argv)
    files, dropped = read_corpus(cfg.source)
    command = ["data.python_code", *argv]
    free = {"source": cfg.source, "python": platform.python_version()}
    free |= {"licence": "each file keeps the licence of its package", "dropped": dropped}
    write_texts(cfg, files, command, **free)


if __name__ == "__main__":
    run(main, PythonCodeConfig)
