"""infra/device.py: which device, the compiler's absence, and freed memory that is kept."""

import subprocess
import sys

import pytest
import torch
from eval_models import tiny_model

from infra.device import compile_or_explain, measured_flops, pick_device

PAGE_FAULTS = """
import resource, torch
from infra.device import keep_freed_memory
if {keep}:
    keep_freed_memory()
torch.set_num_threads(1)
for _ in range(40):  # 16 MiB each, freed at once
    torch.ones(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow  # 8 s
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt belongs to glibc")
def test_freed_memory_is_used_again_without_new_pages():
    """16 MiB are 4,096 pages; the kernel counts each one it hands out."""

    def faults(keep: bool) -> int:
        command = [sys.executable, "-c", PAGE_FAULTS.format(keep=keep)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    kept, returned = faults(True), faults(False)
    # Huge pages make few faults in both cases.
    assert kept < 100 and (kept < returned or returned < 100), (kept, returned)


FREED = """
import re, torch
from pathlib import Path
from infra.device import keep_freed_memory, return_freed_memory

def megabytes():
    return int(re.search("VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1000

keep_freed_memory()
kept = [torch.ones(1 << 18) for _ in range(300)][::10]  # holes of 9 MiB
before = megabytes()
return_freed_memory(96)
narrow = megabytes()
return_freed_memory(576)
print(before - narrow, before - megabytes())
"""


@pytest.mark.slow  # 4 s
@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim belongs to glibc")
def test_the_holes_between_tensors_return_to_the_kernel_for_wide_networks():
    """270 of 300 MiB are free. The interpreter itself may need a page in between."""
    command = [sys.executable, "-c", FREED]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    narrow, wide = map(int, printed.split())
    assert abs(narrow) < 5 and 230 < wide < 300


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cuda:x", "", "cpu:0:0"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ValueError, match="device must be one of auto, .*cpu.*; got"):
        pick_device(name)


def test_auto_is_a_device_that_computes():
    device = pick_device("auto")
    assert (torch.ones(2, device=device) + 1).tolist() == [2, 2]
    assert measured_flops(device, "float32") > 1e6


def test_without_a_compiler_the_model_runs_eagerly(monkeypatch, capsys):
    model = tiny_model()
    tokens = torch.arange(6).view(2, 3)
    expected = model(tokens, tokens)

    def compiled(*_):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function: compiled)
    model.run_blocks = compile_or_explain(model.run_blocks, torch.device("cpu"))
    assert "no C++ compiler found" in capsys.readouterr().out
    assert torch.equal(model(tokens, tokens), expected)
