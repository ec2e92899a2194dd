"""Several processes train one model: torchrun starts them, gloo (CPU) or nccl (CUDA) connects them.

    torchrun --nproc_per_node=2 train.py config/toy_copy_ar.py
    torchrun --nproc_per_node=8 train.py config/paper_1_ar.py --parallel=fsdp --dtype=bfloat16

Each process takes a slice of the rows of every global batch, and every draw is keyed by the global index of its row. So
any number of processes trains the model that one trains, to float tolerance (dropout, off by default, is the
exception). Without torchrun there is one process, and nothing here but `World` is at work.
"""

import contextlib
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import checkpoint
from device import autocast, pick_device


@dataclass
class ParallelConfig:
    """How several processes share the work. See the top of this file."""

    parallel: str = "ddp"  # ddp: each holds the whole model | fsdp: each a share of weights, gradients and optimizer
    patience: float = 600.0  # seconds that a process may stand still while others wait for it; then it is named

    def __post_init__(self):
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel must be one of ddp, fsdp; got {self.parallel!r}")
        if not 1 <= self.patience < 1e6:
            raise ValueError(f"patience must be 1 second or more, got {self.patience}")


class Whole(nn.Module):
    """A model, and what is computed with it, as one module: do() runs in its forward pass.

    DDP and FSDP see what goes through a forward pass. Here that is a term of a loss, whichever methods of the model it
    calls, and not the bare model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, do: Callable):
        return do()


class World:
    """The processes of a run, this one among them. Number 0 leads: it writes and prints."""

    rank, size, watch = 0, 1, None
    sharded, gathered = False, "float32"  # under FSDP, and the dtype in which weights are gathered then

    def __init__(self, device: torch.device):
        self.device = device

    @property
    def leader(self) -> bool:
        return self.rank == 0

    def rows(self, batch_size: int, parts: int, part: int) -> slice:
        """Rows of the global batch in a micro-batch of this process, the part-th of `parts`."""
        size = batch_size // (self.size * parts)
        start = (self.rank * parts + part) * size
        return slice(start, start + size)

    def wrap(self, model: nn.Module, cfg) -> nn.Module:
        """The model on its device, as what exchanges gradients: Whole, alone or in DDP or FSDP.

        FSDP replaces the parameters: make the optimizers after it.
        """
        self.sharded = cfg.parallel == "fsdp"
        if self.sharded:
            self.gathered = cfg.dtype
            return shard(model, self, cfg)
        whole = Whole(model.to(self.device))
        if self.size == 1:
            return whole
        # What the last term of a step does not use must be known, or the exchange waits for its gradient.
        unused = cfg.ar_weight > 0 and cfg.self_conditioning
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.13 renames broadcast_buffers, 2.11 has only the old name
            return nn.parallel.DistributedDataParallel(
                whole, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=unused
            )

    def look(self, whole: nn.Module, do: Callable):
        """do(), without gradients, in all processes alike: under FSDP each holds only a share of the weights."""
        # Weights that are gathered in bfloat16 compute in nothing else, not even a sample.
        with torch.no_grad(), autocast(self.device, self.gathered):
            found = (whole if self.sharded else whole_of(whole))(do)
        if self.sharded:
            whole.reshard()  # the next step moves the shares, and what was put together of them is old
        return found

    def gather(self, numbers: list) -> list[list[float]]:
        """The numbers of each process, the same list of lists in all of them. Waits for the device."""
        mine = [float(number) for number in numbers]
        if self.size == 1:
            return [mine]
        self.beat()  # who waits here is ahead of who has not come
        every = [torch.zeros(len(mine), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(every, torch.tensor(mine, dtype=torch.float64))
        return [numbers.tolist() for numbers in every]

    def mean(self, found: dict) -> dict:
        """Each number of a nested dict as its mean over the processes, which all hold equally many rows."""
        if self.size == 1:
            return found
        flat = list(_numbers(found))
        means = iter([sum(column) / self.size for column in zip(*self.gather(flat))])
        return _replaced(found, means)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def agree(self, what: dict) -> None:
        """Raise ValueError, naming the process, where not all hold the same values: another folder, other settings."""
        if self.size == 1:
            return
        self.beat()
        every = [None] * self.size
        dist.all_gather_object(every, what)
        for rank, other in enumerate(every):
            for name in (name for name in what if other[name] != every[0][name]):
                raise ValueError(
                    f"process {rank} has {name} {other[name]}, process 0 {every[0][name]}: all must be given the same "
                    "settings, and see the same out_dir and data"
                )

    def beat(self, where: str = "") -> None:
        """Say that this process goes on, and where it is ("": as before). All processes do so at the same places."""
        if self.watch is not None:
            self.watch.count, self.watch.where = self.watch.count + 1, where or self.watch.where

    def save(self, path: Path, model, optimizers: list, step: int, tokenizer: str, keep: int = 1, **rest) -> None:
        """Write a checkpoint: the leader a file, or all together a folder of shards."""
        if self.sharded:
            import sharded  # torch's distributed checkpoints take a second to import

            if self.leader:
                checkpoint.keep_tokenizer(tokenizer, path.parent)
            sharded.save(path, checkpoint.head(model, step, tokenizer) | rest, model, optimizers, keep)
        elif self.leader:
            states = [optimizer.state_dict() for optimizer in optimizers]
            checkpoint.save(path, model, step, tokenizer, keep, optimizer=states, **rest)

    def read(self, path: Path, parallel: str | None, device: str = "cpu") -> dict:
        """The fields of a checkpoint. Of a folder of shards, under FSDP, only what is no tensor: see `restore`.

        parallel: what is asked for; None: what the checkpoint says.
        """
        if path.is_dir():
            import sharded

            head = sharded.read_head(path)
            if (parallel or head.get("train_config", {}).get("parallel")) == "fsdp":
                return head
        return checkpoint.load(path, device)

    def restore(self, path: Path, state: dict, model, optimizers: list) -> None:
        """Put a checkpoint's optimizer state into place, and the weights too where they are in shards as well."""
        if self.sharded and "model" not in state:
            import sharded

            sharded.restore(path, model, optimizers)
            return
        if len(state["optimizer"]) != len(optimizers):
            raise ValueError(f"{path}: it has {len(state['optimizer'])} optimizers, this run {len(optimizers)}")
        for optimizer, kept in zip(optimizers, state["optimizer"]):
            try:
                optimizer.load_state_dict(_shared_out(optimizer, kept) if self.sharded else kept)
            except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
                raise ValueError(f"{path}: its optimizer state does not fit: {reason}") from None

    def leave(self) -> None:
        """Wait for the others, the leader's last checkpoint too, and part."""
        self.beat("at the end")
        dist.barrier()
        self.watch.over.set()
        dist.destroy_process_group()

    def lost(self, error: BaseException) -> str:
        """The line for an exchange that failed: who is not there."""
        who = self.watch.culprit(2.5) if self.watch is not None else ""
        reason = str(error).strip().splitlines()[0][:160]
        return f"process {self.rank} lost the others {self.watch.where}: {who or reason}; go on with --init_from=resume"


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a share, put together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_of(module: nn.Module) -> nn.Module:
    return getattr(module, "module", module)


