"""Which sampler, how many steps and candidates, which N: one table out of the results of runs.study and runs.few_steps.

Nothing is run here. A row is one choice, all else as in the first row; what a text costs stands beside how often it is
right. Rows differ in their held-out items and seeds, which are counted, so a point between two of them says little.
"""

import json
import statistics
from pathlib import Path

from eval.common import markdown
from runs.few_steps import EXIT_TASKS, EXITS, FIXED, OURS
from runs.jobs import plain

ADAPTED, HALF_NOISE = list(OURS)[0], "half of the rows from noise alone"  # of training, at a few steps
TEN, ZERO, ARGMAX, ENTROPY, SURE = list(EXITS)[1:]
# Choice -> (flags of sampling or training, folder of results, row of its files).
CHOICES = {
    "start here": ("--candidates=1 --steps=10", "few_steps", f"exit_{TEN}"),
    "2 steps": ("--candidates=1 --steps=2", "few_steps", f"{ADAPTED}_2"),
    "2 steps, half of the rows trained from noise": ("--candidates=1 --steps=2", "few_steps", f"{HALF_NOISE}_2"),
    "4 steps": ("--candidates=1 --steps=4", "few_steps", f"{ADAPTED}_4"),
    "4 steps, half of the rows trained from noise": ("--candidates=1 --steps=4", "few_steps", f"{HALF_NOISE}_4"),
    "50 steps": ("--candidates=1 --steps=50", "few_steps", f"exit_{FIXED}"),
    "until it stands still": ("--candidates=1 --steps=50 --temperature=0", "few_steps", f"exit_{ZERO}"),
    "the same, argmax": ("--candidates=1 --steps=50 --sampler=argmax_unrolled", "few_steps", f"exit_{ARGMAX}"),
    "until it is sure": ("--candidates=1 --steps=50 --sampler=entropy_bound", "few_steps", f"exit_{ENTROPY}"),
    "surest slots first": ("--candidates=1 --steps=50 --sampler=confidence", "few_steps", f"exit_{SURE}"),
    "best of 4": ("--candidates=4 --steps=10", "study", "table3_10_4"),
    "best of 8, the paper's": ("--candidates=8 --steps=10", "study", "table3_10_8"),
    "best of 16": ("--candidates=16 --steps=10", "study", "table3_10_16"),
    "5 steps, best of 8": ("--candidates=8 --steps=5", "study", "table3_5_8"),
    "20 steps, best of 8": ("--candidates=8 --steps=20", "study", "table3_20_8"),
    "N = 0": ("no stage 2", "study", "AR2Diff_0"),
    "N = 200, the rows above": ("stage 2: --max_steps=200", "study", "AR2Diff_N"),
    "N = 400": ("stage 2: --max_steps=400", "study", "AR2Diff_2N"),
}


def choices_table(results: Path) -> str:
    """Choices x (calls a text, share right of each mini task as mean and range over seeds, seeds x items)."""
    rows = []
    for choice, (flags, folder, row) in CHOICES.items():
        cells, calls, counts = [], "-", []
        for task, metric in EXIT_TASKS.items():
            paths = sorted((results / folder).glob(f"mini_?_{task}_{plain(row)}.json"))
            found = [json.loads(path.read_text()) for path in paths]
            cells.append(share(found, metric))
            counts.append(f"{len(found)} x {found[0]['n']}" if found else "-")
            if found and calls == "-":  # of translation, whose texts are the longest
                calls = f"{statistics.mean(result['calls_per_sample'] for result in found):.1f}"
        rows.append([choice, flags, calls, *cells, ", ".join(counts)])
    columns = ["translation EM %", "QA EM %", "code pass@1 %", "seeds x items of each"]
    return markdown(["choice", "flags", "calls a text", *columns], rows)


def share(found: list[dict], metric: str) -> str:
    """'96.0 (94.0 to 98.5)': mean and range over seeds, in percent."""
    values = [100 * result[metric] for result in found]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
