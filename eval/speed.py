"""How fast the two decoders are: AR and diffusion of the same weights, both as fast as we can make them, timed in turn.

    python -m eval.speed --quick                                        # a small shape, under two minutes on 2 cores
    python -m eval.speed --out=results/speed_gpt2.json                  # GPT-2 small; the same command again goes on
    python -m eval.speed --device=cuda --minutes=4 --out=results/gpu/speed_decode.json
    python -m eval.speed --init_from=CKPT --ar_from=CKPT --task=translation    # quality beside speed
    python -m eval.speed --peers=FOLDER                                 # beside others' loops: see eval/peers.py

Random weights that never end a text, so every text has its full length: AR spends a call a token, diffusion a call a
step. What a longer text of fewer tokens would save shows with a checkpoint only. Compiled is fast.speed_up; the first
call, which compiles, is timed apart. A table, a picture beside the JSON, one JSON line last.
"""

import json
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from importlib import import_module
from io import StringIO
from pathlib import Path

import torch

from configurator import configure, run
from device import computes_bfloat16, pick_device
from eval.common import environment, write_json
from eval.decoders import ADAPTIVE, Checkpoints, Networks, Part, Setting, Shapes, System, integrate_ar, write
from eval.limits import ar_work, diffusion_work, gemm_line, loop_line, prefix_line
from eval.peers import peer_lines
from eval.speed_table import crossover_table, crossovers, quality_key, rows_of, table
from eval.timing import Line, alternate, ceilings, clock, header, peak_bytes


@dataclass
class SpeedConfig:
    out: str = ""  # the JSON, each finished cell at once, and beside it the picture; empty: nowhere
    quick: bool = False  # a shape of 6 layers, two lengths
    device: str = "auto"  # auto | cpu | cuda | mps
    dtypes: str = ""  # of weights and activations; empty: float32, and bfloat16 where that is fast; quick: float32
    batches: str = ""  # empty: 1,8 on a CPU, 1,8,32 elsewhere
    lengths: str = ""  # tokens; empty: 64 to 4,096
    minutes: float = 0.0  # begin nothing new after that; 0: no limit
    runs: int = 3  # timed runs of a system at a setting, beyond those that warm up
    patience: float = 40.0  # seconds for the runs of one system at one setting; a slow one gets fewer, at least one
    peers: str = ""  # a folder of checkouts to run beside ours, see eval/peers.py
    init_from: str = ""  # a diffusion checkpoint: its own lengths, its quality beside its speed
    ar_from: str = ""  # the AR checkpoint it is compared with
    task: str = "exact_match"  # translation | qa | code | exact_match: what quality means
    n: int = 100  # texts that are scored with a checkpoint
    threads: int = 0  # 0: what torch takes
    seed: int = 1337


STEPS = (10, 20, 50)
# Rows x tokens that are decoded whole. Beyond it 3 steps are timed, and on a CPU AR in three places.
WHOLE, WHOLE_ON_GPU = 2048, 32768


def plan(cfg: SpeedConfig, shapes: Shapes, device: torch.device, compiles: bool) -> list[tuple[Setting, list[System]]]:
    """The blocks in order of what they tell: a run that is cut short has the most telling ones."""
    cpu = device.type == "cpu"
    batches = _numbers("batches", cfg.batches) or ([1] if cfg.quick else [1, 8] if cpu else [1, 8, 32])
    lengths = _numbers("lengths", cfg.lengths) or (shapes.lengths[:2] if cfg.quick else shapes.lengths)
    blocks = []
    first = lengths[:3]
    for tier in (first, lengths[3:]):
        for batch, dtype, length in ((b, d, n) for b in batches for d in dtypes_of(cfg) for n in tier):
            if cpu and length > shapes.learned and (batch > 1 or length < max(lengths)):
                continue  # hours
            full = not cpu or (dtype == "float32" and batch == 1 and length in first and length <= shapes.learned)
            blocks.append((Setting(dtype, batch, length), systems(batch * length, full, cpu, compiles)))
    return blocks


def dtypes_of(cfg: SpeedConfig) -> list[str]:
    """The number formats that are asked for."""
    both = not cfg.quick and computes_bfloat16(pick_device(cfg.device))
    dtypes = (cfg.dtypes or ("float32,bfloat16" if both else "float32")).split(",")
    if not set(dtypes) <= {"float32", "bfloat16"}:
        raise ValueError(f"--dtypes: there are float32, bfloat16; got {cfg.dtypes!r}")
    return dtypes


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part]
    except ValueError:
        raise ValueError(f"--{name} wants numbers with commas between them, got {text!r}") from None


