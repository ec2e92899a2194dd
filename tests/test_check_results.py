"""eval/check_results.py: a page that differs from its results, and results without their origin."""

import json
from pathlib import Path

import pytest

from eval import check_results
from eval.check_results import differences, main, without_origin

ROOT = Path(__file__).parent.parent
ORIGIN = {"command": "python -m x", "seed": 0, "commit": "abc1234", "hardware": "cpu"}
ORIGIN |= {"torch": "2", "python": "3"}


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A page whose one table was written from one result."""
    (tmp_path / "results").mkdir()
    line = {"job": "mini_1_mini_translation_ar", "exact_match": 0.5, "bleu": 20.0}
    line |= {"calls_per_sample": 10.0, "seconds_per_sample": 0.1} | ORIGIN
    (tmp_path / "results/study.jsonl").write_text(json.dumps(line) + "\n")
    path = tmp_path / "README.md"
    path.write_text("# Title\n\n<!-- table: table2 -->\nold\n<!-- end -->\n\nText.\n")
    monkeypatch.chdir(tmp_path)
    main(["--write"])
    return path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_written_page_matches_and_the_rest_of_it_is_untouched(page, capsys):
    text = page.read_text()
    assert text.startswith("# Title\n\n<!-- table: table2 -->\n\n| row")
    assert text.endswith("<!-- end -->\n\nText.\n") and "old" not in text
    main([])
    assert capsys.readouterr().out == "1 tables match 1 files of results\n"
    main(["--write"])
    assert page.read_text() == text


@pytest.mark.parametrize(
    "file, old, new", [("README.md", "50.0", "55.0"), ("results/study.jsonl", "20.0", "21.0")]
)
def test_a_changed_cell_is_shown(page, capsys, file, old, new):
    change(page.parent / file, old, new)
    with pytest.raises(SystemExit, match="differ from their results"):
        main([])
    number = 1 + next(i for i, x in enumerate(page.read_text().splitlines()) if "| AR " in x)
    names, place, shown, made = capsys.readouterr().out.rsplit("\n", 4)[:-1]
    assert names == "--- README.md\n+++ results" and place == f"@@ -{number} +{number} @@"
    assert shown.startswith("-| AR ") and made.startswith("+| AR ")
    assert new in (shown if file == "README.md" else made)


def test_a_missing_and_an_extra_row_are_shown(page):
    row = next(line for line in page.read_text().splitlines() if line.startswith("| AR "))
    change(page, row, f"| new |\n{row}")
    assert differences(page, Path("results"))[-1] == "-| new |"
    change(page, f"| new |\n{row}\n", "")
    assert differences(page, Path("results"))[-1] == f"+{row}"


def test_bad_markers_and_tables_that_fail_are_named(page, monkeypatch):
    monkeypatch.setitem(check_results.TABLES, "table2", lambda results: {}["bleu"])
    (line,) = differences(page, Path("results"))
    assert line == f"{page}: cannot make table table2: KeyError 'bleu'"
    change(page, "table: table2", "table: tabel2")
    assert "no table 'tabel2', did you mean 'table2'?" in differences(page, Path("results"))[0]
    change(page, "<!-- end -->", "")
    assert differences(page, Path("results")) == [f"{page}: a table has no <!-- end -->"]


@pytest.mark.parametrize("name", ORIGIN)
@pytest.mark.parametrize("lines", [False, True])
def test_a_result_must_name_its_origin(tmp_path, name, lines):
    """Also among its settings. A commit may not be unknown."""
    path = tmp_path / ("a.jsonl" if lines else "a.json")
    rest = {key: value for key, value in ORIGIN.items() if key != name}
    for entry in (ORIGIN, rest | {"settings": ORIGIN}):
        path.write_text(json.dumps(entry))
        assert without_origin(path) == []
    for entry in (rest, rest | {name: "unknown"}):
        path.write_text(json.dumps(entry))
        assert without_origin(path)[0].endswith(f"has no {name}")


def test_the_pages_of_this_repository_match_its_results(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    try:
        main([])
    except SystemExit:
        pytest.fail(capsys.readouterr().out)