def is_exchange(error: BaseException) -> bool:
    """Whether an error comes from the connection between processes."""
    words = ("gloo", "nccl", "connection", "socket", "tcpstore")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def each_term(whole: nn.Module, terms: Iterator, count: int, last: bool) -> Iterator:
    """The terms of a loss, one by one: backpropagate each before the next is asked for.

    Under DDP gradients are exchanged with the count-th, and only where last says that it is the last of the step.
    """
    for k in range(count):
        quiet = isinstance(whole, nn.parallel.DistributedDataParallel) and not (last and k + 1 == count)
        with whole.no_sync() if quiet else contextlib.nullcontext():
            yield whole(lambda: next(terms))
    assert next(terms, None) is None, f"the loss has more than {count} terms, and the last was not exchanged"


def shard(model: nn.Module, world: World, cfg) -> nn.Module:
    """The model in shares: each process keeps a slice of every weight, its gradient and its optimizer state.

    Before a block is computed its weights are gathered, in bfloat16 where that is the dtype; after it they are let go.
    A block that runs twice in one pass, for a prefix that is read first and for the target, cannot be let go between
    its two backward passes: such a model is gathered whole, and only gradients and optimizer are in shares.
    """
    if not dist.is_initialized():
        raise ValueError(
            "parallel=fsdp shares a model out among processes: start them with torchrun, or go on with --parallel=ddp"
        )
    if cfg.compile:
        raise ValueError("compile and parallel=fsdp are not tried together; drop one")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if cfg.dtype == "bfloat16" else {}
    once = cfg.prefix_attention == "joint" or cfg.prefix_attention == cfg.target_attention == "causal"
    if once and cfg.arch == "decoder_only" and not cfg.anneal_steps:
        for block in model.blocks:  # the stream between them stays in float32, as under autocast
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**half, cast_forward_inputs=False))
    whole = Whole(model)
    fully_shard(whole, mesh=mesh)
    if world.device.type != "cpu":
        model.to(world.device)  # buffers; the shares are there already
    return whole


def _shared_out(optimizer, kept: dict) -> dict:
    """An optimizer's state with each whole tensor cut as its parameter is."""
    from torch.distributed.tensor import distribute_tensor

    params = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {
        j: {
            name: distribute_tensor(value.to(params[j].device), params[j].device_mesh, params[j].placements)
            if isinstance(value, torch.Tensor) and value.shape == params[j].shape
            else value
            for name, value in state.items()
        }
        for j, state in kept["state"].items()
    }
    return kept | {"state": cut}


