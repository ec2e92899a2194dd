"""The paper's three tables, ours beside theirs (arXiv 2401.17181, Tables 1 to 3).

    python -m eval.tables --scale=toy                       # two CPU cores, hours; what is done stays done
    python -m eval.tables --scale=small --sources=FOLDER    # one GPU, every job under eight minutes
    python -m eval.tables --scale=paper --plan              # what each job would cost; runs nothing

toy: the three mini tasks and the Python source of this machine. small: SQuAD, MBPP, Multi30k and Python source at the
size of GPT-2 small. paper: its sizes, steps and tasks, with GPT-2's vocabulary; --pretrain names a stream set that
stands for its mC4 and The Stack. --sources: a folder with copies of the real sets (runs/study.py, sources_of); without
it they are fetched. --tiny: every job of a scale for 20 steps of a network of two layers, to see that it starts.
Cells are the mean over training seeds and, in brackets, the lowest and the highest; what has not been run is empty.
"""

import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from configurator import configure, nearest, run
from cost import count_by_muon, count_params, train_flops, training_memory
from data import mbpp, parallel, squad, wmt14
from data.loader import build_if_missing, open_set
from device import measured_flops, pick_device
from eval.common import environment, markdown, write_text
from eval.plots import plot_study
from model import ModelConfig, model_settings
from runs.jobs import plain
from runs.study import (
    ARCHITECTURES,
    LAPTOP_PARTS,
    NEWSTEST,
    OBJECTIVES,
    SIZES,
    STEPS_AND_SAMPLES,
    Plan,
    Size,
    StudyConfig,
    plan_of,
    run_jobs,
    turn,
)
from runs.tables import results_of, spread
from train import TrainConfig

# The columns of the paper, and what stands in them here: (part of the study, set, metric, label).
TASKS = {
    "toy": [
        ("mini", "mini_translation", "bleu", "mini translation BLEU"),
        ("mini", "mini_qa", "f1", "mini QA F1"),
        ("mini", "mini_code", "pass@1", "mini code pass@1"),
    ],
    "small": [
        ("small", "multi30k", "bleu", "Multi30k BLEU"),
        ("small", "squad", "f1", "SQuAD F1"),
        ("small", "mbpp", "pass@10", "MBPP pass@10"),
    ],
    "paper": [
        ("paper_base", "wmt14", "bleu", "WMT14 BLEU"),
        ("paper_base", "squad", "f1", "SQuAD F1"),
        ("paper_base", "mbpp", "pass@80", "MBPP pass@80"),
    ],
}
PARTS = {"toy": LAPTOP_PARTS, "small": ["small"], "paper": ["paper_base", "paper_large", "paper_xl"]}
PAPER_COLUMNS = ["WMT14 En-Fr BLEU", "SQuAD F1", "MBPP pass@80 %"]
PAPER_1 = {
    ("encoder_decoder", "prefix_lm"): (27.6, 75.8, 0.0),
    ("decoder_only", "prefix_lm"): (29.8, 77.4, 12.2),
    ("encoder_decoder", "span_corruption"): (28.7, 78.2, 0.0),
    ("decoder_only", "span_corruption"): (29.1, 80.6, 11.1),
}
# Size Base. The paper's "Diffusion" has as many steps as its AR pretraining, so twice the FLOPs; N is 10K and 100K.
PAPER_2 = {
    "AR": (33.27, 68.11, 5.5),
    "diffusion, N steps": None,
    "diffusion, equal FLOPs": (29.83, 77.41, 12.2),
    "AR2Diff_0": (29.62, 64.77, 1.1),
    "AR2Diff_N": (29.41, 68.12, 4.4),
    "AR2Diff_long": (29.92, 71.87, 7.7),
    "AR2Diff_N, no self-conditioning": None,
    "AR2Diff_N (paper's settings)": None,
}
PAPER_3 = {(5, 8): (77.41, 5.5), (10, 8): (77.41, 12.2), (20, 8): (77.72, 16.7), (10, 4): (77.51, 11.1)}
PAPER_3[10, 16] = (77.13, 13.3)
GPU_TFLOPS = 989  # of an H100, bfloat16, dense (data sheet)


