"""What all evaluations share: settings, generated texts, results, and the examples of a task.

A result is written to --json=FILE before it is printed.
"""

import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from configurator import build, configure, flatten, read_settings, require, setting, validate
from data.loader import Pairs, build_if_missing, open_dataset
from data.mini import TAGS
from data.sources import parse_json, read_json_lines, read_text
from eval.metrics import Metric, interval
from infra.checkpoint import load, load_model, write_atomically
from infra.device import autocast, has_fast_bf16, pick_device
from sample import choose_sampler, sampler_configs

RESAMPLES = 1000  # of a bootstrap
MAX_EXAMPLES = 1 << 20  # the key of a sample has 32 bits: 20 for the example
MAX_SAMPLES = 1 << 12  # and 12 for its number


class Settings:
    """The base of all settings here: their limits are checked when they are built."""

    def __post_init__(self):
        validate(self)


@dataclass
class EvalConfig(Settings):
    """Settings of every evaluation."""

    init_from: str = setting("out/run/ckpt.pt", "the checkpoint", path=True)
    batch_size: int = setting(64, "texts per batch", minimum=1)
    seed: int = setting(0, "seed of all draws", minimum=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1 or mps")
    dtype: str = setting("float32", "autocast", choices=("float32", "bfloat16", "auto"))
    json: str = setting("", "write the result to this file", path=True)

    def __post_init__(self):
        super().__post_init__()
        if self.dtype == "auto":
            fast = has_fast_bf16(pick_device(self.device))
            self.dtype = "bfloat16" if fast else "float32"


@dataclass
class PairsConfig(EvalConfig):
    """Settings of an evaluation on held-out pairs."""

    data: str = setting("", "set of pairs; default: that of the checkpoint", path=True)
    n: int = setting(200, "held-out pairs, evenly spaced over the set", minimum=1)


# Texts


@dataclass
class Generator:
    """A checkpoint and the settings of its sampler."""

    model: torch.nn.Module
    tokenizer: object
    decoder: ModuleType  # autoregressive, diffusion or one of extras/
    sampler: object  # the SamplerConfig of the decoder
    cfg: EvalConfig

    def settings(self) -> dict:
        """Return the settings of evaluation and sampler."""
        name = self.decoder.__name__.removeprefix("extras.").replace("autoregressive", "ar")
        # The samplers of diffusion.py have their own names.
        return flatten(self.cfg) | {"sampler": name} | flatten(self.sampler)

    def texts(self, prompts: list, examples: Sequence[int] | None = None) -> tuple[list[str], dict]:
        """Return the text of each prompt (token ids), in order, and the mean cost.

        examples: the keys of the random numbers, by default the places in the list. A batch has
        prompts of one length, so it needs no padding mask. The batches change no text.
        """
        n = len(prompts)
        keys = range(n) if examples is None else examples
        device = self.model.tok.weight.device
        pad_id = self.model.cfg.pad_id
        texts = [""] * n
        calls = 0  # of the network, summed over candidates
        start = time.perf_counter()
        lengths = [len(prompt) for prompt in prompts]
        order = sorted(range(n), key=lengths.__getitem__)
        groups = [list(group) for _, group in groupby(order, key=lengths.__getitem__)]
        batches = [part for group in groups for part in batched(group, self.cfg.batch_size)]
        for places in tqdm(batches, unit="batch", disable=None, leave=False):
            rows = [prompts[i] for i in places]
            prefix = torch.tensor(rows, dtype=torch.long, device=device)
            example = torch.tensor([keys[i] for i in places], device=device)
            settings = (self.sampler, self.cfg.seed, example)
            with autocast(device, self.cfg.dtype):
                output = self.decoder.generate(self.model, prefix, *settings)
            for i, tokens in zip(places, output.tokens.tolist()):
                length = [*tokens, pad_id].index(pad_id)
                texts[i] = self.tokenizer.decode(tokens[:length])
            calls += int(output.calls.sum())
        seconds = time.perf_counter() - start
        return texts, {"calls_per_sample": calls / n, "seconds_per_sample": seconds / n}


def batched(items: Sequence, size: int) -> Iterator[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


def open_checkpoint(argv: list[str], cls: type) -> tuple:
    """Return (settings, Generator, checkpoint fields).

    argv holds settings of `cls` and of the sampler that fits the checkpoint.
    """
    values = read_settings((cls, *sampler_configs()), argv)
    cfg = build(cls, values)
    model, tokenizer, state = load_model(cfg.init_from, pick_device(cfg.device))
    model, decoder, sampler = choose_sampler(model, values, cfg.init_from)
    return cfg, Generator(model, tokenizer, decoder, sampler, cfg), state


# Results


def finish(path: str, result: dict, text: str) -> dict:
    """Write the result to `path`, if given, then print the text for a reader. Return the result."""
    try:
        if path:
            write_text(path, json.dumps(result, indent=1) + "\n")
    finally:
        print(text)
    return result


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file and its folder. Readers never see half a file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def read_lines(path: str | Path) -> list[dict]:
    """Return the objects of a JSON-lines file; [] if there is no file."""
    return [line for _, line in read_json_lines(path)] if Path(path).is_file() else []


def write_lines(path: str | Path, lines: Iterable[dict]) -> None:
    """Write a JSON-lines file."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(path, text)


def origin(name: str, argv: list[str], settings: dict, state: dict | None = None) -> dict:
    """Return the fields of a result that name its origin."""
    command = " ".join([f"python -m eval.{name}", *argv])
    fields = {"seed": settings["seed"], "settings": settings, "command": command}
    if state:
        data = (state.get("train_config") or {}).get("data")
        trained = {"step": state["step"], "data": data, "fingerprint": state.get("fingerprint")}
        fields |= {"trained": trained, "model": state["model_config"]}
    return fields | environment()


def environment() -> dict:
    """Return what a number was measured on."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.SubprocessError):  # git or the history may be missing
        commit = "unknown"
    return {
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = re.findall(r"model name\s*: (.+)", text) or [platform.machine()]
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


# Data


def open_pairs(data: str, state: dict | None = None) -> Pairs:
    """Open the held-out pairs of a set, by default of the checkpoint's training set."""
    data = data or training_data(state)
    pairs = open_dataset(build_if_missing(data), "valid")
    fault = f"{data} is a stream of text; give a set of pairs: --data=FOLDER"
    require(isinstance(pairs, Pairs), fault)
    return pairs


def training_data(state: dict) -> str:
    data = (state.get("train_config") or {}).get("data")
    require(data, "the checkpoint does not name its training data: give --data=FOLDER")
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
    return examples


def is_mini(pairs: Pairs) -> bool:
    """Return whether data.mini made the set, wherever it lies."""
    return "data.mini" in str(pairs.meta.get("command"))


def choose(examples: Collection, n: int, what: str = "the set") -> list:
    """Return n examples, evenly spaced because files are often in order of topics. 0: all."""
    require(examples, f"{what} has no examples to score")
    n = min(n, len(examples)) or len(examples)
    return [examples[i * len(examples) // n] for i in range(n)]


# Tasks


@dataclass
class TaskConfig(PairsConfig):
    """Settings of the three tasks: which examples, whose answers."""

    n: int = setting(0, "examples, evenly spaced over the set; 0: all", minimum=0)
    source: str = setting("", "file of the examples, also .gz; default: held-out pairs", path=True)
    predictions: str = setting("", "score this JSON of {id: text or list of texts}", path=True)
    reference: bool = setting(False, "score the references, without a model")
    items: bool = setting(True, "keep every answer in the JSON file")

    def __post_init__(self):
        super().__post_init__()
        for one, other in (("predictions", "reference"), ("source", "data")):
            both = getattr(self, one) and getattr(self, other)
            require(not both, f"give --{one} or --{other}, not both")


class TaskRun:
    """An evaluation of a task: its settings, its examples, and a model if a model answers."""

    def __init__(self, task: str, argv: list[str], cls: type, examples: Callable):
        """cls: a TaskConfig. examples(cfg): all examples."""
        self.task = task
        self.argv = argv
        self.generator = None
        self.state = None
        values = read_settings((cls, *sampler_configs()), argv)
        if values.get("predictions") or values.get("reference"):
            self.cfg = configure(cls, argv)
        else:
            self.cfg, self.generator, self.state = open_checkpoint(argv, cls)
        cfg = self.cfg
        if not cfg.source and not cfg.data:
            cfg.data = training_data(self.state or load(cfg.init_from))
        self.examples = choose(examples(cfg), cfg.n, cfg.source or cfg.data)

    def texts(self) -> tuple[list[str], dict]:
        """Return one text per example and the mean cost."""
        samples, cost = self.samples(1)
        return [texts[0] for texts in samples], cost

    def samples(self, n_samples: int) -> tuple[list[list[str]], dict]:
        """Return texts per example, and the mean cost. A file of predictions has its own number.

        A prompt that is too long counts as empty answers. A text depends on the example and the
        number of the sample, not on how many there are.
        """
        if self.cfg.reference:
            return [[example["target"]] * n_samples for example in self.examples], {}
        if not self.generator:
            return read_predictions(self.cfg.predictions, [e["id"] for e in self.examples]), {}
        model_cfg = self.generator.model.cfg
        longest = model_cfg.block_size - model_cfg.target_length
        encode = self.generator.tokenizer.encode_prompt
        prompts = [encode(example["prefix"]) for example in self.examples]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) <= longest]
        n = len(prompts)
        note = f"{n - len(fitting)} of {n} prompts are longer than {longest} tokens, the limit"
        require(fitting, note)
        if len(fitting) < n:
            print(f"{note}; they count as empty answers", file=sys.stderr)
        places = [(i, k) for i in fitting for k in range(n_samples)]
        keys = [i + k * MAX_EXAMPLES for i, k in places]
        texts, cost = self.generator.texts([prompts[i] for i, _ in places], keys)
        found = dict(zip(places, texts))
        return [[found.get((i, k), "") for k in range(n_samples)] for i in range(n)], cost

    def report(self, items: list, metrics: dict[str, Metric], extra: dict, notes: str = "") -> dict:
        """Write and print the result. items: the texts of each example."""
        result = {"task": self.task, "n": len(items)}
        rows = []
        for name, metric in metrics.items():
            *ends, method = interval(metric, RESAMPLES, self.cfg.seed)
            result |= {name: metric.value, f"{name}_interval": ends, f"{name}_interval_by": method}
            rows.append([name, metric.show(metric.value), metric.show(*ends), method])
            if metric.signature:
                result.setdefault("signatures", {})[name] = metric.signature
                notes += f"\n{name}: {metric.signature}"
        if "calls_per_sample" in extra:
            notes += f"\n{cost_line(extra)}"
        settings = self.generator.settings() if self.generator else flatten(self.cfg)
        result |= extra | {"resamples": RESAMPLES}
        result |= origin(self.task, self.argv, settings, self.state)
        if self.cfg.items:
            result["items"] = {e["id"]: item for e, item in zip(self.examples, items)}
        header = [f"{self.task}, n = {len(items):,}", "value", "95% interval", "method"]
        return finish(self.cfg.json, result, markdown(header, rows) + notes)


def read_predictions(path: str, ids: list[str]) -> list[list[str]]:
    """Return the texts of each example from a JSON object of {id: text or list of texts}."""
    found = parse_json(read_text(path), path)
    found = found if isinstance(found, dict) else {}
    odd = ", ".join(sorted(found.keys() ^ set(ids))[:3])
    counts = f"{len(found)} predictions for {len(ids)} examples"
    require(not odd, f"{path}: {counts}, as {{id: text}}; missing or unknown: {odd}")
    samples = [[found[i]] if isinstance(found[i], str) else found[i] for i in ids]
    for i, texts in zip(ids, samples):
        fits = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        fits = fits and len(texts) == len(samples[0]) > 0
        require(fits, f"{path}: {i} must be a text, or a list of as many texts as {ids[0]}")
    return samples
