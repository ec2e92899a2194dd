"""eval.speed at tiny sizes; its arithmetic is checked by hand. How fast anything is: results/."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import autoregressive
import diffusion
from eval import speed
from eval.speed import at_length, lines_table, make_line, model_config
from infra.flops import forward_flops
from model import Transformer

CPU = torch.device("cpu")
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 16}
CASE = {"shape": "six", "dtype": "float32", "batch": 2, "length": 6}
RESULTS = Path(__file__).parent.parent / "results" / "speed.jsonl"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Tiny shapes, no compiler, no copies of 512 MiB."""
    shapes = {"six": SIZES | {"vocab_size": 30}, "gpt2": SIZES | {"vocab_size": 40}}
    monkeypatch.setattr(speed, "SHAPES", shapes)
    monkeypatch.setattr(speed, "TRAIN_BATCH", {"six": (2, 8), "gpt2": (2, 8)})
    monkeypatch.setattr(speed, "PROMPT", 3)
    monkeypatch.setattr(speed, "compiled", lambda network: network)
    monkeypatch.setattr(speed, "measured_bandwidth", lambda device: 1e9)
    speed.random_networks.cache_clear()


def networks() -> dict[str, Transformer]:
    return speed.random_networks("six", "float32", 20, CPU, 0)


def times(**seconds) -> dict[str, list]:
    """Results of time_in_turn: ar=[1, 2] -> {"ar": [(1, None), (2, None)]}."""
    return {name: [(value, None) for value in values] for name, values in seconds.items()}


# The command