def systems(tokens: int, everything: bool, cpu: bool, compiles: bool) -> list[System]:
    """What is timed in turn at a setting of so many tokens, all rows together.

    A GPU runs 10, 20 and 50 steps. On a CPU the steps of one run of 10 tell of 20 and 50, and so does a run of 3 on
    either where the canvas is wide.
    """
    limit = WHOLE if cpu else WHOLE_ON_GPU

    def diffusers(candidates: int = 1, **what) -> list[System]:
        if tokens * candidates > limit:
            return [System(steps=3, tells=STEPS, candidates=candidates, **what)]
        if cpu:
            return [System(steps=10, tells=STEPS, candidates=candidates, **what)]
        return [System(steps=n, tells=(n,), candidates=candidates, **what) for n in STEPS]

    compiled = (False, True) if compiles else (False,)
    found = [System("AR", c) for c in compiled]
    found += [one for c in compiled for one in diffusers(kind="frozen", compiled=c)]
    if everything:
        for c in compiled:
            found += diffusers(kind="joint", compiled=c)
            found += diffusers(kind="frozen", compiled=c, conditioned=True)
            found += diffusers(kind="frozen", compiled=c, candidates=8)
            n = ADAPTIVE["steps"]
            found.append(System("frozen", c, 3 if cpu or tokens > limit else n, (n,), adaptive=True))
    return found


def systems_of(subject: Checkpoints, compiles: bool) -> list[System]:
    """What is timed of a checkpoint: every number of steps is run whole, for its texts end where they end."""
    found = []
    for compiled in (False, True) if compiles else (False,):
        found += [System("AR", compiled)] if ("AR", False) in subject.models else []
        what = dict(kind=subject.kind, compiled=compiled, conditioned=subject.conditioned)
        for candidates in (1, 8):
            found += [System(steps=n, tells=(n,), candidates=candidates, **what) for n in STEPS]
            n = ADAPTIVE["steps"]
            found.append(System(steps=n, tells=(n,), candidates=candidates, adaptive=True, **what))
    return found


def main(argv: list[str], shapes: Shapes | None = None, speed_up: Callable | None = None) -> dict:
    """Measure, print and write what argv asks for; returns what the JSON line holds.

    speed_up: makes the compiled form of a model; fast.speed_up where it is not given.
    """
    cfg, shapes, speed_up = configure(SpeedConfig, argv), shapes or Shapes(), speed_up or _compiler()
    if cfg.task not in TASKS:
        raise ValueError(f"--task: there are {', '.join(TASKS)}; got {cfg.task!r}")
    if cfg.ar_from and not cfg.init_from:
        raise ValueError("--ar_from goes with --init_from, the diffusion checkpoint that it is compared with")
    if cfg.peers and not Path(cfg.peers).is_dir():
        raise ValueError(f"--peers={cfg.peers}: no such folder")
    began, device = time.time(), pick_device(cfg.device)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    if cfg.init_from:
        subject = Checkpoints(cfg.init_from, cfg.ar_from, cfg.n, device)
        ours = systems_of(subject, bool(speed_up))
        blocks = [(Setting("float32", B, subject.length), ours) for B in sorted({1, len(subject.prefixes)})]
    else:
        blocks = plan(cfg, shapes, device, bool(speed_up))
        shape = shapes.six if cfg.quick else shapes.gpt2
        subject = Networks(shape, shapes, max(shapes.new, *(setting.length for setting, _ in blocks)), device, cfg.seed)
    result, save = _open(cfg, argv, shapes)
    print(" | ".join(f"{key} {value}" for key, value in environment().items()))
    todo = [partial(measure, setting, ours, subject, cfg, device, speed_up) for setting, ours in blocks]
    if cfg.init_from:
        todo.append(partial(score, ours, cfg))
    else:
        todo.insert(1, partial(measure_lines, shapes, subject, cfg, device, speed_up))
    for task in todo:
        if cfg.minutes and time.time() - began > 60 * cfg.minutes:
            print(f"--minutes={cfg.minutes:g} are over; the same command goes on from here")
            break
        task(result, save)
    else:
        result["finished"] = True
    result["rows"] = rows_of(list(result["cells"].values()), result["ceilings"], result["quality"])
    result["crossovers"] = crossovers(result["rows"])
    save()
    _show(result, cfg)
    return result


