"""What goes wrong inside a step, in one line that says what to do: no memory, no number."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from atomic import write_atomically
from cost import count_by_muon, count_params, training_memory
from model import ModelConfig, model_settings


@contextlib.contextmanager
def explained(settings: dict, processes: int) -> Iterator[dict]:
    """Raise ValueError, with what to lower, where memory runs out inside.

    Yields a dict in which the loop keeps step, rows, prefix and target: where it is, and the
    size of its micro-batch.
    """
    now = {"step": 0, "rows": 1, "prefix": 1, "target": 1}
    try:
        yield now
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(out_of_memory(settings, now, processes)) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out: CUDA, mps and the CPU's allocator each say it in their own words."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def out_of_memory(settings: dict, now: dict, processes: int) -> str:
    """The line for a step that did not fit: what it wants, and what to lower. See `explained`."""
    m, rows, accum = ModelConfig(**model_settings(settings)), now["rows"], settings["grad_accum_steps"]
    half, again = settings["dtype"] == "bfloat16", settings["gradient_checkpointing"]
    by_muon = count_by_muon(m) if settings["optimizer"] == "muon" else 0
    sizes = (rows, now["prefix"], now["target"], 2 if half else 4, by_muon)
    need = training_memory(m, count_params(m), *sizes, gradient_checkpointing=again)
    ways = []
    if rows > 1:
        more = next(k for k in range(accum + 1, accum * rows + 1) if accum * rows % k == 0)
        ways.append(f"--grad_accum_steps={more} (the same run, a micro-batch of {accum * rows // more} rows)")
    if not again and not settings["compile"] and not settings["parallel"] == "fsdp":
        ways.append("--gradient_checkpointing")
    ways += [] if half else ["--dtype=bfloat16"]
    if need["activations"] + need["logits"] < sum(need.values()) / 2 or not ways:  # parameters are what fills it
        ways.insert(0, f"{'' if processes > 1 else 'torchrun with '}--parallel=fsdp, a smaller --n_embd or --n_layer")
    length = now["prefix"] + now["target"]
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in need.items())
    return (
        f"out of memory at step {now['step']}: {rows} rows of {length} tokens want about {parts}; "
        f"try {', or '.join(ways)}, with --init_from=resume"
    )


def no_number(out: Path, step: int, losses: list[float], norm: float, settings: dict) -> str:
    """The line for a loss or a gradient that is none."""
    size = settings["batch_size"]
    by = f" ({', '.join(map(str, losses))} by process)" if len(losses) > 1 else ""
    return (
        f"loss {sum(losses) / len(losses)}{by}, gradient norm {norm} at step {step} (examples {step * size}.."
        f"{(step + 1) * size - 1} of {settings['data']}, seed {settings['seed']}); {out / 'ckpt.pt'} holds the last "
        f"good step, {out / 'bad_batch.json'} the batch and how to replay it. Try a lower --learning_rate or "
        "--dtype=float32."
    )


def keep_bad_batch(out: Path, step: int, losses: list[float], norm: float, batch, settings: dict) -> None:
    """Write what a step that gave no number was made of: a small JSON file, whatever the size of the model.

    batch: the global batch, the rows of all processes. The step is a function of the weights and of this file.
    """
    entry = {
        "step": step,
        "loss_by_process": [str(loss) for loss in losses],  # nan is no JSON
        "grad_norm": str(norm),
        **{name: settings[name] for name in ("data", "seed", "batch_size", "bucket", "grad_accum_steps")},
        "replay": f"python train.py --out_dir={out} --init_from=resume --save_interval=1",
        "note": "The replay goes from the last checkpoint to this step again, bit for bit on one device, and leaves "
        "the weights right before it in ckpt.pt. Draws are functions of (seed, step, example).",
        "example": batch.example.tolist(),
        "prefix": batch.prefix.tolist(),
        "target": batch.target.tolist(),
    }
    write_atomically(out / "bad_batch.json", lambda file: file.write(json.dumps(entry).encode()))
