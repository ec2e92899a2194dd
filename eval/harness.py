"""Our checkpoints under EleutherAI's lm-evaluation-harness: its tasks, prompts and metrics, our generation.

    pip install lm-eval
    python -m eval.harness --init_from=out/run/ckpt.pt --tasks=gsm8k,my_task.yaml --n=100 --json=out/harness.json

A task is one of the harness's names, whose data it fetches, or a YAML file as its documentation describes, which may
point to a local JSONL file. What it asks a model for:

    generate_until           text after a prompt: AR and diffusion alike, cut at the task's stop strings
    loglikelihood            log p(continuation | prompt). AR: exact. Diffusion: minus the bound of eval.bound, which is
                             for the continuation and the end of the text behind it; is_greedy is False, so that what
                             is built on it (lambada's acc) means nothing
    loglikelihood_rolling    log p(text), in windows of what a target holds with all the prefix that fits. Likewise

How text is drawn is set here, as in sample.py, and not by the task; its stop strings and max_gen_toks are obeyed. A
prompt that is longer than the model can read loses its beginning, and how many did is said.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from configurator import run
from data.objectives import collate
from draws import forbidden_ids
from eval.bound import READINGS, BoundConfig, target_nats
from eval.common import EvalConfig, environment, generate_texts, load_for_eval, write_json

INSTALL = "pip install lm-eval"
EXACT = "exact log-likelihood"
BOUND = "lower bound on the log-likelihood (eval.bound) of the continuation and the end behind it; is_greedy is False"


@dataclass
class HarnessConfig(EvalConfig):
    tasks: str = ""  # names and YAML files, with commas between
    n: int = 500  # items of each task at most
    shots: int = -1  # solved examples in the prompt; -1: as many as the task says
    noise_steps: int = BoundConfig.noise_steps  # these three: see eval.bound
    draws: int = BoundConfig.draws
    reading: str = READINGS[0]

    def __post_init__(self):
        self.bound()
        if not self.tasks:
            raise ValueError("name a task: --tasks=NAME_OR_FILE.yaml, several with commas between")

    def bound(self) -> BoundConfig:
        return BoundConfig(
            n=self.n,
            batch_size=self.batch_size,
            seed=self.seed,
            noise_steps=self.noise_steps,
            draws=self.draws,
            reading=self.reading,
        )


class Answers:
    """What the harness asks of a model, as methods on lists of requests; request.args holds the texts."""

    def __init__(self, model, tokenizer, cfg):
        self.model, self.tokenizer, self.cfg = model, tokenizer, cfg
        self.shortened, self.measure = 0, EXACT if model.cfg.paradigm == "ar" else BOUND
        self.room = model.cfg.target_length - 1  # tokens of an answer

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """A text for each (prompt, {"until": [..], "max_gen_toks": n}), cut before the first stop string."""
        texts, _ = generate_texts(
            self.model, self.tokenizer, [self._prompt(prompt) for prompt, _ in _args(requests)], self.cfg
        )
        found = []
        for text, (_, asked) in zip(texts, _args(requests)):
            if "max_gen_toks" in asked:
                text = self.tokenizer.decode(self.tokenizer.encode(text)[: int(asked["max_gen_toks"])])
            found.append(before(text, asked.get("until")))
        return found

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p in nats, whether greedy decoding gives it) for each (prompt, continuation); see the file's head."""
        pairs = [(self._prompt(prompt), self._target(wanted)) for prompt, wanted in _args(requests)]
        return list(zip(self._log_p(pairs), greedy(self.model, pairs, self.cfg.batch_size)))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """log p in nats of each (text,), each token once, given all that fits of what stands before it."""
        windows, owner = [], []
        for number, (text,) in enumerate(_args(requests)):
            ids = self.tokenizer.encode(text)
            for start in range(0, len(ids), self.room):
                before_it = ids[max(0, start - self.longest_prefix()) : start]
                windows.append((before_it, ids[start : start + self.room]))
                owner.append(number)
        found = [0.0] * len(requests)
        for number, log_p in zip(owner, self._log_p(windows)):
            found[number] += log_p
        return found

    def longest_prefix(self) -> int:
        """Tokens of a prompt that the model can read before a whole target."""
        return self.model.cfg.block_size - self.model.cfg.target_length

    def _prompt(self, text: str) -> list[int]:
        ids, most = self.tokenizer.encode(text), self.longest_prefix()
        self.shortened += len(ids) > most
        return ids[max(0, len(ids) - most) :]

    def _target(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        if len(ids) > self.room:
            raise ValueError(
                f"a continuation has {len(ids)} tokens, the model's target holds {self.room}: {text[:40]!r}"
            )
        return ids

    def _log_p(self, pairs: list) -> list[float]:
        if not pairs:
            return []
        text, pads = target_nats(self.model, pairs, list(range(len(pairs))), self.cfg.bound())
        # AR: the continuation alone, as the harness means it. The bound is one number for the whole canvas.
        return [-a for a in text] if self.measure == EXACT else [-a - b for a, b in zip(text, pads)]


def _args(requests) -> list[tuple]:
    return [request.args for request in requests]


def before(text: str, stops: str | list[str] | None) -> str:
    """The text up to the first of the stop strings. 'one. two', ['w', '.'] -> 'one'."""
    stops = [stops] if isinstance(stops, str) else stops or []
    return text[: min((at for stop in stops if stop and (at := text.find(stop)) >= 0), default=len(text))]


@torch.no_grad()
def greedy(model, pairs: list, batch_size: int) -> list[bool]:
    """Whether each target is what greedy decoding gives, token by token; False for a diffusion model."""
    m, device = model.cfg, model.tok.weight.device
    if m.paradigm != "ar":
        return [False] * len(pairs)
    found, order = [False] * len(pairs), sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))
    for start in range(0, len(pairs), batch_size):
        group = order[start : start + batch_size]
        batch = collate([pairs[i] for i in group], group, m.pad_id, m.sep_id, m.target_length)
        logits = model(batch.prefix.to(device), batch.target.to(device))  # (B, T, V)
        likeliest = logits.index_fill(-1, forbidden_ids(m, device), -torch.inf).argmax(-1).tolist()
        for i, row in zip(group, likeliest):
            found[i] = row[: len(pairs[i][1])] == list(pairs[i][1])
    return found


