"""The Python source on this machine: a stream to pretrain on, and pairs of docstring and body.

    python -m data.python_code [--source=stdlib|PATH] [--tokenizer=bytes|gpt2|PATH]

"stdlib" is the standard library of the Python that runs this: equal for equal versions. Writes
python_code and python_pairs. A pair is a function, dedented:

    def mean(values):                       return sum(values) / len(values)
        \"\"\"The average of the values.\"\"\"

Whole files are held out, by a hash of their path. Tests, demos and generated tables are left out.
So are near-duplicates: files, and bodies of functions, that differ only in comments and spaces.
"""

import ast
import platform
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from configurator import configure, require, run, setting
from data.sources import SetConfig, hash_number, percent, write_set, write_texts
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
    name: str = setting("python", "the data sets become the folders out/name_code and _pairs")


def read_corpus(source: str) -> tuple[dict, dict, Counter]:
    """Return the files, the pairs of their functions, and how much was left out and why.

    Files and functions are by split, in the order of the paths, without near-duplicates.
    """
    files = {"train": [], "valid": []}
    pairs = {"train": [], "valid": []}
    dropped = Counter()
    seen = set()
    root = _stdlib() if source == "stdlib" else Path(source)
    require(root.exists(), f"--source must be stdlib or a path; {source!r} does not exist")
    paths = list(_walk(root, dropped))
    # Training files first: of equal files in both splits, the held-out one is dropped.
    for split, path in sorted(paths, key=lambda item: item[0]):
        text = _read(path)
        tree = parse_python(text) if text else None
        if tree is None:
            dropped["files that are empty or no Python of this version"] += 1
        elif not _is_new(text, seen):
            dropped["files near-duplicate"] += 1
        else:
            files[split].append(text)
            for prefix, body in functions(text, tree):
                if not _is_new(body, seen):
                    dropped["functions near-duplicate"] += 1
                elif not parses(prefix, body):
                    dropped["functions that cannot be dedented"] += 1
                else:
                    pairs[split].append({"prefix": prefix, "target": body})
    return files, pairs, dropped


def functions(text: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (prefix, body) of each function with a docstring and code on the lines after it.

    The prefix is `def` to the end of the docstring, with its newline. Both are dedented by the
    column of the def. Functions inside functions belong to the body of the outer one.
    """
    lines = re.split(r"\r\n|\r|\n", text)  # Python's lines: splitlines would split at form feeds
    for node in _outer_functions(tree):
        documented = len(node.body) > 1 and ast.get_docstring(node, clean=False) is not None
        end = node.body[0].end_lineno
        if documented and node.body[1].lineno > end:
            prefix = _dedent(lines[node.lineno - 1 : end], node.col_offset)
            yield prefix + "\n", _dedent(lines[end : node.end_lineno], node.col_offset)


def parses(prefix: str, body: str) -> bool:
    """Whether prefix and body together are one Python function with a body. Nothing is run."""
    tree = parse_python(prefix + body + "\n")
    node = tree.body[0] if tree is not None and len(tree.body) == 1 else None
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return len(node.body) > 1 or ast.get_docstring(node, clean=False) is None


def split_of(path: str) -> str:
    """Return 'train' or 'valid'. path: inside its source folder, so equal on all machines."""
    return "valid" if percent(path) < HELD_OUT else "train"


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


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


def _outer_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _outer_functions(child)


def _dedent(lines: list[str], column: int) -> str:
    """Remove `column` spaces from each line, spaces at its end, and blank lines at the end."""
    lines = [line[min(column, len(line) - len(line.lstrip())) :].rstrip() for line in lines]
    return "\n".join(lines).rstrip("\n")


def main(argv: list[str]) -> None:
    cfg = configure(PythonCodeConfig, argv)
    files, pairs, dropped = read_corpus(cfg.source)
    command = ["data.python_code", *argv]
    free = {"source": cfg.source, "python": platform.python_version()}
    free |= {"licence": "each file keeps the licence of its package", "dropped": dropped}
    write_texts(replace(cfg, name=f"{cfg.name}_code"), files, command, **free)
    sizes = {"target_length": cfg.target_length or 192, "block_size": cfg.block_size or 384}
    write_set(replace(cfg, name=f"{cfg.name}_pairs", **sizes), pairs, command, **free)


if __name__ == "__main__":
    run(main, PythonCodeConfig)
