"""Measure the share of held-out items of a mini or toy task that a model gets right.

    python -m eval.exact_match --init_from=out/ar2diff_3_finetune/ckpt.pt --steps=10

No prompt holds the length of the answer, and every canvas is target_length wide.
"""

from dataclasses import dataclass

from configurator import run, setting
from data.mini import TAGS, TASKS
from eval import common
from eval.common import PairsConfig
from eval.metrics import wilson


@dataclass
class ExactMatchConfig(PairsConfig):
    n: int = setting(500, "held-out items, the first of the set", minimum=1)


def score(prediction: str, prefix: str, target: str, mini: bool) -> bool:
    """Return whether an answer is right: by the scorer of its mini task, else if it is equal."""
    if mini:
        task = TASKS[TAGS[prefix[:2]]]
        return task.score(prediction, {"prefix": prefix, "target": target})
    return prediction == target


def main(argv: list[str]) -> dict:
    cfg, generator, state = common.open_checkpoint(argv, ExactMatchConfig)
    pairs = common.open_pairs(cfg.data, state)
    mini = common.is_mini(pairs)
    n = min(cfg.n, len(pairs))
    predictions, cost = generator.texts([pairs.pair(i)[0] for i in range(n)])
    hits = sum(score(predictions[i], *pairs.text(i), mini) for i in range(n))
    low, high = wilson(hits, n)
    result = {"task": pairs.folder.name, "n": n, "hits": hits, "exact_match": hits / n}
    result |= {"interval": [low, high]} | cost
    result |= common.origin("exact_match", argv, generator.settings(), state)
    share = f"{hits / n:.1%} exact match [{low:.1%}, {high:.1%}] on {n} held-out items"
    text = f"{pairs.folder.name}: {share} | {common.cost_line(cost)}"
    return common.finish(cfg.json, result, text)


if __name__ == "__main__":
    run(main, ExactMatchConfig)
