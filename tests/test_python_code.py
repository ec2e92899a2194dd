"""data/python_code.py on a small folder of sources."""

import pytest
from data_files import write

from data import python_code
from data.loader import open_dataset
from data.python_code import read_corpus, split_of

NAMES = [f"m{i}.py" for i in range(60)]
TRAIN = [name for name in NAMES if split_of(name) == "train"]
VALID = [name for name in NAMES if split_of(name) == "valid"]


def module(i: int) -> str:
    return f'def f{i}(x):\n    """Add {i}."""\n    return x + {i}\n'


@pytest.fixture
def folder(tmp_path):
    """40 modules, a copy with other spaces, 2 broken files, 3 tests."""
    texts = {f"m{i}.py": module(i) + "\n# " + "x" * 400 + "\n" for i in range(40)}
    texts["zz_copy.py"] = "# a comment\n\n" + module(3).replace("x + 3", "x  +  3")
    texts |= {"zz_broken.py": "def (", "zz_latin.py": b"# caf\xe9\n"}
    texts |= {name: module(100) for name in ("tests/a.py", "test_b.py", "conftest.py")}
    for name, text in texts.items():
        write(tmp_path / "src" / name, text)
    return tmp_path / "src"


def test_near_duplicates_tests_and_broken_files_are_left_out_and_counted(folder):
    files, dropped = read_corpus(str(folder))
    assert sum(map(len, files.values())) == 40
    assert dropped == {
        "files of tests, demos, tables": 3,
        "files near-duplicate": 1,
        "files that are empty or no Python of this version": 2,
    }


def test_of_copies_in_both_splits_the_held_out_one_is_dropped(tmp_path):
    for name, i in ((VALID[0], 1), (TRAIN[-1], 1), (VALID[1], 2)):
        (tmp_path / name).write_text(module(i))
    assert read_corpus(str(tmp_path))[0] == {"train": [module(1)], "valid": [module(2)]}


def test_two_builds_are_equal(folder, tmp_path):
    for name in "ab":
        python_code.main([f"--source={folder}", f"--out={tmp_path / name}"])
    stream, again = (open_dataset(tmp_path / name / "python_code", "train") for name in "ab")
    assert stream.fingerprint == again.fingerprint and stream.block_size == 256
    assert module(int(TRAIN[0][1:-3])) in stream.tokenizer.decode(stream.tokens)
    assert stream.meta["python"] and stream.meta["dropped"]["files near-duplicate"] == 1


def test_an_absent_source_is_refused():
    with pytest.raises(ValueError, match="'sdtlib' does not exist"):
        python_code.main(["--source=sdtlib"])
