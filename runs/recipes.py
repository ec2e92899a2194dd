"""Recipes of adaptation: what the shift, annealing, the prefix's attention and the kept AR loss are worth.

    python -m runs.recipes              # two hours on 2 cores, two jobs at a time; again: goes on
    python -m runs.recipes --table      # only print the tables of what is there

Each cell converts the AR model of runs.study (trained if it is missing), adapts it and fine-tunes it at the sizes of
that study, on mini translation and on Python source. The budget of a cell is FLOPs: with the AR loss kept a step makes
three passes and not two, and the cell gets two thirds of the steps in both stages. Everything else is our default:
self-conditioning, uniform noise, two passes.

The design. Two factors at two levels, shift and annealing (edge by edge over the first half of the adaptation, or at
once), and how the prefix is read at three: r = 0, a frozen causal prefix; r = +1, a joint prefix; r = -1, a frozen
causal prefix with the AR loss kept. There is no cell with both a joint prefix and the AR loss, as a prefix that looks
at the target cannot be read before it: a regular 2^(4-1) of the four factors would ask for two of them under either
sign of its generator. So at r = 0 all four cells of shift x annealing are run, and at r = +-1 the half of them that the
generator shift x annealing = r picks, with no and yes as -1 and +1: eight cells of the twelve that exist, every factor
balanced within every other. What the prefix is worth is read from the two joint cells and the causal two beside them,
and so is the AR loss. Main effects are clear of one another, not of interactions of two factors.

All intervals are Student's over seeds, 95%: an effect is computed in each seed, from the same AR model, and its spread
over seeds is its error. That asks for no equal variance of cells near 0% and near 100%.
"""

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from configurator import configure, run
from data.loader import build_if_missing
from eval.common import markdown
from runs.jobs import Job, plain
from runs.study import SAMPLER, SIZES, Plan, StudyConfig, ar_of, run_jobs, table_2


@dataclass
class RecipesConfig(StudyConfig):
    results: str = "results/recipes"


class Cell(NamedTuple):
    """One recipe. Its name is its row and, made plain, its results' file name."""

    shift: bool
    annealed: bool
    joint: bool
    ar_loss: bool

    @property
    def name(self) -> str:
        prefix = "joint" if self.joint else "causal prefix, AR loss" if self.ar_loss else "causal prefix"
        return f"{'shift' if self.shift else 'own slot'}, {'annealed' if self.annealed else 'at once'}, {prefix}"


BOTH = (False, True)
CELLS = [Cell(shift, annealed, False, False) for shift in BOTH for annealed in BOTH]
CELLS += [Cell(shift, annealed, True, False) for shift in BOTH for annealed in BOTH if shift == annealed]
CELLS += [Cell(shift, annealed, False, True) for shift in BOTH for annealed in BOTH if shift != annealed]

# How else the mask may open of today's default (bidirectional prefix, shift), whose own row is runs.study's. None: it
# is not annealed.
DEFAULT = "edges: today's default"
FORMS = {"at once": None, "band": ["--anneal_form=band"], "blocks": ["--anneal_form=blocks"]}
TASKS = {"mini": "mini_translation", "python": "python_pairs"}  # part of the study -> what is fine-tuned and judged
LEFT_TO_RIGHT = "left_to_right"  # a causal prefix can be decoded as an AR model decodes


def jobs_of(part: str, seed: int, cfg: RecipesConfig) -> list[Job]:
    """All of one part and seed: the AR model where it is missing, the cells, the forms."""
    size, task = SIZES[part], TASKS[part]
    plan = Plan(part, size, seed, StudyConfig(out=cfg.out, results=cfg.results, scale=cfg.scale))
    table_2(plan)
    ar = ar_of(part, seed, plan.cfg)
    plan.jobs = [job for job in plan.jobs if job.name == ar.job]

    def recipe(name: str, settings: dict[str, str], form: list[str] | None, always: list[str], share: float = 1.0):
        start = plan.convert(f"recipe_{plain(name)}_start", settings, ar)
        steps = [round(share * count) for count in (size.N, size.tuning(task))]
        opening = [] if form is None else [f"--anneal_steps={round(cfg.scale * steps[0]) // 2}", *form]
        flags = ["--schedule=constant", *opening, *always]
        adapted = plan.train(f"recipe_{plain(name)}_adapt", size.pretrain, steps[0], *flags, source=start)
        return plan.train(f"recipe_{plain(name)}_{task}", task, steps[1], *always, source=adapted)

    for cell in CELLS:
        settings = {"shift": str(cell.shift).lower(), "prefix_attention": "joint" if cell.joint else "causal"}
        keep = ["--ar_weight=1.0"] if cell.ar_loss else []
        tuned = recipe(cell.name, settings, [] if cell.annealed else None, keep, share=2 / 3 if cell.ar_loss else 1.0)
        plan.judge(plain(cell.name), task, tuned, *SAMPLER)
        if part == "mini" and not cell.joint:
            plan.judge(f"{plain(cell.name)}_{LEFT_TO_RIGHT}", task, tuned, "--sampler=ar")
    for label, form in FORMS.items():
        tuned = recipe(f"form_{label}", {}, form, [])
        plan.judge(plain(f"form_{label}"), task, tuned, *SAMPLER)
    return plan.jobs


