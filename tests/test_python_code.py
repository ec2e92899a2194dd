"""data/python_code.py on a small folder of sources."""

import ast

import pytest

from data import python_code
from data.loader import open_set
from data.python_code import bare_functions, functions, parses, read_corpus, split_of

SOURCE = '''
import os

class Box:
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

def only_documented():
    """Nothing here."""

if os.name:
    def nested():
        """Below an if."""
        return 3
'''


def module(i: int) -> str:
    return f'def f{i}(x):\n    """Add {i}."""\n    return x + {i}\n'


@pytest.fixture
def folder(tmp_path):
    """40 modules, of which one is a copy with other spaces and comments, one is no Python and three are tests."""
    root = tmp_path / "src"
    (root / "tests").mkdir(parents=True)
    for i in range(40):
        (root / f"m{i}.py").write_text(module(i) + "\n# " + "x" * 400 + "\n")
    (root / "zz_copy.py").write_text("# a comment\n\n" + module(3).replace("x + 3", "x  +  3"))
    (root / "zz_body.py").write_text('def other_name(x):\n    """Other words."""\n    return x + 4\n')
    (root / "zz_broken.py").write_text("def (")
    (root / "zz_latin.py").write_bytes(b"# caf\xe9\n")
    (root / "tests" / "a.py").write_text(module(100))
    (root / "test_b.py").write_text(module(101))
    (root / "conftest.py").write_text(module(102))
    return root


def test_functions_come_out_dedented_and_whole():
    pairs = list(functions(SOURCE, ast.parse(SOURCE)))
    assert [prefix.split("(")[0] for prefix, _ in pairs] == ["def size", "async def wait", "def nested"]
    prefix, body = pairs[0]
    assert prefix == 'def size(self):\n    """How big.\n\n    In litres.\n    """\n'
    assert body == "    # counted once\n    return self.width * 2"
    assert pairs[1][1].count("\n") == 5 and "\nleft of everything" in pairs[1][1]
    assert all(parses(*pair) for pair in pairs)


def test_a_form_feed_does_not_shift_the_lines():
    """Python counts lines at newlines only; str.splitlines also cuts at a form feed, which old modules have."""
    text = 'x = 1\n\x0c\ndef f():\n    """Doc."""\n    return 2\n'
    assert list(functions(text, ast.parse(text))) == [('def f():\n    """Doc."""\n', "    return 2")]


def test_bare_functions_come_out_dedented_and_whole():
    """Those on lines of their own: not one that shares a line with its head, nor one with a docstring."""
    text = """class A:
    def one(
        self,
    ):
        # why
        return 1

    def deep(x):
        @cache
        def inner():
            return x

        return inner

    def shared(a,
               b): return a
    def said(self):
        \"\"\"Doc.\"\"\"
        return 2
    async def last(self): pass
"""
    assert list(bare_functions(text, ast.parse(text))) == [
        ("def one(\n    self,\n):\n    # why\n", "    return 1"),
        ("def deep(x):\n", "    @cache\n    def inner():\n        return x\n\n    return inner"),
    ]


def test_bare_functions_join_the_training_pairs_and_none_is_like_one_held_out(tmp_path):
    names = [f"m{i}.py" for i in range(60)]
    held = next(name for name in names if split_of(name) == "valid")
    trained = next(name for name in names if split_of(name) == "train")
    (tmp_path / held).write_text('def f(x):\n    """Doc."""\n    return x + 1\n\n\ndef bare(x):\n    return x - 9\n')
    (tmp_path / trained).write_text("def g(x):\n    return x + 1\n\n\ndef h(x):\n    return x + 2\n")
    held_out = [('def f(x):\n    """Doc."""\n', "    return x + 1")]
    assert read_corpus(str(tmp_path)).functions == {"train": [], "valid": held_out}
    found = read_corpus(str(tmp_path), bare=True)
    assert found.functions == {"train": [("def h(x):\n", "    return x + 2")], "valid": held_out}
    assert found.dropped["functions near-duplicate"] == 1


def test_a_body_parses_or_it_does_not():
    head = 'def f(x):\n    """Doc."""\n'
    for good in ("    return x", "    for i in x:\n        yield i\n\n    return 3", "    return '\\d'"):
        assert parses(head, good)
    assert (
        parses("def f(x):\n", "    return x")
        and not parses("def f(x):\n", "")
        and not parses("def f(x):\n", '    "D."')
    )
    for bad in (
        "",
        "    return (x",
        "return x",
        "    return x\0",
        "    x = " + "(" * 9999,
        "    pass\nprint(1)",
        "   # no",
    ):
        assert not parses(head, bad)


