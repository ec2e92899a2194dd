"""Tables from the JSON of results/: what README and results/ show is made here and nowhere else.

python -m runs.tables                       # print them
python -m runs.tables --into=README.md      # or write them behind their markers there
"""

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configurator import configure, run
from eval.common import markdown
from runs.choices import choices_table
from runs.few_steps import exit_table, ways_table
from runs.jobs import plain
from runs.recipes import cells_table, effects_table, ranged
from runs.speed_tables import decode_table, lines_table, peers_table, quality_table
from runs.study import TRIED


@dataclass
class TablesConfig:
    results: str = "results"
    into: str = ""  # a Markdown file with markers <!-- table: NAME --> ... <!-- end -->


ROWS = [
    "AR",
    "diffusion, N steps",
    "diffusion, equal FLOPs",
    "AR2Diff_0",
    "AR2Diff_N",
    "AR2Diff_2N",
    "AR2Diff_N, no self-conditioning",
    "AR2Diff_N (paper's settings)",
]
# Rows that the tables call by what they are: where a slot is read the paper does not say.
SHOWN = {"AR2Diff_N (paper's settings)": "AR2Diff_N, joint, own slot, no self-conditioning"}
# Set -> (metric, its column).
TASKS = {
    "mini_translation": [("exact_match", "translation EM %"), ("bleu", "BLEU")],
    "mini_qa": [("exact_match", "QA EM %"), ("f1", "F1 %")],
    "mini_code": [("pass@1", "code pass@1 %")],
}


def spread(values: list[float], unit: str = "%") -> str:
    """'91.2 (89.0 to 93.1)': mean and range over seeds, in percent or as it is."""
    values = [100 * value for value in values] if unit == "%" else values
    return ranged(values, 1 if unit == "%" or statistics.mean(values) >= 10 else 3)


def results_of(folder: Path, part: str, task: str, row: str) -> list[dict]:
    """The results of a row on a task, one a seed, as far as they are there."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{part}_?_{task}_{row}.json"))]


def mini_table(folder: Path) -> str:
    """Rows x mini tasks over seeds, then network calls and time per sample of translation."""
    rows = []
    for row in ROWS:
        found = {task: results_of(folder, "mini", task, plain(row)) for task in TASKS}
        cells = [SHOWN.get(row, row)]
        for task, metrics in TASKS.items():
            for metric, _ in metrics:
                values = [result[metric] for result in found[task] if metric in result]
                cells.append(spread(values, "" if metric == "bleu" else "%") if values else "-")
        first = found["mini_translation"]
        cells.append(f"{statistics.mean(r['calls_per_sample'] for r in first):.1f}" if first else "-")
        cells.append(f"{1000 * statistics.median(r['seconds_per_sample'] for r in first):.1f}" if first else "-")
        cells.append("/".join(str(len(seeds)) for seeds in found.values()))
        rows.append(cells)
    columns = [column for metrics in TASKS.values() for _, column in metrics]
    return markdown(["row", *columns, "calls", "ms / sample, median", "seeds"], rows)


def python_table(folder: Path) -> str:
    """Rows of the Python source part. Bits per byte compare among diffusion rows, or with AR rows, never across."""
    rows = []
    for row in ROWS:
        seeds = results_of(folder, "python", "python_pairs", plain(row))
        if not seeds:
            continue
        kind = "exact NLL" if row == "AR" else "L(1), mean over rates"
        bits = [r["loss"]["bits_per_byte"] for r in seeds]
        parse = [r["generated"]["parse"] for r in seeds]
        full = [r["generated"]["parse_and_not_trivial"] for r in seeds]
        cells = [SHOWN.get(row, row), spread(bits, ""), kind, spread(parse), spread(full)]
        rows.append([*cells, f"{statistics.mean(r['calls_per_sample'] for r in seeds):.1f}", str(len(seeds))])
    header = ["row", "bits per byte", "which is", "bodies that parse %", "parse and not trivial %", "calls", "seeds"]
    return markdown(header, rows) if rows else "(no Python results yet)"


def act_1_table(rows: list[dict]) -> str:
    """The quickstart's first table."""
    cells = [
        [
            r["row"],
            f"{r['exact_match']:.1%}",
            "{:.1%} to {:.1%}".format(*r["interval"]),
            f"{r['calls_per_sample']:.1f}",
            f"{1000 * r['seconds_per_sample']:.1f}",
        ]
        for r in rows
    ]
    header = ["pretraining, then the same fine-tuning", "exact match", "95% interval", "network calls", "ms a sample"]
    return markdown(header, cells)


