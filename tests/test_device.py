"""device.py: memory that is kept."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch, device
if {keep}:
    assert device.keep_freed_memory()
torch.set_num_threads(1)
for _ in range(40):  # 16 MiB, that is freed at once; what is small stands in between, and the first few do not fit
    torch.ones(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow  # 8 s
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's mallopt is asked")
def test_what_was_freed_comes_back_without_new_pages():
    """16 MiB are 4,096 pages; the kernel counts each that it has to hand out."""

    def faults(keep: bool) -> int:
        code = [sys.executable, "-c", FAULTS.format(keep=keep)]
        return int(subprocess.run(code, check=True, capture_output=True, text=True).stdout)

    kept, returned = faults(True), faults(False)
    assert kept < 100 and (kept < returned or returned < 100), (kept, returned)  # with huge pages there are few
