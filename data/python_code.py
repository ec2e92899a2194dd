"""The Python source on this machine, as a stream to pretrain on and as pairs: signature and docstring -> body.

    python -m data.python_code [--source=stdlib|all|PATH] [--tokenizer=bytes|gpt2|PATH] [--bare] [--out=out/data]

"stdlib" is the standard library of the Python that runs this: the same numbers for everyone who has that version. "all"
adds the installed packages. Writes python_code and python_pairs. Tests, demos and generated tables are left out.

A pair, dedented to the def; prefix and target laid end to end are the function again:

    def mean(values):                       return sum(values) / len(values)
        \"\"\"The average of the values.\"\"\"

Held out are whole files, by a hash of their path. Near-duplicates are left out: files, and bodies of functions whatever
their name, signature and docstring, that are equal when comment lines, blank lines and spaces are taken away. The
first stays, training files being read first, so that nothing held out is a near-duplicate of what was trained on.

--bare adds functions without a docstring to the training pairs, more than twice as many. Held out stays what was, and
what equals it is not added.
"""

import ast
import hashlib
import importlib.metadata
import platform
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from configurator import configure, run
from data.loader import OUT, join_documents, write_pairs, write_stream
from data.syntax import parse_python
from data.tokenizer import get_tokenizer

STREAM_TARGET, PAIR_TARGET = 128, 192  # tokens, separator included: what target_length=0 means
STREAM_BLOCK, PAIR_BLOCK = 256, 384  # tokens, prefix and target: what block_size=0 means
HELD_OUT = 10  # percent of the files
MAX_FILE = 400_000  # bytes; what is longer is a table that a program wrote
LICENCE = "each file keeps the licence of its package (the standard library: PSF-2.0); for use here, not for passing on"

# Folders that hold no code worth learning: tests, demos, tables written by programs, other people's wheels.
SKIPPED = {"__pycache__", "test", "tests", "testing", "idle_test", "lib2to3", "turtledemo", "ensurepip"}
SKIPPED |= {"encodings", "pydoc_data"}
PACKAGES = {"site-packages", "dist-packages"}  # below the standard library, but no part of it


@dataclass
class PythonCodeConfig:
    source: str = "stdlib"  # stdlib | all (with the installed packages) | a folder or file
    tokenizer: str = "bytes"  # bytes | gpt2 | the path of a tokenizer.json
    target_length: int = 0  # tokens, separator included; 0: 128 in the stream, 192 in pairs, and longer bodies go
    block_size: int = 0  # tokens, prefix and target; 0: 256 in the stream, 384 in pairs, and longer prefixes go
    bare: bool = False  # functions without a docstring too are training pairs, their prefix the signature alone
    out: str = OUT  # the folder the sets go into

    def __post_init__(self):
        least = (self.target_length or PAIR_TARGET) + 1
        if self.target_length < 0 or self.target_length == 1 or 0 < self.block_size < least or self.block_size < 0:
            raise ValueError(
                f"target_length must be 0 or at least 2, and block_size 0 or more than it; got {self.target_length} "
                f"and {self.block_size}"
            )
        if not self.block_size and self.target_length >= STREAM_BLOCK:
            raise ValueError(
                f"a target_length of {self.target_length} needs a block_size above it, such as --block_size="
                f"{2 * self.target_length}"
            )


@dataclass
class Corpus:
    """What was read: per split the texts of the files, and (prefix, body) of their functions."""

    files: dict[str, list[str]] = field(default_factory=lambda: {"train": [], "valid": []})
    functions: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: {"train": [], "valid": []})
    dropped: Counter = field(default_factory=Counter)  # reason -> how many

    def add_functions(self, split: str, pairs: Iterable[tuple[str, str]], seen: set[bytes]) -> None:
        """Those whose body is not among those seen."""
        for prefix, body in pairs:
            if _is_new(_code_alone(body), seen):
                self.functions[split].append((prefix, body))
            else:
                self.dropped["functions near-duplicate"] += 1


