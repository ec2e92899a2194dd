"""Every command of the README, then of docs/using.md, runs: in order, on what those before it left, in a short form."""

import asyncio
import email
import http
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configurator import configure

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("README.md", "docs/using.md")
PROSE = ["README.md", "results/README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# Appended to make a command short; later arguments win. By the file or module that runs.
SHORT = {
    "train.py": ["--max_steps=3", "--eval_batches=1", "--batch_size=8", "--device=cpu"],
    "ar2diff.py": [],
    "sample.py": ["--candidates=1", "--steps=2", "--device=cpu"],
    "data.mini": [],
    "data.toy": [],
    "data.python_code": [],
    "data.text_file": [],
    "data.bpe": [],
    "eval.exact_match": ["--n=4"],
    "eval.translation": ["--n=4", "--resamples=100"],
    "eval.qa": ["--n=4"],
    "eval.code": ["--n=4"],
    "eval.bound": ["--n=2"],
    "eval.python_code": ["--n=4", "--steps=2"],
    "eval.check_results": [],
    "runs.study": ["--table"],
    "runs.tables": [],
}
# What is too long, or does not run Python: why, and what is checked instead.
LONG = {
    "python -m pip": "downloads; .ci/run installs with this very line",
    "python -m pytest": "that is who is asking",
    "python -m runs.quickstart": "6 minutes; tests/test_runs.py plays it short, .ci/run whole",
    "python -m eval.check_results --same": "wants a second clone; tests/test_runs.py compares two",
    "python -m eval.harness": "fetches its task; tests/test_harness.py runs one from disk",
    "python -m eval.speed": "minutes; tests/test_speed.py measures smaller shapes",
    "python -m eval.tables": "hours; tests/test_tables.py starts every job of it",
    "torchrun": "many processes; tests/test_distributed.py starts 2 and 4 on one machine, and two nodes on loopback",
    "bash quickstart.sh": "8 minutes; .ci/run plays it whole",
    "ruff": "lint is no test; .ci/run runs both",
    ".ci/run": "runs these tests",
}
SETTINGS = {
    "eval.check_results": "CheckConfig",
    "eval.harness": "HarnessConfig",
    "eval.speed": "SpeedConfig",
    "eval.tables": "TablesConfig",
    "runs.quickstart": "QuickstartConfig",
}


def commands(pages: tuple[str, ...] = PAGES) -> list[str]:
    """The command lines of all ```bash blocks, continued lines joined, without comments."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in re.sub(r"\s#\s.*", "", line).split("&&") if part.strip()]


def long_form(command: str) -> str | None:
    return next((start for start in LONG if command.startswith(start)), None)


@pytest.fixture
def copy(tmp_path_factory) -> Path:
    """A folder that looks like a fresh clone. No links: one of the commands writes into the README."""
    left_out = shutil.ignore_patterns("out", ".*", "__pycache__", "*.png")
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("clone"), ignore=left_out, dirs_exist_ok=True)


def test_every_command_is_run_or_named_as_an_exception():
    assert len(commands(PAGES[:1])) > 12 and len(commands(PAGES[1:])) > 30
    for command in commands():
        words = shlex.split(command)
        program = words[2] if words[1:2] == ["-m"] else words[1] if len(words) > 1 else ""
        assert long_form(command) or (words[0] == "python" and program in SHORT), f"who tests this? {command}"
    for start in LONG:
        assert any(command.startswith(start) for command in commands()), f"no page has {start}"


def test_the_newcomer_needs_two_commands_to_start_and_two_for_weights_of_his_own():
    for heading, count in (("Install, quickstart", 2), ("Bring your own weights", 2)):
        section = re.search(rf"^## {heading}\n(.*?)^## ", README, flags=re.MULTILINE | re.DOTALL)[1]
        block = re.search(r"^```bash\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)[1]
        assert len(block.splitlines()) == count
    text = [line for line in README.splitlines() if not line.startswith("<!--")]
    assert len(text) <= 230, "what is longer belongs on a page of docs/"


@pytest.mark.slow  # a minute
def test_the_commands_run_one_after_the_other(copy, monkeypatch, capsys):
    """In this process: starting Python and torch forty times would take minutes."""
    monkeypatch.chdir(copy)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))  # nobody types
    write_hub_model(copy / "Qwen" / "Qwen2.5-0.5B")
    some = [Path(module.__file__).parent for module in (asyncio, email, http)]  # the whole library takes 10 s
    monkeypatch.setattr("data.python_code._roots", lambda source: some)
    for command in dict.fromkeys(commands()):  # what stands on both pages runs once
        if long_form(command):
            continue
        words = shlex.split(command)[1:]
        program, argv = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        short = SHORT[program]
        try:
            importlib.import_module(program.removesuffix(".py")).main([*argv, *short])
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{command} {' '.join(short)}\n{error}\n{capsys.readouterr().out[-2000:]}") from error


def write_hub_model(folder: Path) -> None:
    """A tiny network of that family where the README names one of the hub, so that nothing is fetched."""
    pytest.importorskip("transformers")
    from tests.test_pretrained import source

    source(folder, "qwen2", max_position_embeddings=1024)


@pytest.mark.parametrize("program", SETTINGS)
def test_long_commands_have_the_settings_they_are_given(program):
    module = importlib.import_module(program)
    for command in (c for c in commands() if c.startswith(f"python -m {program}")):
        configure(getattr(module, SETTINGS[program]), shlex.split(command)[3:])
    assert callable(module.main)


@pytest.mark.slow  # starts Python, 6 s
def test_a_command_runs_from_a_shell(copy):
    """One of them as it stands, in a process of its own; the rest is checked above, file by file."""
    said = subprocess.run([sys.executable, "-m", "data.toy"], cwd=copy, capture_output=True, text=True)
    assert said.returncode == 0 and "toy_copy" in said.stdout, said.stderr


def test_what_the_tree_names_is_there():
    tree, folder, top = re.search(r"## What is where\n\n```\n(.*?)```", README, flags=re.DOTALL)[1], "", set()
    for line in tree.splitlines():
        name, comment = line.split(maxsplit=1)
        inside = folder if line.startswith("  ") else ""
        folder = inside or (name if name.endswith("/") else "")
        top.add(name)
        assert (ROOT / inside / name).exists(), inside + name
        for other in re.findall(r"\b\w+\.py\b", comment):
            assert (ROOT / folder / other).exists(), folder + other
            top |= set() if folder else {other}
    left_out = {path.name for path in ROOT.glob("*.py")} - top
    assert not left_out, f"at the top, but not in the tree: {left_out}"


def test_the_list_of_files_in_using_names_files_that_are_there():
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^## Files of .*?\n\n```\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    for line in listed.splitlines():
        name, comment = line.split(maxsplit=1)
        for path in [name, *(f"{Path(name).parent}/{other}" for other in re.findall(r"\b\w+\.(?:py|sh)\b", comment))]:
            assert (ROOT / path).is_file(), path


def test_paths_in_the_text_are_there():
    for path in set(re.findall(r"`([\w./]+\.(?:py|sh|txt|cff))`", README)) - {"python ar2diff.py"}:
        assert (ROOT / path).exists() or list(ROOT.glob(f"*/{path}")), path


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, spaces to hyphens, only letters, digits, - and _ left."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PROSE)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_quickstart_is_valid_bash():
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    for script in ("quickstart.sh", ".ci/run"):
        assert subprocess.run([bash, "-n", ROOT / script]).returncode == 0
