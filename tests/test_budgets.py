"""The budgets of the project. python tests/test_budgets.py prints them; the test holds them."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ROOT_FILES = sorted(ROOT.glob("*.py"))


def n_lines(*patterns: str) -> int:
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sum(len(path.read_text().splitlines()) for path in paths)


def words(*patterns: str) -> int:
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return sum(len(path.read_text().split()) for path in paths)


def root_functions() -> list[tuple[int, int]]:
    """(lines, local names) of each function in the root files."""
    found = []
    for path in ROOT_FILES:
        codes = [compile(path.read_text(), path.name, "exec")]
        while codes:
            part = codes.pop()
            codes += [const for const in part.co_consts if hasattr(const, "co_code")]
            if part.co_flags & inspect.CO_OPTIMIZED and part.co_name[0] != "<":
                last = max(line for *_, line in part.co_lines() if line)
                names = {*part.co_varnames, *part.co_cellvars}
                found.append((last - part.co_firstlineno + 1, len(names)))
    return found


def code_lines() -> list[str]:
    lines = [line for path in ROOT_FILES for line in path.read_text().splitlines()]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def joined_assignments() -> int:
    """Assignments such as `a, b = x, y`. A swap and an unpacking are allowed."""
    found = 0
    for path in ROOT_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
                continue
            target = node.targets[0]
            if isinstance(target, ast.Tuple):
                names = {ast.unparse(element) for element in target.elts}
                found += names != {ast.unparse(element) for element in node.value.elts}
    return found


def typed_settings() -> int:
    from configurator import all_fields
    from train import TrainConfig

    typed = [f for f in all_fields(TrainConfig).values() if not f.metadata.get("hidden")]
    assert all(field.metadata["help"] for field in typed)
    return len(typed)


def modules_of_train() -> int:
    from test_imports import FILES, imports

    loaded = {"train"}
    for _ in range(len(FILES)):
        loaded |= {module for name in loaded for module in imports(name) & FILES.keys()}
    return len(loaded)


def tracked_results() -> int:
    return sum(1 for path in (ROOT / "results").rglob("*") if path.is_file())


def table() -> list[tuple[str, float, float]]:
    """(what, today, at most)."""
    python = ("*.py", "infra/*.py", "extras/*.py", "hf/*.py", "data/*.py", "eval/*.py")
    small = ("view/*.py", "config/*.py", "docs/**/*.py")
    functions = root_functions()
    lines = code_lines()
    return [
        ("Python, without tests", n_lines(*python, *small), 11_250),
        ("root files", n_lines("*.py"), 2_210),
        ("number of root files", len(ROOT_FILES), 8),
        ("infra/", n_lines("infra/*.py"), 900),
        ("extras/", n_lines("extras/*.py"), 1_100),
        ("hf/", n_lines("hf/*.py"), 1_100),
        ("data/", n_lines("data/*.py"), 1_940),
        ("eval/", n_lines("eval/*.py"), 3_650),
        ("tests", n_lines("tests/**/*.py"), 10_650),
        ("longest function in the root, lines", max(lines for lines, _ in functions), 60),
        ("most local names in the root", max(names for _, names in functions), 25),
        ("characters per line in the root", sum(map(len, lines)) / len(lines), 50),
        ("lines beyond 100 columns, %", 100 * sum(len(x) > 100 for x in lines) / len(lines), 5),
        ("joined assignments", joined_assignments(), 0),
        ("settings of a training", typed_settings(), 50),
        ("modules that train.py loads", modules_of_train(), 16),
        ("README, lines", n_lines("README.md"), 150),
        ("README, words", words("README.md"), 1_300),
        ("docs, words", words("docs/**/*.md"), 5_000),
        ("results/README, lines", n_lines("results/README.md"), 250),
        ("files in results/", tracked_results(), 40),
    ]


@pytest.mark.parametrize(("what", "today", "limit"), table())
def test_within_budget(what, today, limit):
    assert today <= limit, f"{what}: {today}, budget {limit}"


if __name__ == "__main__":
    for what, today, limit in table():
        mark = "OVER" if today > limit else ""
        print(f"{what:<40} {today:>9,.1f} {limit:>9,} {mark}".replace(".0 ", "   "))
