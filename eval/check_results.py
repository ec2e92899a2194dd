"""Compare every table of README.md, results/ and docs/ with the results it comes from.

    python -m eval.check_results           # exits with status 1 if anything differs
    python -m eval.check_results --write   # rewrite the tables instead

A table is between <!-- table: NAME --> and <!-- end -->. Each result must name its origin: command,
seed, commit, hardware and versions.
"""

import json
import re
import sys
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

from configurator import configure, run, setting, suggest
from eval.common import write_text
from eval.tables import TABLES

PAGES = ("README.md", "results/*.md", "docs/*.md")
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
ORIGIN = ("command", "seed", "commit", "hardware", "torch", "python")


@dataclass
class CheckConfig:
    write: bool = setting(False, "rewrite the tables of the pages")


def rewrite(page: Path, results: Path) -> str:
    """Return the text of a page with every table made again. Raise ValueError for a bad marker."""
    text = page.read_text(encoding="utf-8")
    if len(BLOCK.findall(text)) != text.count("<!-- table:"):
        raise ValueError(f"{page}: a table has no <!-- end -->")

    def again(block: re.Match) -> str:
        begin, name, _, end = block.groups()
        if name not in TABLES:
            raise ValueError(f"{page}: no table {name!r}{suggest(name, TABLES)}")
        try:
            return f"{begin}\n{TABLES[name](results)}\n\n{end}"
        except (OSError, KeyError, IndexError) as error:
            reason = f"{type(error).__name__} {error}"
            raise ValueError(f"{page}: cannot make table {name}: {reason}") from None

    return BLOCK.sub(again, text)


def differences(page: Path, results: Path) -> list[str]:
    """Return the lines of a diff from the page to its results."""
    try:
        new = rewrite(page, results).splitlines()
    except ValueError as error:
        return [str(error)]
    old = page.read_text(encoding="utf-8").splitlines()
    return list(unified_diff(old, new, str(page), str(results), n=0, lineterm=""))


def without_origin(path: Path) -> list[str]:
    """Return a line for each result of a file that does not name its origin."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    found = []
    for number, line in enumerate(lines, 1):
        entry = json.loads(line)
        known = entry.get("settings", {}) | entry.get("origin", {}) | entry
        missing = [key for key in ORIGIN if known.get(key) in (None, "", "unknown")]
        if missing:
            found.append(f"{path}:{number}: has no {', '.join(missing)}")
    return found


def main(argv: list[str]) -> None:
    """Compare or rewrite all pages."""
    cfg = configure(CheckConfig, argv)
    results = Path("results")
    pages = [page for pattern in PAGES for page in sorted(Path().glob(pattern))]
    if cfg.write:
        for page in pages:
            write_text(page, rewrite(page, results))
        return
    found = [line for page in pages for line in differences(page, results)]
    files = [path for path in sorted(results.iterdir()) if path.suffix in (".json", ".jsonl")]
    found += [line for path in files for line in without_origin(path)]
    tables = sum(len(BLOCK.findall(page.read_text(encoding="utf-8"))) for page in pages)
    print("\n".join(found) or f"{tables} tables match {len(files)} files of results")
    if found:
        sys.exit("the pages differ from their results; --write rewrites the tables")


if __name__ == "__main__":
    run(main, CheckConfig)
