"""What the paper's trainings cost, and what more GPUs change: the arithmetic of docs/scale.md.

    python -m runs.scale                              # at the assumptions below
    python -m runs.scale --mfu=0.3 --peak_tflops=312  # on an A100

FLOPs, parameters and bytes are counted by cost.py. Assumed are the share of its peak that a GPU reaches (nothing here
was measured on a GPU), the links, and what the paper leaves open: prefix and target of 512 tokens each, every row full,
fine-tuning to the last step.
"""

import functools
from dataclasses import dataclass

from configurator import configure, read_settings, run
from cost import count_params, train_flops, training_memory
from encdec import model_without_weights
from eval.common import markdown
from eval.tables import GPU_TFLOPS
from model import ModelConfig
from optimizers import muon_takes
from runs.study import PAPER_STEPS, SIZES
from train import TrainConfig


@dataclass
class ScaleConfig:
    mfu: float = 0.4  # assumed: share of the peak that a training reaches
    peak_tflops: float = float(GPU_TFLOPS)  # of a GPU, bfloat16, dense; an H100's data sheet
    memory_gb: float = 80.0  # of a GPU
    inside_gb: float = 450.0  # GB/s that a GPU sends to the other seven of its machine: NVLink
    link_gb: float = 50.0  # and to other machines: a port of 400 Gbit/s each

    def __post_init__(self):
        if not 0 < self.mfu <= 1 or min(self.peak_tflops, self.memory_gb, self.inside_gb, self.link_gb) <= 0:
            raise ValueError(f"mfu must be in (0, 1], the others above 0; got {self}")


PREFIX, TARGET, BATCH = 512, 512, 128
SHAPES = {"Base": "paper_base", "Large": "paper_large", "XL": "paper_xl"}
VOCABULARY = dict(vocab_size=256_000, n_ordinary=255_900, pad_id=255_997, sep_id=255_998, mask_id=255_999)  # PaLM's
DIFFUSION = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
FINE_TUNING = sum(PAPER_STEPS["F"].values())  # of the three tasks together
# Row of Table 2 -> (AR, diffusion) steps before fine-tuning, and what is fine-tuned.
ROWS = {
    "AR": (PAPER_STEPS["A"], 0, "ar"),
    "diffusion": (0, PAPER_STEPS["A"], "diffusion"),
    "AR2Diff_0": (PAPER_STEPS["A"], 0, "diffusion"),
    "AR2Diff_10K": (PAPER_STEPS["A"], PAPER_STEPS["N"], "diffusion"),
    "AR2Diff_100K": (PAPER_STEPS["A"], PAPER_STEPS["N"] * PAPER_STEPS["long"], "diffusion"),
}
# Beyond the paper: what one GPU of 80 GB does not hold. Llama 2's shapes and vocabulary.
LARGER = {
    "7B": dict(n_layer=32, n_head=32, n_embd=4096, n_hidden=11008, tie_weights=False, vocab_size=32_000),
    "13B": dict(n_layer=40, n_head=40, n_embd=5120, n_hidden=13824, tie_weights=False, vocab_size=32_000),
}
GPUS = (1, 8, 64, 128)


@functools.cache
def network(size: str, paradigm: str = "diffusion") -> ModelConfig:
    """The paper's network of that size, or a larger one."""
    if size in LARGER:
        ids = {name: LARGER[size]["vocab_size"] - k for k, name in enumerate(("mask_id", "sep_id", "pad_id"), 1)}
        settings = LARGER[size] | ids | {"n_ordinary": ids["pad_id"]}
    else:
        settings = read_settings(TrainConfig, SIZES[SHAPES[size]].network)[0] | VOCABULARY
    settings = settings | {"block_size": PREFIX + TARGET, "target_length": TARGET}
    return ModelConfig(**settings | (DIFFUSION if paradigm == "diffusion" else {}))


@functools.cache
def params_of(size: str) -> int:
    return count_params(network(size))


def step_flops(size: str, paradigm: str) -> int:
    """Of one optimizer step, with 128 rows; diffusion backpropagates two terms, L(1) and L(2)."""
    return BATCH * train_flops(network(size, paradigm), PREFIX, TARGET, unroll_steps=2)


def muon_flops(m: ModelConfig) -> int:
    """Of Muon in one step: five Newton-Schulz iterations, each X Xᵀ, its square and a product, for every matrix."""
    shapes = [sorted(p.shape) for name, p in model_without_weights(m).named_parameters() if muon_takes(name, p)]
    return sum(5 * (4 * a * a * b + 2 * a**3) for a, b in shapes)


def gpu_hours(cfg: ScaleConfig, flops: float) -> float:
    return flops / (cfg.peak_tflops * 1e12 * cfg.mfu) / 3600


