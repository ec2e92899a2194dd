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
