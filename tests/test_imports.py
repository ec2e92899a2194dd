"""Who imports whom, read from the source: a table to keep, and files that fit in a head."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A module may import the modules named for it, and nothing else of ours. "data.*": the modules of that folder that have
# no row of their own. Only runs/, eval.tables and tests/ may import anything. Nothing else imports them, but for
# eval.check_results, which makes the tables again.
MAY_IMPORT = {
    # level 0
    "configurator": "",
    "atomic": "",
    "draws": "",
    "device": "",
    "rope": "",
    "recompute": "",
    "attention": "",
    "cross_entropy": "",
    "data.objectives": "",
    "data.syntax": "",
    "data.tokenizer_json": "",
    # level 1
    "optimizers": "device",
    "model": "attention rope",
    "data.tokenizer": "data.tokenizer_json",
    "families": "model",
    "anneal": "draws",
    "autoregressive": "cross_entropy device draws",
    "fast": "model encdec",
    "samplers": "draws",
    "diffusion": "cross_entropy device draws samplers",
    "encdec": "model rope",
    "cost": "diffusion model encdec optimizers",
    "plan": "attention configurator cost device model",
    "data.loader": "data.objectives data.tokenizer",
    "data.ahead": "data.objectives",
    "sharded": "atomic configurator",
    "checkpoint": "atomic configurator sharded model encdec data.tokenizer",
    # level 2
    "run_folder": "atomic",
    "trouble": "atomic cost model",
    "distributed": "device checkpoint sharded",
    "heldout": "device draws autoregressive diffusion data.tokenizer",
    "speculative": "device draws samplers diffusion",
    "data.sources": "data.loader data.tokenizer",
    "data.squad": "configurator data.sources data.text_file",
    "data.mbpp": "configurator data.sources data.text_file",
    "data.parallel": "configurator data.sources",
    "data.wmt14": "configurator data.parallel data.sources",
    "data.bpe": "configurator checkpoint data.tokenizer_json data.tokenizer data.python_code data.text_file",
    "data.*": "configurator data.loader data.tokenizer data.syntax",
    "pretrained": "data.tokenizer_json data.tokenizer encdec families model",
    "ar2diff": "configurator draws model encdec autoregressive diffusion checkpoint pretrained "
    "data.loader data.tokenizer data.objectives",
    # level 3
    "train": "configurator device draws model encdec anneal plan recompute cost autoregressive diffusion checkpoint "
    "optimizers run_folder heldout trouble distributed data.ahead data.loader data.tokenizer data.objectives",
    "view.cells": "data.tokenizer",
    "view.record": "",
    "view.terminal": "data.tokenizer view.cells view.record",
    "view.page": "checkpoint data.tokenizer view.record",
    "sample": "configurator device draws model autoregressive diffusion samplers speculative checkpoint "
    "data.tokenizer data.objectives view.*",
    "eval.metrics": "",
    "eval.sandbox": "eval.sandbox_child",
    "eval.sandbox_child": "",
    "eval.common": "configurator device autoregressive diffusion speculative checkpoint sample "
    "data.objectives data.loader data.mini data.text_file eval.metrics",
    "eval.timing": "data.objectives",
    "eval.limits": "cost diffusion draws eval.timing",
    "eval.decoders": "ar2diff autoregressive checkpoint data.loader diffusion eval.limits eval.timing model",
    "eval.speed_table": "eval.common eval.limits eval.timing",
    "eval.peers": "autoregressive diffusion eval.decoders eval.timing model",
    "eval.figures": "checkpoint",
    "eval.plot_runs": "checkpoint eval.figures view.cells",
    "eval.animate_canvas": "eval.figures view.cells",
    "eval.plot_canvas": "checkpoint diffusion eval.animate_canvas eval.figures sample view.cells",
    "eval.doc_figures": "configurator data.tokenizer diffusion draws eval.figures model samplers",
    "eval.plots": "checkpoint configurator eval.figures eval.plot_canvas eval.plot_runs",
    # level 4
    "eval.*": "configurator device draws model cost autoregressive diffusion checkpoint ar2diff train sample data.* "
    "eval.common eval.metrics eval.sandbox eval.python_code eval.exact_match",
    "eval.faults": "configurator ar2diff atomic checkpoint data.* heldout run_folder train eval.common",
    "eval.train_speed": "anneal configurator cost data.ahead data.loader data.objectives device draws eval.common "
    "eval.timing model train",
    "eval.harness": "configurator data.objectives draws eval.bound eval.common",
    "eval.speed": "configurator device eval.plots eval.common eval.decoders eval.limits eval.peers eval.speed_table "
    "eval.timing fast",
    "eval.parity": "configurator encdec eval.common pretrained",
    # level 5
    "eval.tables": "*",
    "eval.check_results": "configurator runs.tables",
    "runs.*": "*",
}
CORE = ("model", "autoregressive", "diffusion", "ar2diff", "train")
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for pattern in ("*.py", "data/*.py", "view/*.py", "eval/*.py", "runs/*.py")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "__init__.py"
}


def imported(path: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(FILES)


def allowed(name: str) -> list[str]:
    folder = name.rpartition(".")[0]
    return MAY_IMPORT[name if name in MAY_IMPORT else f"{folder}.*"].split()


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_what_its_level_allows(name):
    may = allowed(name)
    for other in imported(FILES[name]):
        folder = other.rpartition(".")[0]
        assert other in may or f"{folder}.*" in may or "*" in may, f"{name} imports {other}; it may import {may}"


def test_the_core_fits_in_a_head():
    lines = {name: len(FILES[name].read_text(encoding="utf-8").splitlines()) for name in CORE if name in FILES}
    assert max(lines.values()) <= 450 and sum(lines.values()) <= 1500, lines


@pytest.mark.parametrize("name", FILES)
def test_a_file_opens_with_what_it_is_about(name):
    assert ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8"))), f"{name} has no docstring"