def test_near_duplicates_tests_and_broken_files_are_left_out_and_counted(folder):
    corpus = read_corpus(str(folder))
    assert sum(map(len, corpus.files.values())) == 41  # zz_body has new text, but no new function
    assert sum(map(len, corpus.functions.values())) == 40
    assert dict(corpus.dropped) == {
        "files of tests, demos, tables": 3,
        "files near-duplicate": 1,
        "files that are empty or no Python of this version": 2,
        "functions near-duplicate": 1,
    }


def test_no_file_is_in_both_splits(folder):
    corpus = read_corpus(str(folder))
    for i in range(40):
        split = split_of(f"m{i}.py")
        assert any(module(i) in text for text in corpus.files[split])
        if i not in (3, 4):  # those have copies elsewhere
            assert any(f"def f{i}(" in prefix for prefix, _ in corpus.functions[split])


def test_of_copies_in_both_splits_the_held_out_one_goes(tmp_path):
    names = [f"m{i}.py" for i in range(60)]
    held = next(name for name in names if split_of(name) == "valid")
    other = next(name for name in names if split_of(name) == "valid" and name != held)
    copied = max(name for name in names if split_of(name) == "train")
    for name, i in ((held, 1), (copied, 1), (other, 2)):
        (tmp_path / name).write_text(module(i))
    corpus = read_corpus(str(tmp_path))
    assert corpus.files == {"train": [module(1)], "valid": [module(2)]}


def test_both_sets_are_written_and_read_back(folder, tmp_path, capsys):
    python_code.main([f"--source={folder}", f"--out={tmp_path}"])
    out = capsys.readouterr().out
    assert "left out:" in out and "train" in out.splitlines()[-1]
    stream, pairs = (open_set(tmp_path / name, "train") for name in ("python_code", "python_pairs"))
    assert (stream.target_length, stream.block_size) == (128, 256)
    assert (pairs.target_length, pairs.block_size) == (192, 384)
    assert module(0) in stream.tokenizer.decode(stream.tokens) or split_of("m0.py") == "valid"
    assert all(parses(*pairs.text(i)) for i in range(len(pairs)))
    assert pairs.meta["python"] and pairs.meta["licence"] and pairs.meta["dropped"]["functions near-duplicate"] == 1


def test_two_builds_are_equal(folder, tmp_path, capsys):
    for name in "ab":
        python_code.main([f"--source={folder}", f"--out={tmp_path / name}"])
    for name in ("python_code", "python_pairs"):
        a, b = (open_set(tmp_path / x / name, "train").fingerprint for x in "ab")
        assert a == b


@pytest.mark.parametrize("length", [300, 3000])  # the second is dropped before the tokenizer sees it
def test_pairs_that_do_not_fit_are_counted(folder, tmp_path, capsys, length):
    (folder / "m0.py").write_text('def long(x):\n    """Doc."""\n    return "' + "x" * length + '"\n' + module(0))
    python_code.main([f"--source={folder}", f"--out={tmp_path}"])
    pairs = [open_set(tmp_path / "python_pairs", split) for split in ("train", "valid")]
    assert pairs[0].meta["dropped"]["functions too long"] == 1
    assert sum(map(len, pairs)) == 40


def test_lengths_are_as_asked_and_the_longer_pairs_go(folder, tmp_path, capsys):
    body = '    return "' + "x" * 30 + '"'  # 43 bytes; with the separator 44
    (folder / "m0.py").write_text(f'def long(x):\n    """Doc."""\n{body}\n' + module(0))
    for target, too_long in ((44, 0), (43, 1)):
        out = tmp_path / str(target)
        python_code.main([f"--source={folder}", f"--target_length={target}", "--block_size=90", f"--out={out}"])
        for name in ("python_code", "python_pairs"):
            made = open_set(out / name, "train")
            assert (made.target_length, made.block_size) == (target, 90)
        assert made.meta["dropped"].get("functions too long", 0) == too_long


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--target_length=1"], "at least 2"),
        (["--block_size=192"], "more than it"),
        (["--target_length=64", "--block_size=64"], "more than it"),
        (["--target_length=256"], "needs a block_size"),
    ],
)
def test_lengths_that_leave_no_prefix_are_refused(argv, says):
    with pytest.raises(ValueError, match=says):
        python_code.main(argv)


def test_a_source_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be stdlib, all or a path, got 'sdtlib'"):
        read_corpus("sdtlib")
    with pytest.raises(ValueError, match="no Python file for train"):
        read_corpus(str(tmp_path))
