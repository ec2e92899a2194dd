"""The benchmark of decoding runs at tiny sizes; its arithmetic is checked by hand. How fast anything is: results/."""

import json
import statistics
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import autoregressive
import diffusion
from checkpoint import save
from cost import forward_flops
from data.loader import write_pairs
from data.tokenizer import get_tokenizer
from eval import decoders, exact_match, limits, plots, speed, timing
from eval.decoders import GPT2, Networks, Part, Setting, Shapes, System
from eval.speed_table import crossover, label, rows_of, table
from model import ModelConfig, Transformer
from runs.speed_tables import decode_table, lines_table, peers_table, quality_table
from samplers import SAMPLERS

SIZES = dict(n_layer=2, n_head=2, n_embd=16)
CEILINGS = dict(flops=1e9, bandwidth=1e9)


def tiny() -> Shapes:
    shape = SIZES | GPT2
    return Shapes(
        gpt2=shape | dict(vocab_size=40),
        six=shape | dict(vocab_size=30),
        prompt=3,
        long_prompt=9,
        new=6,
        lengths=(4, 6, 16, 20),
        learned=16,
    )


def networks() -> Networks:
    shapes = tiny()
    return Networks(shapes.gpt2, shapes, 20, timing.CPU, seed=0)


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch):
    """Ceilings take a second to measure; every test but theirs does without."""
    monkeypatch.setattr(speed, "ceilings", lambda device, dtype: dict(CEILINGS))


class SpedUp:
    """Stands in for fast.Fast: the same seam around the same network."""

    def __init__(self, model):
        self.model, self.cfg, self.tok, self.soft_embedding = model, model.cfg, model.tok, model.soft_embedding

    def encode(self, *args, **named):
        return self.model.encode(*args, **named)

    def decode(self, *args, **named):
        return self.model.decode(*args, **named)


def run(*flags, **named):
    return speed.main(["--runs=2", *flags], tiny(), **dict(speed_up=SpedUp) | named)


SMALL = ("--dtypes=float32", "--batches=1", "--lengths=4,20")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(what main returned, the file) of a run of two lengths, the longer one with RoPE."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("speed") / "results" / "speed.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "ceilings", lambda device, dtype: dict(CEILINGS))
        return run(*SMALL, f"--out={out}"), out


# How slow nothing may become


@pytest.mark.slow  # 5 seconds a sampler
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_the_loop_around_a_network_costs_less_than_the_network(sampler):
    """GPT-2's vocabulary and width, two blocks: a softmax in float64, multinomial or a sort would cost several times
    that. What the loop costs beside twelve blocks is in results/."""
    shape = GPT2 | dict(n_layer=2, n_head=12, n_embd=768, vocab_size=50_257)
    model = Networks(shape, Shapes(), 65, timing.CPU, seed=0).get(System("frozen"), Setting("float32", 1, 64))
    prefix = torch.arange(8)[None]
    cfg = diffusion.SamplerConfig(sampler=sampler, steps=3, candidates=1)
    bare = limits.Recorded(model, prefix)
    systems = dict(loop=partial(diffusion.generate, bare, prefix, cfg))
    systems["all"] = partial(diffusion.generate, model, prefix, cfg)
    times, _ = timing.in_turn(systems, 5, timing.CPU)
    share = statistics.median(a / b for a, b in zip(times["loop"], times["all"]))
    print(f"{sampler}: {share:.2f}")
    assert share < 0.5


# What is measured