def test_every_measurement_adds_its_lines_once(tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise ImportError

    monkeypatch.setattr(speed, "transformers_generate", missing)
    file = tmp_path / "new" / "speed.jsonl"
    flags = ["--runs=2", "--shape=six", "--dtype=float32", "--lengths=4,6", f"--json={file}"]
    lines = speed.main([*flags, "--batches=1"])
    assert [line["what"] for line in lines] == ["train", "unroll", "loop", "decode", "decode"]
    assert [json.loads(line) for line in file.read_text().splitlines()] == lines
    for line in lines:
        assert line["systems"][line["baseline"]]["ratio"] == [1.0, 1.0]
        for entry in line["systems"].values():
            assert len(entry["seconds"]) == len(entry["ratio"]) == 2 and min(entry["ratio"]) > 0
    printed = capsys.readouterr().out
    assert lines[0]["origin"]["hardware"] in printed and "transformers is not installed" in printed
    more = speed.main([*flags, "--batches=1,2"])  # skips what the file holds
    assert [line["case"]["batch"] for line in more] == [2, 2, 2]
    assert len(file.read_text().splitlines()) == 8
    file.write_text(file.read_text().replace(lines[0]["origin"]["hardware"], "another machine"))
    assert len(speed.main([*flags, "--batches=1", "--what=loop"])) == 1


def test_decoding_has_a_row_for_each_decoder_and_number_of_steps():
    cfg = speed.SpeedConfig(runs=1)
    pytest.importorskip("transformers")
    systems = speed.decode_case(cfg, CASE, CPU)["systems"]
    kinds = ("cached prefix", "full attention")
    names = ["AR", *(f"{kind}, {n} steps" for kind in kinds for n in (10, 20, 50))]
    assert set(systems) == {*names, *(f"{name}, compiled" for name in names), "transformers"}
    assert systems["AR"]["calls"] == CASE["length"]
    assert {name for name, entry in systems.items() if entry.get("scaled")} == {
        name for name in systems if "20 steps" in name or "50 steps" in name
    }


def test_more_steps_are_estimated_from_ten(monkeypatch):
    """Ten steps of 0.5 s in 6 s: 20 steps take 11 s, 50 take 26 s; AR takes 4 s."""

    def fixed(calls, runs, device):
        return {key: [(4.0, None) if key[0] == "AR" else (6.0, 0.5)] for key in calls}

    monkeypatch.setattr(speed, "time_in_turn", fixed)
    line = speed.decode_case(speed.SpeedConfig(), CASE, CPU)
    assert line["baseline"] == "AR"
    for steps, seconds in ((10, 6.0), (20, 11.0), (50, 26.0)):
        entry = line["systems"][f"cached prefix, {steps} steps"]
        assert entry["seconds"] == [seconds] and entry["ratio"] == [4.0 / seconds]


@pytest.mark.parametrize("fast", (True, False))
def test_the_plan(fast, monkeypatch):
    monkeypatch.setattr(speed.devices, "has_fast_bf16", lambda device: fast)
    cases = list(speed.plan(speed.SpeedConfig(what="decode"), CPU))
    assert {case["dtype"] for _, case in cases} == {"float32", *(["bfloat16"] if fast else [])}
    assert {case["length"] for _, case in cases} == {64, 128, 256, 512, 1024}
    on_gpu = list(speed.plan(speed.SpeedConfig(what="decode"), torch.device("cuda")))
    assert max(case["length"] for _, case in on_gpu) == 4096
    quick = list(speed.plan(speed.SpeedConfig(quick=True), CPU))
    assert {case["shape"] for _, case in quick} == {"six"} and len(quick) == 5


# Clocks and ratios


def test_systems_take_turns():
    """A B, B A, A B: a slow drift of the machine affects both. The warm-up comes first."""
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b") or 7}
    results = speed.time_in_turn(calls, 3, CPU)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [result for _, result in results["b"]] == [7, 7, 7]
    assert [len(runs) for runs in speed.time_in_turn(calls, 3, CPU, limit=0).values()] == [1, 1]


def test_a_ratio_compares_the_runs_of_a_round():
    results = times(ours=[1.0, 2.0], theirs=[2.0, 2.0])
    assert make_line("w", {}, results, "theirs")["systems"]["ours"]["ratio"] == [2.0, 1.0]
    assert make_line("w", {}, results, "theirs", "time")["systems"]["ours"]["ratio"] == [0.5, 1.0]


@pytest.mark.slow  # reads and copies 512 MiB
def test_bandwidth_is_a_speed(monkeypatch):
    monkeypatch.undo()
    assert speed.measured_bandwidth(CPU) > 1e8


# Roofline


@pytest.mark.parametrize("kind", ("cached prefix", "full attention"))
def test_the_work_of_diffusion_is_what_torch_counts(kind):
    model = at_length(networks()[kind], 6)
    prefix = torch.zeros(2, 3, dtype=torch.long)
    sampler = diffusion.SamplerConfig(steps=4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        diffusion.generate(model, prefix, sampler)
    flops, _ = speed.decoding_work(model, 3, 6, 4, 2)
    assert counter.get_total_flops() == flops


def test_the_work_of_ar_is_the_sum_over_its_tokens():
    """FLOPs: each token as a target of one after all before it. Bytes: all weights and keys."""
    model = networks()["AR"]
    alone = replace(model.cfg, prefix_attention="bidirectional")  # counts only the new token
    steps = [forward_flops(alone, 3 + i, 1) - forward_flops(alone, 3 + i, 0) for i in range(6)]
    weights = 4 * (sum(p.numel() for p in model.parameters()) - model.pos.weight.numel())
    keys = [4 * 2 * 2 * 16 * (3 + i + 1) for i in range(6)]  # bytes, k and v, layers, width, tokens
    flops, nbytes = speed.decoding_work(model, 3, 6, 6, batch=2)
    assert flops == 2 * (sum(steps) + forward_flops(model.cfg, 3, 0))
    assert nbytes == 7 * weights + 2 * sum(keys)


def test_the_roofline_is_the_longer_time():
    assert speed.roofline(8.0, 3.0, 4.0, 1.0) == {"roofline": 3.0, "bound": "bytes"}
    assert speed.roofline(8.0, 3.0, 2.0, 3.0) == {"roofline": 4.0, "bound": "FLOPs"}


# Networks


def test_all_decoders_share_their_weights_and_never_end_a_text():
    weights = [network.state_dict() for network in networks().values()]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])
    prompt = torch.zeros(2, 3, dtype=torch.long)
    model = at_length(networks()["AR"], 16)
    out = autoregressive.generate(model, prompt, autoregressive.SamplerConfig())
    assert out.calls.tolist() == [16, 16] and networks()["AR"].cfg.target_length == 21


def test_a_recorded_network_repeats_one_call():
    network = at_length(networks()["cached prefix"], 6)
    prefix = torch.zeros(2, 3, dtype=torch.long)
    recorded = speed.recorded(network, prefix)
    canvas = torch.full((2, 7), network.cfg.sep_id)
    expected = network.decode(network.encode(prefix), canvas)
    assert torch.equal(recorded.decode(recorded.encode(prefix), canvas + 1), expected)
    out = diffusion.generate(recorded, prefix, diffusion.SamplerConfig(steps=2, temperature=0.0))
    assert torch.equal(out.tokens, expected[:, :-1, :-3].argmax(-1))


