"""The study: every row of the paper's tables on every task, with seeds, and what was tried for the defaults.

    python -m runs.study                       # all that a laptop can pay; two jobs at a time, one core each
    python -m runs.study --part=mini --seeds=1 # one part
    python -m runs.study --table               # only print the tables from results/study/*.json

Jobs are resumed one by one: what has its JSON is not run again, and a training that was cut off goes on from its last
checkpoint. As in the paper a row of Table 2 is pretraining (AR for A steps, or diffusion), conversion and N steps of
adaptation where named, then the same F fine-tuning steps on the task with the row's own loss. Table 1 is diffusion
from scratch by two architectures with two objectives, Table 3 one fine-tuned model sampled in more ways than one.
`python -m eval.tables` asks for whole scales and sets the paper's numbers beside ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from ar2diff import ConvertConfig
from configurator import configure, nearest, read_settings, run
from data import mbpp, parallel, squad
from data.loader import build_if_missing
from runs.jobs import Job, at_step, copy_once, plain, work
from train import TrainConfig

PAPER = {"prefix_attention": "joint", "shift": "false", "self_conditioning": "false"}
# From scratch nothing has to line up with AR weights, so the slot's own position is read.
SCRATCH = [
    "--paradigm=diffusion",
    "--prefix_attention=bidirectional",
    "--target_attention=bidirectional",
    "--self_conditioning",
]
SAMPLER = ["--steps=10", "--candidates=1"]  # of every diffusion row but those of Table 3
ARCHITECTURES = ["encoder_decoder", "decoder_only"]
OBJECTIVES = ["prefix_lm", "span_corruption"]
STEPS_AND_SAMPLES = [(5, 8), (10, 8), (20, 8), (10, 4), (10, 16)]  # the paper's Table 3


@dataclass(frozen=True)
class Size:
    """What is trained and for how long, in steps."""

    pretrain: str  # the set that is pretrained on
    tasks: dict[str, list[str]]  # set -> the evaluation of a model that was fine-tuned on it
    network: list[str]  # flags of every model that starts from nothing
    every: list[str]  # flags of every training
    A: int  # AR pretraining
    N: int  # adaptation
    F: int | dict[str, int]  # fine-tuning, on all tasks alike or on each
    long: int = 2  # the longer adaptation is so many N
    P: int = 0  # diffusion pretraining of Table 1; 0: no Table 1
    folder: str = "out/data"
    table_3: tuple = ()  # tasks whose AR2Diff_N is sampled in the ways of Table 3
    table_3_n: int = 200  # held-out items there: an item at 20 steps and 8 samples costs 160 network calls

    def tuning(self, task: str) -> int:
        return self.F if isinstance(self.F, int) else self.F[task]


LAPTOP = ["--n_layer=3", "--n_embd=96"]
GPT2_SMALL = ["--n_layer=12", "--n_head=12", "--n_embd=768", "--block_size=1024"]
BF16 = ["--dtype=bfloat16", "--compile"]
MBPP = ["-m", "eval.code", "--source={mbpp}", "--split=validation", "--run_code"]
# The paper's (sections 4.1 and 4.2), with GPT-2's vocabulary for its 256,000 and AdamW for what it does not name.
PAPER_EVERY = ["--batch_size=128", "--optimizer=adamw", "--learning_rate=1e-3", "--schedule=constant", *BF16]
PAPER_TASKS = {
    "wmt14": ["-m", "eval.translation", "--source={wmt14_source}", "--target_source={wmt14_target}"],
    "squad": ["-m", "eval.qa", "--source={squad}"],
    "mbpp": [*MBPP, "--samples=80", "--k=1,80"],
}
PAPER_STEPS = dict(A=1_000_000, N=10_000, long=10, F={"wmt14": 500_000, "squad": 250_000, "mbpp": 5_000})


def paper_size(layers: int, heads: int, width: int, hidden: int, P: int = 0) -> Size:
    """One of the paper's sizes: T5 1.1's shape, decoder-only."""
    network = [f"--n_layer={layers}", f"--n_head={heads}", f"--n_embd={width}", f"--n_hidden={hidden}"]
    network.append("--block_size=1024")
    return Size("paper", PAPER_TASKS, network, PAPER_EVERY, **PAPER_STEPS, P=P, folder="out/paper/data")


SIZES = {
    "mini": Size(
        pretrain="mini",
        tasks={
            "mini_translation": ["-m", "eval.translation", "--n=500", "--items=false"],
            "mini_qa": ["-m", "eval.qa", "--n=500", "--items=false"],
            "mini_code": ["-m", "eval.code", "--n=500", "--items=false", "--run_code"],
        },
        network=LAPTOP,
        every=[],
        A=600, N=200, F=200, P=300,
        table_3=("mini_translation", "mini_qa", "mini_code"),
    ),
    "python": Size(
        pretrain="python_code",
        tasks={"python_pairs": ["-m", "eval.python_code", "--n=100"]},
        network=[*LAPTOP, "--block_size=384"],
        every=["--batch_size=16"],
        A=400, N=200, F=100,
    ),
    # One GPU: GPT-2 small, pretrained on all the Python source of the machine.
    "small": Size(
        pretrain="python_code",
        tasks={
            "multi30k": [
                "-m", "eval.translation", "--source={multi30k_source}", "--target_source={multi30k_target}"
            ],
            "squad": ["-m", "eval.qa", "--source={squad}", "--n=1000"],
            "mbpp": [*MBPP, "--samples=10", "--k=1,10"],
            "python_pairs": ["-m", "eval.python_code", "--n=400"],
        },
        network=GPT2_SMALL,
        every=["--batch_size=64", *BF16],
        A=4000, N=1000, F=1000, P=2000,
        folder="out/small/data",
        table_3=("squad", "mbpp"),
    ),
    "paper_base": replace(paper_size(12, 12, 768, 2048, P=1_000_000), table_3=("squad", "mbpp")),
    "paper_large": paper_size(24, 16, 1024, 2816),
    "paper_xl": paper_size(24, 32, 2048, 5120),
}  # fmt: skip


LAPTOP_PARTS = ["mini", "python"]


@dataclass
class StudyConfig:
    part: str = "all"  # all (what a laptop can pay) | mini | python | tried; the other SIZES are eval.tables'
    seeds: int = 3
    lanes: int = 2  # jobs at a time
    threads: int = 1  # of each job
    scale: float = 1.0  # of all step counts; below 1 only to see that everything runs
    out: str = "out/study"
    results: str = "results/study"
    sources: str = ""  # a folder with copies of the real data sets (see sources_of); "": they are fetched
    table: bool = False  # print the tables of what there is, run nothing


def sources_of(folder: str) -> dict[str, str]:
    """The raw files that the evaluations of real tasks read, below a folder or at their official addresses."""
    if not folder:
        test = "test_2016_flickr"
        multi30k = {f"multi30k_{side}": parallel.MULTI30K[f"{test}.{language}"].url for side, language in LANGUAGES}
        wmt14 = {f"wmt14_{side}": f"{NEWSTEST}.{language}" for side, language in LANGUAGES}
        return {"squad": squad.DEV.url, "mbpp": mbpp.MBPP.url} | multi30k | wmt14
    found = {"squad": "squad/dev-v1.1.json.gz", "mbpp": "mbpp/mbpp.jsonl"}
    for side, language in LANGUAGES:
        found |= {f"multi30k_{side}": f"multi30k/test_2016_flickr.{language}.gz"}
        found |= {f"wmt14_{side}": f"wmt14/newstest2014.{language}"}
    return {name: f"{folder}/{path}" for name, path in found.items()}


LANGUAGES = (("source", "en"), ("target", "fr"))
NEWSTEST = "out/paper/data/newstest2014"  # where eval.tables puts what data.wmt14 reads


class Model(NamedTuple):
    """A checkpoint that some job makes."""

    checkpoint: Path
    job: str
    settings: dict  # of its training, as far as they are not the defaults


class Plan:
    """The jobs of one part and seed, as they are asked for."""

    def __init__(self, part: str, size: Size, seed: int, cfg: StudyConfig):
        self.part, self.size, self.seed, self.cfg = part, size, seed, cfg
        self.out, self.jobs = Path(cfg.out) / part / f"seed{seed}", []
        self.trainings: dict[str, tuple[dict, Path, int]] = {}  # job -> settings, set, steps

    def job(self, name: str, commands: list[list[str]], after: list[str], done: Callable[[], bool]) -> str:
        self.jobs.append(Job(f"{self.part}/{self.seed}/{name}", commands, after, done))
        return self.jobs[-1].name

    def train(self, name: str, data: str, steps: int, *flags: str, source: Model | None = None, copy_of: str = ""):
        """A training from scratch, from a source or, with copy_of, the training of the source, longer."""
        folder, steps, data = self.out / name, max(2, round(steps * self.cfg.scale)), Path(self.size.folder) / data
        argv = ["train.py", *([f"--init_from={source.checkpoint}"] if source and not copy_of else [])]
        argv += [f"--out_dir={folder}", f"--data={data}", f"--max_steps={steps}"]
        argv += [f"--seed={self.seed}", *self.size.every, *flags, "--init_from=resume"]
        commands = [copy_once(self.out / copy_of, folder), argv] if copy_of else [argv]
        job = self.job(name, commands, [source.job] if source else [], lambda: at_step(folder, steps))
        settings = (source.settings if source else {}) | read_settings(TrainConfig, [*self.size.every, *flags])[0]
        self.trainings[job] = settings, data, steps
        return Model(folder / "ckpt.pt", job, settings)

    def convert(self, name: str, settings: dict[str, str], source: Model) -> Model:
        """The diffusion model that an AR model becomes."""
        path, flags = self.out / name / "ckpt.pt", [f"--{key}={value}" for key, value in settings.items()]
        argv = ["ar2diff.py", f"--init_from={source.checkpoint}", f"--out_dir={path.parent}", "--check", "--overwrite"]
        cfg = configure(ConvertConfig, flags)
        made = {"paradigm": "diffusion", "target_attention": "bidirectional"}
        made |= {name: getattr(cfg, name) for name in ("prefix_attention", "shift", "lookahead", "self_conditioning")}
        return Model(path, self.job(name, [[*argv, *flags]], [source.job], path.exists), source.settings | made)

    def judge(self, name: str, task: str, model: Model, *sampler: str) -> None:
        """Evaluate a fine-tuned model; `name` is the row in the result's file name."""
        result = Path(self.cfg.results) / f"{self.part}_{self.seed}_{task}_{name}.json"
        evaluate = [arg.format(**sources_of(self.cfg.sources)) for arg in self.size.tasks[task]]
        argv = [*evaluate, f"--init_from={model.checkpoint}", f"--json={result}", "--seed=0", *sampler]
        self.job(f"{task}_{name}_eval", [argv], [model.job], result.exists)


