"""Several processes train one model.

    torchrun --nproc_per_node=8 train.py config/paper_1_ar.py --parallel=fsdp --optimizer=adamw

Each process takes some rows of every global batch, and random numbers depend on the global row
index. So every number of processes trains the same model, to rounding (except with dropout).
"""

import contextlib
import math
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from configurator import one_line, require
from infra.device import pick_device

LOST = ("gloo", "nccl", "connection", "tcpstore")  # in a message if another process has ended


@dataclass
class DistributedContext:
    """This process among those of the run. Rank 0 is the main one: it writes and prints."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    sharded: bool = False  # set by wrap(): each process holds a shard of each parameter

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def local_rows(self, batch_size: int, accum: int = 1, micro: int = 0) -> slice:
        """Return the rows of the global batch for a micro-batch of this process."""
        size = batch_size // (self.world_size * accum)
        start = (self.rank * accum + micro) * size
        return slice(start, start + size)

    def wrap(self, model: nn.Module, parallel: str) -> None:
        """Move the model to the device, in place. fsdp: keep only a shard of each parameter here.

        Call it before make_optimizers. fsdp needs AdamW, because Muon needs whole matrices.
        """
        model.to(self.device)
        if parallel == "ddp":
            return
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        require(dist.is_initialized(), "--parallel=fsdp needs torchrun (see README.md)")
        # If the prefix is cached, its backward pass comes last and needs all weights. Such a model
        # is gathered and freed as a whole, once per step.
        for part in [*model.blocks, model] if model.cfg.one_sequence else [model]:
            fully_shard(part)
        model.set_reshard_after_backward(model.cfg.one_sequence)
        for name in ("encode", "decode"):  # the loss calls them instead of forward
            register_fsdp_forward_method(model, name)
        self.sharded = True

    def set_gradient_sync(self, model, last: bool) -> None:
        """fsdp: exchange gradients only in the last backward pass of a step."""
        if self.sharded:
            model.set_requires_gradient_sync(last and model.cfg.one_sequence)

    def average_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its mean over the processes, in one exchange."""
        if self.sharded and not model.cfg.one_sequence:
            # FSDP sees backward passes through logits only, so this one of value 0 starts it.
            model.set_requires_gradient_sync(True)
            model.set_reshard_after_backward(True)
            token = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            (model(token, token).sum() * 0).backward()
            model.set_reshard_after_backward(False)
        if self.world_size == 1 or self.sharded:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = parameters_to_vector(gradients)
        dist.all_reduce(flat)
        vector_to_parameters(flat / self.world_size, gradients)

    def clip_gradients(self, model: nn.Module, max_norm: float) -> float:
        """Scale all gradients down to this norm (0: never) and return the norm they had."""
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm or math.inf)
        return float(norm.full_tensor() if self.sharded else norm)

    def mean(self, numbers: dict) -> dict:
        """Return each number as its mean over the processes, which have equally many rows."""
        values = torch.tensor([float(value) for value in numbers.values()], dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(values)
        return dict(zip(numbers, (values / self.world_size).tolist()))

    def any(self, flag: int) -> int:
        """Return the largest flag of all processes."""
        value = torch.tensor(int(flag))
        if self.world_size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def full_state(self, model: nn.Module, optimizers: list) -> dict:
        """Return {"model", "optimizer": list}, complete on rank 0. All processes must call it."""
        states = [_whole(optimizer.state_dict()) for optimizer in optimizers]
        return {"model": _whole(model.state_dict()), "optimizer": states}

    def load_full_state(self, model: nn.Module, optimizers: list, state: dict) -> None:
        """Load what full_state returned on rank 0, under any number of processes."""
        own = model.state_dict()
        model.load_state_dict({name: _cut(v, own[name]) for name, v in state["model"].items()})
        for optimizer, kept in zip(optimizers, state["optimizer"], strict=True):
            p = [p for group in optimizer.param_groups for p in group["params"]]
            moments = kept["state"].items()
            cut = {i: {k: _cut(v, p[i]) for k, v in named.items()} for i, named in moments}
            optimizer.load_state_dict(kept | {"state": cut})


def _whole(value):
    """Return a tensor, or those of nested dicts, put together on the CPU of rank 0."""
    if isinstance(value, dict):
        return {name: _whole(part) for name, part in value.items()}
    if not hasattr(value, "full_tensor"):
        return value
    whole = value.full_tensor()  # all processes take part
    return whole.cpu() if dist.get_rank() == 0 else None


def _cut(value, like):
    """Return this process's shard of a whole tensor, if `like` is sharded."""
    if not hasattr(like, "device_mesh") or getattr(value, "shape", None) != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def init_distributed(device_name: str):
    """Connect the processes that torchrun started, yield a DistributedContext. Rank 0 prints."""
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        yield DistributedContext(device)
        return
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    context = DistributedContext(device, dist.get_rank(), dist.get_world_size())
    try:
        with open(os.devnull, "w") as null:
            with contextlib.redirect_stdout(sys.stdout if context.is_main else null):
                yield context
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in LOST):
            raise
        reason = one_line(error)[:160]
        raise ValueError(f"process {context.rank} lost the others: {reason}") from None
    finally:
        dist.destroy_process_group()
