"""What every evaluation shares: a checkpoint with sampler settings, generation that can go on later, tables, JSON.

The three tasks of the paper (eval.translation, eval.qa, eval.code) share more: where examples and answers come from,
and what is reported of them. That is the second half.
"""

import hashlib
import json
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import autoregressive
import diffusion
import speculative
from checkpoint import load, load_model, write_atomically
from configurator import configure, read_settings
from data.loader import Pairs, build_if_missing, open_set
from data.mini import task_of
from data.objectives import collate
from data.text_file import read_text
from device import pick_device
from eval.metrics import Metric, interval, paired
from eval.metrics import wilson as wilson  # other evaluations ask for it here
from sample import LEFT_TO_RIGHT, decoder_of


@dataclass
class EvalConfig:
    """Settings of every evaluation; the sampler's settings come beside them, those of the checkpoint's paradigm."""

    init_from: str = "out/run/ckpt.pt"
    n: int = 500  # held-out items
    batch_size: int = 64
    seed: int = 0
    device: str = "auto"  # auto | cpu | cuda | mps
    json: str = ""  # also write the result to this file


def load_for_eval(argv: list[str], base: type = EvalConfig):
    """(settings, model, tokenizer, checkpoint fields): argv read with the sampler settings the checkpoint calls for."""
    given = _read_any(argv, base)
    device = pick_device(given.get("device", base.device))
    model, tokenizer, state = load_model(given.get("init_from", base.init_from), device)
    sampler = decoder_of(model.cfg, given.get("sampler")).SamplerConfig
    named = [("sampler", str, given["sampler"])] if given.get("sampler") in LEFT_TO_RIGHT else []
    known = {f.name for f in fields(base)} | {f.name for f in fields(sampler)} | {name for name, *_ in named}
    kind = "an AR" if model.cfg.paradigm == "ar" else "a diffusion"
    for name in given:
        if name not in known:
            raise ValueError(f"{name!r} is no setting for {kind} checkpoint; there are: {', '.join(sorted(known))}")

    def check(self):
        for part in (base, sampler):
            getattr(part, "__post_init__", lambda _: None)(self)

    both = make_dataclass("Settings", named, bases=(base, sampler), namespace={"__post_init__": check})
    return configure(both, argv), model, tokenizer, state


def _read_any(argv: list[str], base: type) -> dict:
    """What argv gives, before it is known which paradigm's sampler it is for."""
    samplers = [module.SamplerConfig for module in (autoregressive, speculative, diffusion)]
    return read_settings(make_dataclass("Anything", [], bases=(base, *samplers)), argv)[0]


class Job(NamedTuple):
    """One text to generate."""

    key: str  # names it in the file of finished texts
    prefix: list[int]  # token ids
    example: int  # keys its draws
    length: int = -1  # tokens of the answer where that is given away: the slots behind are pad from the start


class Made(NamedTuple):
    """One text that was generated, and what it cost."""

    text: str
    calls: int  # network calls, all candidates counted
    seconds: float  # its share of its batch, encode included


def generate_texts(model, tokenizer, prefixes: list[list[int]], cfg) -> tuple[list[str], dict]:
    """The text of each prefix (token ids) in order, and what it cost: see `cost`."""
    jobs = [Job(str(i), prefix, i) for i, prefix in enumerate(prefixes)]
    made = {job.key: one for job, one in _generate(model, tokenizer, jobs, cfg)}
    return [made[job.key].text for job in jobs], cost(made.values())


def cost(made: Iterable[Made]) -> dict:
    """Network calls per sample, all candidates counted, and seconds per sample."""
    made = list(made)
    calls, seconds = sum(one.calls for one in made), sum(one.seconds for one in made)
    return {"calls_per_sample": calls / len(made), "seconds_per_sample": seconds / len(made)}


