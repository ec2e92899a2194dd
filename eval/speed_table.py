"""What was timed, as a table: seconds, tokens, ratios to AR, shares of the floor, crossovers. Arithmetic only.

A cell is one system at one setting, as eval.speed writes it to JSON; a row is what the table says of it. A cell whose
steps were timed gives a row for each number of steps: 3 timed steps tell of 50, and the row says so with a ~.
"""

import math
import statistics

from eval.common import markdown
from eval.limits import Work
from eval.timing import summary

SETTING = ("dtype", "batch", "length")


def rows_of(cells: list[dict], ceilings: list[dict], quality: dict[str, dict]) -> list[dict]:
    """A row for each cell and number of steps, AR first at each setting, each compared with the fastest AR there."""
    rows = []
    for setting in sorted({tuple(cell[name] for name in SETTING) for cell in cells}):
        here = [cell for cell in cells if tuple(cell[name] for name in SETTING) == setting]
        seen = [c for c in ceilings if c["dtype"] == setting[0]]
        best = {name: max(c[name] for c in seen) for name in ("flops", "bandwidth")}
        made = [row for cell in here for row in _rows(cell, best)]
        ar = min((row for row in made if row["kind"] == "AR" and row["times"]), key=_median, default=None)
        for row in made:
            if ar and row["times"]:
                row |= _against(row, ar)
            row["quality"] = quality.get(quality_key(row, row["steps"]), {})
        rows += sorted(made, key=lambda row: row["kind"] != "AR")
    return rows


def _rows(cell: dict, best: dict) -> list[dict]:
    for steps in cell["tells"]:
        row = {name: cell[name] for name in (*SETTING, "kind", "compiled", "candidates", "conditioned", "adaptive")}
        row |= dict(name=cell["name"], position=cell["position"], steps=steps, block=cell["block"])
        row |= dict(failed=cell.get("failed", ""), memory=cell.get("memory"), first_call=cell.get("first_call"))
        extra = steps - cell["steps"]  # steps that were not run
        row["times"] = [run["seconds"] + extra * (run["step"] or 0.0) for run in cell["runs"]]
        row["scaled"] = bool(extra) or cell["integrated"]
        if row["times"]:
            work = [Work(*part) for part in cell["work"]]
            counted = statistics.mean(run["calls"] for run in cell["runs"])  # of a text, all candidates
            calls = counted if not extra else steps * cell["candidates"]
            if cell["kind"] == "AR":
                whole = work[0]
            else:
                (read, call, soft), n = work, calls / cell["candidates"]
                whole = read + call * n + soft * (n - 1)
            floor, binding = whole.floor(best)
            seconds = summary(row["times"])
            row |= dict(seconds=seconds, calls=calls, floor=floor, binding=binding, share=floor / seconds["median"])
            tokens = statistics.mean(run["tokens"] for run in cell["runs"]) if cell["real"] else cell["length"]
            row["tokens_per_second"] = cell["batch"] * tokens / seconds["median"]
            row["tokens_per_call"] = tokens / calls
        yield row


def _median(row: dict) -> float:
    return row["seconds"]["median"]


def _against(row: dict, ar: dict) -> dict:
    """Ratio to AR, above 1 is faster than AR: of neighbouring runs where both were timed in one block."""
    pairs = [a / b for a, b in zip(ar["times"], row["times"])]
    if row["block"] != ar["block"]:
        pairs = [_median(ar) / _median(row)]
    return dict(ratio=summary(pairs), allowed=ar["floor"] / row["floor"], ar_share=ar["share"])


def quality_key(what: dict, steps: int) -> str:
    """What decides which texts come out: of a row, or of a system with its steps."""
    ar = what["kind"] == "AR"
    return "AR" if ar else f"{what['kind']} {steps} {what['candidates']} {'adaptive' if what['adaptive'] else ''}"


