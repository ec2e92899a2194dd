"""Several processes train one model.

    torchrun --nproc_per_node=8 train.py config/paper_1_ar.py

Each process holds the whole model and takes some rows of every global batch. Random numbers depend
on the global row index. So every number of processes trains the same model, to rounding (except
with dropout).
"""

import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from infra.device import pick_device


@dataclass
class DistributedContext:
    """This process among those of the run. Rank 0 is the main one: it writes and prints."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

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

    def average_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its mean over the processes, in one exchange."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = parameters_to_vector(gradients)
        dist.all_reduce(flat)
        vector_to_parameters(flat / self.world_size, gradients)

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
    finally:
        dist.destroy_process_group()
