"""Every test runs with one thread and without a network. No training measures the machine."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from infra import device  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def known_speed(monkeypatch):
    monkeypatch.setattr(device, "measured_flops", lambda *_: 1e12)


@pytest.fixture(scope="session")
def copy_set(tmp_path_factory):
    from processes import make_copy_set

    return make_copy_set(tmp_path_factory.mktemp("sets") / "copy")
