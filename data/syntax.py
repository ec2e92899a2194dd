"""Python text to syntax tree, for text that a model generated. Nothing is run."""

import ast
import warnings


def parse_python(source: str) -> ast.Module | None:
    """Return the syntax tree, or None if the text is not Python or nested too deeply."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as an unknown escape "\d"
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a NUL byte
            return None


def same_code(one: str, other: str) -> bool:
    """Compare the syntax trees of two programs. Text that is not Python equals only itself."""
    trees = [parse_python(one), parse_python(other)]
    if one == other or None in trees:
        return one == other
    try:
        return ast.dump(trees[0]) == ast.dump(trees[1])
    except RecursionError:
        return False
