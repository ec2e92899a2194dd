"""One thread and no network for every test: they share a small machine, and must pass on a plane."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

torch.set_num_threads(1)
