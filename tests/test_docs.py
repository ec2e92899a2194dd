"""docs/: every command and snippet runs, and every quoted line exists in the function it names."""

import ast
import functools
import json
import re
from pathlib import Path

import pytest
from eval_models import CACHED, save_model
from test_readme import ROOT, blocks, commands, desk, run_command  # noqa: F401

PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in PAGES}
QUOTE = re.compile(r"# ([\w/]+\.py), ([\w.]+)")  # the first line of a quotation
UNSOLVED = ("sampler", "noise", "mask_schedule", "crossover")  # exercises as they are handed out
each_page = pytest.mark.parametrize("page", TEXTS)


@functools.cache
def definitions(path: Path) -> dict[str, str]:
    """Return name or Class.name -> source for all that a file defines at the top or in a class."""
    source = path.read_text(encoding="utf-8")
    found = {}

    def collect(nodes, prefix):
        for node in nodes:
            targets = getattr(node, "targets", [getattr(node, "target", node)])
            for target in targets:
                name = getattr(target, "name", None) or getattr(target, "id", None)
                if name:
                    found[prefix + name] = ast.get_source_segment(source, node)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{node.name}.")

    collect(ast.parse(source).body, "")
    return found


@each_page
def test_quoted_lines_and_names_exist(page):
    for block in blocks(TEXTS[page], "python"):
        head, *lines = block.splitlines()
        if quote := QUOTE.fullmatch(head):
            source = definitions(ROOT / quote[1])[quote[2]].splitlines()
            missing = {line.strip() for line in lines} - {line.strip() for line in source}
            assert not missing, f"{head}: {missing}"
    for name, file in re.findall(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`", TEXTS[page]):
        assert name in definitions(ROOT / file), f"{file} has no {name}"


@each_page
def test_snippets_run(page):
    for block in blocks(TEXTS[page], "python"):
        if not QUOTE.match(block):
            exec(compile(block, page, "exec"), {"__name__": page})


@pytest.fixture
def runs(desk) -> Path:  # noqa: F811
    """The runs that the README leaves behind, with tiny models."""
    sizes = dict(block_size=88, target_length=41)
    ours = CACHED | dict(shift=True, self_conditioning=True)
    names = {"ar2diff_1_ar": {}, "ar_finetune": {}, "ar2diff_2_adapt": ours}
    names |= {"ar2diff_start": ours, "ar2diff_3_finetune": ours}
    for name, settings in names.items():
        (desk / "out" / name).mkdir(parents=True)
        save_model(desk / "out" / name / "ckpt.pt", "out/data/mini", **sizes, **settings)
        line = {"step": 2, "loss": 1.0, "val_loss": 1.0, "val_loss_by_rate": {"0.5": 1.0}}
        (desk / "out" / name / "log.jsonl").write_text(json.dumps(line) + "\n")
    return desk


@pytest.mark.slow
@each_page
def test_commands_run(page, runs, monkeypatch):
    monkeypatch.setattr("data.python_code._roots", lambda source: [Path(json.__file__).parent])
    for command in commands(TEXTS[page]):
        if "smol" in command or "checkpoints/" in command:
            continue  # test_readme.py has the real model
        name = command.rpartition(" ")[2]
        if "docs.exercises.grade" in command and name in UNSOLVED:
            with pytest.raises(AssertionError, match="SystemExit 1"):
                run_command(command)
        else:
            run_command(command)


def test_pictures_are_shown_and_small():
    text = "".join([*TEXTS.values(), (ROOT / "README.md").read_text(encoding="utf-8")])
    for path in [*ROOT.glob("docs/**/*.png"), *ROOT.glob("docs/**/*.svg")]:
        assert path.name in text, f"no page shows {path}"
        assert path.stat().st_size < 250_000, path