@dataclass
class TablesConfig:
    scale: str = "toy"  # toy | small | paper
    plan: bool = False  # print tokens, FLOPs, memory and hours of every training, run nothing
    tiny: bool = False  # 20 steps of a small network each
    seeds: int = 3
    lanes: int = 0  # jobs at a time; 0: two of one core each at toy scale, else one
    sources: str = ""  # a folder with copies of the real data sets; "": they are fetched
    pretrain: str = ""  # paper: a stream set made with --tokenizer=gpt2, for pretraining
    mfu: float = 0.4  # share of the peak that the plan reckons with
    peak_tflops: float = 0.0  # of the plan; 0: measured here at toy scale, else an H100's
    out: str = "out/study"
    results: str = "results/study"
    picture: str = ""  # where quality against N and against steps is drawn; "": OUT/tables_SCALE.png

    def __post_init__(self):
        if self.scale not in PARTS:
            raise ValueError(f"scale must be one of {', '.join(PARTS)}; got {self.scale!r}{nearest(self.scale, PARTS)}")
        if self.seeds < 1 or self.lanes < 0 or not 0 < self.mfu <= 1 or self.peak_tflops < 0:
            raise ValueError(
                "seeds must be at least 1, lanes and peak_tflops 0 or more, mfu in (0, 1]; got "
                f"{self.seeds}, {self.lanes}, {self.peak_tflops}, {self.mfu}"
            )


def sizes(cfg: TablesConfig) -> dict[str, Size]:
    """The parts of the scale, as the settings change them."""
    found = {part: SIZES[part] for part in PARTS[cfg.scale]}
    if cfg.scale == "paper" and cfg.pretrain:
        found = {part: replace(size, pretrain=str(Path(cfg.pretrain).absolute())) for part, size in found.items()}
    return {part: tiny(size) for part, size in found.items()} if cfg.tiny else found


def tiny(size: Size) -> Size:
    """The same jobs, 20 steps of a small network each, on a CPU."""
    block = [flag for flag in size.network if flag.startswith("--block_size")]
    network = ["--n_layer=2", "--n_head=2", "--n_embd=32", *block]
    every = ["--batch_size=4", "--eval_batches=1", "--eval_interval=20", "--log_interval=1", "--sample_interval=0"]
    tasks = {task: [*argv, "--n=2", "--batch_size=2"] for task, argv in size.tasks.items()}
    for argv in tasks.values():
        argv[:] = ["--samples=1" if a.startswith("--samples") else "--k=1" if a.startswith("--k=") else a for a in argv]
    steps = dict(A=20, N=20, F=20, long=2, P=20 if size.P else 0)
    return replace(size, network=network, every=every, tasks=tasks, table_3=size.table_3[:1], table_3_n=2, **steps)


def study_config(cfg: TablesConfig) -> StudyConfig:
    """What runs.study is told."""
    lanes = cfg.lanes or (2 if cfg.scale == "toy" else 1)
    tag = "_tiny" if cfg.tiny else ""
    return StudyConfig(
        seeds=cfg.seeds, lanes=lanes, threads=1 if cfg.scale == "toy" else 0, out=cfg.out + tag,
        results=(cfg.out + "_tiny/results") if cfg.tiny else cfg.results, sources=cfg.sources,
    )  # fmt: skip


def prepare(cfg: TablesConfig) -> None:
    """Build the sets of the scale that are missing. Raises ValueError where the paper's corpus has no stand-in."""
    for size in sizes(cfg).values():
        folder, here = Path(size.folder), f"--out={size.folder}"
        given = Path(cfg.sources) if cfg.sources else None
        for name in (size.pretrain, *size.tasks):
            if cfg.scale == "toy":
                build_if_missing(folder / name)
            elif (folder / name / "meta.json").exists():
                continue
            elif name in ("python_code", "python_pairs"):
                from data import python_code

                python_code.main(["--source=all", "--tokenizer=gpt2", here])
            elif name == "squad":
                files = ["train-v1.1.json", "dev-v1.1.json"]
                paths = [_copy(given / "squad", file, "train-subset-v1.1.json") for file in files] if given else []
                squad.main([*(f"--{k}={p}" for k, p in zip(("source", "valid_source"), paths)), *GPT2, here])
            elif name == "mbpp":
                mbpp.main([*([f"--source={_copy(given / 'mbpp', 'mbpp.jsonl')}"] if given else []), *GPT2, here])
            elif name == "multi30k":
                keys = dict(source="train.en", target="train.fr", valid_source="val.en", valid_target="val.fr")
                files = [f"--{key}={_copy(given / name, file)}" for key, file in keys.items()] if given else []
                parallel.main([*files, "--name=multi30k", *GPT2, here])
            elif name == "wmt14":
                wmt14.main([*([f"--source={given / name}"] if given else []), *GPT2, here])
            else:
                made = "python -m data.text_file --tokenizer=gpt2 --target_length=512 --block_size=1024"
                raise ValueError(f"the paper pretrains on mC4 and The Stack; name a set made by {made} with --pretrain")
        if "wmt14" in size.tasks and not given and not Path(f"{NEWSTEST}.en").exists():
            lines = wmt14.read()
            for language, side in (("en", "source"), ("fr", "target")):
                write_text(f"{NEWSTEST}.{language}", "".join(example[side] + "\n" for example in lines))