def adapter(model, tokenizer, cfg):
    """The same as the harness's own kind of model: an lm_eval.api.model.LM. Raises ValueError where it is missing."""
    from importlib import import_module

    LM = import_module("lm_eval.api.model").LM
    adapted = type("Checkpoint", (Answers, LM), {})(model, tokenizer, cfg)
    LM.__init__(adapted)
    return adapted


def load_tasks(names: str):
    """(the harness's task manager, the list of tasks to give it). Raises ValueError for a file that is not there."""
    from lm_eval.tasks import TaskManager

    tasks = [name.strip() for name in names.split(",") if name.strip()]
    files = [name for name in tasks if name.endswith((".yaml", ".yml"))]
    for name in files:
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such task file")
    manager = TaskManager(include_defaults=len(files) < len(tasks))  # reading all of its own takes seconds
    unknown = [name for name in set(tasks) - set(files) if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"the harness knows no task {', '.join(sorted(unknown))}; a task file ends with .yaml")
    return manager, tasks


def main(argv: list[str]) -> dict:
    """Evaluate as argv says; returns what the JSON line holds."""
    cfg, model, tokenizer, state = load_for_eval(argv, HarnessConfig)
    try:
        import lm_eval
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ValueError(f"the harness is not installed ({error}); {INSTALL}") from None
    manager, tasks = load_tasks(cfg.tasks)
    lm = adapter(model, tokenizer, cfg)
    shots = None if cfg.shots < 0 else cfg.shots
    found = lm_eval.simple_evaluate(
        model=lm, tasks=tasks, num_fewshot=shots, limit=cfg.n, task_manager=manager, random_seed=cfg.seed,
        numpy_random_seed=cfg.seed, torch_random_seed=cfg.seed, fewshot_random_seed=cfg.seed,
    )  # fmt: skip
    asked = sorted({request["output_type"] for request in found["configs"].values()})
    print(make_table(found))
    if set(asked) & {"loglikelihood", "loglikelihood_rolling", "multiple_choice"}:
        print(f"likelihoods: {lm.measure}")
    if lm.shortened:
        most = lm.longest_prefix()
        print(
            f"{lm.shortened} prompts were longer than the {most} tokens that the model reads: each lost its beginning"
        )
    result = {"tasks": found["results"], "n": {name: n["effective"] for name, n in found["n-samples"].items()}}
    result |= {"asked": asked, "likelihood": lm.measure, "prompts_shortened": lm.shortened, "settings": asdict(cfg)}
    result |= {"trained": {"step": state["step"], "fingerprint": state.get("fingerprint")}, "model": asdict(model.cfg)}
    result |= {"command": f"python -m eval.harness {' '.join(argv)}", "lm_eval": lm_eval.__version__} | environment()
    print(json.dumps(result, default=str))
    if cfg.json:
        write_json(cfg.json, json.loads(json.dumps(result, default=str)))
    return result


if __name__ == "__main__":
    run(main)
