"""data/ahead.py: the batches of a loop without it, made one ahead."""

import threading

import pytest
import torch

from data.ahead import ahead
from data.objectives import Batch

CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def numbered(step: int, rows: int) -> Batch:
    return Batch(*(torch.full((rows, 2), step) for _ in range(3)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
def test_batches_come_in_order_and_none_is_missing(device):
    places = [(step, 3) for step in range(5)]
    found = list(ahead(numbered, iter(places), torch.device(device)))
    assert all(batch.target.device.type == device for batch in found)
    assert [int(batch.prefix[0, 0]) for batch in found] == [0, 1, 2, 3, 4]
    assert all(batch.target.shape == (3, 2) for batch in found)
    assert list(ahead(numbered, [], CPU)) == []


def test_the_next_batch_is_made_while_one_is_used_and_by_another_thread():
    made, there = [], threading.Event()

    def make(step):
        made.append(threading.current_thread())
        if step == 1:
            there.set()
        return numbered(step, 1)

    batches = ahead(make, [(step,) for step in range(9)], CPU)
    next(batches)
    assert there.wait(10)
    batches.close()
    assert len(made) <= 3 and threading.main_thread() not in made


def test_an_error_comes_where_its_batch_would_have_come():
    def make(step):
        if step == 2:
            raise ValueError("no such token")
        return numbered(step, 1)

    batches = ahead(make, [(step,) for step in range(4)], CPU)
    assert int(next(batches).prefix[0, 0]) == 0 and int(next(batches).prefix[0, 0]) == 1
    with pytest.raises(ValueError, match="no such token"):
        next(batches)


def test_no_thread_is_left():
    before = threading.active_count()
    batches = ahead(numbered, [(step, 1) for step in range(100)], CPU)
    next(batches)
    batches.close()
    assert threading.active_count() == before