def _compiler() -> Callable | None:
    try:
        from fast import speed_up
    except ImportError:
        print("compiled systems left out: there is no fast.py")
        return None
    return speed_up


def _open(cfg: SpeedConfig, argv: list[str], shapes: Shapes) -> tuple[dict, Callable[[], None]]:
    """(the result so far, what writes it). Raises ValueError where the file is of another run."""
    same = {k: v for k, v in environment().items() if k in ("hardware", "torch", "threads")}
    same |= dict(shapes=asdict(shapes), quick=cfg.quick, seed=cfg.seed, checkpoints=[cfg.init_from, cfg.ar_from])
    same = json.loads(json.dumps(same))
    result = dict(command="", header=same, cells={}, lines=[], ceilings=[], quality={}, finished=False)
    if cfg.out and Path(cfg.out).exists():
        found = json.loads(Path(cfg.out).read_text(encoding="utf-8"))
        differs = [name for name in same if found.get("header", {}).get(name) != same[name]]
        if differs:
            raise ValueError(
                f"{cfg.out} is of another run (other {', '.join(differs)}): name another --out, or delete it"
            )
        result |= found
        print(f"{cfg.out}: {len(result['cells'])} cells are there already")
    result |= dict(command=" ".join(["python -m eval.speed", *argv]), seed=cfg.seed, **environment())
    return result, lambda: write_json(cfg.out, result) if cfg.out else None


