"""Tiny data sets, models and checkpoints."""

import torch

from data.loader import write_pairs
from data.tokenizer import get_tokenizer
from eval.study import Stage
from infra.checkpoint import save
from model import ModelConfig, Transformer, build_model

BYTES = get_tokenizer("bytes")
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=16)
JOINT = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
CACHED = JOINT | dict(prefix_attention="bidirectional")
KINDS = {"ar": {}, "diffusion": JOINT}


def tiny_model(**settings) -> Transformer:
    torch.manual_seed(0)
    return build_model(ModelConfig(**TINY | settings)).eval()


def save_model(path, data="", **settings) -> None:
    """A random checkpoint at step 7 that was trained on `data`."""
    fields = dict(train_config={"data": str(data)}, fingerprint="abc") if data else {}
    save(path, tiny_model(**settings), 7, "bytes", **fields)


def save_pairs(folder, texts, target_length: int, block_size: int, **meta) -> None:
    pairs = [(BYTES.encode(prefix), BYTES.encode(target)) for prefix, target in texts]
    splits = {"train": pairs, "valid": pairs}
    write_pairs(folder, splits, "bytes", target_length, block_size, **meta)


QUICK = {  # more flags of a study's commands, to test that they start
    "train.py": "--max_steps=20 --batch_size=2 --grad_accum_steps=1 --eval_batches=1",
    "eval.translation": "--n=10",
    "eval.qa": "--n=10",
    "eval.code": "--n=10 --samples=1 --k=1",
}


def quick(stage: Stage) -> Stage:
    """The stage, and those before it, with 20 steps of training and 10 items."""
    program = stage.argv[1] if stage.argv[0] == "-m" else stage.argv[0]
    more = QUICK.get(program, "").split()
    return Stage(stage.name, (*stage.argv, *more), stage.source and quick(stage.source))
