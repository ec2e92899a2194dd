"""Who imports whom: the core needs nothing optional, nothing needs eval/, and there is no cycle."""

import ast
import functools
import graphlib
import importlib
import sys
from pathlib import Path

import pytest
import torch
from processes import Child

ROOT = Path(__file__).parent.parent
FOLDERS = ("infra", "data", "extras", "hf", "eval", "view")
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for pattern in ("*.py", *(f"{folder}/*.py" for folder in FOLDERS))
    for path in ROOT.glob(pattern)
    if path.name != "__init__.py"
}
CORE = [name for name in FILES if name.split(".")[0] not in ("extras", "hf", "eval", "view")]
REQUIRED = {"torch", "numpy", "tiktoken", "tqdm"}


@functools.cache
def imports(name: str, inside_functions: bool = False) -> set[str]:
    """Return all modules that a file imports when it is loaded, or inside functions too."""
    found = set()
    nodes = [ast.parse(FILES[name].read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found


def test_the_core_loads_no_optional_folder_and_no_optional_package():
    for name in CORE:
        optional = imports(name) & FILES.keys() - {*CORE}
        assert not optional, f"{name} loads {optional}"
        packages = {module.split(".")[0] for module in imports(name)}
        outside = packages - sys.stdlib_module_names - REQUIRED - {*FOLDERS, *FILES}
        assert not outside, f"{name} loads {outside}"
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert {line.partition("=")[0] for line in lines if line[0] != "#"} == REQUIRED


def test_only_eval_imports_eval():
    others = [name for name in FILES if not name.startswith("eval.")]
    users = {n for n in others for module in imports(n, True) if module.split(".")[0] == "eval"}
    assert not users and len(others) > 40


def test_there_is_no_cycle():
    graph = {name: imports(name) & FILES.keys() for name in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the cycle


@pytest.mark.parametrize(("program", "most"), [("train", 16), ("sample", 22), ("ar2diff", 22)])
def test_the_commands_load_few_modules_and_no_optional_package(program, most, tmp_path):

    def load():
        importlib.import_module(program)
        loaded = sorted(FILES.keys() & sys.modules.keys())
        assert len(loaded) <= most, loaded
        assert not any(name.startswith(("hf.", "eval.", "view.")) for name in loaded), loaded

    blocked = ("safetensors", "tokenizers", "transformers", "matplotlib", "gguf", "jinja2")
    run_without(blocked, load, tmp_path / "output")


def run_without(blocked, work, output: Path) -> None:
    """Call work() in a fork that forgets our modules. An import of what is blocked fails."""

    def forget():
        for name in [name for name in sys.modules if name.split(".")[0] in {*FOLDERS, *FILES}]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(blocked))
        work()

    assert Child(forget, output).wait() == 0, output.read_text()


def test_without_extras_the_core_trains_converts_and_generates(tmp_path):
    """The folder may be deleted. No part of it imports another; drafting has three files."""
    extras = {name for name in FILES if name.startswith("extras.")}
    shared = {"extras.adapter", "extras.speculative"}
    assert not any(imports(name, True) & extras - shared for name in extras)

    def work():
        import ar2diff
        import sample
        from data.objectives import Batch
        from diffusion import LossConfig
        from infra.rng import make_rng
        from model import ModelConfig, build_model
        from train import PARADIGMS

        source = build_model(ModelConfig(n_layer=1, block_size=16, target_length=6))
        ours = dict(
            paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional"
        )
        batch = Batch(torch.ones(2, 4).long(), torch.ones(2, 6).long(), torch.arange(2))
        for model in (source, ar2diff.convert(source, **ours)):
            module = PARADIGMS[model.cfg.paradigm]
            for term in module.losses(model, batch, LossConfig(), make_rng(0, batch.example)):
                term.backward()
            module.generate(model, batch.prefix, module.SamplerConfig())
        sample.sampler_configs()
        importlib.import_module("eval.tables")  # the last command of the quickstart

    run_without(["extras"], work, tmp_path / "output")