def test_every_decoder_is_timed_at_every_number_of_steps(measured):
    rows = [row for row in measured[0]["rows"] if row["length"] == 4]
    assert {label(row) for row in rows if not row["compiled"]} == {
        "AR",
        *(f"{kind}, {n} steps" for kind in ("frozen", "joint") for n in (10, 20, 50)),
        *(f"frozen, {n} steps, {extra}" for extra in ("8 candidates", "self-conditioning") for n in (10, 20, 50)),
        "frozen, adaptive",
    }
    assert sum(row["compiled"] for row in rows) == sum(not row["compiled"] for row in rows)
    assert all(0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"] for row in rows)


def test_calls_are_counted_with_all_candidates(measured):
    """AR: one a token. Diffusion: one a step and candidate."""
    for row in measured[0]["rows"]:
        assert row["calls"] == (row["length"] if row["kind"] == "AR" else row["steps"] * row["candidates"])
        assert row["tokens_per_call"] == row["length"] / row["calls"]


def test_what_was_not_run_whole_is_marked(measured):
    for row in measured[0]["rows"]:
        whole = row["kind"] == "AR" or row["steps"] == 10
        assert row["scaled"] != whole
    lines = table(measured[0]["rows"]).splitlines()
    assert all("~" in line for line in lines if "50 steps" in line)
    assert not any("~" in line for line in lines if " AR" in line)


def test_positions_are_rotary_beyond_the_learned_ones(measured):
    assert {row["length"]: row["position"] for row in measured[0]["rows"]} == {4: "learned", 20: "rope"}


def test_the_file_holds_what_was_returned_and_the_picture_lies_beside_it(measured):
    result, out = measured
    assert json.loads(out.read_text())["rows"] == json.loads(json.dumps(result["rows"]))
    assert result["finished"] and all(result[name] for name in ("hardware", "torch", "commit", "command"))
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_the_lines_beside_the_table(measured):
    names = {(line["name"], line["case"].removeprefix("float32").strip()) for line in measured[0]["lines"]}
    gemm = {("gemm", f"{how}{where}") for how in ("eager", "compiled") for where in ("", " 16 slots")}
    assert names == {("loop", "batch 1"), ("loop", "batch 8"), ("prefix", "")} | gemm
    assert all(line["ratio"]["median"] > 0 for line in measured[0]["lines"])


def test_the_same_command_again_does_only_what_is_missing(measured, tmp_path):
    """Of a killed run one cell has a run too few, one is not there and one line is lost: those are made, no others."""
    before = json.loads(measured[1].read_text())
    keys = [key for key in before["cells"] if key.startswith("('float32', 1, 4)")]
    before["cells"][keys[0]]["runs"].pop()
    del before["cells"][keys[3]]
    lost = before["lines"].pop()
    out = tmp_path / "speed.json"
    out.write_text(json.dumps(before))
    after = run(*SMALL, f"--out={out}")
    fresh = {key for key in after["cells"] if after["cells"][key]["block"] != measured[0]["cells"][key]["block"]}
    assert fresh == {keys[0], keys[3]} and after["cells"].keys() == measured[0]["cells"].keys()
    assert [line["name"] for line in after["lines"]] == [line["name"] for line in [*before["lines"], lost]]
    assert after["lines"][:-1] == before["lines"]


def test_the_file_of_another_run_is_left_alone(measured):
    before = measured[1].read_text()
    with pytest.raises(ValueError, match="of another run .other seed.: name another --out"):
        run(*SMALL, f"--out={measured[1]}", "--seed=1")
    assert measured[1].read_text() == before


def test_minutes_end_a_run_between_two_blocks(tmp_path, capsys):
    out = tmp_path / "speed.json"
    result = run(*SMALL, f"--out={out}", "--minutes=1e-9")
    assert not result["finished"] and not result["cells"] and "goes on from here" in capsys.readouterr().out


def test_without_a_compiler_its_systems_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fast", None)
    result = run("--dtypes=float32", "--batches=1", "--lengths=20", speed_up=None)
    assert not any(row["compiled"] for row in result["rows"])
    assert "compiled systems left out" in capsys.readouterr().out


def test_what_does_not_fit_is_a_row_of_its_own(monkeypatch):
    def write(system, *args, **named):
        if system.kind != "AR":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 210 GiB")
        return decoders.write(system, *args, **named)

    monkeypatch.setattr(speed, "write", write)
    monkeypatch.setattr(speed, "line_makers", lambda *_: {})
    result = run("--dtypes=float32", "--batches=1", "--lengths=20")
    failed = [row for row in result["rows"] if row["failed"]]
    assert failed and all("out of memory" in row["failed"] and row["kind"] == "frozen" for row in failed)
    assert "out of memory" in table(result["rows"])


@pytest.mark.parametrize("there", (True, False))
def test_bfloat16_is_left_out_where_the_processor_has_none(there, monkeypatch):
    monkeypatch.setattr(speed, "computes_bfloat16", lambda device: there)
    assert speed.dtypes_of(speed.SpeedConfig()) == ["float32", *(["bfloat16"] if there else [])]
    assert speed.dtypes_of(speed.SpeedConfig(dtypes="bfloat16")) == ["bfloat16"]  # asked for is asked for


@pytest.mark.parametrize("cpu", (True, False))
def test_the_plan_begins_with_what_tells_most(cpu, monkeypatch):
    monkeypatch.setattr(speed, "computes_bfloat16", lambda device: True)
    blocks = speed.plan(speed.SpeedConfig(), Shapes(), torch.device("cpu" if cpu else "cuda"), True)
    settings = [setting for setting, _ in blocks]
    assert settings[0] == Setting("float32", 1, 256) and len(set(settings)) == len(settings)
    assert {s.batch for s in settings} == ({1, 8} if cpu else {1, 8, 32})
    assert {s.length for s in settings} == {64, 128, 256, 512, 1024, 4096} | (set() if cpu else {2048})
    assert {s.dtype for s in settings if s.length == 4096} == {"float32", "bfloat16"}
    for setting, ours in blocks:
        assert {s.kind for s in ours} >= {"AR", "frozen"} and {s.compiled for s in ours} == {True, False}
        scaled = any(system.tells != (system.steps,) for system in ours)
        assert scaled == (cpu or setting.batch * setting.length * 8 > 32768), "a GPU runs every step that is short"


@pytest.mark.slow  # 4 s
def test_quick_is_one_number_format_of_a_small_shape(monkeypatch):
    monkeypatch.setattr(speed, "line_makers", lambda *_: {})
    result = run("--quick")
    assert {(row["dtype"], row["batch"], row["length"]) for row in result["rows"]} == {
        ("float32", 1, 4),
        ("float32", 1, 6),
    }
    assert (
        result["cells"]["('float32', 1, 4) AR 0"]["work"][0][0]
        < run(*SMALL[:2], "--lengths=4")["cells"]["('float32', 1, 4) AR 0"]["work"][0][0]
    )


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--lengths=64;128", "--lengths wants numbers"),
        ("--dtypes=float16", "there are float32, bfloat16"),
        ("--dtypes=float16 --quick", "there are float32, bfloat16"),
        ("--peers=nowhere", "--peers=nowhere: no such folder"),
        ("--task=summary", "there are translation, qa, code, exact_match"),
        ("--ar_from=x.pt", "--ar_from goes with --init_from"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_line(flag, says):
    with pytest.raises(ValueError, match=says):
        run(*flag.split())


def test_bfloat16_and_batches_are_measured_where_asked(monkeypatch):
    monkeypatch.setattr(speed, "line_makers", lambda *_: {})
    result = run("--dtypes=bfloat16", "--batches=2", "--lengths=4")
    assert {(row["dtype"], row["batch"]) for row in result["rows"]} == {("bfloat16", 2)}


# Quality beside speed


@pytest.mark.slow  # times every decoder, 4 s
def test_quality_stands_beside_speed(tmp_path, monkeypatch):
    """The rows of a checkpoint say what eval.exact_match says of that setting, and AR stops where its texts end."""
    monkeypatch.setattr(speed, "STEPS", (2, 4))
    monkeypatch.setitem(decoders.ADAPTIVE, "steps", 4)
    tokenizer = get_tokenizer("bytes")
    pairs = [(tokenizer.encode(text), tokenizer.encode(text)) for text in ("ab", "cd", "ef")]
    write_pairs(tmp_path / "copy", {"train": pairs, "valid": pairs}, "bytes", 8, 16, source="tests")
    both = dict(paradigm="diffusion", prefix_attention="bidirectional", target_attention="bidirectional", shift=True)
    for name, kind in (("ar", {}), ("diffusion", both)):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, target_length=8, **kind))
        save(tmp_path / f"{name}.pt", model, 7, "bytes", train_config={"data": str(tmp_path / "copy")})
    flags = [
        f"--init_from={tmp_path / 'diffusion.pt'}",
        f"--ar_from={tmp_path / 'ar.pt'}",
        "--task=exact_match",
        "--n=3",
    ]
    result = run(*flags)
    ours = [row for row in result["rows"] if row["steps"] == 4 and row["candidates"] == 8 and not row["adaptive"]]
    ours = [row for row in ours if row["compiled"]]
    said = exact_match.main([flags[0], "--n=3", "--steps=4", "--candidates=8"])
    assert [row["quality"]["exact_match"] for row in ours] == [said["exact_match"]] * 2  # batch 1 and 3
    assert {row["length"] for row in result["rows"]} == {7}
    assert all("exact_match" in row["quality"] for row in result["rows"]) and not any(
        r["scaled"] for r in result["rows"]
    )
    with pytest.raises(ValueError, match="is an AR model"):
        run(f"--init_from={tmp_path / 'ar.pt'}")
    (tmp_path / "speed_quality.json").write_text(json.dumps(result | dict(seed=0)))
    row = next(line for line in quality_table(tmp_path).splitlines() if "| frozen, 4 steps, 8 candidates" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:3] == ["32.0", f"{said['exact_match']:.4g}"] and decode_table(tmp_path) == "(not measured yet)"
    fastest = min((r for r in result["rows"] if r["steps"] == 4 and r["candidates"] == 8 and r["batch"] == 1
                   and not r["adaptive"]), key=lambda r: r["seconds"]["median"])  # fmt: skip
    assert cells[3:5] == [f"{1000 * fastest['seconds']['median']:.3g}", f"{fastest['ratio']['median']:.2f}"]


