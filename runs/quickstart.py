"""The story of quickstart.sh: two acts, their table and their pictures.

    python -m runs.quickstart [--acts=1]

Every command that runs is printed and is one of the README's; what an earlier run finished is not done again.
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from checkpoint import load_model
from configurator import configure, run
from eval import exact_match, plots, python_code
from eval.common import environment, markdown, write_json
from runs.jobs import Job, copy_once, work
from runs.tables import act_1_table
from train import TrainConfig

STEPS = [1, 2, 4, 10, 20]  # of the picture "quality against steps"
SCRATCH_N, SCRATCH_EQUAL = 300, 600  # AR2Diff's N, and N + A / 2: an unrolled diffusion step costs two AR steps


@dataclass
class QuickstartConfig:
    acts: str = "12"  # 1: mini translation | 2: Python source | 12: both
    lanes: int = 2  # trainings at a time, one core each


def act_1() -> list[Job]:
    """AR -> AR2Diff -> diffusion on the mini tasks, and its rivals."""
    tune = ["train.py", "config/ar2diff_3_finetune.py"]

    def train(name, *argv, after=()):
        return Job(name, [[*argv, "--init_from=resume"]], list(after))

    def from_to(source, target):
        return [*tune, f"--init_from=out/{source}/ckpt.pt", f"--out_dir=out/{target}"]

    longer = train(
        "diffusion from scratch, longer",
        *["train.py", "config/scratch_diffusion.py", "--out_dir=out/scratch_longer", f"--max_steps={SCRATCH_EQUAL}"],
        after=["copy of it"],
    )
    start = ["ar2diff.py", "--init_from=out/ar2diff_1_ar/ckpt.pt", "--out_dir=out/ar2diff_start", "--check"]
    copy = copy_once(Path("out/scratch_diffusion"), Path("out/scratch_longer"))
    ar, scratch, converted, adapted = (
        "stage 1: AR pretraining",
        "diffusion from scratch",
        "conversion",
        "stage 2: adaptation",
    )
    return [
        train(ar, "train.py", "config/ar2diff_1_ar.py"),
        train(scratch, "train.py", "config/scratch_diffusion.py"),
        Job(converted, [start], [ar], Path("out/ar2diff_start/ckpt.pt").exists),
        train(adapted, "train.py", "config/ar2diff_2_adapt.py", after=[converted]),
        train("stage 3: fine-tuning", *tune, after=[adapted]),
        train("from scratch, fine-tuned", *from_to("scratch_diffusion", "scratch_finetune"), after=[scratch]),
        Job("copy of it", [copy], [scratch], Path("out/scratch_longer/ckpt.pt").exists),
        longer,
        train("longer, fine-tuned", *from_to("scratch_longer", "longer_finetune"), after=[longer.name]),
        train("AR, fine-tuned", *from_to("ar2diff_1_ar", "ar_finetune"), after=[ar]),
        train("without adaptation, fine-tuned", *from_to("ar2diff_start", "zero_finetune"), after=[converted]),
    ]


ACT_1_ROWS = {
    "AR": "ar_finetune",
    f"diffusion from scratch, {SCRATCH_N} steps": "scratch_finetune",
    "diffusion from scratch, FLOPs of AR + adaptation": "longer_finetune",
    "AR2Diff_0": "zero_finetune",
    f"AR2Diff_{SCRATCH_N}": "ar2diff_3_finetune",
}


def act_2() -> list[Job]:
    """The same three stages on Python source, short: a demonstration, not a result."""

    def train(name, *argv, after=()):
        return Job(name, [["train.py", *argv, "--init_from=resume"]], list(after))

    return [
        train("AR on Python source", "config/python_1_ar.py"),
        Job(
            "conversion of it",
            [["ar2diff.py", "--init_from=out/python_1_ar/ckpt.pt", "--out_dir=out/python_start", "--check"]],
            ["AR on Python source"],
            Path("out/python_start/ckpt.pt").exists,
        ),
        train("adaptation", "config/python_2_adapt.py", after=["conversion of it"]),
        train(
            "AR, bodies", "config/python_3_finetune.py",
            "--init_from=out/python_1_ar/ckpt.pt", "--out_dir=out/python_ar_finetune", after=["AR on Python source"],
        ),
        train("diffusion, bodies", "config/python_3_finetune.py", after=["adaptation"]),
    ]  # fmt: skip


ACT_2_ROWS = {"AR": "python_ar_finetune", "AR2Diff_N": "python_3_finetune"}


def evaluated(rows: dict[str, str], measure, first: list[str], sampler: list[str]) -> dict[str, dict]:
    """measure.main on the checkpoint of each row; the AR row decodes greedily and takes no sampler settings."""
    found = {}
    for row, folder in rows.items():
        argv = [f"--init_from=out/{folder}/ckpt.pt", *first, *([] if row == "AR" else sampler)]
        print(f"$ python -m {measure.__name__} {' '.join(argv)}", flush=True)
        found[row] = measure.main(argv)
    return found


def table_1() -> str:
    """Act 1 as a table, and the curve of quality against steps."""
    found = evaluated(ACT_1_ROWS, exact_match, ["--n=528"], ["--steps=10", "--candidates=1"])
    said = ("exact_match", "interval", "calls_per_sample", "seconds_per_sample")
    rows = [{"row": row} | {name: result[name] for name in said} for row, result in found.items()]
    ar = found["AR"]
    series = []
    for row, folder in list(ACT_1_ROWS.items())[2:]:
        points = []
        for steps in STEPS:
            argv = [f"--init_from=out/{folder}/ckpt.pt", "--n=200", f"--steps={steps}", "--candidates=1"]
            result = found[row] if steps == 10 else exact_match.main(argv)
            points.append(
                {"steps": steps, "calls": round(result["calls_per_sample"], 1), "value": result["exact_match"]}
            )
            points[-1]["interval"] = result["interval"]
        series.append({"name": row, "points": points})
    quality = {
        "title": "Mini translation, 200 held-out numbers (528 at 10 steps), one candidate",
        "metric": "exact match",
        "series": series,
    }
    quality["ar"] = {"value": ar["exact_match"], "interval": ar["interval"], "calls": round(ar["calls_per_sample"], 1)}
    origin = {"command": "python -m runs.quickstart", "seed": TrainConfig.seed}
    write_json("out/quality.json", quality | {"rows": rows} | origin | environment())
    plots.plot_quality(quality, Path("out/quality.png"))
    return act_1_table(rows)


def table_2() -> str:
    """Act 2 as a table. The loss of an AR row is an exact likelihood, that of a diffusion row is not."""
    rows = []
    for row, r in evaluated(ACT_2_ROWS, python_code, ["--n=60"], ["--steps=20", "--candidates=1"]).items():
        kind = "exact" if row == "AR" else "denoising loss, mean over corruption rates"
        made = r["generated"]
        cells = [
            row,
            f"{r['loss']['bits_per_byte']:.2f}",
            kind,
            f"{made['parse']:.0%}",
            f"{made['parse_and_not_trivial']:.0%}",
        ]
        rows.append([*cells, f"{r['calls_per_sample']:.0f}"])
    return markdown(
        ["row", "bits per byte", "which is", "bodies that parse", "and do something", "network calls"], rows
    )


def main(argv: list[str]) -> None:
    """Play the acts that argv names."""
    cfg = configure(QuickstartConfig, argv)
    if cfg.acts not in ("1", "2", "12"):
        raise ValueError(f"acts must be 1, 2 or 12, got {cfg.acts!r}")
    begun, logs, tables = time.time(), Path("out/logs"), []
    if "1" in cfg.acts:
        print("Act 1: numbers in English, numbers in French. What each training says is in out/logs/.", flush=True)
        command("-m", "data.mini")
        work(act_1(), logs, cfg.lanes, show=True)
        tables.append("## Act 1: mini translation\n\n" + table_1())
        runs = [
            Path("out") / name for name in ("ar2diff_1_ar", "ar2diff_2_adapt", "ar2diff_3_finetune", "scratch_longer")
        ]
        plots.plot_losses(runs, Path("out/loss.png"))
        prompt = "fr nine hundred eighty-one"
        model, tokenizer, _ = load_model("out/ar2diff_3_finetune/ckpt.pt")
        plots.plot_canvas(model, tokenizer, prompt, Path("out/canvas.png"))
        checkpoint = "--init_from=out/ar2diff_3_finetune/ckpt.pt"
        command("sample.py", checkpoint, f"--prompt={prompt}", "--candidates=1", "--show", "--pause=0.05")
        print(f"\n{tables[-1]}\n\nAct 1 took {(time.time() - begun) / 60:.1f} minutes.\n", flush=True)
    if "2" in cfg.acts:
        print(
            "Act 2, a demonstration: the Python source on this machine. A model this small writes rough code.",
            flush=True,
        )
        command("-m", "data.python_code")
        work(act_2(), logs, cfg.lanes, show=True)
        tables.append("## Act 2: Python source, a demonstration\n\n" + table_2())
        prompt = 'def is_empty(self):\n    """Return True if the queue is empty."""\n'
        command("sample.py", "--init_from=out/python_3_finetune/ckpt.pt", f"--prompt={prompt}", "--steps=20")
        print(f"\n{tables[-1]}\n")
    where = environment()
    tables.append(f"{where['hardware']}, torch {where['torch']}, Python {where['python']}, commit {where['commit']}")
    Path("out/quickstart.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    pictures = "out/loss.png, out/canvas.png, out/quality.png" if "1" in cfg.acts else "no pictures without act 1"
    print(f"{(time.time() - begun) / 60:.1f} minutes in all. Table: out/quickstart.md. Pictures: {pictures}.")


def command(*argv: str) -> None:
    """Run one of the README's commands and show it."""
    print("$ python " + " ".join(f"'{a}'" if " " in a else a for a in argv), flush=True)
    subprocess.run([sys.executable, *argv], check=True)


if __name__ == "__main__":
    run(main)
