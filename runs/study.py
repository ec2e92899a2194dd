"""The study: every row of the main table on every task, with seeds, and the table of what was tried for the defaults.

    python -m runs.study                       # everything; two jobs at a time, one core each
    python -m runs.study --part=mini --seeds=1 # one part
    python -m runs.study --table               # only print the tables from results/study/*.json

Jobs are resumed one by one: what has its JSON is not run again, and a training that was cut off goes on from its last
checkpoint. As in the paper a row is pretraining (AR for A steps, or diffusion), conversion and N steps of adaptation
where named, then the same F fine-tuning steps on the task with the row's own loss.
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import configure, nearest, run
from data.loader import build_if_missing
from runs.jobs import Job, at_step, copy_once, plain, work

PAPER = {"prefix_attention": "joint", "shift": "false", "self_conditioning": "false"}
# From scratch nothing has to line up with AR weights, so the slot's own position is read.
SCRATCH = [
    "--paradigm=diffusion",
    "--prefix_attention=bidirectional",
    "--target_attention=bidirectional",
    "--self_conditioning",
]


@dataclass
class Size:
    """How long each stage is, in steps, and what it reads."""

    pretrain_data: str
    tasks: list[str]
    flags: list[str]  # of every pretraining: the model, the batch, the number format
    small: list[str]  # of every training after a checkpoint
    A: int
    N: int
    F: int
    folder: str = "out/data"


SIZES = {
    "mini": Size(
        "mini", ["mini_translation", "mini_qa", "mini_code"], ["--n_layer=3", "--n_embd=96"], [], 600, 200, 200
    ),
    "python": Size(
        "python_code",
        ["python_pairs"],
        ["--n_layer=3", "--n_embd=96", "--block_size=384"],
        ["--batch_size=16"],
        400,
        200,
        100,
    ),
    # GPT-2 small on all the Python source of the machine: for one GPU, by runs/ar2diff.sh.
    "gpu": Size(
        "python_code",
        ["python_pairs"],
        ["--n_layer=12", "--n_head=12", "--n_embd=768", "--block_size=512"],
        ["--batch_size=128", "--dtype=bfloat16", "--compile"],
        6000,
        3000,
        500,
        "out/gpu/data",
    ),
}
EVALUATE = {"mini": ["-m", "eval.exact_match", "--n=500"], "python": ["-m", "eval.python_code", "--n=100"]}
EVALUATE["gpu"] = ["-m", "eval.python_code", "--n=400"]


@dataclass
class StudyConfig:
    part: str = "all"  # all (what a laptop can pay) | mini | python | tried | gpu
    seeds: int = 3
    lanes: int = 2  # jobs at a time
    threads: int = 1  # of each job
    scale: float = 1.0  # of all step counts; below 1 only to see that everything runs
    out: str = "out/study"
    results: str = "results/study"
    table: bool = False  # print the tables of what there is, run nothing


def jobs_of_size(part: str, size: Size, seed: int, cfg: StudyConfig) -> list[Job]:
    """All jobs of one part and seed: pretraining, conversions, adaptation, fine-tuning of each row on each task."""
    out, jobs = Path(cfg.out) / part / f"seed{seed}", []
    A, N, F = (max(2, round(steps * cfg.scale)) for steps in (size.A, size.N, size.F))
    data, small = Path(size.folder), size.small

    def train(name, steps, *flags, after=(), source=None):
        target = out / name
        argv = [
            "train.py",
            f"--out_dir={target}",
            f"--max_steps={steps}",
            f"--seed={seed}",
            *flags,
            "--init_from=resume",
        ]
        if source:
            argv.insert(1, f"--init_from={source}")
        jobs.append(Job(f"{part}/{seed}/{name}", [argv], list(after), lambda: at_step(target, steps)))
        return f"{part}/{seed}/{name}"

    def convert(name, settings, source, after):
        target = out / name
        argv = ["ar2diff.py", f"--init_from={source}", f"--out_dir={target}", "--check", "--overwrite"]
        argv += [f"--{key}={value}" for key, value in settings.items()]
        jobs.append(Job(f"{part}/{seed}/{name}", [argv], [after], lambda: (target / "ckpt.pt").exists()))
        return f"{part}/{seed}/{name}"

    pretrain = [f"--data={data / size.pretrain_data}", "--schedule=constant", *small]
    ar = train("ar", A, *size.flags, *pretrain)
    rows = {"AR": (out / "ar/ckpt.pt", ar)}
    for label, settings in (("", {}), (" (paper's settings)", PAPER)):
        tag = "paper_" if label else ""
        start = convert(f"{tag}start", settings, out / "ar/ckpt.pt", ar)
        if not label:
            rows["AR2Diff_0"] = (out / "start/ckpt.pt", start)
        adapted = train(f"{tag}adapt", N, *pretrain, after=[start], source=out / f"{tag}start/ckpt.pt")
        rows[f"AR2Diff_N{label}"] = (out / f"{tag}adapt/ckpt.pt", adapted)
    scratch = train("scratch", N, *size.flags, *SCRATCH, *pretrain)
    rows["diffusion, N steps"] = (out / "scratch/ckpt.pt", scratch)

    def longer(name, source, steps, after, *flags):
        """The same run, longer: it goes on from a copy."""
        train(name, steps, *flags, *pretrain, after=[after])
        jobs[-1].commands.insert(0, copy_once(out / source, out / name))
        return out / name / "ckpt.pt", jobs[-1].name

    # As many FLOPs as A AR steps and N diffusion steps: an unrolled step passes over everything twice.
    equal = N + A // 2
    rows["diffusion, equal FLOPs"] = longer("scratch_longer", "scratch", equal, scratch, *size.flags, *SCRATCH)
    twice = {}  # on the first of several tasks: how the two grow with N
    if len(size.tasks) > 1:
        twice["diffusion, 2N steps"] = longer("scratch_twice", "scratch", 2 * N, scratch, *size.flags, *SCRATCH)
        twice["AR2Diff_2N"] = longer("adapt_twice", "adapt", 2 * N, rows["AR2Diff_N"][1])

    for task in size.tasks:
        for row, (checkpoint, after) in (rows | twice if task == size.tasks[0] else rows).items():
            name = f"{task}_{plain(row)}"
            tune = train(name, F, f"--data={data / task}", *small, after=[after], source=checkpoint)
            result = Path(cfg.results) / f"{part}_{seed}_{name}.json"
            argv = [*EVALUATE[part], f"--init_from={out / name / 'ckpt.pt'}", f"--json={result}", "--seed=0"]
            argv += [] if row == "AR" else ["--steps=10", "--candidates=1"]

            jobs.append(Job(f"{part}/{seed}/{name}_eval", [argv], [tune], result.exists))
    return jobs


# What was tried for the defaults: one change each from a row of the main table, on its first task.
TRIED = {
    "no shift (own position)": ({"shift": "false"}, []),
    "shift and lookahead": ({"lookahead": "true"}, []),
    "no self-conditioning": ({"self_conditioning": "false"}, []),
    "joint prefix": ({"prefix_attention": "joint"}, []),
    "causal prefix": ({"prefix_attention": "causal"}, []),
    "mask noise": ({"noise": "mask"}, []),
    "from scratch, shift": (None, [*SCRATCH, "--shift"]),
    "from scratch, joint prefix": (None, [*SCRATCH, "--prefix_attention=joint"]),
    "mask annealed over 100 steps": ({}, ["--anneal_steps=100"]),
    "one pass: L(1) alone": ({"self_conditioning": "false"}, ["--unroll_steps=1"]),
    "learning rate x 1/2": ({}, ["--learning_rate=7.5e-4"]),
    "learning rate x 2": ({}, ["--learning_rate=3e-3"]),
    "AdamW": ({}, ["--optimizer=adamw"]),
    "self-conditioning for half of the rows": ({}, ["--self_conditioning_prob=0.5"]),
    "unroll by sampling (SUNDAE)": ({}, ["--unroll_temperature=1.0"]),
    "batches of one prefix length": ({}, ["--bucket=32"]),
    "learning rate decays in stage 2, too": ({}, ["--schedule=linear"]),
}
# Which of them run on Python source, too, and which with a second seed: what fixes the network.
READOUTS = list(TRIED)[:4]
NETWORKS = list(TRIED)[:8]


def turn(name: str) -> tuple:
    """Where a job stands in line: what was tried and what it starts from, translation over all seeds, the rest."""
    part, seed, rest = name.split("/")
    if part == "tried":
        return (0 if "python" not in rest else 2), int(seed), 1
    if part == "mini" and "mini_qa" not in rest and "mini_code" not in rest:
        first = seed in "12" and rest in ("ar", "start", "adapt", "scratch")
        return (0 if first else 1), int(seed), 0
    return 2, int(seed), {"mini": 0, "python": 1, "gpu": 3}[part]


def jobs_tried(part: str, labels: list[str], seed: int, cfg: StudyConfig) -> list[Job]:
    """Each of these lines of TRIED: convert, N steps of adaptation, F on the first task of the part, evaluate."""
    size, base, jobs = SIZES[part], Path(cfg.out) / part / f"seed{seed}", []
    task, folder = size.tasks[0], Path(size.folder)
    for label in labels:
        settings, flags = TRIED[label]
        name = f"{task}_{plain(label)}"
        out = Path(cfg.out) / "tried" / f"seed{seed}" / name
        result = Path(cfg.results) / f"tried_{seed}_{name}.json"
        commands, start, stage_2, stage_3 = [], [], [*size.small, "--schedule=constant", *flags], [*size.small]
        if settings is None:
            stage_2 = [*size.flags, *stage_2]
        else:
            convert = ["ar2diff.py", f"--init_from={base / 'ar/ckpt.pt'}", f"--out_dir={out / 'start'}", "--overwrite"]
            commands.append([*convert, *(f"--{key}={value}" for key, value in settings.items())])
            start = [f"--init_from={out / 'start/ckpt.pt'}"]
            stage_3 += [flag for flag in flags if not flag.startswith(("--anneal", "--schedule"))]
        stages = [
            ["adapt", size.pretrain_data, size.N, start, stage_2],
            ["tune", task, size.F, [f"--init_from={out / 'adapt/ckpt.pt'}"], stage_3],
        ]
        for stage, data, steps, source, extra in stages:
            steps = max(2, round(steps * cfg.scale))
            argv = ["train.py", *source, f"--out_dir={out / stage}", f"--data={folder / data}"]
            commands.append([*argv, f"--max_steps={steps}", f"--seed={seed}", *extra, "--init_from=resume"])
        argv = [*EVALUATE[part], f"--init_from={out / 'tune/ckpt.pt'}", f"--json={result}", "--seed=0"]
        commands.append([*argv, "--steps=10", "--candidates=1"])

        jobs.append(Job(f"tried/{seed}/{name}", commands, [f"{part}/{seed}/ar"], result.exists))
    return jobs


def main(argv: list[str]) -> None:
    """Run the parts that argv names, then print the tables."""
    cfg = configure(StudyConfig, argv)
    parts = ["all", *SIZES, "tried"]
    if cfg.part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}; got {cfg.part!r}{nearest(cfg.part, parts)}")
    if not cfg.table:
        seeds, jobs = range(1, cfg.seeds + 1), []
        wanted = [cfg.part] if cfg.part in SIZES else ["mini", "python"]
        for size in (SIZES[part] for part in wanted):
            build_if_missing(Path(size.folder) / size.pretrain_data)
        for seed in seeds:
            for part in wanted:
                rows = jobs_of_size(part, SIZES[part], seed, cfg)
                jobs += rows if cfg.part != "tried" else []
                labels = {("mini", 1): list(TRIED), ("mini", 2): NETWORKS, ("python", 1): READOUTS}.get((part, seed))
                if labels and cfg.part in ("all", "tried"):
                    jobs += ([] if rows[0] in jobs else rows[:1]) + jobs_tried(part, labels, seed, cfg)
        jobs.sort(key=lambda job: turn(job.name))  # the first task over all seeds, then the breadth
        work(jobs, Path(cfg.out) / "logs", cfg.lanes, cfg.threads)
    from runs.tables import print_tables  # they read this file's rows

    print_tables(Path(cfg.results).parent)


if __name__ == "__main__":
    run(main)