def as_baseline(state: dict) -> dict:
    """Our weights under the names of torch's Transformer."""
    names = {"attn.qkv": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj."}
    names |= {"mlp.up": "linear1.", "mlp.down": "linear2.", "norm1": "norm1.", "norm2": "norm2."}
    found = {f"{name}.weight": state[f"{name}.weight"] for name in ("tok", "pos")}
    for key, value in state.items():
        if key.startswith("norm."):
            found[f"blocks.{key}"] = value
        elif key.startswith("blocks."):
            _, layer, module = key.split(".", 2)
            module, kind = module.rsplit(".", 1)
            found[f"blocks.layers.{layer}.{names[module]}{kind}"] = value
    return found


def test_our_step_and_the_baseline_train_alike():
    """From the same weights on the same tokens, the losses of torch's Transformer are ours."""
    batch = speed.random_batch(CASE, 0, 8, 0, CPU)
    shape = speed.SHAPES["six"]
    cfg = speed.TrainConfig(model=model_config(shape, 0, 8), optimizer="adamw", learning_rate=1e-3)
    ours = Transformer(cfg.model)
    theirs = speed.BaselineGPT(**shape, length=8)
    missing = theirs.load_state_dict(as_baseline(ours.state_dict()), strict=False).missing_keys
    assert missing == ["mask"]
    rng = speed.make_rng(0, batch.example)
    terms = {
        ours: partial(autoregressive.losses, ours, batch, cfg.loss, rng),
        theirs: partial(theirs.terms, batch),
    }
    losses = []
    for model, compute in terms.items():
        optimizers = speed.make_optimizers(model, cfg)
        step = speed.optimizer_step(model, optimizers, compute, CPU, "float32")
        losses.append([step() for _ in range(12)])
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_gpt2_of_transformers_has_our_size_and_writes_the_whole_text():
    pytest.importorskip("transformers")
    model = networks()["AR"]
    call = speed.transformers_generate(model, torch.zeros(2, 3, dtype=torch.long), 6)
    theirs = call.func.__self__
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in model.parameters())
    assert call().shape == (2, 4 + 6)


@pytest.mark.slow  # 5 seconds per sampler
@pytest.mark.parametrize("sampler", list(diffusion.SAMPLERS))
def test_the_loop_costs_less_than_the_network(sampler, monkeypatch):
    """GPT-2's vocabulary and width, two blocks: a sort or a float64 softmax would cost more."""
    shape = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 50257}
    monkeypatch.setattr(speed, "SHAPES", {"gpt2": shape})
    network = at_length(speed.random_networks("gpt2", "float32", 65, CPU, 0)["cached prefix"], 64)
    prefix = torch.arange(3)[None]
    cfg = diffusion.SamplerConfig(sampler=sampler, steps=3)
    generate = partial(diffusion.generate, prefix=prefix, cfg=cfg)
    calls = {
        "loop": partial(generate, speed.recorded(network, prefix)),
        "whole": partial(generate, network),
    }
    line = make_line("loop", {}, speed.time_in_turn(calls, 5, CPU), "whole", "time")
    assert median(line["systems"]["loop"]["ratio"]) < 0.5


# Tables


def test_the_table_of_the_results_file():
    """Read by hand in the file: AR writes 256 tokens in 4.66 s, 10 steps have 0.97 of its speed."""
    lines = speed.read_lines(RESULTS)
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in speed.decode_table(lines, short=True).splitlines()
    ]
    at = rows[0].index("256")
    found = {(row[0], row[1], row[2]): row[at] for row in rows[2:]}
    assert found["float32", "1", "AR"] == "4.66 s (42% of roofline)"
    assert found["float32", "1", "cached prefix, 10 steps"] == "0.97"
    assert len(found) == 8 and "50 steps" in speed.decode_table(lines)
    assert all(line["origin"]["command"] in speed.origins(lines) for line in lines)


def test_the_faster_form_of_a_system_is_shown():
    systems = {
        "AR": {"seconds": [3.0]},
        "AR, compiled": {"seconds": [2.0]},
        "x, 10 steps, compiled": {"seconds": [2.0]},
        "x, 10 steps": {"seconds": [1.0]},
    }
    faster = speed.faster_forms(systems)
    assert {name: entry["seconds"] for name, entry in faster.items()} == {
        "AR": [2.0],
        "x, 10 steps": [1.0],
    }


def test_a_row_for_each_system_without_empty_columns():
    line = make_line(
        "train", {"dtype": "float32", "batch": 2}, times(a=[1.0, 2.0], b=[4.0, 4.0]), "b"
    )
    header, _, row = lines_table([line]).splitlines()
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "train, float32, batch 2",
        "a",
        "1.5 s",
        "b: 4 s",
        "3.00 (2.00 to 4.00) speed",
    ]
    line["systems"]["a"] |= {"roofline": 0.75, "bound": "bytes", "scaled": True}
    assert "~1.5 s" in lines_table([line]) and "50% of bytes" in lines_table([line])
