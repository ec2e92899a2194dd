"""docs/: every command and snippet runs, every quoted line stands in its function, every number in its file."""

import ast
import functools
import importlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint import save
from model import ModelConfig, Transformer

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCS}
BY_README = ("using.md",)  # pages whose commands run in test_readme.py, behind the README's
FAILS = ("sampler", "noise", "mask_schedule", "crossover")  # exercises as they are handed out
DIFFUSION = dict(paradigm="diffusion", prefix_attention="bidirectional", target_attention="bidirectional", shift=True)

pages = pytest.mark.parametrize("page", TEXTS)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], flags=re.MULTILINE | re.DOTALL)


@functools.cache
def definitions(path: Path) -> dict[str, str]:
    """name or Class.name -> its source, of all that a file defines at the top and in its classes."""
    source = path.read_text(encoding="utf-8")
    found = {}
    for node in ast.parse(source).body:
        names = [node.name] if hasattr(node, "name") else []
        names += [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
        names += [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []
        found |= {name: ast.get_source_segment(source, node) for name in names}
        for part in node.body if isinstance(node, ast.ClassDef) else []:
            if hasattr(part, "name"):
                found[f"{node.name}.{part.name}"] = ast.get_source_segment(source, part)
    return found


@pages
def test_every_name_stands_in_the_file_it_is_said_to(page):
    """`name` in `file.py`, also over a line end."""
    for name, file in re.findall(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`", TEXTS[page]):
        assert (ROOT / file).is_file(), file
        assert name in definitions(ROOT / file), f"{file} has no {name}"


@pages
def test_every_quoted_line_stands_in_its_function(page):
    for block in blocks(page, "python"):
        head, *lines = block.splitlines()
        quoted = re.fullmatch(r"# ([\w/]+\.py), ([\w.]+)", head)
        if not quoted:
            continue
        source = [line.strip() for line in definitions(ROOT / quoted[1])[quoted[2]].splitlines()]
        for line in lines:
            assert line.strip() in source, f"{quoted[1]}, {quoted[2]} has no line {line!r}"


@pages
def test_every_snippet_runs(page):
    for block in blocks(page, "python"):
        if not re.match(r"# [\w/]+\.py, ", block):
            exec(compile(block, page, "exec"), {"__name__": page})


def test_the_tests_above_find_what_they_look_for():
    quotes = [block for page in TEXTS for block in blocks(page, "python") if re.match(r"# [\w/]+\.py, ", block)]
    names = [name for text in TEXTS.values() for name in re.findall(r"`([\w.]+)`\s+in\s+`([\w/]+\.py)`", text)]
    assert len(quotes) >= 9 and len(names) >= 25 and sum(len(blocks(page, "python")) for page in TEXTS) > len(quotes)
    assert "Transformer._embed" in definitions(ROOT / "model.py") and "SAMPLERS" in definitions(ROOT / "samplers.py")


@pages
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)\s]+)", TEXTS[page]):
        assert (ROOT / "docs" / target.split("#")[0]).exists(), target
    for path in set(re.findall(r"`([\w/]+\.(?:py|sh|md))`", TEXTS[page])):
        made = path.startswith("out/")  # by a command of the page, not in the repository
        assert made or (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path


def value_at(path: Path, place: str):
    """The value at a.b.0.c; a key may hold a dot itself, as the corruption rates do."""
    value, parts = json.loads(path.read_text(encoding="utf-8")), place.split(".")
    while parts:
        if isinstance(value, list):
            value = value[int(parts.pop(0))]
            continue
        n = next(n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in value)
        value, parts = value[".".join(parts[:n])], parts[n:]
    return value


def said(value: float, like: str) -> str:
    """The value with the unit and the digits of a text."""
    number, unit = re.fullmatch(r"([\d.]+)(%| ms)?", like).groups()
    scale = {"%": 100, " ms": 1000, None: 1}[unit]
    return f"{value * scale:.{len(number.partition('.')[2])}f}{unit or ''}"


NUMBERS = [
    (page, text, target, place)
    for page, content in TEXTS.items()
    for text, target, place in re.findall(r'\[([\d.]+(?:%| ms)?)\]\(([^\s)]+\.json)\s+"([^"]+)"\)', content)
]


def test_every_number_is_that_of_its_file():
    assert len(NUMBERS) > 25
    for page, text, target, place in NUMBERS:
        assert text == said(value_at(ROOT / "docs" / target, place), text), f"{page}: {target}, {place}"


def test_the_answers_have_no_other_percentages_but_those():
    """A percentage that is not linked was linked before, or is no result."""
    plain = re.sub(r'\[[^\]]*\]\([^)]*\.json\s+"[^"]+"\)', "", TEXTS["questions.md"])
    linked = {text for page, text, *_ in NUMBERS if page == "questions.md"}
    assert set(re.findall(r"[\d.]+%", plain)) - linked <= {"15%"}  # BERT's rate


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the repository, with what the commands before them would have made: runs of tiny models."""
    left_out = shutil.ignore_patterns("out", ".*", "__pycache__", "*.png")
    folder = shutil.copytree(ROOT, tmp_path_factory.mktemp("clone"), ignore=left_out, dirs_exist_ok=True)
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=60, target_length=20)
    for name, settings in {"ar2diff_1_ar": {}, "ar_finetune": {}, "ar2diff_2_adapt": DIFFUSION,
                           "ar2diff_3_finetune": DIFFUSION}.items():  # fmt: skip
        run = folder / "out" / name
        run.mkdir(parents=True)
        save(run / "ckpt.pt", Transformer(ModelConfig(**sizes | settings)), 2, "bytes")
        entry = {"loss": 1.0, "val_loss": 1.0} | ({"val_loss_by_rate": {"0.5": 1.0}} if settings else {})
        (run / "log.jsonl").write_text("".join(json.dumps(entry | {"step": k}) + "\n" for k in (1, 2)))
    return folder


@pytest.mark.slow  # 8 s
def test_every_command_runs(clone, monkeypatch, capsys):
    monkeypatch.chdir(clone)
    pages = [page for page in TEXTS if page not in BY_README]
    commands = [line for page in pages for block in blocks(page, "bash") for line in block.splitlines()]
    assert len(commands) > 8
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "python", f"who tests this? {command}"
        program, argv = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
        fails = program == "docs.exercises.grade" and argv[-1] in FAILS
        try:
            importlib.import_module(program).main(argv)
        except SystemExit as left:
            assert fails and left.code == 1, command
        else:
            assert not fails, command
    for made in re.findall(r"(?:--out=|--html=)(\S+)", "\n".join(commands)):
        assert (clone / made).exists(), made


def test_the_figures_are_those_that_the_command_makes(clone):
    from eval.doc_figures import FIGURES

    assert {f"{name}.png" for name in FIGURES} == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    shown = set(re.findall(r"\]\(figures/(\w+)\.png\)", TEXTS["method.md"]))
    assert shown == set(FIGURES)


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "docs").rglob("*.png")}
    assert max(sizes.values()) < 250_000, sizes


def test_the_patterns_of_the_figure_are_those_of_the_docstring():
    """model.attention_mask draws them with two tokens of prefix and three of target."""
    from eval import doc_figures

    lines = [line.split() for line in definitions(ROOT / "model.py")["attention_mask"].splitlines()]
    rows = [
        line[1:] for line in lines if line and line[0] in ("p", "t") and set(line[1:]) <= {"x", "."} and len(line) == 26
    ]
    drawn = {name: ["".join(row[5 * k : 5 * k + 5]) for row in rows] for k, name in enumerate(
        ("GPT", "prefix LM", "AR2Diff (joint)", "frozen prefix", "AR-readable prompt"))}  # fmt: skip
    assert len(rows) == 5
    doc_figures_P, doc_figures_T = doc_figures.P, doc_figures.T
    try:
        doc_figures.P, doc_figures.T = 2, 3
        for name, settings in doc_figures.PATTERNS.items():
            seen = doc_figures.pattern(*settings).tolist()
            assert ["".join("x" if cell else "." for cell in row) for row in seen] == drawn[name], name
    finally:
        doc_figures.P, doc_figures.T = doc_figures_P, doc_figures_T