def costs_table(cfg: ScaleConfig) -> str:
    """The rows of Table 2: FLOPs of their parts, GPU-hours, and days on 8 and 64 GPUs."""
    lines = []
    for size in SHAPES:
        ar, diffusion = step_flops(size, "ar"), step_flops(size, "diffusion")
        for row, (ar_steps, diffusion_steps, tuned) in ROWS.items():
            before = ar_steps * ar + diffusion_steps * diffusion
            tuning = FINE_TUNING * (ar if tuned == "ar" else diffusion)
            tokens = (ar_steps + diffusion_steps) * BATCH * (PREFIX + TARGET)
            hours = gpu_hours(cfg, before + tuning)
            new = gpu_hours(cfg, before + tuning - ROWS["AR"][0] * ar) if row.startswith("AR2Diff") else hours
            cells = [size, row, f"{tokens / 1e9:.1f}", f"{before:.2e}", f"{tuning:.2e}", f"{hours:,.0f}", f"{new:,.0f}"]
            lines.append([*cells, f"{hours / 8 / 24:.1f}", f"{hours / 64 / 24:.2f}"])
    header = ["size", "row", "pretraining tokens, 10⁹", "its FLOPs", "fine-tuning FLOPs", "GPU-hours"]
    header += ["without the AR pretraining", "days on 8", "days on 64"]
    return markdown(header, lines)


def share(size: str, gpus: int, fsdp: bool) -> float:
    """GB of weights, gradients and AdamW's moments on each GPU, with autocast's copies of the weights."""
    params = params_of(size)
    return params * (16 / (gpus if fsdp else 1) + 2) / 1e9


def shares_table(cfg: ScaleConfig) -> str:
    """What the parameters take of a GPU before a token is read, under DDP and FSDP."""
    lines = []
    for size in [*SHAPES, *LARGER]:
        params = params_of(size)
        cells = [share(size, 1, False), share(size, 8, True), share(size, 64, True)]
        lines.append([size, f"{params / 1e6:,.0f}M", *(f"{gb:,.1f}" for gb in cells)])
    return markdown(["size", "parameters", "ddp, GB", "fsdp on 8, GB", "fsdp on 64, GB"], lines)


def rows_that_fit(cfg: ScaleConfig, size: str, gpus: int) -> int:
    """The largest micro-batch, a divisor of the rows of a GPU, that its memory holds; 0 where none does."""
    m, params = network(size), params_of(size)
    for parts in (k for k in range(1, BATCH // gpus + 1) if BATCH // gpus % k == 0):
        rows = BATCH // gpus // parts
        if sum(training_memory(m, params, rows, PREFIX, TARGET, 2).values()) <= cfg.memory_gb * 1e9:
            return rows
    return 0


def gpus_table(cfg: ScaleConfig) -> str:
    """A diffusion step of 128 rows on more and more GPUs: its micro-batches, and seconds of each part."""
    lines, rate = [], cfg.peak_tflops * 1e12 * cfg.mfu
    for size in SHAPES:
        params, muon = params_of(size), muon_flops(network(size)) / rate
        for gpus in GPUS:
            rows, compute = rows_that_fit(cfg, size, gpus), step_flops(size, "diffusion") / gpus / rate
            link = cfg.inside_gb if gpus <= 8 else cfg.link_gb
            travels = (gpus - 1) / gpus * params / (link * 1e9)  # seconds for a byte of each parameter
            # A ring: gradients there and back, 4 bytes. Under FSDP each of two terms gathers weights in 2 bytes twice.
            ddp, fsdp = 2 * 4 * travels, 2 * (2 + 2 + 4) * travels
            cells = [size, str(gpus), str(rows), str(BATCH // gpus // rows) if rows else "-"]
            lines.append([*cells, *(f"{seconds:.3f}" for seconds in (compute, ddp, fsdp, muon))])
    header = ["size", "GPUs", "rows at a time", "grad_accum_steps", "compute, s", "ddp exchange, s", "fsdp exchange, s"]
    return markdown([*header, "Muon, s"], lines)


def biggest(cfg: ScaleConfig) -> str:
    """What one row takes of a GPU, by part: the shape of the memory."""
    lines = []
    for size in SHAPES:
        found = training_memory(network(size), params_of(size), 1, PREFIX, TARGET, 2)
        fixed = found["weights"] + found["gradients"] + found["optimizer"]
        one = found["activations"] + found["logits"]
        lines.append([size, *(f"{part / 1e9:.2f}" for part in (fixed, found["activations"], found["logits"], one))])
    header = ["size", "for parameters, GB", "activations of a row, GB", "logits of a row, GB", "a row, GB"]
    return markdown(header, lines)


TABLES = {"scale_costs": costs_table, "scale_shares": shares_table, "scale_rows": biggest, "scale_gpus": gpus_table}


def main(argv: list[str]) -> None:
    """Print the tables."""
    cfg = configure(ScaleConfig, argv)
    print(f"at {cfg.mfu:.0%} of {cfg.peak_tflops:g} TFLOP/s a GPU (assumed), {cfg.link_gb:g} GB/s between machines")
    for name, table in TABLES.items():
        print(f"\n### {name}\n\n{table(cfg)}")


if __name__ == "__main__":
    run(main)