def _generate(model, tokenizer, jobs: Sequence[Job], cfg) -> Iterator[tuple[Job, Made]]:
    """Each job with its text, as batches end.

    Prefixes of one length are read together, so that no batch needs a mask; each row keeps its own draws, so batching
    changes no text.
    """
    m, device = model.cfg, model.tok.weight.device
    groups: list[list[Job]] = []
    for job in sorted(jobs, key=_kind):
        same = groups and _kind(groups[-1][0]) == _kind(job) and len(groups[-1]) < cfg.batch_size
        groups[-1].append(job) if same else groups.append([job])
    for group in groups:
        start, known = time.perf_counter(), {}
        pairs, names = [(job.prefix, []) for job in group], [job.example for job in group]
        batch = collate(pairs, names, m.pad_id, m.sep_id, m.target_length)
        if group[0].length >= 0:
            length = torch.tensor([[job.length] for job in group])  # (B, 1)
            given = torch.where(torch.arange(m.target_length - 1) < length, -1, m.pad_id)  # (B, T - 1)
            known = {"given": given.to(device)}
        prefix, example = batch.prefix.to(device), batch.example.to(device)
        made = decoder_of(m, getattr(cfg, "sampler", None)).generate(model, prefix, cfg, cfg.seed, example, **known)
        rows, calls = made.tokens.tolist(), made.calls.tolist()
        seconds = (time.perf_counter() - start) / len(group)
        for job, row, n in zip(group, rows, calls):
            yield job, Made(tokenizer.decode(row[: row.index(m.pad_id)] if m.pad_id in row else row), n, seconds)


def _kind(job: Job) -> tuple[int, bool]:
    """Jobs of one kind may share a batch."""
    return len(job.prefix), job.length >= 0


def generate_kept(model, tokenizer, jobs: list[Job], cfg) -> dict[str, Made]:
    """Key -> text. Each is written to part_file as it ends, and what is there already is not made again.

    The file opens with what the texts depend on: weights, sampler, seed, prompts. That of another run is replaced.
    """
    path, header, kept = part_file(cfg), _header(model, jobs, cfg), {}
    if path:
        kept = _read_parts(path, header) if path.exists() else {}
        lines = [json.dumps(header), *(_line(key, made) for key, made in kept.items())]
        write_text(path, "\n".join(lines) + "\n")
    todo = [job for job in jobs if job.key not in kept]
    bar = tqdm(total=len(jobs), initial=len(kept), unit="text", dynamic_ncols=True, disable=None, leave=False)
    with bar, open(path, "a", encoding="utf-8") if path else nullcontext() as file:
        for job, made in _generate(model, tokenizer, todo, cfg):
            kept[job.key] = made
            bar.update()
            if file:
                file.write(_line(job.key, made) + "\n")
                file.flush()
    return kept


def part_file(cfg) -> Path | None:
    """Where finished texts stand until the run is through: beside save, else beside json, nowhere without both."""
    beside = cfg.save or cfg.json
    return Path(f"{beside}.part.jsonl") if beside else None


