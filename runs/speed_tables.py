"""The speed tables of README and results/, from results/speed_*.json: what eval.speed and eval.train_speed wrote."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from eval.common import markdown
from eval.speed_table import crossover, label

NOTHING = "(not measured yet)"


def decode_table(folder: Path, short: bool = False) -> str:
    """Seconds of the fastest AR, then how many times as fast each diffusion system is, by length.

    Of the eager and the compiled form of a system the faster one stands here. short: ten steps behind a frozen prefix
    are the only system.
    """
    tables = []
    for result in _results(folder, lambda result: result.get("cells") and not result["quality"]):
        rows, lengths = result["rows"], sorted({row["length"] for row in result["rows"]})
        lines = []
        for dtype, batch in dict.fromkeys((row["dtype"], row["batch"]) for row in rows):
            here = [row for row in rows if (row["dtype"], row["batch"]) == (dtype, batch) and row["times"]]
            for name, *cells in _decode_lines(here, lengths):
                if not short or name.startswith("AR") or name == "frozen, 10 steps":
                    lines.append([dtype, f"{batch}", name, *cells])
        unfinished = "" if result["finished"] else " (not finished)"
        header = ["dtype", "batch", f"AR seconds / diffusion seconds{unfinished}", *(f"{n:,}" for n in lengths)]
        tables += [markdown([*header, "crossover"], lines), origin(result)]
    return "\n\n".join(tables) or NOTHING


def _decode_lines(rows: list[dict], lengths: list[int]) -> Iterator[list[str]]:
    ar = map(_fastest([row for row in rows if row["kind"] == "AR"]).get, lengths)
    seconds = [f"{_mark(row)}{row['seconds']['median']:.3g} s ({row['share']:.0%})" if row else "" for row in ar]
    yield ["AR: seconds (share of its floor)", *seconds, ""]
    for name, group in _by_name(row for row in rows if row["kind"] != "AR").items():
        best = {n: row for n, row in _fastest(group).items() if "ratio" in row}
        cells = [f"{_mark(row)}{row['ratio']['median']:.2f}" if row else "" for row in map(best.get, lengths)]
        crossing = crossover({n: row["ratio"]["median"] for n, row in best.items()}) if best else ""
        yield [name, *cells, crossing]


def quality_table(folder: Path) -> str:
    """Of a checkpoint: what each setting of the sampler costs and how many texts are right, by batch."""
    tables = []
    for result in _results(folder, lambda result: bool(result.get("quality"))):
        rows = [row for row in result["rows"] if row["times"]]
        batches = sorted({row["batch"] for row in rows})
        metrics = list(dict.fromkeys(name for row in rows for name in row["quality"]))
        lines = []
        for name, group in sorted(_by_name(rows).items(), key=lambda item: item[1][0]["kind"] != "AR"):
            first, best = group[0], {row["batch"]: row for row in _fastest(group, "batch").values()}
            cells = [name, f"{first['calls']:.1f}"]
            cells += [f"{first['quality'][metric]:.4g}" if metric in first["quality"] else "" for metric in metrics]
            for batch in batches:
                row = best[batch]
                ratio = f"{row['ratio']['median']:.2f}" if "ratio" in row else ""
                cells += [f"{1000 * row['seconds']['median'] / batch:.3g}", ratio]
            lines.append(cells)
        times = [cell for batch in batches for cell in (f"ms a text, batch {batch}", "x AR")]
        tables += [markdown(["decoder", "calls", *metrics, *times], lines), origin(result)]
    return "\n\n".join(tables) or NOTHING


def peers_table(folder: Path) -> str:
    """How many times as fast as each peer's loop ours is, median and range, by number format and batch."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    tables, cases = [], []
    for result in _results(folder, lambda result: any(line["name"] == "peer" for line in result["lines"])):
        for line in (line for line in result["lines"] if line["name"] == "peer"):
            case, r = line["case"].removeprefix(f"{line['base']}, "), line["ratio"]
            cases += [case] if case not in cases else []
            row = cells.setdefault((line["base"], line["system"]), {"aim": line["target"]})
            row[case] = f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
        rows = [[*key, row["aim"], *(row.get(case, "") for case in cases)] for key, row in cells.items()]
        tables += [markdown(["loop", "ours beside it", "aim", *cases], rows), origin(result)]
    return "\n\n".join(tables) or NOTHING


def lines_table(folder: Path, names: tuple[str, ...]) -> str:
    """Ratios of two neighbours in time: the lines of these names."""
    rows, origins = [], []
    for result in _results(folder, lambda result: any(line["name"] in names for line in result["lines"])):
        for line in (line for line in result["lines"] if line["name"] in names):
            r, systems = line["ratio"], (line["system"], line["base"])
            ratio = f"{r['median']:.3f} ({r['low']:.3f} to {r['high']:.3f})"
            unit = line["note"].get("unit", "s" if line["note"].get("clock") != "cpu" else "s of the CPU")
            amounts = {name: line["seconds"][name]["median"] for name in systems}
            if unit == "bytes":
                unit, amounts = "MB", {name: amount / 1e6 for name, amount in amounts.items()}
            pair = ", ".join(f"{name} {amount:.3g} {unit}" for name, amount in amounts.items())
            rows.append([line["name"], line["case"], ratio, line["target"], pair])
        origins.append(origin(result))
    table = markdown(["line", "case", "ratio, median (range)", "aim", "medians"], rows)
    return "\n\n".join([table, *dict.fromkeys(origins)]) if rows else NOTHING


def origin(result: dict) -> str:
    """Command, seed and machine of a result."""
    cells = (result.get("cells") or {}).values()  # each names its own: a table may be gone on with
    commits = ", ".join(sorted({result["commit"], *(cell["commit"] for cell in cells if "commit" in cell)}))
    where = f"{result['hardware']}, {result['threads']} threads, torch {result['torch']}, commit {commits}"
    return f"`{result['command']}`, seed {result['seed']}; {where}."


def _results(folder: Path, wanted: Callable[[dict], bool]) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("speed_*.json"))]
    return [result for result in found if wanted(result)]


def _by_name(rows) -> dict[str, list[dict]]:
    """Rows of one system, eager and compiled."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(label(row | dict(name=row["name"].replace(", compiled", ""))), []).append(row)
    return groups


def _fastest(rows: list[dict], by: str = "length") -> dict[int, dict]:
    """Length (or batch) -> the fastest of the rows."""
    found: dict[int, dict] = {}
    for row in rows:
        other = found.get(row[by])
        if other is None or row["seconds"]["median"] < other["seconds"]["median"]:
            found[row[by]] = row
    return found


def _mark(row: dict) -> str:
    return "~" * row["scaled"]
