"""What every evaluation uses: settings, generated texts, the result file, the examples of a task.

A result is written to --json=FILE before it is printed.
"""

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from tqdm import tqdm

import autoregressive
import diffusion
from configurator import all_fields, build, flatten, read_settings, setting, validate
from data.loader import Pairs, build_if_missing, open_dataset
from data.mini import TAGS
from data.sources import parse_json, read_text
from eval.metrics import interval, paired
from infra.checkpoint import load, load_model, write_atomically
from infra.device import pick_device

RESAMPLES = 1000  # of a bootstrap
LEFT_TO_RIGHT = ("ar", "speculative")  # values of --sampler besides those of diffusion.py


@dataclass
class EvalConfig:
    """Settings of every evaluation."""

    init_from: str = setting("out/run/ckpt.pt", "the checkpoint", path=True)
    batch_size: int = setting(64, "texts per batch", minimum=1)
    seed: int = setting(0, "seed of all draws", minimum=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    json: str = setting("", "write the result to this file", path=True)

    def __post_init__(self):
        validate(self)


# Texts


class Job(NamedTuple):
    """A text to generate."""

    key: str
    prefix: list[int]  # token ids
    example: int  # the key of its random numbers


@dataclass
class Generator:
    """A checkpoint and the settings of its sampler."""

    model: torch.nn.Module
    tokenizer: object
    decoder: ModuleType  # autoregressive, diffusion or extras.speculative
    sampler: object  # the SamplerConfig of the decoder
    run: EvalConfig

    def settings(self) -> dict:
        name = "ar" if self.decoder is autoregressive else "speculative"
        return {"sampler": name} | flatten(self.sampler)  # diffusion.py has its own names

    def texts(self, prefixes: list[list[int]]) -> tuple[list[str], dict]:
        """Return the text of each prefix (token ids), in order, and the mean cost."""
        texts, cost = self.answers([Job(str(i), ids, i) for i, ids in enumerate(prefixes)])
        return [texts[str(i)] for i in range(len(prefixes))], cost

    def answers(self, jobs: list[Job]) -> tuple[dict[str, str], dict]:
        """Return the texts by key, and the mean cost. The batches change no text.

        A batch holds prefixes of one length, so it needs no padding mask.
        """
        device = self.model.tok.weight.device
        texts = {}
        calls = 0  # of the network, summed over candidates
        start = time.perf_counter()
        with tqdm(total=len(jobs), unit="text", disable=None, leave=False) as bar:
            for batch in _batches(jobs, self.run.batch_size):
                prefix = torch.tensor([job.prefix for job in batch], dtype=torch.long)
                example = torch.tensor([job.example for job in batch])
                rows = (prefix.to(device), self.sampler, self.run.seed, example.to(device))
                output = self.decoder.generate(self.model, *rows)
                for job, tokens in zip(batch, output.tokens.tolist()):
                    texts[job.key] = self._decode(tokens)
                calls += int(output.calls.sum())
                bar.update(len(batch))
        n = len(jobs)
        seconds = time.perf_counter() - start
        return texts, {"calls_per_sample": calls / n, "seconds_per_sample": seconds / n}

    def _decode(self, tokens: list[int]) -> str:
        pad_id = self.model.cfg.pad_id
        return self.tokenizer.decode(tokens[: [*tokens, pad_id].index(pad_id)])


def _batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    by_length = sorted(jobs, key=lambda job: len(job.prefix))
    for _, group in groupby(by_length, key=lambda job: len(job.prefix)):
        yield from batched(list(group), size)


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def decoder_for(model_cfg, sampler: str = "") -> ModuleType:
    """Return the module whose generate() serves this model and --sampler."""
    if sampler == "speculative":
        from extras import speculative

        return speculative
    return autoregressive if sampler == "ar" or model_cfg.paradigm == "ar" else diffusion


def open_checkpoint(argv: list[str], cls: type) -> tuple:
    """Return (settings, Generator, checkpoint fields).

    argv holds settings of `cls` and of the sampler that fits the checkpoint.
    """
    values = _read_any(argv, cls)
    run = build(EvalConfig, values)
    model, tokenizer, state = load_model(run.init_from, pick_device(run.device))
    sampler = values.get("sampler", "")
    if sampler in LEFT_TO_RIGHT:
        del values["sampler"]
    decoder = decoder_for(model.cfg, sampler)
    known = all_fields(cls, decoder.SamplerConfig)
    for name in values:
        if name not in known:
            names = f"settings of this {model.cfg.paradigm} checkpoint: {', '.join(known)}"
            raise ValueError(f"{name!r} does not apply to {run.init_from}; {names}")
    sampler_cfg = build(decoder.SamplerConfig, values)
    return build(cls, values), Generator(model, tokenizer, decoder, sampler_cfg, run), state


def _read_any(argv: list[str], cls: type) -> dict:
    """Return the settings of argv before the paradigm of the checkpoint is known."""
    samplers = [autoregressive.SamplerConfig, diffusion.SamplerConfig]
    if "--sampler=speculative" in argv:
        samplers.append(decoder_for(None, "speculative").SamplerConfig)
    return read_settings((cls, *samplers), argv)


# Results


def finish(path: str, result: dict, text: str) -> dict:
    """Write the result to `path`, if given, then print the text for a reader. Return the result."""
    try:
        if path:
            write_text(path, json.dumps(result, indent=1) + "\n")
    finally:
        print(text)
    return result


def origin(name: str, argv: list[str], settings: dict, state: dict | None = None) -> dict:
    """Return the fields of a result that tell how it was made."""
    fields = {"seed": settings["seed"], "settings": settings}
    fields["command"] = f"python -m eval.{name} {' '.join(argv)}"
    if state:
        data = (state.get("train_config") or {}).get("data")
        trained = {"step": state["step"], "data": data, "fingerprint": state.get("fingerprint")}
        fields |= {"trained": trained, "model": state["model_config"]}
    return fields | environment()


def environment() -> dict:
    """Return what a number was measured on."""
    cuda = torch.cuda.is_available()
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if cuda else _cpu(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):  # git may be missing
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    names = re.findall(r"model name\s*: (.+)", info) or [platform.machine()]
    return f"{names[0]} x {len(names)}, {torch.backends.cpu.get_cpu_capability()}"


def cost_line(cost: dict) -> str:
    calls = f"{cost['calls_per_sample']:.1f} network calls"
    return f"{calls}, {cost['seconds_per_sample']:.4f} s per sample"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return an aligned Markdown table."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in table]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def write_text(path: str, text: str) -> None:
    """Write a UTF-8 file and its folder. Readers never see half a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


# Data


def open_pairs(data: str, state: dict | None = None) -> Pairs:
    """Open the held-out pairs of a set, by default of the checkpoint's training set."""
    data = data or training_data(state)
    pairs = open_dataset(build_if_missing(data), "valid")
    if not isinstance(pairs, Pairs):
        raise ValueError(f"{data} is a stream of text; give a set of pairs: --data=FOLDER")
    return pairs


def training_data(state: dict) -> str:
    data = (state.get("train_config") or {}).get("data")
    if not data:
        raise ValueError("the checkpoint does not name its training data: give --data=FOLDER")
    return data


def held_out(data: str, task: str) -> list[dict]:
    """Return the held-out pairs of a set as examples; of data.mini those of the task."""
    pairs = open_pairs(data)
    mini = is_mini(pairs)
    examples = []
    for i in range(len(pairs)):
        prefix, target = pairs.text(i)
        if not mini or TAGS.get(prefix[:2]) == task:
            examples.append({"id": str(i), "prefix": prefix, "target": target})
    if not examples:
        raise ValueError(f"{data} has no examples of the task {task}")
    return examples


def is_mini(pairs: Pairs) -> bool:
    """Return whether data.mini made the set, wherever it lies."""
    return "data.mini" in str(pairs.meta.get("command"))


def choose(examples: Collection, n: int) -> list:
    """Return n examples, evenly spaced because files are often in order of topics. 0: all."""
    if not examples:
        raise ValueError("there are no examples to score")
    n = min(n, len(examples)) or len(examples)
    return [examples[i * len(examples) // n] for i in range(n)]


# Tasks


@dataclass
class TaskConfig:
    """Settings of the three tasks: which examples, whose answers."""

    n: int = setting(0, "examples, evenly spaced over the set; 0: all", minimum=0)
    source: str = setting("", "file of the examples, also .gz; default: held-out pairs", path=True)
    data: str = setting("", "set of pairs; default: that of the checkpoint", path=True)
    predictions: str = setting("", "score the answers in this file, without a model", path=True)
    reference: bool = setting(False, "score the references, without a model")
    save: str = setting("", "write the answers to this file, as predictions reads it", path=True)
    items: bool = setting(True, "keep every answer in the JSON file, for --against")
    against: str = setting("", "compare item by item with this JSON of another run", path=True)

    def __post_init__(self):
        validate(self)
        for one, other in (("predictions", "reference"), ("source", "data")):
            if getattr(self, one) and getattr(self, other):
                raise ValueError(f"give --{one} or --{other}, not both")


class TaskRun:
    """An evaluation of a task: its settings, its examples, and a model if a model answers."""

    def __init__(self, task: str, argv: list[str], cls: type, examples: Callable):
        """cls: settings with the groups `run` and `task`. examples(cfg): all examples."""
        self.task = task
        self.argv = argv
        self.generator = None
        self.state = None
        values = _read_any(argv, cls)
        if values.get("predictions") or values.get("reference"):
            self.cfg = build(cls, read_settings((cls,), argv))
        else:
            self.cfg, self.generator, self.state = open_checkpoint(argv, cls)
        chosen = self.cfg.task
        if not chosen.source and not chosen.data:
            chosen.data = training_data(self.state or load(self.cfg.run.init_from))
        self.examples = choose(examples(self.cfg), chosen.n)
        content = json.dumps(self.examples, sort_keys=True).encode()
        self.fingerprint = sha256(content).hexdigest()[:16]
        self.other = self._read_other(chosen.against) if chosen.against else []

    def _read_other(self, path: str) -> list:
        found = parse_json(read_text(path), path)
        wanted = {"task": self.task, "examples": self.fingerprint}
        if (
            not isinstance(found, dict)
            or not wanted.items() <= found.items()
            or "items" not in found
        ):
            kind = f"the --json of eval.{self.task} on the same examples, with its items"
            raise ValueError(f"{path}: must be {kind}")
        return [found["items"][example["id"]] for example in self.examples]

    def jobs(self) -> list[Job]:
        """Return a job for each prompt that fits. The other examples count as empty answers."""
        model_cfg = self.generator.model.cfg
        longest = model_cfg.block_size - model_cfg.target_length
        jobs = []
        for i, example in enumerate(self.examples):
            prefix = self.generator.tokenizer.encode_prompt(example["prefix"])
            if len(prefix) <= longest:
                jobs.append(Job(example["id"], prefix, i))
        total = len(self.examples)
        limit = f"longer than {longest} tokens, the model's limit"
        if not jobs:
            raise ValueError(f"all {total} prompts are {limit}")
        if len(jobs) < total:
            note = (
                f"{total - len(jobs)} of {total} prompts are {limit}; they count as empty answers"
            )
            print(note, file=sys.stderr)
        return jobs

    def texts(self, read: Callable) -> tuple[list[str], dict]:
        """Return one text per example, by the model, the references or a file, and the mean cost.

        read(path, examples) reads the file.
        """
        if self.generator:
            texts, cost = self.generator.answers(self.jobs())
            return [texts.get(example["id"], "") for example in self.examples], cost
        if self.cfg.task.reference:
            return [example["target"] for example in self.examples], {}
        return read(self.cfg.task.predictions, self.examples), {}

    def report(self, items: list, score: Callable, extra: dict, notes: str = "") -> dict:
        """Write and print the result.

        items: one JSON value per example. score(items) -> {name: Metric}.
        """
        seed = self.cfg.run.seed
        metrics = score(items)
        result = {"task": self.task, "n": len(self.examples)}
        rows = []
        for name, metric in metrics.items():
            low, high, method = interval(metric, RESAMPLES, seed)
            result |= {name: metric.value, f"{name}_interval": [low, high]}
            result[f"{name}_interval_by"] = method
            value, low, high = map(metric.show, (metric.value, low, high))
            rows.append([name, value, f"{low} to {high}", method])
        header = [f"{self.task}, n = {len(self.examples):,}", "value", "95% interval", "method"]
        text = markdown(header, rows) + notes
        if self.other:
            result["against"] = {"file": self.cfg.task.against}
            rows = []
            for name, theirs in score(self.other).items():
                pair = paired(metrics[name], theirs, RESAMPLES, seed)
                result["against"][name] = {"theirs": theirs.value} | pair
                low, high = map(theirs.show, pair["difference_interval"])
                values = map(theirs.show, (theirs.value, pair["difference"]))
                rows.append([name, *values, f"{low} to {high}", f"{pair['p']:.3g}"])
            header = [
                f"against {self.cfg.task.against}",
                "theirs",
                "difference",
                "95% interval",
                "p",
            ]
            text += f"\n\n{markdown(header, rows)}"
        if "calls_per_sample" in extra:
            text += f"\n{cost_line(extra)}"
        result |= extra | {"examples": self.fingerprint, "resamples": RESAMPLES}
        settings = flatten(self.cfg) | (self.generator.settings() if self.generator else {})
        result |= origin(self.task, self.argv, settings, self.state)
        if self.cfg.task.items:
            result["items"] = {e["id"]: item for e, item in zip(self.examples, items)}
        return finish(self.cfg.run.json, result, text)


def check_ids(path: str, found: Collection[str], examples: list[dict]) -> None:
    """Raise ValueError unless a file has predictions for the examples and for nothing else."""
    wanted = {example["id"] for example in examples}
    if wanted != set(found):
        counts = f"{len(found)} predictions for {len(wanted)} examples"
        some = ", ".join(sorted(wanted ^ set(found))[:3])
        raise ValueError(f"{path}: {counts}; missing or unknown: {some}")