def crossovers(rows: list[dict]) -> list[dict]:
    """For each system over all lengths: from which length on it is faster than the fastest AR."""
    lines: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["kind"] != "AR" and "ratio" in row:
            lines.setdefault((row["dtype"], row["batch"], row["name"], row["steps"]), []).append(row)
    found = []
    for (dtype, batch, name, steps), line in lines.items():
        ratios = {row["length"]: row["ratio"]["median"] for row in line}
        found.append(dict(dtype=dtype, batch=batch, name=name, steps=steps, ratios=ratios, length=crossover(ratios)))
    return found


def crossover(ratios: dict[int, float]) -> str:
    """Where the ratio to AR passes 1, between two measured lengths by a straight line in both logarithms.

    {64: 0.5, 256: 2.0} -> "128". "< 64": faster than AR at every measured length; "> 256": at none.
    """
    lengths = sorted(ratios)
    if ratios[lengths[-1]] < 1:
        return f"> {lengths[-1]}"
    slower = [length for length in lengths if ratios[length] < 1]
    if not slower:
        return f"< {lengths[0]}"
    low = slower[-1]
    high = lengths[lengths.index(low) + 1]
    a, b = math.log(ratios[low]), math.log(ratios[high])
    return f"{low * (high / low) ** (-a / (b - a)):.0f}"


def label(row: dict) -> str:
    """What a row is called: "frozen, 20 steps, 8 candidates, compiled"."""
    if row["kind"] == "AR" or row["adaptive"]:
        return row["name"]
    kind, *rest = row["name"].split(", ")
    return ", ".join([kind, f"{row['steps']} steps", *rest])


def table(rows: list[dict]) -> str:
    """Markdown, a line for each row."""
    header = ["dtype", "batch", "length", "system", "seconds, median (range)", "tokens/s", "tokens/call", "calls"]
    header += ["first call", "peak MB", "ratio to AR (range)", "ceilings allow", "share of floor"]
    metrics = list(dict.fromkeys(name for row in rows for name in row.get("quality", {})))
    lines = []
    for row in rows:
        length = f"{row['length']}" + (" rope" if row["position"] == "rope" else "")
        cells = [row["dtype"], f"{row['batch']}", length, label(row)]
        if not row["times"]:
            lines.append([*cells, row["failed"], *[""] * (len(header) + len(metrics) - len(cells) - 1)])
            continue
        mark, s = "~" if row["scaled"] else "", row["seconds"]
        several = f" ({s['low']:.3g} to {s['high']:.3g})" if len(row["times"]) > 1 else ""
        cells += [f"{mark}{s['median']:.3g}{several}", f"{row['tokens_per_second']:.3g}"]
        cells += [f"{row['tokens_per_call']:.3g}", f"{row['calls']:g}"]
        cells.append(f"{row['first_call']:.1f}" if row["first_call"] is not None else "")
        cells.append(f"{row['memory'] / 1e6:.4g}" if row["memory"] else "")
        if "ratio" in row:
            r = row["ratio"]
            several = f" ({r['low']:.2f} to {r['high']:.2f})" if len(row["times"]) > 1 else ""
            cells += [f"{mark}{r['median']:.2f}{several}", f"{row['allowed']:.2f}"]
        else:
            cells += ["", ""]
        cells.append(f"{row['share']:.0%} of {row['binding']}")
        quality = row.get("quality", {})
        lines.append(cells + [f"{quality[name]:.4g}" if name in quality else "" for name in metrics])
    return markdown([*header, *metrics], lines)


def crossover_table(found: list[dict]) -> str:
    """Markdown: the ratio to AR at each length and where it passes 1."""
    lengths = sorted({length for one in found for length in one["ratios"]})
    rows = []
    for one in found:
        ratios = [f"{one['ratios'][n]:.2f}" if n in one["ratios"] else "" for n in lengths]
        name = label(one | dict(kind="", adaptive="adaptive" in one["name"]))
        rows.append([one["dtype"], f"{one['batch']}", name, *ratios, one["length"]])
    return markdown(["dtype", "batch", "system", *(f"{n}" for n in lengths), "crossover"], rows)