def measure(setting, ours, subject, cfg: SpeedConfig, device, speed_up, result: dict, save: Callable) -> None:
    """Time the systems that have no finished cell at this setting, in turn."""
    cells, began, calls, works = result["cells"], time.time(), {}, {}
    missing = {key: s for s in ours if not _done(cells.get(key := f"{astuple(setting)} {s.name} {s.steps}"))}
    if not missing:
        return
    if device.type == "cuda":  # each length gets programs of its own shapes, not one that was made for all of them
        subject.forget_compiled()
        torch.compiler.reset()
    result["ceilings"].append(dict(dtype=setting.dtype, **ceilings(device, setting.dtype)))
    for key, system in missing.items():
        cell = asdict(setting) | asdict(system) | dict(name=system.name, position=subject.position(setting.length))
        cell |= dict(runs=[], wanted=0, integrated=False, block=began, commit=result["commit"], real=subject.real)
        cells[key] = cell
        try:
            calls[key], works[key] = prepare(system, setting, subject, device, speed_up, cell)
        except RuntimeError as error:  # torch's own are: what does not fit into memory is a finding
            cell["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    prepared = time.time()
    for key, seconds, said, wanted in alternate(calls, cfg.runs, cfg.patience, device):
        run = dict(seconds=seconds / len(subject.prompts(setting))) | said
        cells[key]["runs"].append(run)
        cells[key] |= dict(wanted=wanted, work=works[key](run["calls"]))
        save()
    print(
        f"{setting.dtype} batch {setting.batch} length {setting.length}: {len(calls)} systems timed in "
        f"{time.time() - prepared:.0f} s after {prepared - began:.0f} s of first calls, which compile",
        flush=True,
    )


def _done(cell: dict | None) -> bool:
    return cell is not None and ("failed" in cell or 0 < cell["wanted"] <= len(cell["runs"]))


def prepare(system: System, setting, subject, device, speed_up, cell: dict) -> tuple[Callable, Callable]:
    """(the call that is timed, warmed up; the work that so many calls are). First call and memory go into cell."""
    prompts, model = subject.prompts(setting), subject.get(replace(system, compiled=False), setting)
    (B, P), L, cuda = prompts[0].shape, setting.length, device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    decoder = subject.get(system, setting, speed_up)
    steps = 3 if cuda else 1 + system.conditioned  # a graph is recorded on the second call or the third
    part = Part(decoder, 3, L + 1) if system.kind == "AR" else decoder
    warm = partial(write, replace(system, steps=min(system.steps, steps)), part, prompts[:1])
    cell["first_call"], _ = clock(warm, device)
    kept = torch.cuda.memory_allocated(device) - before if cuda else 0
    cell["memory"] = kept + peak_bytes(warm, device) + sum(p.numel() * p.element_size() for p in model.parameters())
    if system.kind != "AR":
        work = [astuple(part) for part in diffusion_work(model, P, L, B, system.candidates)]
        return partial(write, system, decoder, prompts, by_step=system.tells != (system.steps,)), lambda calls: work
    cell["integrated"] = device.type == "cpu" and B * L > WHOLE
    call = partial(integrate_ar if cell["integrated"] else partial(write, system), decoder, prompts)
    return call, lambda calls: [astuple(ar_work(model, P, calls, B))]


def measure_lines(shapes: Shapes, subject: Networks, cfg, device, speed_up, result: dict, save: Callable) -> None:
    """The lines beside the table: the loop's share of decoding, the matmuls' share of a call, a long prefix; peers."""
    print(header())
    there = {(line["name"], line["case"]) for line in result["lines"]}
    cases = {case for _, case in there}

    def keep(line: Line) -> None:
        print(line, flush=True)
        result["lines"].append(line.record())
        save()

    for dtype in dtypes_of(cfg):
        for (name, case), make in line_makers(dtype, shapes, subject, cfg.runs, device, speed_up).items():
            if (name, case) not in there:
                keep(make(case))
        for batch in (1, 8) if cfg.peers else ():
            setting = Setting(dtype, batch, shapes.new)
            for line in peer_lines(Path(cfg.peers), subject, setting, cfg.runs, speed_up, cases):
                keep(line)


def line_makers(dtype: str, shapes: Shapes, subject: Networks, runs: int, device, speed_up) -> dict:
    """(name, case) -> what makes that line."""
    here = Setting(dtype, 1, shapes.new)
    model = subject.get(System("frozen"), here)
    short, many, long = (
        subject.prompt(*size) for size in ((1, shapes.prompt), (8, shapes.prompt), (1, shapes.long_prompt))
    )

    def loop(prefix, case):
        return loop_line(model, prefix, 3, runs, case, device)

    def gemm(slots, compiled, case):
        where = replace(here, length=slots)
        plain, decoder = (subject.get(System("frozen", c), where, speed_up) for c in (False, compiled))
        return gemm_line(plain, decoder, short, runs, case, ceilings(device, dtype)["flops"], device)

    found = {("loop", f"{dtype} batch 1"): partial(loop, short), ("loop", f"{dtype} batch 8"): partial(loop, many)}
    for slots in (shapes.new, shapes.learned):
        where = "" if slots == shapes.new else f" {slots} slots"
        found |= {("gemm", f"{dtype} eager{where}"): partial(gemm, slots, False)}
        found |= {("gemm", f"{dtype} compiled{where}"): partial(gemm, slots, True)} if speed_up else {}
    return found | {("prefix", dtype): lambda case: prefix_line(model, [long, short], runs, case, device)}


TASKS = ("translation", "qa", "code", "exact_match")


def score(ours: list[System], cfg: SpeedConfig, result: dict, save: Callable) -> None:
    """The task's metrics under each setting of a sampler; compiled systems say the same and are not asked again."""
    task = import_module(f"eval.{cfg.task}")
    for system in ours:
        if system.compiled or (key := quality_key(asdict(system), system.steps)) in result["quality"]:
            continue
        checkpoint = cfg.ar_from if system.kind == "AR" else cfg.init_from
        flags = dict(init_from=checkpoint, n=cfg.n, seed=cfg.seed, device=cfg.device) | asdict(system.sampler)
        with redirect_stdout(StringIO()):  # it prints a table of its own
            said = task.main([f"--{name}={value}" for name, value in flags.items()])
        metrics = [name for name in said if f"{name}_interval" in said or name == "exact_match"]
        result["quality"][key] = {name: said[name] for name in metrics}
        save()


def _show(result: dict, cfg: SpeedConfig) -> None:
    print(table(result["rows"]))
    if any(one["ratios"].keys() != {result["rows"][0]["length"]} for one in result["crossovers"]):
        print("\nratio to the fastest AR at each length, above 1 is faster; from the crossover on diffusion is")
        print(crossover_table(result["crossovers"]))
    print(NOTES)
    if cfg.out and result["rows"]:
        try:
            from eval.plots import plot_speed

            plot_speed(result["rows"], Path(cfg.out).with_suffix(".png"))
        except ValueError as error:  # without matplotlib the table is whole
            print(error)
    print(json.dumps({name: value for name, value in result.items() if name not in ("cells", "rows", "lines")}))


NOTES = """
~: scaled from fewer steps, or AR integrated from three places. calls: of a text, all candidates counted. peak: weights
and the most that a call allocates beside them. share of floor: of the longer of FLOPs at the matmul rate and bytes at
the bandwidth, the best of both in this run. ceilings allow: the ratio to AR if both stood on their floors. Random
weights never settle: adaptive rows run all their steps. The first call, which compiles, is not in any of this."""


if __name__ == "__main__":
    run(main)