# Arithmetic


def cell(**changed) -> dict:
    base = dict(dtype="float32", batch=2, length=100, kind="AR", compiled=False, steps=0, tells=[0], candidates=1)
    base |= dict(conditioned=False, adaptive=False, name="AR", position="learned", block=1.0, integrated=False)
    base |= dict(
        real=False, work=[[2e9, 4e9]], runs=[dict(seconds=s, calls=100, tokens=100, step=None) for s in (8, 12)]
    )
    return base | changed


def test_three_steps_tell_of_ten():
    """6 s for 3 steps of 2 s, so 20 s for 10; AR took 8 and 12, neighbours of each. All by hand."""
    runs = [dict(seconds=6.0, calls=3, tokens=100, step=2.0), dict(seconds=6.0, calls=3, tokens=100, step=1.0)]
    diffuser = cell(
        kind="frozen", name="frozen", steps=3, tells=[3, 10], runs=runs, work=[[1e9, 0], [2e9, 0], [1e9, 0]]
    )
    ar, three, ten = rows_of([diffuser, cell()], [dict(dtype="float32", flops=2e9, bandwidth=1e9)], {})
    assert ar["seconds"]["median"] == 10 and ar["tokens_per_second"] == 20 and ar["tokens_per_call"] == 1
    assert (ar["floor"], ar["binding"], ar["share"]) == (4, "bytes", 0.4)
    assert three["times"] == [6, 6] and not three["scaled"]
    assert ten["times"] == [20, 13] and ten["scaled"] and ten["calls"] == 10 and ten["tokens_per_call"] == 10
    assert ten["floor"] == (1 + 10 * 2 + 9 * 1) / 2 and ten["binding"] == "FLOPs"
    assert ten["ratio"] == dict(median=pytest.approx((8 / 20 + 12 / 13) / 2), low=8 / 20, high=12 / 13)
    assert ten["allowed"] == 4 / 15 and ten["ar_share"] == 0.4


