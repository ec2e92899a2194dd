"""data/python_code.py on a small folder of sources."""

import ast

import pytest
from data_files import write

from data import python_code
from data.loader import open_dataset
from data.python_code import functions, parses, read_corpus, split_of

SOURCE = '''
import os
\x0c
class Box:  # a form feed before it does not shift the lines
    """A box."""

    @property
    def size(self):
        """How big.

        In litres.
        """
        # counted once
        return self.width * 2

    def no_docstring(self):
        return 1

async def wait(n):
    """Wait."""
    def inner():
        """Not a pair of its own."""
        return """
left of everything
"""
    return inner

def one_line(): "doc"; return 1

if os.name:
    def nested():
        """Below an if."""
        return 3
'''
NAMES = [f"m{i}.py" for i in range(60)]
TRAIN = [name for name in NAMES if split_of(name) == "train"]
VALID = [name for name in NAMES if split_of(name) == "valid"]


def module(i: int) -> str:
    return f'def f{i}(x):\n    """Add {i}."""\n    return x + {i}\n'


@pytest.fixture
def folder(tmp_path):
    """40 modules, a copy with other spaces, a renamed function, 2 broken files, 3 tests."""
    texts = {f"m{i}.py": module(i) + "\n# " + "x" * 400 + "\n" for i in range(40)}
    texts["zz_copy.py"] = "# a comment\n\n" + module(3).replace("x + 3", "x  +  3")
    texts["zz_body.py"] = 'def other(x):\n    """Other words."""\n    return x + 4\n'
    texts |= {"zz_broken.py": "def (", "zz_latin.py": b"# caf\xe9\n"}
    texts |= {name: module(100) for name in ("tests/a.py", "test_b.py", "conftest.py")}
    for name, text in texts.items():
        write(tmp_path / "src" / name, text)
    return tmp_path / "src"


def test_functions_are_dedented_and_whole():
    pairs = list(functions(SOURCE, ast.parse(SOURCE)))
    assert [p.split("(")[0] for p, _ in pairs] == ["def size", "async def wait", "def nested"]
    prefix, body = pairs[0]
    assert prefix == 'def size(self):\n    """How big.\n\n    In litres.\n    """\n'
    assert body == "    # counted once\n    return self.width * 2"
    assert pairs[1][1].count("\n") == 5 and "\nleft of everything" in pairs[1][1]
    assert all(parses(*pair) for pair in pairs)


GOOD = ["    return x", "    for i in x:\n        yield i\n\n    return 3", "    return '\\d'"]
BAD = ["", "    return (x", "return x", "    return x\0", "    pass\nx = 1", '    "D."']


@pytest.mark.parametrize("body", GOOD + BAD)
def test_a_body_parses_or_not(body):
    assert parses("def f(x):\n", body) is (body in GOOD)


def test_near_duplicates_tests_and_broken_files_are_left_out_and_counted(folder):
    files, pairs, dropped = read_corpus(str(folder))
    assert sum(map(len, files.values())) == 41  # zz_body has new text, but no new function
    assert sum(map(len, pairs.values())) == 40
    assert dropped == {
        "files of tests, demos, tables": 3,
        "files near-duplicate": 1,
        "files that are empty or no Python of this version": 2,
        "functions near-duplicate": 1,
    }


def test_of_copies_in_both_splits_the_held_out_one_is_dropped(tmp_path):
    for name, i in ((VALID[0], 1), (TRAIN[-1], 1), (VALID[1], 2)):
        (tmp_path / name).write_text(module(i))
    assert read_corpus(str(tmp_path))[0] == {"train": [module(1)], "valid": [module(2)]}


def test_both_sets_are_written_and_two_builds_are_equal(folder, tmp_path):
    for name in "ab":
        python_code.main([f"--source={folder}", f"--out={tmp_path / name}"])
    stream, pairs, again = (
        open_dataset(tmp_path / name, "train")
        for name in ("a/python_code", "a/python_pairs", "b/python_pairs")
    )
    assert pairs.fingerprint == again.fingerprint
    assert [d.block_size for d in (stream, pairs)] == [256, 384] and pairs.target_length == 192
    assert module(int(TRAIN[0][1:-3])) in stream.tokenizer.decode(stream.tokens)
    assert all(parses(*pairs.text(i)) for i in range(len(pairs)))
    assert pairs.meta["python"] and pairs.meta["dropped"]["functions near-duplicate"] == 1


def test_an_absent_source_is_refused():
    with pytest.raises(ValueError, match="'sdtlib' does not exist"):
        python_code.main(["--source=sdtlib"])