def quickstart_table(path: Path) -> str:
    rows = json.loads(path.read_text()).get("rows") if path.exists() else None
    return act_1_table(rows) if rows else "(no quickstart yet)"


def pair_table(folder: Path) -> str:
    """What the kept pair writes under held-out signatures, by decoding, and at the end what stands there."""
    rows, results = [], [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for r in results:
        asked, loss = r["settings"], r["loss"]["bits_per_byte"]
        way = ", ".join(f"{name} {asked[name]}" for name in ("sampler", "steps", "temperature") if name in asked)
        if asked.get("candidates", 1) > 1:
            way += f", best of {asked['candidates']}"
        name = {"ar": "AR", "diffusion": "diffusion"}[r["paradigm"]]
        kind = "exact NLL" if r["paradigm"] == "ar" else "L(1), mean over rates"
        cost = [f"{r['calls_per_sample']:.1f}", f"{1000 * r['seconds_per_sample']:.0f}"]
        rows.append([f"{name}: {way}", *_shares(r["generated"]), *cost, f"{loss:.3f}", kind])
    if not rows:
        return "(no trained pair yet)"
    rows.append(["the held-out bodies", *_shares(results[0]["held_out"]), "", "", "", ""])
    shares = ["parse % (95%)", "parse and not trivial %", "distinct %", "mean bytes"]
    cost = ["calls", "ms / sample", "bits per byte", "which is"]
    return "\n\n".join([markdown(["decoding", *shares, *cost], rows), origin(folder)])


def _shares(found: dict) -> list[str]:
    low, high = (100 * end for end in found["parse_interval"])
    parts = [f"{100 * found['parse']:.1f} ({low:.1f} to {high:.1f})", f"{100 * found['parse_and_not_trivial']:.1f}"]
    return [*parts, f"{100 * found['distinct']:.1f}", f"{found['mean_bytes']:.0f}"]


# The rows of the main table that the changes start from, and one that is a change itself.
STARTS = {"ours: mask opened edge by edge": "AR2Diff_N", "from scratch": "diffusion, N steps"}
STARTS["ours without self-conditioning"] = "AR2Diff_N, no self-conditioning"
STARTS["paper: joint prefix, no shift, no self-conditioning"] = "AR2Diff_N (paper's settings)"


def tried_table(folder: Path) -> str:
    """What was tried for the defaults: exact match on translation by seed, best first, and bits per byte on Python."""

    def result(label: str, part: str, task: str, seed: int) -> dict | None:
        part, row = (part, STARTS[label]) if label in STARTS else ("tried", label)
        path = folder / f"{part}_{seed}_{task}_{plain(row)}.json"
        return json.loads(path.read_text()) if path.exists() else None

    rows = []
    for label in [*STARTS, *TRIED]:
        seeds = [result(label, "mini", "mini_translation", seed) for seed in (1, 2)]
        code = result(label, "python", "python_pairs", 1)
        if any(seeds) or code:
            cells = [f"{100 * found['exact_match']:.1f}" if found else "-" for found in seeds]
            bits = f"{code['loss']['bits_per_byte']:.3f}" if code else "-"
            rows.append((seeds[0]["exact_match"] if seeds[0] else 0.0, [label, *cells, bits]))
    rows = [cells for _, cells in sorted(rows, key=lambda row: -row[0])]
    header = ["change", "translation EM %, seed 1", "seed 2", "Python, bits per byte, seed 1"]
    return markdown(header, rows)


def origin(folder: Path) -> str:
    """Where the numbers of the study come from: hardware, versions, commits, as the files say."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    names = ("hardware", "torch", "python", "commit")
    return "; ".join(f"{name} {', '.join(sorted({str(r[name]) for r in results}))}" for name in names)


def grid(number: int) -> Callable[[Path], str]:
    """One of the paper's tables at toy scale."""

    def table(results: Path) -> str:
        from eval.tables import tables  # it reads this file's cells

        return tables("toy", results / "study")[f"Table {number}"]

    return table


TRAINING = ("train", "kept", "mfu", "unroll", "anneal", "memory", "loader", "processes", "loss")


def scale(name: str) -> Callable[[Path], str]:
    """One of the tables of docs/scale.md, at the assumptions of runs/scale.py."""

    def table(_: Path) -> str:
        from runs.scale import TABLES, ScaleConfig  # it comes back here by way of eval/tables.py

        return TABLES[name](ScaleConfig())

    return table


def faults_table(results: Path) -> str:
    """Kills and other faults, and how many runs were lost or changed by them."""
    if not (results / "faults.json").exists():
        return "(no campaign yet)"
    rows = json.loads((results / "faults.json").read_text())["table"]
    cells = [[row["fault"], *(str(row[name]) for name in ("runs", "kills", "lost_or_changed"))] for row in rows]
    total = [str(sum(row[name] for row in rows)) for name in ("runs", "kills", "lost_or_changed")]
    return markdown(["fault", "runs", "kills", "lost or changed"], [*cells, ["together", *total]])


TABLES = {
    "table1": grid(1),
    "table2": grid(2),
    "table3": grid(3),
    "mini": lambda results: mini_table(results / "study"),
    "quickstart": lambda results: quickstart_table(results / "quickstart_quality.json"),
    "python": lambda results: python_table(results / "study"),
    "pair": lambda results: pair_table(results / "pair"),
    "tried": lambda results: tried_table(results / "study"),
    "ways": lambda results: ways_table(results / "few_steps"),
    "exit": lambda results: exit_table(results / "few_steps"),
    "choices": choices_table,
    "effects": lambda results: effects_table(results / "recipes", results / "study"),
    "recipes": lambda results: cells_table(results / "recipes", results / "study"),
    "origin": lambda results: origin(results / "study"),
    "decode": decode_table,
    "quality": quality_table,
    "decode, short": lambda results: decode_table(results, short=True),
    "peers": peers_table,
    "faults": faults_table,
    **{name: scale(name) for name in ("scale_costs", "scale_shares", "scale_rows", "scale_gpus")},
    "lines": lambda results: lines_table(results, ("loop", "gemm", "prefix")),
    "training": lambda results: lines_table(results, TRAINING),
}


def print_tables(results: Path) -> None:
    """All of them, as Markdown."""
    for name, table in TABLES.items():
        print(f"\n### {name}\n\n{table(results)}")


def write_into(path: Path, results: Path) -> None:
    """Put each table behind its marker `<!-- table: NAME -->`, up to `<!-- end -->`, and leave the rest alone."""
    text = path.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        pattern = re.compile(f"(<!-- table: {name} -->\\n).*?(<!-- end -->)", re.DOTALL)
        made = table(results).replace("\\", r"\\")
        text = pattern.sub(rf"\1\n{made}\n\n\2", text)
    path.write_text(text, encoding="utf-8")


def main(argv: list[str]) -> None:
    """Print the tables, or write them into a Markdown file that has their markers."""
    cfg = configure(TablesConfig, argv)
    if cfg.into:
        write_into(Path(cfg.into), Path(cfg.results))
    else:
        print_tables(Path(cfg.results))


if __name__ == "__main__":
    run(main)
