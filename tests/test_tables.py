"""eval/tables.py: cells over seeds, the paper's numbers next to ours, the quickstart's table."""

import json
from pathlib import Path

from eval import tables
from eval.study import read_results

ROOT = Path(__file__).parent.parent


def cells(table: str) -> dict[str, list[str]]:
    """First cell of a row -> the others."""
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_a_cell_is_mean_and_range_over_seeds_and_a_dash_if_nothing_ran():
    lines = {
        "mini_1_mini_translation_ar2diff_n": {"bleu": 30.0, "exact_match": 0.5},
        "mini_2_mini_translation_ar2diff_n": {"bleu": 34.0, "exact_match": 0.5},
        "mini_1_mini_code_ar2diff_n": {"pass@1": 0.25},
    }
    for name in list(lines)[:2]:
        lines[name] |= {"calls_per_sample": 10.0, "seconds_per_sample": 0.002}
    found = cells(tables.table_2(lines))
    ours = ["50.0", "32.0 (30.0 to 34.0)", "-", "25.0", "10.0", "2.00"]
    assert found["AR2Diff_N"] == ["29.41, 68.12, 4.4", *ours]
    assert len(found) == 2 + 1  # rows without a result are left out


def test_labelled_lines_become_the_rows_of_their_table():
    lines = {
        "mini_1_mini_translation_a_b_2": {"row": "A, b", "exact_match": 0.25},
        "mini_1_mini_translation_a_b_10": {"row": "A, b", "exact_match": 0.5},
        "mini_2_mini_translation_a_b_10": {"row": "A, b", "exact_match": 0.75},
    }
    found = cells(tables.few_steps_table(lines))
    assert found["A, b"] == ["25.0", "-", "62.5 (50.0 to 75.0)", "-"] and len(found) == 3
    recipe = {"mini_1_mini_translation_own": {"row": "own", "exact_match": 1.0}}
    recipe["mini_1_mini_translation_own_left_to_right"] = {"exact_match": 0.125}
    assert cells(tables.recipes_table(recipe, {}))["own"] == ["100.0", "12.5"]


def test_the_kept_studies_fill_their_tables():
    results = ROOT / "results"
    steps = cells(tables.TABLES["few_steps"](results))
    assert len(steps) == 2 + 10 and not any("-" in row for row in list(steps.values())[2:])
    recipes = cells(tables.TABLES["recipes"](results))
    assert len(recipes) == 2 + 11 and recipes["default (Table 2)"][0] == "95.9 (92.2 to 98.6)"


def test_the_quickstart_becomes_lines_and_a_table(tmp_path):
    for i, name in enumerate([*tables.QUICKSTART, "zero_finetune_4"]):
        result = {"exact_match": 0.5, "interval": [0.4, 0.6], "calls_per_sample": 10.0 + i}
        result["seconds_per_sample"] = 0.0125
        tables.write_text(tmp_path / f"quickstart/{name}.json", json.dumps(result))
    found = cells(tables.quickstart(tmp_path))
    assert found["AR"] == ["50.0%", "40.0% to 60.0%", "10.0", "12.5"] and len(found) == 2 + 5
    assert len(read_results(tmp_path / "quickstart.jsonl")) == 6
    assert "AR2Diff_300" in (tmp_path / "quickstart.md").read_text()