def read_corpus(source: str, bare: bool = False) -> Corpus:
    """Files and functions without near-duplicates, in sorted order of paths. Raises ValueError if there are none.

    bare: training functions without a docstring come after those that have one.
    """
    corpus, seen, paths, without_docstring = Corpus(), set(), [], []
    for root in _roots(source):
        for path in _walk(root, corpus.dropped):
            paths.append((split_of(path.relative_to(root).as_posix() if root.is_dir() else path.name), path))
    # Training files first: of what is in both splits, the held-out copy goes.
    for split, path in sorted(paths, key=lambda item: item[0]):
        text = _read(path)
        tree = parse_python(text) if text else None
        if tree is None:
            corpus.dropped["files that are empty or no Python of this version"] += 1
            continue
        if not _is_new(_code_alone(text), seen):
            corpus.dropped["files near-duplicate"] += 1
            continue
        corpus.files[split].append(text)
        corpus.add_functions(split, functions(text, tree), seen)
        if bare and split == "train":
            without_docstring += bare_functions(text, tree)
    corpus.add_functions("train", without_docstring, seen)  # last: of equal bodies those with a docstring stay
    for split, texts in corpus.files.items():
        if not texts:
            raise ValueError(
                f"--source={source}: no Python file for {split}; want stdlib, all, or a folder with more files"
            )
    return corpus