def table_2(plan: Plan) -> dict[str, dict[str, Model]]:
    """Rows x tasks of the main table; returns the fine-tuned model of each row and task."""
    size, tuned = plan.size, {}
    pretrain = [*size.network, "--schedule=constant"]
    ar = plan.train("ar", size.pretrain, size.A, *pretrain)
    scratch = plan.train("scratch", size.pretrain, size.N, *pretrain, *SCRATCH)
    # As many FLOPs as A AR steps and N diffusion steps: an unrolled step passes over everything twice.
    longer = dict(source=scratch, copy_of="scratch")
    equal = plan.train("scratch_longer", size.pretrain, size.N + size.A // 2, *pretrain, *SCRATCH, **longer)
    rows = {"AR": ar, "diffusion, N steps": scratch, "diffusion, equal FLOPs": equal}

    def adapt(name: str, steps: int, *flags: str, **source) -> Model:
        return plan.train(name, size.pretrain, steps, "--schedule=constant", *flags, **source)

    opening = f"--anneal_steps={size.N // 2}"
    rows["AR2Diff_0"] = start = plan.convert("start", {}, ar)
    rows["AR2Diff_N"] = adapted = adapt("adapt", size.N, opening, source=start)
    longer = dict(source=adapted, copy_of="adapt")
    rows[f"AR2Diff_{size.long}N"] = adapt("adapt_longer", size.long * size.N, opening, **longer)
    hard = plan.convert("hard_start", {"self_conditioning": "false"}, ar)
    rows["AR2Diff_N, no self-conditioning"] = adapt("hard_adapt", size.N, opening, source=hard)
    papers = plan.convert("paper_start", PAPER, ar)
    rows["AR2Diff_N (paper's settings)"] = adapt("paper_adapt", size.N, source=papers)
    for task in size.tasks:
        for row, model in rows.items():
            tuned.setdefault(row, {})[task] = plan.train(f"{task}_{plain(row)}", task, size.tuning(task), source=model)
            plan.judge(plain(row), task, tuned[row][task], *([] if row == "AR" else SAMPLER))
    return tuned


def table_1(plan: Plan) -> None:
    """Architecture x objective: diffusion from scratch for P steps, then F on each task."""
    size = plan.size
    for arch in ARCHITECTURES:
        for objective in OBJECTIVES:
            name = f"table1_{arch}_{objective}"
            flags = [*size.network, *SCRATCH, f"--arch={arch}", f"--objective={objective}", "--schedule=constant"]
            model = plan.train(name, size.pretrain, size.P, *flags)
            for task in size.tasks:
                model_of_task = plan.train(f"{task}_{name}", task, size.tuning(task), source=model)
                plan.judge(name, task, model_of_task, *SAMPLER)


def plan_of(part: str, size: Size, seed: int, cfg: StudyConfig) -> Plan:
    """All jobs of one part and seed."""
    plan = Plan(part, size, seed, cfg)
    tuned = table_2(plan)
    for task in size.table_3:
        for steps, samples in STEPS_AND_SAMPLES:
            sampler = [f"--steps={steps}", f"--candidates={samples}", f"--n={size.table_3_n}"]
            plan.judge(f"table3_{steps}_{samples}", task, tuned["AR2Diff_N"][task], *sampler)
    if size.P:
        table_1(plan)
    return plan


# What was tried for the defaults, on the first task of a part. The search began where the mask is opened at once, and
# each line is one change from there; opening it edge by edge, as AR2Diff_N of the main table now does, was the best.
TRIED = {
    "mask opened at once": ({}, []),
    "no shift (own position)": ({"shift": "false"}, []),
    "shift and lookahead": ({"lookahead": "true"}, []),
    "no self-conditioning": ({"self_conditioning": "false"}, []),
    "joint prefix": ({"prefix_attention": "joint"}, []),
    "causal prefix": ({"prefix_attention": "causal"}, []),
    "mask noise": ({"noise": "mask"}, []),
    "from scratch, shift": (None, [*SCRATCH, "--shift"]),
    "from scratch, joint prefix": (None, [*SCRATCH, "--prefix_attention=joint"]),
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
READOUTS = list(TRIED)[:5]
NETWORKS = list(TRIED)[:9]


def ar_of(part: str, seed: int, cfg: StudyConfig) -> Model:
    """The pretrained AR model of a part, which table_2 plans."""
    settings = read_settings(TrainConfig, [*SIZES[part].every, *SIZES[part].network])[0]
    return Model(Path(cfg.out) / part / f"seed{seed}" / "ar" / "ckpt.pt", f"{part}/{seed}/ar", settings)


def jobs_tried(part: str, labels: list[str], seed: int, cfg: StudyConfig) -> list[Job]:
    """Each of these lines of TRIED: convert, N steps of adaptation, F on the first task of the part, evaluate."""
    size, plan = SIZES[part], Plan("tried", SIZES[part], seed, cfg)
    ar, task = ar_of(part, seed, cfg), next(iter(size.tasks))
    for label in labels:
        (settings, flags), name = TRIED[label], f"{task}_{plain(label)}"
        if settings is None:
            start, stage_2, stage_3 = None, [*size.network, "--schedule=constant", *flags], []
        else:
            start, stage_2 = plan.convert(f"{name}_start", settings, ar), ["--schedule=constant", *flags]
            stage_3 = [flag for flag in flags if not flag.startswith("--schedule")]
        model = plan.train(f"{name}_adapt", size.pretrain, size.N, *stage_2, source=start)
        tuned = plan.train(f"{name}_tune", task, size.tuning(task), *stage_3, source=model)
        plan.judge(plain(label), task, tuned, *SAMPLER)
    return plan.jobs


def turn(job: Job) -> tuple:
    """Where a job stands in line: what was tried and what it starts from, then Table 2, then the rest."""
    part, seed, rest = job.name.split("/")
    if part == "tried":
        return (0 if "python" not in rest else 1), int(seed)
    if part == "mini" and seed in "12" and (rest in ("ar", "start", "adapt") or "translation_ar2diff_n" in rest):
        return 0, int(seed)
    return 3 if "table" in rest else 2, int(seed)


def run_jobs(jobs: list[Job], cfg: StudyConfig) -> None:
    """Do what is missing: the evaluations without a result, and what they need."""
    by_name = {job.name: job for job in jobs}
    missing = [job for job in jobs if job.name.endswith("_eval") and not job.done()]
    needed = {job.name for job in missing}
    while missing:
        before = [by_name[name] for name in missing.pop().after if name in by_name and name not in needed]
        needed |= {job.name for job in before}
        missing += before
    work([job for job in jobs if job.name in needed], Path(cfg.out) / "logs", cfg.lanes, cfg.threads)


def main(argv: list[str]) -> None:
    """Run the parts that argv names, then print the tables."""
    cfg = configure(StudyConfig, argv)
    parts = ["all", *LAPTOP_PARTS, "tried"]  # the others need sets that eval.tables prepares
    if cfg.part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}; got {cfg.part!r}{nearest(cfg.part, parts)}")
    if not cfg.table:
        jobs = []
        wanted = [cfg.part] if cfg.part in LAPTOP_PARTS else LAPTOP_PARTS
        for size in (SIZES[part] for part in wanted):
            build_if_missing(Path(size.folder) / size.pretrain)
        for seed in range(1, cfg.seeds + 1):
            for part in wanted:
                rows = plan_of(part, SIZES[part], seed, cfg).jobs
                labels = {("mini", 1): list(TRIED), ("mini", 2): NETWORKS, ("python", 1): READOUTS}.get((part, seed))
                tried = jobs_tried(part, labels, seed, cfg) if labels and cfg.part in ("all", "tried") else []
                jobs += (rows if cfg.part != "tried" else rows[:1]) + tried
        run_jobs(sorted(jobs, key=turn), cfg)
    from runs.tables import print_tables  # they read this file's rows

    print_tables(Path(cfg.results).parent)


if __name__ == "__main__":
    run(main)