def test_the_ratio_is_to_the_fastest_ar_and_to_neighbours_only():
    slow = cell(name="AR, compiled", compiled=True, runs=[dict(seconds=40, calls=100, tokens=100, step=None)])
    later = cell(kind="joint", name="joint", steps=10, tells=[10], block=2.0, work=[[0, 0], [1, 0], [0, 0]])
    rows = rows_of([slow, cell(), later], [dict(dtype="float32", **CEILINGS)], {})
    assert rows[-1]["ratio"] == dict(median=1.0, low=1.0, high=1.0), "of the medians: no pair was neighbours"
    assert rows[0]["ratio"]["median"] == 8 / 40


@pytest.mark.parametrize(
    "ratios, where",
    [
        ({64: 0.5, 256: 2.0}, "128"),
        ({64: 1.5, 256: 2.0}, "< 64"),
        ({64: 0.5, 256: 0.9}, "> 256"),
        ({64: 0.5, 256: 2.0, 1024: 4.0}, "128"),
    ],
)
def test_crossover(ratios, where):
    """A straight line in both logarithms: half as fast at 64, twice as fast at 256, even at 128."""
    assert crossover(ratios) == where


@pytest.mark.parametrize("kind", ("frozen", "joint"))
def test_counted_work_is_what_torch_counts(kind):
    """Of a network call and of the replay of its matmuls."""
    model = networks().get(System(kind), Setting("float32", 2, 6))
    prefix, target = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        cache = model.encode(prefix, 7)
        with FlopCounterMode(display=False) as call:
            model.decode(cache, target)
        with FlopCounterMode(display=False) as replay:
            limits.gemm_replay(model, 3, 6, 2)()
        with FlopCounterMode(display=False) as read:
            model.encode(prefix, 7)
    first, step, soft = limits.diffusion_work(model, 3, 6, 2)
    assert call.get_total_flops() == replay.get_total_flops() == step.flops
    assert read.get_total_flops() == first.flops and soft.flops == 0