def functions(text: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(prefix, body) of every function and method with a docstring and code on the lines after it.

    prefix is `def` to the end of the docstring, with its newline; body the lines after it, without the last newline.
    Both are dedented by the column of the def, so the body keeps its four spaces. Functions inside functions
    belong to their parent's body.
    """
    lines = _lines(text)
    for node in _outer_functions(tree):
        if len(node.body) < 2 or ast.get_docstring(node, clean=False) is None:
            continue
        docstring, first = node.body[0], node.body[1]
        if first.lineno <= docstring.end_lineno:
            continue  # both on one line
        yield _cut(lines, node, docstring.end_lineno)


def bare_functions(text: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(prefix, body) of every function and method without a docstring whose code is on lines of its own.

    prefix is `def` to the line before the first statement, comments there included; else as functions().
    """
    lines = _lines(text)
    for node in _outer_functions(tree):
        first = node.body[0]
        begins = min(part.lineno for part in [first, *getattr(first, "decorator_list", [])])
        alone = begins > node.lineno and not lines[begins - 1][: first.col_offset].strip(" \t@")
        if alone and ast.get_docstring(node, clean=False) is None:
            yield _cut(lines, node, begins - 1)


def _lines(text: str) -> list[str]:
    return re.split(r"\r\n|\r|\n", text)  # as Python counts lines; splitlines would also cut at a form feed


def _cut(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef, at: int) -> tuple[str, str]:
    """The lines of a function up to line `at`, with a newline, and those after it, both dedented."""
    prefix = _dedent(lines[node.lineno - 1 : at], node.col_offset)
    body = _dedent(lines[at : node.end_lineno], node.col_offset)
    return "\n".join(prefix) + "\n", "\n".join(body)


def fitting_pairs(
    corpus: Corpus, encode: Callable[[str], list[int]], longest_prefix: int, target_length: int
) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Per split the (prefix, body) token ids that fit, a separator with the body; the others are counted."""
    kept = {split: [] for split in corpus.functions}
    for split, pairs in corpus.functions.items():
        for prefix, body in pairs:
            # Far over the limit in characters: too long in any tokens, so spare the tokenizer.
            hopeless = len(prefix) > 8 * longest_prefix or len(body) > 8 * target_length
            ids = ([], []) if hopeless else (encode(prefix), encode(body))
            if hopeless or len(ids[0]) > longest_prefix or len(ids[1]) > target_length - 1:
                corpus.dropped["functions too long"] += 1
            elif not parses(prefix, body):
                corpus.dropped["functions that cannot be dedented"] += 1
            else:
                kept[split].append(ids)
    return kept


def parses(signature_and_docstring: str, body: str) -> bool:
    """Whether prefix and body, laid end to end, are one Python function with a body. Nothing is run.

    The docstring alone would parse, too; of a function without one any statement is a body.
    """
    tree = parse_python(signature_and_docstring + body + "\n")
    if tree is None or len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return len(tree.body[0].body) > 1 or ast.get_docstring(tree.body[0], clean=False) is None


def split_of(path: str) -> str:
    """'train' or 'valid', by a hash of the path inside its source folder: the same on every machine."""
    number = int.from_bytes(hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    return "valid" if number % 100 < HELD_OUT else "train"


def _roots(source: str) -> list[Path]:
    paths = sysconfig.get_paths()
    if source == "stdlib":
        return [Path(paths["stdlib"])]
    if source == "all":
        return [Path(p) for p in dict.fromkeys([paths["stdlib"], paths["purelib"], paths["platlib"]])]
    if not Path(source).exists():
        raise ValueError(f"--source must be stdlib, all or a path, got {source!r}: no such path")
    return [Path(source)]


def _walk(root: Path, dropped: Counter) -> list[Path]:
    """The .py files below root in sorted order; root itself if it is a file."""
    if root.is_file():
        return [root]
    found = []
    for path in sorted(root.rglob("*.py")):
        folders = set(path.relative_to(root).parts[:-1])
        if folders & PACKAGES or not path.is_file():
            continue
        if folders & SKIPPED or re.match(r"test_|_?test\.py|conftest|.*_test\.py", path.name):
            dropped["files of tests, demos, tables"] += 1
        elif path.stat().st_size > MAX_FILE:
            dropped[f"files over {MAX_FILE:,} bytes"] += 1
        else:
            found.append(path)
    return found


def _read(path: Path) -> str:
    """The text, decoded as its first lines say; "" if it cannot be."""
    try:
        with tokenize.open(path) as f:
            text = f.read()
        text.encode("utf-8")
        return text
    except (OSError, SyntaxError, UnicodeError, LookupError):
        return ""


def _code_alone(text: str) -> str:
    """The code without comment lines, blank lines and spaces."""
    return "".join("".join(line.split()) for line in text.split("\n") if not line.lstrip().startswith("#"))


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    new = digest not in seen
    seen.add(digest)
    return new


def _outer_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler):
            yield from _outer_functions(child)


def _dedent(lines: list[str], column: int) -> list[str]:
    """The lines without their first `column` spaces, without spaces at the ends, without blank lines at the end."""
    lines = [line[min(column, len(line) - len(line.lstrip())) :].rstrip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def main(argv: list[str]) -> None:
    cfg = configure(PythonCodeConfig, argv)
    tokenizer, corpus = get_tokenizer(cfg.tokenizer), read_corpus(cfg.source, cfg.bare)
    (stream_target, stream_block), (pair_target, pair_block) = (
        (cfg.target_length or target, cfg.block_size or block)
        for target, block in ((STREAM_TARGET, STREAM_BLOCK), (PAIR_TARGET, PAIR_BLOCK))
    )
    pairs = fitting_pairs(corpus, tokenizer.encode, pair_block - pair_target, pair_target)
    free = {
        "command": " ".join(["python -m data.python_code", *argv]),
        "source": cfg.source,
        "python": platform.python_version(),
        "packages": _package_versions() if cfg.source == "all" else {},
        "licence": LICENCE,
        "files": {split: len(texts) for split, texts in corpus.files.items()},
        "dropped": dict(sorted(corpus.dropped.items())),
    }
    stream = {split: join_documents(texts, tokenizer) for split, texts in corpus.files.items()}
    out = Path(cfg.out)
    metas = [
        write_stream(out / "python_code", stream, cfg.tokenizer, stream_target, stream_block, **free),
        write_pairs(out / "python_pairs", pairs, cfg.tokenizer, pair_target, pair_block, **free),
    ]
    for reason, n in free["dropped"].items():
        print(f"left out: {n:6,} {reason}")
    for name, meta in zip(("python_code", "python_pairs"), metas):
        counts = ", ".join(f"{split} {n:,} {what}" for split, c in meta["splits"].items() for what, n in c.items())
        print(f"{out / name}: {counts}; Python {free['python']}, sha256 {meta['sha256'][:16]}")


def _package_versions() -> dict[str, str]:
    return dict(
        sorted((d.metadata["Name"], d.version) for d in importlib.metadata.distributions() if d.metadata["Name"])
    )


if __name__ == "__main__":
    run(main)
