"""Share of held-out items of a mini or toy task that a model gets right.

    python -m eval.exact_match --init_from=out/ar2diff_3_finetune/ckpt.pt --steps=10 --candidates=1

Prints one line and one JSON line: share with its 95% interval, network calls and seconds per sample. The length of
the answer is never given away: every canvas is target_length wide.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from configurator import run
from data.loader import build_if_missing, open_set
from data.mini import TASKS, task_of
from eval.common import EvalConfig, environment, generate_texts, load_for_eval, wilson, write_json


@dataclass
class ExactMatchConfig(EvalConfig):
    data: str = ""  # by default the set the checkpoint was trained on


def score(prediction: str, prefix: str, target: str, set_name: str) -> bool:
    """Whether the answer is right: by the mini task's own scorer, else character by character."""
    if set_name.startswith("mini"):
        return TASKS[task_of(set_name, prefix)].score(prediction, {"prefix": prefix, "target": target})
    return prediction == target


def main(argv: list[str]) -> dict:
    """Evaluate as argv says; returns what the JSON line holds."""
    cfg, model, tokenizer, state = load_for_eval(argv, ExactMatchConfig)
    data = cfg.data or state["train_config"]["data"]
    held_out, name = open_set(build_if_missing(data), "valid"), Path(data).name
    n = min(cfg.n, len(held_out))
    texts, cost = generate_texts(model, tokenizer, [list(held_out.pair(i)[0]) for i in range(n)], cfg)
    items = [(*held_out.text(i), text) for i, text in zip(range(n), texts)]  # prefix, target, prediction
    wrong = [item for item in items if not score(item[2], item[0], item[1], name)]
    hits = n - len(wrong)
    low, high = wilson(hits, n)
    result = {"task": name, "n": n, "hits": hits, "exact_match": hits / n, "interval": [low, high], **cost}
    result |= {"wrong": wrong[:3], "settings": asdict(cfg), "command": f"python -m eval.exact_match {' '.join(argv)}"}
    result |= environment()
    print(
        f"{name}: {hits / n:.1%} exact match [{low:.1%}, {high:.1%}] on {n} held-out | "
        f"{cost['calls_per_sample']:.1f} network calls, {cost['seconds_per_sample']:.4f} s per sample"
    )
    print(json.dumps(result))
    if cfg.json:
        write_json(cfg.json, result)
    return result


if __name__ == "__main__":
    run(main)
