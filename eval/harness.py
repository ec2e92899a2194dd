"""Evaluate with EleutherAI's lm-evaluation-harness: its tasks and metrics, our generation.

    pip install lm-eval
    python -m eval.harness --init_from=out/run/ckpt.pt --tasks=gsm8k,my_task.yaml --n=100

A task is one of the harness's names, whose data it downloads, or a YAML file of its format, which
may name a local JSONL file. It may need:

    generate_until  text after a prompt, cut at the task's stop strings
    loglikelihood   log p(continuation | prompt). AR: exact. Diffusion: minus the bound of
                    eval.bound, for the continuation and the end of the text; is_greedy is False, so
                    metrics built on it (lambada's acc) mean nothing

The sampler is set here, not by the task. A prompt that is too long loses its beginning.
"""

import json
from dataclasses import dataclass

import torch

from configurator import require, run, setting
from eval.bound import BoundConfig, split_nats, target_nats
from eval.common import EvalConfig, finish, open_checkpoint, origin
from infra.device import autocast
from infra.logits import banned_token_ids

EXACT = "exact log-likelihood"
BOUND = "lower bound on the log-likelihood (eval.bound) of continuation and end; is_greedy is False"


@dataclass
class HarnessConfig(EvalConfig, BoundConfig):
    tasks: str = setting("", "names and YAML files, separated by commas")
    n: int = setting(500, "items of each task", minimum=1)
    shots: int = setting(-1, "solved examples in the prompt; -1: the task's number", minimum=-1)

    def __post_init__(self):
        super().__post_init__()
        require(self.tasks, "name a task: --tasks=NAME or --tasks=FILE.yaml, separated by commas")


class Model:
    """The methods that the harness calls, on lists of requests; request.args holds the texts."""

    def __init__(self, generator, bound: BoundConfig):
        self.generator = generator
        self.bound = bound
        self.model = generator.model
        self.encode = generator.tokenizer.encode
        self.shortened = 0  # prompts that lost their beginning
        model_cfg = self.model.cfg
        self.measure = EXACT if model_cfg.paradigm == "ar" else BOUND
        self.longest_prefix = model_cfg.block_size - model_cfg.target_length
        self.longest_answer = model_cfg.target_length - 1

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Return a text for each (prompt, {"until": [..], "max_gen_toks": n})."""
        texts, _ = self.generator.texts([self._prompt(request.args[0]) for request in requests])
        cut = []
        for text, (_, options) in zip(texts, (request.args for request in requests)):
            if "max_gen_toks" in options:
                tokens = self.encode(text)[: int(options["max_gen_toks"])]
                text = self.generator.tokenizer.decode(tokens)
            cut.append(until(text, options.get("until")))
        return cut

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log p in nats, is_greedy) for each (prompt, continuation)."""
        texts = [request.args for request in requests]
        pairs = [(self._prompt(prompt), self._target(after)) for prompt, after in texts]
        cfg = self.generator.cfg
        places = range(len(pairs))
        with autocast(self.model.tok.weight.device, cfg.dtype):
            nats = target_nats(self.model, pairs, places, self.bound, cfg.batch_size, cfg.seed)
            greedy = is_greedy(self.model, pairs, cfg.batch_size)
        if self.measure == EXACT:  # of the continuation only, as the harness defines it
            log_p = [-text for text in nats[0]]
        else:  # a bound is one number for the canvas
            log_p = [-text - pads for text, pads in zip(*nats)]
        return list(zip(log_p, greedy))

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise ValueError("loglikelihood_rolling is not supported: choose another task")

    def _prompt(self, text: str) -> list[int]:
        ids = self.generator.tokenizer.encode_prompt(text)
        self.shortened += len(ids) > self.longest_prefix
        return ids[max(0, len(ids) - self.longest_prefix) :]

    def _target(self, text: str) -> list[int]:
        ids = self.encode(text)
        limit = f"the model's target has room for {self.longest_answer}"
        fault = f"a continuation has {len(ids)} tokens, {limit}: {text[:40]!r}"
        require(len(ids) <= self.longest_answer, fault)
        return ids


def until(text: str, stops: str | list[str] | None) -> str:
    """Return the text before the first stop string: 'one. two', ['w', '.'] -> 'one'."""
    stops = [stops] if isinstance(stops, str) else stops or []
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))]


def is_greedy(model, pairs: list, batch_size: int) -> list[bool]:
    """Return whether each target is the result of greedy decoding. Always False for diffusion."""
    if model.cfg.paradigm != "ar":
        return [False] * len(pairs)

    def misses(model, batch) -> torch.Tensor:
        logits = model(batch.prefix, batch.target)[:, :-1]  # (B, T - 1, V)
        banned = banned_token_ids(model.cfg, logits.device)
        return logits.index_fill(-1, banned, -torch.inf).argmax(-1) != batch.target[:, 1:]

    in_text, _ = split_nats(model, pairs, range(len(pairs)), batch_size, misses)
    return [number == 0 for number in in_text]


def main(argv: list[str]) -> dict:
    import lm_eval  # an optional dependency
    from lm_eval.api.model import LM
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import make_table

    cfg, generator, state = open_checkpoint(argv, HarnessConfig)
    wanted = EvaluatorConfig(tasks=cfg.tasks)
    manager = wanted.process_tasks()  # loads the tasks that are files
    model = type("Checkpoint", (Model, LM), {})(generator, cfg)
    LM.__init__(model)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=wanted.tasks,
        num_fewshot=None if cfg.shots < 0 else cfg.shots,
        limit=cfg.n,
        task_manager=manager,
        **dict.fromkeys(seeds, cfg.seed),
    )
    counts = {name: n["effective"] for name, n in found["n-samples"].items()}
    result = {"tasks": found["results"], "n": counts, "likelihood": model.measure}
    result |= {"prompts_shortened": model.shortened, "lm_eval": lm_eval.__version__}
    result |= origin("harness", argv, generator.settings(), state)
    text = f"{make_table(found)}\nlikelihoods: {model.measure}"
    if model.shortened:
        limit = f"longer than {model.longest_prefix} tokens and lost their beginning"
        text += f"\n{model.shortened} prompts were {limit}"
    return finish(cfg.json, json.loads(json.dumps(result, default=str)), text)


if __name__ == "__main__":
    run(main, HarnessConfig)
