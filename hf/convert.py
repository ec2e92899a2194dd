"""What ar2diff.py does with other people's weights: import, check on a text, export."""

from pathlib import Path

import torch

from data.objectives import Batch
from data.tokenizer import Tokenizer, get_tokenizer
from hf.export import export_folder
from hf.load import load_hf, resolve_source
from infra.checkpoint import load
from model import ModelConfig, split_prompt

# The text that --check reads if none is given.
TEXT = (
    "The harbour was quiet in the early morning. Two boats lay at the quay, and on one of them a "
    "man in a blue coat was mending a net. He did not look up when the bell of the old church "
    "began to ring. Later, he said, there would be wind from the west, and by noon all the boats "
    "would be back. The children knew it too; they had already gone down to the beach with "
    "baskets, to wait for the fish and to hear the news from the other side of the bay. "
)


def import_source(name: str, block_size: int, target_length: int):
    """Read weights and print what was found. Returns (model, tokenizer, "", name, path)."""
    path = resolve_source(name)
    if path is None:
        raise ValueError(f"{name}: no .pt file, Hugging Face folder, hub name or GGUF file")
    model, tokenizer, notes = load_hf(path, block_size, target_length)
    dtype = str(model.tok.weight.dtype).removeprefix("torch.")
    size = f"{sum(p.numel() for p in model.parameters()):,} weights, {dtype}"
    lengths = f"block_size {model.cfg.block_size}, target_length {model.cfg.target_length}"
    print(f"{name}: {size} | {lengths} | {tokenizer.name}")
    print_notes(notes)
    return model, tokenizer, "", name, path


def print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")


def text_batch(text: str, tokenizer: Tokenizer, cfg: ModelConfig) -> Batch:
    """Cut two rows from a text, at its start and its middle, repeated to fill the targets."""
    numbers = " ".join(str(7 * i % cfg.n_ordinary) for i in range(50))
    default = numbers if tokenizer.name.startswith("ids-") else TEXT
    ids = tokenizer.encode(text or default)
    T = cfg.target_length
    P = min(32, cfg.block_size - T)
    if not ids:
        raise ValueError("--check needs a text, but the tokenizer makes nothing of --prompt")
    starts = (0, len(ids) // 2)
    rows = torch.tensor([(ids[start:] + ids * (P + T))[: P + T - 1] for start in starts])
    prefix, first = split_prompt(rows[:, :P], cfg)
    return Batch(prefix, torch.cat([first, rows[:, P:]], dim=1), torch.arange(2))


def export(source: str, folder: Path, overwrite: bool) -> None:
    """Write the weights of a checkpoint as a Hugging Face folder."""
    if resolve_source(source) is not None:
        raise ValueError(f"{source} is not one of our checkpoints; --export needs one")
    state = load(source)
    tokenizer = get_tokenizer(state["tokenizer"], Path(source).parent)
    notes = export_folder(folder, state, tokenizer, overwrite)
    print(f"{folder}: {source} step {state['step']} as a Hugging Face folder")
    print_notes(notes)