def test_self_conditioning_is_counted():
    model = networks().get(System("frozen", conditioned=True), Setting("float32", 2, 6))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.soft_embedding(torch.zeros(2, 6, 40))
    assert limits.diffusion_work(model, 3, 6, 1, candidates=2)[2].flops == counted.get_total_flops()


def test_ar_work_is_the_sum_over_its_tokens():
    """FLOPs: each token as a target of one behind all before it. Bytes: all weights and keys, each token anew."""
    model = networks().get(System(), Setting("float32", 2, 6))
    one_by_one = replace(
        model.cfg, prefix_attention="bidirectional"
    )  # so that forward_flops counts the new token alone
    flops = [forward_flops(one_by_one, 3 + i, 1) - forward_flops(one_by_one, 3 + i, 0) for i in range(6)]
    weights = 4 * (sum(p.numel() for p in model.parameters()) - model.pos.weight.numel())
    keys = [4 * 2 * 2 * 16 * (3 + i + 1) for i in range(6)]  # float32, keys and values, layers, width, tokens
    work = limits.ar_work(model, 3, 6, rows=2)
    assert work.flops == 2 * (sum(flops) + forward_flops(model.cfg, 3, 0))
    assert work.bytes == 7 * weights + 2 * sum(keys)


def test_long_ar_is_integrated_from_three_places(monkeypatch):
    """With a clock that each call moves by an amount linear in what was read, the integral is the sum."""
    now = [0.0]
    monkeypatch.setattr(decoders.time, "perf_counter", lambda: now[0])
    model = networks().get(System(), Setting("float32", 1, 16))

    class Ticking(SpedUp):
        def decode(self, cache, *args, **named):
            now[0] += 1 + cache.length / 8
            return self.model.decode(cache, *args, **named)

    found = decoders.integrate_ar(Ticking(model), [torch.zeros(1, 3, dtype=torch.long)], tokens=3)
    assert found["seconds"] == pytest.approx(sum(1 + (3 + i) / 8 for i in range(16)), rel=0.02) and found["calls"] == 16


def test_a_part_of_a_text_is_its_beginning_in_buffers_of_the_whole():
    model = networks().get(System(), Setting("float32", 1, 16))
    prefix, sampler, rooms = torch.zeros(1, 3, dtype=torch.long), autoregressive.SamplerConfig(), []
    whole = autoregressive.generate(model, prefix, sampler).tokens
    part = Part(model, 4, room=17)
    part.model = type("Spy", (), dict(encode=lambda _, p, room: rooms.append(room) or model.encode(p, room)))()
    assert torch.equal(autoregressive.generate(part, prefix, sampler).tokens, whole[:, :4]) and rooms == [17]


def test_all_systems_share_their_weights():
    """A frozen and a joint diffusion model compute what the AR model does where they see the same tokens."""
    made, setting = networks(), Setting("float32", 1, 6)
    weights = [made.get(System(kind), setting).state_dict() for kind in ("AR", "frozen", "joint")]
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])
    assert made.get(System("frozen"), setting).cfg.target_length == 7


def test_what_was_compiled_can_be_forgotten_and_the_weights_stay():
    made, setting, fast = networks(), Setting("float32", 1, 6), System("frozen", compiled=True)
    first = made.get(fast, setting, SpedUp).model
    assert made.get(fast, setting, SpedUp).model is first
    made.forget_compiled()
    assert made.get(fast, setting, lambda model: SpedUp(model)).model is first, "another form of the same network"
    assert not any(key[-1] for key in networks().made)


def test_a_recorded_network_answers_as_the_real_one_did():
    model = networks().get(System("frozen"), Setting("float32", 2, 6))
    prefix = torch.zeros(2, 3, dtype=torch.long)
    fake, at = limits.Recorded(model, prefix), []
    sampler = diffusion.SamplerConfig(steps=2, candidates=1, temperature=0.0)
    diffusion.generate(fake, prefix, sampler, on_step=lambda step, canvas, logits, rows: at.append(canvas))
    assert torch.equal(at[1], fake.logits[:, :-1].argmax(-1)) and torch.equal(at[2], at[1])


# Clocks


def test_systems_take_turns():
    """A B, B A, A B: a slow drift of the machine falls on both."""
    order = []
    times, _ = timing.in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b") or 0.5}, runs=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert times["b"] == [0.5] * 3  # a system may bring its own clock