GPT2 = ["--tokenizer=gpt2"]


def _copy(folder: Path, *names: str) -> Path:
    """The first of these files that is there, gzipped or not; else the name of the first, for the error."""
    options = [folder / f"{name}{end}" for name in names for end in ("", ".gz")]
    return next((path for path in options if path.exists()), options[0])


def plans(cfg: TablesConfig) -> list[Plan]:
    return [
        plan_of(part, size, seed, study_config(cfg))
        for seed in range(1, cfg.seeds + 1)
        for part, size in sizes(cfg).items()
    ]


# What it costs


def price(settings: dict, data: Path, steps: int) -> dict:
    """Tokens, FLOPs and peak bytes of a training, every row at the full length of its set.

    A set that has not been made is taken for 512 + 512 tokens of GPT-2's vocabulary.
    """
    if (data / "meta.json").exists():
        held = open_set(data, "train")
        T, block = held.target_length, held.block_size
        ids = {name: getattr(held.tokenizer, name) for name in GPT2_IDS}
    else:
        T, block, ids = 512, 1024, GPT2_IDS
    sized = {"block_size": max(block, settings.get("block_size", 0)), "target_length": T}
    cfg = TrainConfig(**(settings | ids | sized))
    m, rows = ModelConfig(**model_settings(asdict(cfg))), cfg.batch_size // cfg.grad_accum_steps
    params, by_muon = _params(tuple(model_settings(asdict(cfg)).items()))
    by_muon = by_muon if cfg.optimizer == "muon" else 0
    memory = training_memory(m, params, rows, block - T, T, 2 if cfg.dtype == "bfloat16" else 4, by_muon)
    flops = steps * cfg.batch_size * train_flops(m, block - T, T, cfg.unroll_steps)
    return {"params": params, "tokens": steps * cfg.batch_size * block, "flops": flops, "bytes": sum(memory.values())}


GPT2_IDS = dict(vocab_size=50304, n_ordinary=50257, pad_id=50257, sep_id=50258, mask_id=50259)  # data/tokenizer.py's


@functools.cache
def _params(settings: tuple) -> tuple[int, int]:
    m = ModelConfig(**dict(settings))
    return count_params(m), count_by_muon(m)  # a plan asks for the same few networks again and again


def plan_table(cfg: TablesConfig) -> str:
    """One line a training of the first seed, then the sum over all seeds. Evaluations are not in it."""
    if cfg.scale == "toy":
        prepare(cfg)  # takes seconds, and the prices are then exact
    device = pick_device("auto")
    peak = cfg.peak_tflops * 1e12 or (measured_flops(device, "float32") if cfg.scale == "toy" else GPU_TFLOPS * 1e12)
    rows, total = [], 0.0
    for plan in plans(replace(cfg, seeds=1)):
        for job, (settings, data, steps) in plan.trainings.items():
            cost = price(settings, data, steps)
            hours = cost["flops"] / (peak * cfg.mfu) / 3600
            total += hours
            cells = [job, f"{steps:,}", f"{cost['params'] / 1e6:,.1f}M", f"{cost['tokens'] / 1e6:,.1f}M"]
            rows.append([*cells, f"{cost['flops']:.2e}", f"{cost['bytes'] / 2**30:,.1f}", f"{hours:,.3f}"])
    header = ["training", "steps", "parameters", "tokens", "FLOPs", "memory, GiB", "hours"]
    speed = f"{cfg.mfu:.0%} of {peak / 1e12:,.3g} TFLOP/s; a training that goes on from a copy is counted whole"
    hours = f"{total:,.1f} hours a seed, {total * cfg.seeds:,.1f} for {cfg.seeds} seeds"
    return f"{markdown(header, rows)}\n\n{hours}, at {speed}."


# What came out


def cell(results: Path, part: str, task: str, row: str, metric: str) -> str:
    """'91.2 (89.0 to 93.1)' over the seeds that have been run, or nothing."""
    values = [result[metric] for result in results_of(results, part, task, row) if metric in result]
    return spread(values, "" if metric in ("bleu", "chrf") else "%") if values else ""


