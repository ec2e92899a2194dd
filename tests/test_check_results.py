"""eval/check_results.py: a page that says something else than the JSON is found, and JSON that hides its origin."""

import json
import re
from pathlib import Path

import pytest

from eval import check_results
from eval.check_results import main, origin_differences, page_differences
from runs.tables import TABLES, write_into

ROOT = Path(__file__).parent.parent
WHOLE = {"command": "python -m x", "seed": 0, "commit": "abc1234", "hardware": "cpu", "torch": "2", "python": "3"}


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    """A folder with one page, whose table was written from one result."""
    (tmp_path / "results" / "study").mkdir(parents=True)
    result = WHOLE | {"exact_match": 0.5, "bleu": 20.0, "calls_per_sample": 10.0, "seconds_per_sample": 0.1}
    (tmp_path / "results" / "study" / "mini_1_mini_translation_ar.json").write_text(json.dumps(result))
    (tmp_path / "README.md").write_text("# Title\n\n<!-- table: mini -->\n<!-- end -->\n\nText.\n")
    write_into(tmp_path / "README.md", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def differences(copy: Path) -> list[str]:
    return page_differences(Path("README.md"), Path("results"))[1]


def change(copy: Path, old: str, new: str) -> None:
    text = (copy / "README.md").read_text()
    assert old in text
    (copy / "README.md").write_text(text.replace(old, new, 1))


def test_a_page_that_was_just_written_agrees(copy, capsys):
    main(["--pages=README.md"])
    assert capsys.readouterr().out == "1 tables on 1 pages agree with 1 files of results\n"


def test_one_cell_that_differs_is_one_line_that_names_place_and_both(copy, capsys):
    change(copy, "50.0", "55.0")
    with pytest.raises(SystemExit) as left:
        main(["--pages=README.md"])
    (line,) = capsys.readouterr().out.splitlines()
    number = 1 + (copy / "README.md").read_text().splitlines().index(re.search("'(.*?)', the results", line)[1])
    assert left.value.code == 1 and line.startswith(f"README.md:{number}: table mini: the page has '| AR ")
    assert "55.0" in line.split("the results")[0] and "50.0" in line.split("the results")[1]


def test_a_result_that_changed_is_found_too(copy):
    path = copy / "results" / "study" / "mini_1_mini_translation_ar.json"
    path.write_text(path.read_text().replace("20.0", "21.0"))
    (line,) = differences(copy)
    assert "20.0" in line.split("the results")[0] and "21.0" in line.split("the results")[1]


@pytest.mark.parametrize("blank", ["", "\n"])
def test_a_row_too_few_or_too_many_is_one_line_and_empty_lines_are_none(copy, blank):
    row = next(line for line in (copy / "README.md").read_text().splitlines() if line.startswith("| AR2Diff_0"))
    change(copy, row + "\n", blank)
    (line,) = differences(copy)
    assert line.endswith(f"the page has nothing, the results {row!r}")
    change(copy, "| AR2Diff_N  ", f"{row}\n| new |\n| AR2Diff_N  ")
    (line,) = differences(copy)
    assert line.endswith("the page has '| new |', the results nothing")


def test_markers_that_mean_nothing_are_found(copy):
    change(copy, "table: mini", "table: mimi")
    assert differences(copy) == ["README.md:3: there is no table 'mimi', did you mean 'mini'?"]
    change(copy, "<!-- end -->", "")
    assert differences(copy) == ["README.md:3: table mimi has no <!-- end -->"]


def test_a_table_that_cannot_be_made_is_a_difference(copy, monkeypatch):
    def fails(results):
        raise KeyError("bleu")

    monkeypatch.setitem(TABLES, "mini", fails)
    assert differences(copy) == ["README.md:3: table mini cannot be made: KeyError 'bleu'"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_result_must_say_where_it_comes_from(tmp_path, name):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(WHOLE))
    assert origin_differences(path) == []
    path.write_text(json.dumps({key: value for key, value in WHOLE.items() if key != name}))
    assert origin_differences(path) == [f"{path}: it does not say its {name}"]


def test_a_seed_may_stand_among_the_settings_and_a_commit_must_be_known(tmp_path):
    path = tmp_path / "a.json"
    rest = {key: value for key, value in WHOLE.items() if key != "seed"}
    path.write_text(json.dumps(rest | {"settings": {"seed": 0}}))
    assert origin_differences(path) == []
    path.write_text(json.dumps(WHOLE | {"commit": "unknown"}))
    assert origin_differences(path) == [f"{path}: it does not say its commit"]
    path.write_text("[1, 2")
    assert "no JSON" in origin_differences(path)[0]


def test_what_is_not_there_is_said(copy):
    for flags, message in (
        (["--results=nowhere"], "nowhere: no such folder"),
        (["--pages=N.md"], "N.md: no such page"),
    ):
        with pytest.raises(ValueError, match=message):
            main(flags)


RUN = """## Act

| row      | exact | ms a sample | calls |
| -------- | ----- | ----------- | ----- |
| AR       | 96.0% | 2.5         | 25.5  |
| AR2Diff  | 98.3% | 6.3         | 10.0  |

hardware, commit
"""


def test_two_runs_may_differ_in_their_times_alone(copy, capsys):
    """A wider time makes a wider rule under the head, which is no difference."""
    Path("a.md").write_text(RUN)
    Path("b.md").write_text(
        RUN.replace("| 2.5         |", "| 1234567.890123 |").replace(" ------------", " -----------------")
    )
    main(["--same=a.md", "--against=b.md"])
    assert capsys.readouterr().out == "a.md and b.md are the same but for the columns of time\n"
    for old, new in (
        ("98.3%", "98.5%"),
        ("10.0", "11.0"),
        ("commit", "commit 2"),
        ("| AR2Diff  | 98.3% | 6.3         | 10.0  |\n", ""),
    ):
        Path("b.md").write_text(RUN.replace(old, new))
        with pytest.raises(SystemExit) as left:
            main(["--same=a.md", "--against=b.md"])
        assert left.value.code == 1 and "a.md:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give both"):
        main(["--same=a.md"])


def test_pages_without_a_table_do_not_pass(copy, capsys):
    (copy / "a.md").write_text("nothing")
    with pytest.raises(SystemExit):
        main(["--pages=a.md"])
    assert "nothing was compared" in capsys.readouterr().out


def test_the_pages_of_this_repository_say_what_its_results_say(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    try:
        main([])
    except SystemExit:
        pytest.fail(capsys.readouterr().out)
    assert check_results.CheckConfig.pages.startswith("README.md results/README.md")