# What is read off a result: column -> (part, value, unit), higher is better but for bits.
COLUMNS: dict[str, tuple[str, Callable[[dict], float]]] = {
    "translation EM %": ("mini", lambda result: 100 * result["exact_match"]),
    "Python L(1), bits per byte": ("python", lambda result: result["loss"]["bits_per_byte"]),
    "bodies that parse and do something %": (
        "python",
        lambda result: 100 * result["generated"]["parse_and_not_trivial"],
    ),
}
# Student's t, 97.5%, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def student(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) of independent values: 95%, infinite for one value. [1, 2, 3] -> 2 -+ 4.303 / sqrt(3)."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, -math.inf, math.inf
    half = STUDENT[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


# Effect -> (what it is the worth of, the cells that have it, the cells they are compared with).
EFFECTS = {
    "shift": (CELLS, lambda cell: cell.shift, lambda cell: not cell.shift),
    "annealing (against at once)": (CELLS, lambda cell: cell.annealed, lambda cell: not cell.annealed),
    "joint prefix (against causal)": (
        [cell for cell in CELLS if cell.shift == cell.annealed],
        lambda cell: cell.joint,
        lambda cell: not cell.joint,
    ),
    "AR loss kept (at equal FLOPs)": (
        [cell for cell in CELLS if cell.shift != cell.annealed],
        lambda cell: cell.ar_loss,
        lambda cell: not cell.ar_loss,
    ),
}


def effect(of_cells: dict[Cell, float], name: str) -> float:
    """How much higher the mean of the cells that have it is than that of the cells beside them that have not."""
    cells, has, has_not = EFFECTS[name]
    means = [statistics.mean(of_cells[cell] for cell in cells if side(cell)) for side in (has, has_not)]
    return means[0] - means[1]


def values_of(folder: Path, part: str, name: str, value: Callable[[dict], float]) -> dict[int, float]:
    """seed -> value, of the results that are there."""
    found = {}
    for path in sorted(folder.glob(f"{part}_?_{TASKS[part]}_{name}.json")):
        found[int(path.name.split("_")[1])] = value(json.loads(path.read_text()))
    return found


def effects_table(folder: Path, study: Path) -> str:
    """Main effects of the cells, then the default's form against the others, seed by seed: mean and interval.

    Those that do not contain 0 are marked.
    """
    rows = []
    for name in EFFECTS:
        cells = [name]
        for part, value in COLUMNS.values():
            found = {cell: values_of(folder, part, plain(cell.name), value) for cell in CELLS}
            seeds = set.intersection(*(set(by_seed) for by_seed in found.values()))
            each = [effect({cell: by_seed[seed] for cell, by_seed in found.items()}, name) for seed in sorted(seeds)]
            cells.append(_said(each))
        rows.append(cells)
    for label in FORMS:
        cells = [f"opened by edges (against {label}), bidirectional prefix"]
        for part, value in COLUMNS.values():
            ours = values_of(study, part, plain("AR2Diff_N"), value)
            theirs = values_of(folder, part, plain(f"form_{label}"), value)
            cells.append(_said([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]))
        rows.append(cells)
    return markdown(["effect, mean over seeds (95%)", *COLUMNS], rows)


def cells_table(folder: Path, study: Path) -> str:
    """The cells, then the forms of annealing: mean over seeds (range). Right: what AR decoding of the weights gives."""
    rows = []
    for label, name, at in [
        *((cell.name, plain(cell.name), folder) for cell in CELLS),
        (f"bidirectional prefix, shift, {DEFAULT}", plain("AR2Diff_N"), study),
        *((f"bidirectional prefix, shift, {label}", plain(f"form_{label}"), folder) for label in FORMS),
    ]:
        found = [list(values_of(at, part, name, value).values()) for part, value in COLUMNS.values()]
        left = list(values_of(at, *_ar_column(name)).values())
        rows.append([label, *map(ranged, found), ranged(left), "/".join(str(len(values)) for values in found[:2])])
    return markdown(["recipe", *COLUMNS, "translation EM %, left to right", "seeds"], rows)


def _ar_column(name: str):
    return "mini", f"{name}_{LEFT_TO_RIGHT}", COLUMNS["translation EM %"][1]


def ranged(values: list[float], digits: int | None = None) -> str:
    """'97.1 (95.0 to 99.2)': the mean, the lowest and the highest."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    digits = digits if digits is not None else 2 if abs(mean) < 10 else 1
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _said(values: list[float]) -> str:
    """'+7.1 (+5.0 to +9.2) *': mean and 95%, with a star where 0 is outside the interval."""
    if not values:
        return "-"
    mean, low, high = student(values)
    digits = 2 if abs(mean) < 10 else 1
    if len(values) == 1:
        return f"{mean:+.{digits}f}"
    star = " *" if low * high > 0 else ""
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f}){star}"


def main(argv: list[str]) -> None:
    """Run what is missing, a seed at a time, then print both tables."""
    cfg = configure(RecipesConfig, argv)
    parts = ["all", *TASKS]
    if cfg.part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}; got {cfg.part!r}")
    if not cfg.table:
        wanted = [cfg.part] if cfg.part in TASKS else list(TASKS)
        for size in (SIZES[part] for part in wanted):
            build_if_missing(Path(size.folder) / size.pretrain)
        run_jobs([job for seed in range(1, cfg.seeds + 1) for part in wanted for job in jobs_of(part, seed, cfg)], cfg)
    folder = Path(cfg.results)
    study = folder.parent / "study"
    print(f"{effects_table(folder, study)}\n\n{cells_table(folder, study)}")


if __name__ == "__main__":
    run(main)
