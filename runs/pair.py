"""A pair to keep: a small AR model of Python and the diffusion model converted from it, and their scores.

    python -m runs.pair              # two to three hours on 2 cores; what an earlier run finished is not done again

Trained on the standard library of one version of Python and nothing else, in a vocabulary of 2,048 of its own
(data/bpe.py). Kept are the weights in bfloat16 and what is needed to read them; the scores in results/pair are those of
the files that are kept.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import load, write_atomically
from configurator import configure, run
from data.tokenizer import FILE
from runs.jobs import Job, at_step, work

NETWORK = ["--n_layer=6", "--n_head=6", "--n_embd=192"]
# Data set -> tokens of prefix and target, and of the target with its separator. A diffusion model learns from what
# stands in targets, so in adaptation they are three quarters of a row.
SETS = {"pretraining": (192, 64), "adaptation": (128, 96), "bodies": (192, 32)}
A, N, F = 2200, 1500, 600  # steps of AR pretraining, adaptation, fine-tuning on bodies (four times through)
KEPT = ("format", "step", "model", "model_config", "tokenizer", "train_config", "converted_from", "fingerprint")


@dataclass
class PairConfig:
    out: str = "out/pair"  # where the trainings go
    kept: str = "pair"  # where the files go that are kept
    results: str = "results/pair"
    source: str = "stdlib"  # what is learned, as in data.python_code
    scale: float = 1.0  # of the steps; those on bodies are never more than at 1: there are few bodies
    n: int = 200  # held-out bodies that are judged
    seed: int = 1337
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: str = "float32"  # float32 | bfloat16


# row of results/pair -> which of the two models, how it is decoded
READOUTS = {
    "ar": ("ar", ["--temperature=0.2"]),
    "diffusion_10": ("diffusion", ["--steps=10", "--candidates=1"]),
    "diffusion_10_of_8": ("diffusion", ["--steps=10", "--candidates=8"]),
    "diffusion_30": ("diffusion", ["--steps=30", "--candidates=1"]),
    "diffusion_30_of_8": ("diffusion", ["--steps=30", "--candidates=8"]),
    "diffusion_31_by_confidence": ("diffusion", ["--sampler=confidence", "--steps=31", "--candidates=1"]),
}


def jobs(cfg: PairConfig) -> list[Job]:
    """The trainings, one after the other."""
    out, data = Path(cfg.out), Path(cfg.out) / "data"
    every = [f"--seed={cfg.seed}", f"--device={cfg.device}", f"--dtype={cfg.dtype}"]

    def scaled(steps: int) -> int:
        return max(2, round(steps * cfg.scale))

    def train(name: str, data_set: str, steps: int, *flags: str, after: str, source: str = "") -> Job:
        start = [f"--init_from={out / source / 'ckpt.pt'}"] if source else []
        argv = ["train.py", *start, f"--data={data / data_set}", f"--out_dir={out / name}", *every, *flags]
        argv += [f"--max_steps={steps}", "--sample_interval=0", "--init_from=resume"]
        return Job(name, [argv], [after], lambda: at_step(out / name, steps))

    pretraining, adaptation, fine_tuning = scaled(A), scaled(N), min(F, scaled(F))

    vocabulary = out / FILE

    def build(name: str) -> list[str]:
        argv = ["-m", "data.python_code", f"--source={cfg.source}", f"--tokenizer={vocabulary}", "--bare"]
        block, target = SETS[name]
        return [*argv, f"--block_size={block}", f"--target_length={target}", f"--out={data / name}"]

    # Micro-batches of one prefix length: most docstrings are short, and what fills up the others costs time.
    on_bodies = ["--bucket=8", "--grad_accum_steps=4"]
    convert = ["ar2diff.py", f"--init_from={out / 'ar' / 'ckpt.pt'}", f"--out_dir={out / 'start'}", "--check"]
    opening = f"--anneal_steps={adaptation // 3}"
    decay = ["--schedule=cosine", "--min_lr_ratio=0.1"]
    return [
        Job("tokenizer", [["-m", "data.bpe", f"--source={cfg.source}", f"--out={vocabulary}"]], [], vocabulary.exists),
        Job(
            "data",
            [build(name) for name in SETS],
            ["tokenizer"],
            (data / "bodies" / "python_pairs" / "meta.json").exists,
        ),
        train("ar", "pretraining/python_code", pretraining, *NETWORK, *decay, after="data"),
        Job("start", [[*convert, "--overwrite"]], ["ar"], (out / "start" / "ckpt.pt").exists),
        train("adapt", "adaptation/python_code", adaptation, *decay, opening, after="start", source="start"),
        train(
            "bodies",
            "bodies/python_pairs",
            fine_tuning,
            *on_bodies,
            "--full_noise_prob=0.5",
            after="adapt",
            source="adapt",
        ),
        train("ar_bodies", "bodies/python_pairs", fine_tuning, *on_bodies, after="ar", source="ar"),
    ]


def keep(source: Path, target: Path) -> None:
    """A checkpoint as it is kept: weights in bfloat16, no optimizer. Its tokenizer's file must stand beside target."""
    state = load(source)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in state["model"].items()}
    found = {name: state[name] for name in KEPT if name in state} | {"model": weights}
    write_atomically(target, lambda file: torch.save(found, file))


def main(argv: list[str]) -> None:
    """Train what is missing, keep both models, judge what is kept."""
    cfg = configure(PairConfig, argv)
    out, kept = Path(cfg.out), Path(cfg.kept)
    work(jobs(cfg), out / "logs", lanes=1, threads=0)
    kept.mkdir(parents=True, exist_ok=True)
    vocabulary = (out / "ar" / FILE).read_bytes()
    write_atomically(kept / FILE, lambda file: file.write(vocabulary))
    for name, folder in (("ar", "ar_bodies"), ("diffusion", "bodies")):
        keep(out / folder / "ckpt.pt", kept / f"{name}.pt")
    judge = []
    for row, (name, decoding) in READOUTS.items():
        result = Path(cfg.results) / f"{row}.json"
        command = ["-m", "eval.python_code", f"--init_from={kept / name}.pt", f"--n={cfg.n}", f"--json={result}"]
        judge.append(Job(row, [[*command, f"--data={out / 'data' / 'bodies' / 'python_pairs'}", *decoding]], []))
    work(judge, out / "logs", lanes=1, threads=0)


if __name__ == "__main__":
    run(main)