def _header(model, jobs: list[Job], cfg) -> dict:
    digest = hashlib.sha256()
    with open(cfg.init_from, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    name = getattr(cfg, "sampler", None)
    sampler = {f.name: getattr(cfg, f.name) for f in fields(decoder_of(model.cfg, name).SamplerConfig)}
    sampler |= {"sampler": name} if name in LEFT_TO_RIGHT else {}
    return {"checkpoint": digest.hexdigest()[:16], "sampler": sampler, "seed": cfg.seed, "prompts": fingerprint(jobs)}


def _line(key: str, made: Made) -> str:
    return json.dumps({"key": key, **made._asdict()})


def _read_parts(path: Path, header: dict) -> dict[str, Made]:
    """What a run with this header has finished. A line that was broken off counts as not there."""
    head, *lines = (_parsed(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n"))
    differs = [name for name in header if head.get(name) != header[name]]
    if differs:
        print(f"{path} is of another run (other {', '.join(differs)}): it is not used and starts over")
        return {}
    kept = {line["key"]: Made(line["text"], line["calls"], line["seconds"]) for line in lines if line}
    print(f"{path}: {len(kept)} texts are there already")
    return kept


def _parsed(line: str) -> dict:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


def fingerprint(value) -> str:
    """16 hex digits of anything that JSON can hold: equal if and only if that is."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def environment() -> dict:
    """What a number was measured on: to be kept with it."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = f"{names[0]} x {len(names)}, {torch.backends.cpu.get_cpu_capability()}" if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": device,
        "threads": torch.get_num_threads(),
    }


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table that reads well as text, too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def write_json(path: str, result: dict) -> None:
    """One JSON file, whole or not at all."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def write_text(path: str, text: str) -> None:
    """One UTF-8 file, whole or not at all, with its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


# What the three tasks share


@dataclass
class TaskConfig(EvalConfig):
    """Settings of the evaluation of a task: what is asked, who answers, what is kept."""

    n: int = 0  # so many examples, evenly spaced over the set; 0: all
    source: str = ""  # the file of the examples, also .gz; without it the held-out pairs of data
    data: str = ""  # a set of pairs; by default the one the checkpoint was trained on
    predictions: str = ""  # score the answers in this file; no checkpoint is needed
    reference: bool = False  # score the right answers; no checkpoint is needed
    save: str = ""  # write the answers to this file, the way predictions reads them
    against: str = ""  # the predictions or the json of another run: compare the two item by item
    items: bool = True  # keep every answer in the json, for another run's --against
    resamples: int = 1000  # of the bootstrap

    def __post_init__(self):
        if self.n < 0 or self.batch_size < 1 or self.resamples < 100:
            raise ValueError(
                "n must be 0 (all) or more, batch_size at least 1, resamples at least 100; got "
                f"{self.n}, {self.batch_size}, {self.resamples}"
            )
        for one, other in (("predictions", "reference"), ("source", "data")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"give --{one} or --{other}, not both")


def open_task(argv: list[str], base: type = TaskConfig):
    """What load_for_eval returns; with --predictions or --reference None for model, tokenizer and fields.

    Without --source the settings name the set: --data, or what the checkpoint was trained on.
    """
    given = _read_any(argv, base)
    if given.get("predictions") or given.get("reference"):
        cfg, model, tokenizer, state = configure(base, argv), None, None, None
    else:
        cfg, model, tokenizer, state = load_for_eval(argv, base)
    if not cfg.source and not cfg.data:
        cfg.data = (state or load(cfg.init_from)).get("train_config", {}).get("data", "")
        if not cfg.data:
            raise ValueError(f"{cfg.init_from} does not say what it was trained on: give --source=FILE or --data=SET")
    return cfg, model, tokenizer, state


def held_out(data: str, task: str) -> list[dict]:
    """The held-out pairs of a set as examples: id, prefix, target. Of the mixed set "mini" those of the task."""
    pairs = open_set(build_if_missing(data), "valid")
    if not isinstance(pairs, Pairs):
        raise ValueError(f"{data} is a stream of text, which asks nothing: give --data=SET of pairs or --source=FILE")
    texts = [pairs.text(i) for i in range(len(pairs))]
    found = [{"id": str(i), "prefix": prefix, "target": target} for i, (prefix, target) in enumerate(texts)]
    if is_mini(data):
        found = [example for example in found if task_of(Path(data).name, example["prefix"]) == task]
    if not found:
        raise ValueError(f"{data} holds no {task}: use python -m eval.{task_of(Path(data).name)}")
    return found


def is_mini(data: str) -> bool:
    """Whether a set is one of data.mini's, by its name."""
    return Path(data).name == "mini" or Path(data).name.startswith("mini_")


def choose(examples: list[dict], n: int) -> list[dict]:
    """n of the examples, evenly spaced, for many a file is in order of articles; 0: all of them."""
    if not examples:
        raise ValueError("there are no examples to score")
    n = min(n, len(examples)) or len(examples)
    return [examples[i * len(examples) // n] for i in range(n)]


def jobs_of(examples: list[dict], prompt: Callable[[dict], str], model, tokenizer) -> list[Job]:
    """A job for each example whose prompt leaves room for the target; how many others there are is printed.

    Those get no answer and are scored as an empty one: to leave them out would flatter.
    """
    room = model.cfg.block_size - model.cfg.target_length
    prefixes = [tokenizer.encode(prompt(example)) for example in examples]
    jobs = [Job(e["id"], prefix, i) for i, (e, prefix) in enumerate(zip(examples, prefixes)) if len(prefix) <= room]
    if not jobs:
        raise ValueError(f"all {len(examples)} prompts have more than {room} tokens, the model's room for them")
    if len(jobs) < len(examples):
        n = len(examples) - len(jobs)
        print(f"{n} of {len(examples)} prompts have more than {room} tokens: no answer, which counts as an empty one")
    return jobs


def check_ids(path: str, found: Collection[str], wanted: list[str]) -> None:
    """Raise ValueError, naming some, unless a file of predictions has the ids of the examples and no others."""
    known = set(wanted)
    missing, extra = [i for i in wanted if i not in found], [i for i in found if i not in known]
    for what, ids in (("none", missing), ("also one", extra)):
        if ids:
            some = ", ".join(ids[:3]) + (", .." if len(ids) > 3 else "")
            fault = f"{what} for {some} ({len(ids)} of them)"
            raise ValueError(f"{path}: {len(found)} predictions for {len(wanted)} examples; {fault}")


def read_items(path: str, task: str, examples: list[dict]) -> list | None:
    """The items in another run's json, in the order of these examples; None if the file is no such result.

    Raises ValueError where it is one, but of another task or of other examples.
    """
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError:
        return None
    if not isinstance(found, dict) or not {"task", "examples"} <= found.keys():
        return None
    if not isinstance(found.get("items"), dict):
        raise ValueError(f"{path}: keeps no answers to compare with; it was made with --items=false")
    if (found.get("task"), found.get("examples")) != (task, fingerprint(examples)):
        raise ValueError(f"{path}: holds {found.get('task')} on {found.get('n')} other examples; want the same ones")
    return [found["items"][example["id"]] for example in examples]


def report(task: str, argv: list[str], cfg, state, examples: list, items: list, metrics: dict, other, extra: dict):
    """Print a table and one JSON line, write cfg.json, drop the finished parts; returns what the line holds.

    items: one JSON value an example, from which its metrics can be had again; in the file only. metrics and other:
    name -> Metric, of this run and of the one to compare with (or None). extra: more fields.
    """
    result = {"task": task, "n": len(examples)}
    for name, metric in metrics.items():
        low, high, how = interval(metric, cfg.resamples, cfg.seed)
        result |= {name: metric.value, f"{name}_interval": [low, high], f"{name}_interval_by": how}
    if other:
        pairs = {name: paired(metrics[name], theirs, cfg.resamples, cfg.seed) for name, theirs in other.items()}
        shown = {name: {"theirs": other[name].value, **pair} for name, pair in pairs.items()}
        result["against"] = {"file": cfg.against, **shown}
    result |= {"resamples": cfg.resamples, "seed": cfg.seed, **extra, "examples": fingerprint(examples)}
    if state:
        trained = {"step": state["step"], "data": state.get("train_config", {}).get("data")}
        result |= {"trained": trained | {"fingerprint": state.get("fingerprint")}, "model": state["model_config"]}
    result |= {"settings": asdict(cfg), "command": f"python -m eval.{task} {' '.join(argv)}"} | environment()
    print(_tables(result, metrics))
    print(json.dumps(result))
    if cfg.json:
        kept = {"items": {e["id"]: item for e, item in zip(examples, items)}} if cfg.items else {}
        write_json(cfg.json, result | kept)
    if (part := part_file(cfg)) and state:
        part.unlink(missing_ok=True)
    return result


def _tables(result: dict, metrics: dict[str, Metric]) -> str:
    rows, pairs, against = [], [], result.get("against")
    for name, metric in metrics.items():
        show = (lambda x: f"{x:.1%}") if metric.unit == "%" else (lambda x: f"{x:.2f}")
        low, high = result[f"{name}_interval"]
        rows.append([name, show(result[name]), f"{show(low)} to {show(high)}", result[f"{name}_interval_by"]])
        if against and name in against:
            pair, (low, high) = against[name], against[name]["difference_interval"]
            cells = [show(pair["theirs"]), show(pair["difference"]), f"{show(low)} to {show(high)}"]
            pairs.append([name, *cells, f"{pair['p']:.3g} {pair['test']}"])
    text = markdown([f"{result['task']}, n = {result['n']:,}", "value", "95% interval", "by"], rows)
    if against:
        text += "\n\n" + markdown([f"against {against['file']}", "theirs", "difference", "95% interval", "p"], pairs)
    if "calls_per_sample" in result:
        text += f"\n{result['calls_per_sample']:.1f} network calls, {result['seconds_per_sample']:.4f} s per sample"
    return text
