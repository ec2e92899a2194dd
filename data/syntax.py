"""Python text to syntax tree, for text that a model wrote: it may be anything, and it is never run."""

import ast
import warnings


def parse_python(source: str) -> ast.Module | None:
    """The syntax tree, or None if the text is not Python or too deeply nested for the parser."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an odd escape such as "\d" is worth a warning to its author, not to us
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # ValueError: a null byte
            return None


def dump(tree: ast.AST) -> str | None:
    """The tree as text without positions: spaces, comments and redundant brackets are gone. None if too deep."""
    try:
        return ast.dump(tree)
    except RecursionError:
        return None


def same_code(one: str, other: str) -> bool:
    """Whether two programs have the same syntax tree. Text that is not Python equals nothing but itself."""
    if one == other:
        return True
    trees = parse_python(one), parse_python(other)
    if None in trees:
        return False
    dumps = [dump(tree) for tree in trees]
    return None not in dumps and dumps[0] == dumps[1]
