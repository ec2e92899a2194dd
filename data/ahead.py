"""Batches that are there when they are asked for: a thread makes the next one while the last one is used.

A batch is a function of its place, so nothing depends on who makes it or when.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch

from data.objectives import Batch


def ahead(make: Callable[..., Batch], places: Iterable[tuple], device: torch.device) -> Iterator[Batch]:
    """make(*place) of each place, on the device. An error of make is raised where its batch would have come."""
    cuda = device.type == "cuda"

    def made(place: tuple) -> Batch:
        batch = make(*place)
        return Batch(*(part.pin_memory() for part in batch)) if cuda else batch

    with ThreadPoolExecutor(1, "ahead") as thread:
        places = iter(places)
        coming = [thread.submit(made, place) for place in islice(places, 1)]
        while coming:
            batch = coming.pop().result()
            coming += [thread.submit(made, place) for place in islice(places, 1)]
            # From pinned memory: the copy is queued behind the last step, and nobody waits for it.
            yield Batch(*(part.to(device, non_blocking=cuda) for part in batch))