def table_1(scale: str, results: Path) -> str:
    """Architecture x objective, diffusion from scratch."""
    rows = []
    for objective in OBJECTIVES:
        for arch in ARCHITECTURES:
            row = f"table1_{arch}_{objective}"
            ours = [cell(results, part, task, row, metric) for part, task, metric, _ in TASKS[scale]]
            rows.append([arch, objective, *map(str, PAPER_1[arch, objective]), *ours])
    return markdown(["architecture", "objective", *PAPER_COLUMNS, *(label for *_, label in TASKS[scale])], rows)


def table_2(scale: str, results: Path, part: str = "") -> str:
    """AR against diffusion against AR2Diff by N. The paper's numbers are those of its size Base."""
    rows, long = [], f"AR2Diff_{SIZES[TASKS[scale][0][0]].long}N"
    for name, theirs in PAPER_2.items():
        row = long if name == "AR2Diff_long" else name
        ours = [cell(results, part or p, task, plain(row), metric) for p, task, metric, _ in TASKS[scale]]
        rows.append([row, *(map(str, theirs) if theirs else ("", "", "")), *ours])
    return markdown(["row", *PAPER_COLUMNS, *(label for *_, label in TASKS[scale])], rows)


def table_3(scale: str, results: Path) -> str:
    """Steps x samples of one model: the paper's diffusion model, our AR2Diff_N. All samples are paid for."""
    columns = [task for task in TASKS[scale] if task[1] in SIZES[task[0]].table_3]
    rows = []
    for steps, samples in STEPS_AND_SAMPLES:
        row = f"table3_{steps}_{samples}"
        ours = [cell(results, part, task, row, metric) for part, task, metric, _ in columns]
        rows.append([str(steps), str(samples), str(steps * samples), *map(str, PAPER_3[steps, samples]), *ours])
    return markdown(["steps", "samples", "calls", *PAPER_COLUMNS[1:], *(label for *_, label in columns)], rows)


def tables(scale: str, results: Path) -> dict[str, str]:
    """Name -> Markdown of all tables of a scale."""
    found = {"Table 1": table_1(scale, results), "Table 2": table_2(scale, results), "Table 3": table_3(scale, results)}
    if scale == "paper":
        found |= {f"Table 2, {part}": table_2(scale, results, part) for part in PARTS["paper"][1:]}
    return found


def picture(scale: str, results: Path) -> list[dict]:
    """Quality against N (AR dashed) and against steps at eight samples: what plots.plot_study draws."""
    long, by_n, ar, by_steps = SIZES[TASKS[scale][0][0]].long, {}, {}, {}
    for part, task, metric, label in TASKS[scale]:
        share = {"bleu": 100}.get(metric, 1)  # BLEU has 100 points
        for row, of, tick in (
            *((f"AR2Diff_{n}", by_n, n) for n in ("0", "N", f"{long}N")),
            ("AR", ar, "AR"),
            *((f"table3_{steps}_8", by_steps, str(steps)) for steps, samples in STEPS_AND_SAMPLES if samples == 8),
        ):
            values = [r[metric] / share for r in results_of(results, part, task, plain(row)) if metric in r]
            if values:
                of.setdefault(label, {})[tick] = values
    levels = {label: sum(found["AR"]) / len(found["AR"]) for label, found in ar.items()}
    n = {"title": "AR2Diff_N after fine-tuning (dashed: AR)", "x": "N, steps of adaptation", "levels": levels}
    n |= {"ticks": ["0", "N", f"{long}N"], "series": by_n}
    steps = {"title": "AR2Diff_N, best of 8 samples", "x": "denoising steps", "ticks": ["5", "10", "20"]}
    return [n, steps | {"series": by_steps}]


def main(argv: list[str]) -> dict:
    """Run what is missing of the scale, or print what it would cost; returns the tables."""
    cfg = configure(TablesConfig, argv)
    if cfg.plan:
        print(plan_table(cfg))
        return {}
    prepare(cfg)
    study = study_config(cfg)
    try:
        run_jobs(sorted((job for plan in plans(cfg) for job in plan.jobs), key=turn), study)
    finally:  # what is there is worth a look also where a job failed
        found = tables(cfg.scale, Path(study.results))
        for name, text in found.items():
            print(f"\n### {name}\n\n{text}")
    path = cfg.picture or f"{cfg.out}/tables_{cfg.scale}.png"
    try:
        plot_study(picture(cfg.scale, Path(study.results)), path)
        print(f"\npicture: {path}")
    except ValueError as error:  # no matplotlib
        print(f"\nno picture: {error}")
    print(json.dumps({"scale": cfg.scale, "results": study.results, "tables": list(found)} | environment()))
    return found


if __name__ == "__main__":
    run(main)
