"""Who imports whom: the core needs nothing optional, nothing needs eval/, and there is no cycle."""

import ast
import functools
import importlib
import sys
from pathlib import Path

import pytest
from processes import Child

ROOT = Path(__file__).parent.parent
FOLDERS = ("infra", "data", "extras", "hf", "eval", "view")
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for pattern in ("*.py", *(f"{folder}/*.py" for folder in FOLDERS))
    for path in sorted(ROOT.glob(pattern))
    if path.name != "__init__.py"
}
CORE = [name for name in FILES if name.split(".")[0] not in ("extras", "hf", "eval", "view")]
REQUIRED = {"torch", "numpy", "tiktoken", "tqdm"}


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


@functools.cache
def imports(name: str, inside_functions: bool) -> set[str]:
    """Return all modules that a file imports when it is loaded, or inside functions too."""
    found = set()
    nodes = [tree(name)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found


def ours(name: str, inside_functions: bool = False) -> set[str]:
    return imports(name, inside_functions) & FILES.keys()


def folder_of(name: str) -> str:
    return name.rpartition(".")[0]


def test_the_core_loads_no_optional_folder_and_no_optional_package():
    for name in CORE:
        optional = {module for module in ours(name) if module not in CORE}
        assert not optional, f"{name} loads {optional}"
        packages = {module.split(".")[0] for module in imports(name, False)}
        outside = packages - sys.stdlib_module_names - REQUIRED - {*FOLDERS, *FILES}
        assert not outside, f"{name} loads {outside}"


def test_requirements_are_the_four_packages():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    packages = {line.partition("=")[0] for line in lines if line and line[0] != "#"}
    assert packages == REQUIRED


def test_only_eval_imports_eval():
    users = {name for name in FILES for other in ours(name, True) if folder_of(other) == "eval"}
    assert {folder_of(name) for name in users} == {"eval"}


def test_no_module_imports_itself_by_way_of_others():
    finished = set()

    def visit(name, path):
        assert name not in path, f"cycle: {' -> '.join([*path, name])}"
        if name not in finished:
            for other in sorted(ours(name)):
                visit(other, [*path, name])
        finished.add(name)

    for name in FILES:
        visit(name, [])
    assert len(finished) == len(FILES) > 50


@pytest.mark.parametrize("program", ["train", "sample", "ar2diff"])
def test_the_commands_load_without_optional_packages(program, tmp_path):
    """In a fork that forgets our modules. train.py loads at most 16 of them."""

    def load():
        for name in [name for name in sys.modules if name.split(".")[0] in {*FOLDERS, *FILES}]:
            del sys.modules[name]
        for name in ("safetensors", "tokenizers", "transformers", "matplotlib", "gguf", "jinja2"):
            sys.modules[name] = None  # then an import of it fails
        importlib.import_module(program)
        loaded = sorted(FILES.keys() & sys.modules.keys())
        assert len(loaded) <= (16 if program == "train" else 22), loaded
        assert not {"hf", "eval", "view"} & set(map(folder_of, loaded)), loaded

    child = Child(load, tmp_path / "output")
    assert child.wait() == 0, (tmp_path / "output").read_text()


def test_every_file_says_what_it_is_for():
    silent = [name for name in FILES if ast.get_docstring(tree(name)) is None]
    assert not silent
