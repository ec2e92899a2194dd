"""Do the pages say what the results say? Every table is made again from the JSON and compared, line by line.

    python -m eval.check_results        # status 1 and a line for each difference, where there is one
    python -m eval.check_results --same=out/quickstart.md --against=../other/out/quickstart.md   # two runs of a command

A table stands between <!-- table: NAME --> and <!-- end -->; runs/tables.py makes it and writes it. Each JSON must also
say how its numbers came about: command, seed, commit, hardware, versions. Of two runs all must be the same but for the
columns of time.
"""

import json
import re
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from pathlib import Path

from configurator import configure, nearest, run
from runs.tables import TABLES

BEGIN, END = re.compile(r"<!-- table: (\S+) -->"), "<!-- end -->"
TIME = re.compile(r"\b(ms|seconds?|minutes?|tokens/s)\b")  # in the head of a column
ORIGIN = ("command", "seed", "commit", "hardware", "torch", "python")


@dataclass
class CheckConfig:
    results: str = "results"
    pages: str = "README.md results/README.md docs/*.md pair/*.md"  # files and patterns, a space between them
    same: str = ""  # instead: a page that a command wrote ..
    against: str = ""  # .. and the page that it wrote when it ran again

    def __post_init__(self):
        if bool(self.same) != bool(self.against):
            raise ValueError("two runs are compared: give both --same=PAGE and --against=PAGE")


def page_differences(page: Path, results: Path) -> tuple[int, list[str]]:
    """(tables that were compared, a line for each difference)."""
    lines, found, count, i = page.read_text(encoding="utf-8").splitlines(), [], 0, 0
    while i < len(lines):
        begin = BEGIN.fullmatch(lines[i].strip())
        i += 1
        if not begin:
            continue
        name, first = begin[1], i
        while i < len(lines) and lines[i].strip() != END and not BEGIN.fullmatch(lines[i].strip()):
            i += 1
        if i == len(lines) or lines[i].strip() != END:
            found.append(f"{page}:{first}: table {name} has no {END}")
        elif name not in TABLES:
            found.append(f"{page}:{first}: there is no table {name!r}{nearest(name, TABLES)}")
        else:
            count += 1
            found += table_differences(page, name, first, lines[first:i], results)
    return count, found


def table_differences(page: Path, name: str, first: int, shown: list[str], results: Path) -> list[str]:
    """A line for each line of the page, from `first` on, that is not as the JSON has it. Empty lines do not count."""
    try:
        made = TABLES[name](results)
    except (OSError, ValueError, KeyError, IndexError) as error:
        return [f"{page}:{first}: table {name} cannot be made: {type(error).__name__} {error}"]
    said = [line.strip() for line in shown]
    expected = [line.strip() for line in made.splitlines() if line.strip()]
    numbers = [number for number, line in enumerate(said) if line]
    found = []
    # Where lines are missing, the n-th against the n-th would blame all that follow.
    matcher = SequenceMatcher(None, [said[number] for number in numbers], expected, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        for i, want in zip_longest(range(a, b), expected[c:d]) if kind != "equal" else ():
            at = first + 1 + numbers[min(a if i is None else i, len(numbers) - 1)] if numbers else first
            page_has = "nothing" if i is None else repr(said[numbers[i]])
            results_have = "nothing" if want is None else repr(want)
            found.append(f"{page}:{at}: table {name}: the page has {page_has}, the results {results_have}")
    return found


def origin_differences(path: Path) -> list[str]:
    """What a file of results does not say of its making."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"{path}: no JSON: {error}"]
    if not isinstance(result, dict):
        return [f"{path}: a result is a dictionary, this is a {type(result).__name__}"]
    said = result.get("settings") or {}
    missing = [name for name in ORIGIN if result.get(name, said.get(name) if name == "seed" else None) in (None, "")]
    missing += ["commit"] if result.get("commit") == "unknown" else []
    return [f"{path}: it does not say its {', '.join(missing)}"] if missing else []


def run_differences(one: Path, other: Path) -> list[str]:
    """A line for each line in which two pages differ, the columns of time in their tables left out."""
    pages = [without_times(page.read_text(encoding="utf-8")) for page in (one, other)]
    return [
        f"{one}:{number}: {'nothing' if a is None else repr(a)}, {other} has {'nothing' if b is None else repr(b)}"
        for number, (a, b) in enumerate(zip_longest(*pages), 1)
        if a != b
    ]


def without_times(text: str) -> list[str]:
    """The lines of a page; of a table's lines the cells of all columns but those whose head names a unit of time."""
    lines, times = [], None
    for line in text.splitlines():
        if not line.startswith("|"):
            lines.append(line)
            times = None
            continue
        cells = [cell.strip() for cell in line.split("|")]
        if times is None:  # the head
            times = {i for i, cell in enumerate(cells) if TIME.search(cell)}
        if not set(line) <= set("|- "):  # the rule under the head is as wide as the cells
            lines.append(" | ".join(cell for i, cell in enumerate(cells) if i not in times).strip())
    return lines


def report(found: list[str], agreement: str, remedy: str) -> None:
    """Print the differences and exit with status 1, or print the agreement."""
    print("\n".join(found) or agreement)
    if found:
        print(f"{len(found)} differences{remedy}", file=sys.stderr)
        sys.exit(1)


def main(argv: list[str]) -> None:
    """Compare all; exits with status 1 where something differs."""
    cfg = configure(CheckConfig, argv)
    if cfg.same:
        found = run_differences(Path(cfg.same), Path(cfg.against))
        return report(found, f"{cfg.same} and {cfg.against} are the same but for the columns of time", "")
    results, pages = Path(cfg.results), []
    if not results.is_dir():
        raise ValueError(f"{results}: no such folder of results")
    for pattern in cfg.pages.split():
        matching = sorted(Path().glob(pattern)) if not Path(pattern).is_absolute() else [Path(pattern)]
        if not matching and "*" not in pattern:
            raise ValueError(f"{pattern}: no such page")
        pages += matching
    compared = [page_differences(page, results) for page in pages]
    files = sorted(results.rglob("*.json"))
    found = [line for _, lines in compared for line in lines]
    found += [line for path in files for line in origin_differences(path)]
    tables = sum(count for count, _ in compared)
    if not tables and not found:
        found = [f"no table on {', '.join(map(str, pages))}: nothing was compared"]
    agreement = f"{tables} tables on {len(pages)} pages agree with {len(files)} files of results"
    report(found, agreement, "; write tables with python -m runs.tables --into=PAGE")


if __name__ == "__main__":
    run(main)