def _numbers(found: dict) -> Iterator[float]:
    for value in found.values():
        yield from _numbers(value) if isinstance(value, dict) else [value]


def _replaced(found: dict, means: Iterator[float]) -> dict:
    return {name: _replaced(v, means) if isinstance(v, dict) else next(means) for name, v in found.items()}


@contextlib.contextmanager
def joined(device: str, patience: float) -> Iterator[World]:
    """The processes that torchrun started, connected; without torchrun this one alone.

    Only the leader prints. A process that stands still longer than `patience` seconds while others wait for it is
    named, and the run ends.
    """
    world = World(pick_device(device))
    if "RANK" not in os.environ:
        yield world
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if world.device.type == "mps":
        raise ValueError("several processes run on cpu or cuda, not on mps")
    if world.device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU, there are {torch.cuda.device_count()}: "
                f"torchrun --nproc_per_node={torch.cuda.device_count()}"
            )
        world.device = torch.device("cuda", local)
        torch.cuda.set_device(world.device)
    store, world.rank, world.size = next(dist.rendezvous("env://", timeout=timedelta(seconds=patience)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        # Only a network that fails without a word comes to this: a process that stands still is found before.
        timeout=timedelta(seconds=2 * patience + 60),
    )
    world.watch = Watch(dist.PrefixStore("watch", store), world.rank, world.size, patience)
    with contextlib.ExitStack() as stack:
        if not world.leader:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        stopped = None
        try:
            try:
                yield world
            except SystemExit as stop:  # a signal stopped all of them, in good order
                stopped = stop
            world.leave()
        except RuntimeError as error:
            if is_exchange(error):
                raise ValueError(world.lost(error)) from None
            raise
        finally:
            world.watch.over.set()
        if stopped is not None:
            raise stopped


class Watch(threading.Thread):
    """Tells the store of torchrun every second how far this process has come, and ends it where another hangs.

    A rank that is dead or stopped tells nothing new; one that hangs still tells, but of an earlier place than the rest.
    """

    def __init__(self, store, rank: int, size: int, patience: float):
        super().__init__(daemon=True)
        self.store, self.rank, self.size, self.patience = store, rank, size, patience
        self.count, self.where, self.told, self.over = 0, "at the start", 0, threading.Event()
        self.every = min(1.0, patience / 5)
        self._tell()
        self.start()

    def _tell(self) -> None:
        self.told += 1
        host = f"{socket.gethostname()}, pid {os.getpid()}"
        self.store.set(f"rank {self.rank}", f"{self.told}|{self.count}|{self.where}|{host}")

    def run(self) -> None:
        seen, since = self.count, time.monotonic()
        while not self.over.wait(self.every):
            try:
                self._tell()
                if self.count != seen:
                    seen, since = self.count, time.monotonic()
                elif time.monotonic() - since > self.patience:
                    who = self.culprit(min(self.patience, 30.0))
                    if self.count != seen:  # it went on while we listened, and what the others told is older than that
                        continue
                    if who.startswith(f"process {self.rank} "):
                        self.over.wait(5 * self.every)  # let the others say it too: they would see a broken connection
                    if who:
                        self._end(f"{who}; go on with --init_from=resume")
            except RuntimeError as error:
                self._end(f"torchrun's store does not answer: {str(error).splitlines()[0][:100]}")

    def _end(self, line: str) -> None:
        if not self.over.is_set():
            print(f"error: {line}", file=sys.stderr, flush=True)
            os._exit(2)  # the main thread is waiting inside a collective and cannot be woken

    def culprit(self, seconds: float) -> str:
        """Who keeps the others waiting, in words; "" where all are at the same place and alive.

        Who says nothing for so many seconds is not alive.
        """
        try:
            before, end = self._told(), time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(self.every)
                self._tell()  # the others are listening too
            now = self._told()
        except RuntimeError:
            return "torchrun's store does not answer, the process that holds it is gone"
        furthest = max(count for _, count, _, _ in now)
        found = []
        for rank, ((told, *_), (told_now, count, where, host)) in enumerate(zip(before, now)):
            if rank != self.rank and told == told_now:
                found.append(f"process {rank} ({host}) is dead or stopped; last heard of {where}")
            elif count < furthest:
                found.append(f"process {rank} ({host}) hangs {where}")
        return " and ".join(found)

    def _told(self) -> list[tuple[int, int, str, str]]:
        keys, seconds = [f"rank {rank}" for rank in range(self.size)], min(self.patience, 30.0)
        # torch waits without end for a store whose process is stopped.
        silent = threading.Timer(seconds, self._end, [f"torchrun's store does not answer: not a word in {seconds:g} s"])
        silent.daemon = True
        silent.start()
        try:
            every = [value.decode().split("|", 3) for value in self.store.multi_get(keys)]
        finally:
            silent.cancel()
        return [(int(told), int(count), where, host) for told, count, where, host in every]