def test_a_slow_system_leaves_after_the_rounds_there_is_patience_for(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def takes(seconds):
        def system():
            now[0] += seconds

        return system

    calls = timing.alternate({"quick": takes(1), "slow": takes(5), "endless": takes(99)}, runs=4, patience=10)
    assert [(name, n) for name, _, _, n in calls] == [
        *[("quick", 4), ("slow", 2), ("endless", 1)],
        *[("slow", 2), ("quick", 4)],
        *[("quick", 4), ("quick", 4)],
    ]


def test_a_rate_is_the_inverse_of_the_seconds():
    times = {"ours": [1.0, 2.0], "theirs": [2.0, 2.0]}
    assert timing.Line("n", "c", "ours", "theirs", "", times, {}).ratios == [0.5, 1.0]
    assert timing.Line("n", "c", "ours", "theirs", "", times, {}, rate=True).ratios == [2.0, 1.0]


def test_peak_memory_is_what_was_alive_at_once():
    """Three arrays of 4 MB are made, two of them live together."""

    def call():
        a = torch.ones(1_000_000)
        b = a + 1
        del a
        return b.exp()

    assert timing.peak_bytes(call, timing.CPU) == pytest.approx(8e6, rel=1e-3)


@pytest.mark.slow  # a gigabyte is copied, 5 s
def test_ceilings_are_speeds():
    found = timing.ceilings(timing.CPU, "float32")
    assert found["flops"] > 1e9 and found["bandwidth"] > 1e8


# Shown elsewhere


def test_the_table_of_results_has_the_faster_form_of_each_system(measured, tmp_path):
    """Ratio by length and crossover of eval.speed's own JSON, beside the lines of older files."""
    out = tmp_path / "speed_decode.json"
    out.write_text(measured[1].read_text())
    text = decode_table(tmp_path)
    found = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in text.splitlines()
        if "frozen, 10 steps " in line
    ]
    rows = [r for r in measured[0]["rows"] if r["name"] in ("frozen", "frozen, compiled") and r["steps"] == 10]
    assert len(found) == 1
    for cell, n in zip(found[0][3:5], (4, 20)):
        fastest = min((row for row in rows if row["length"] == n), key=lambda row: row["seconds"]["median"])
        assert cell == f"{fastest['ratio']['median']:.2f}"
    assert measured[0]["command"] in text and "| loop " not in text
    lines = lines_table(tmp_path, ("loop",))
    assert lines.count("\n| loop ") == 2 and "| gemm " not in lines and measured[0]["command"] in lines
    assert quality_table(tmp_path) == peers_table(tmp_path) == "(not measured yet)"
    short = decode_table(tmp_path, short=True)
    assert "frozen, 10 steps " in short and "AR: seconds" in short
    assert "20 steps" not in short and "joint" not in short and "candidates" not in short and "50 steps" in text


def test_peers_stand_in_a_row_each(tmp_path):
    def line(system, case, *ratio):
        r = dict(zip(("median", "low", "high"), ratio))
        return dict(name="peer", base="LLaDA, temperature 1", system=system, case=case, target=">= 2.0", ratio=r)

    cases = [f"LLaDA, temperature 1, {case}" for case in ("float32 batch 1", "bfloat16 batch 1")]
    lines = [line("ours", cases[0], 1.9, 1.8, 2.0), line("ours", cases[1], 2.5, 2.4, 2.6)]
    result = dict(lines=lines, command="c", seed=1, hardware="h", threads=2, torch="t", commit="a", quality={})
    (tmp_path / "speed_peers.json").write_text(json.dumps(result))
    row = peers_table(tmp_path).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("LLaDA, temperature 1", "ours", ">= 2.0", "1.90 (1.80 to 2.00)", "2.50 (2.40 to 2.60)"),
    ]


def test_the_picture_has_our_lines_and_the_papers_points(measured, monkeypatch, tmp_path):
    """AR and three numbers of steps, filled; beside each the paper's, hollow: 14 ms a token makes 56 s of 4,000."""
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))
    plots.plot_speed(measured[0]["rows"], tmp_path / "speed.png")
    (panel,) = kept[0].axes
    drawn = [line for line in panel.lines if len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in drawn[::2]] == [[4, 20]] * 4
    assert dict(zip(drawn[1].get_xdata(), drawn[1].get_ydata())) == {500: 7.0, 4000: 56.0}
    fastest = min(r["seconds"]["median"] for r in measured[0]["rows"] if r["kind"] == "AR" and r["length"] == 4)
    assert drawn[0].get_ydata()[0] == fastest
