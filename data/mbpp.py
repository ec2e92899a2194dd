'''MBPP: write a Python function from a sentence and three asserts (Austin et al. 2021, 2108.07732).

    python -m data.mbpp [--source=mbpp.jsonl] [--tokenizer=gpt2] [--target_length=256]

    """
    Write a function to double a number.
    assert double(2) == 4                          ->  def double(x):
    """                                                    return 2 * x

The prompt is a docstring: Python, as in pretraining. It holds all asserts, because only they name
the function. The AR2Diff paper does not show its prompt. It probably scores the 90 validation
tasks, because its scores are multiples of 1/90. They are the held-out split here.
'''

from collections import Counter
from dataclasses import dataclass

from configurator import configure, require, run, setting
from data.sources import SetConfig, local, read_json_lines, unix_lines, write_set

SITE = "https://raw.githubusercontent.com/google-research/google-research/master"
# task_id of each split (2108.07732)
SPLITS = {
    "few-shot": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


@dataclass
class MbppConfig(SetConfig):
    source: str = setting(f"{SITE}/mbpp/mbpp.jsonl", "mbpp.jsonl or its URL", path=True)
    name: str = setting("mbpp", "the data set becomes the folder out/name")


def read(source: str) -> list[dict]:
    """Return the tasks of an MBPP file (.jsonl, .jsonl.gz) in file order.

    Fields: id, task_id, split, prefix, target, and tests: Python source that raises if the program
    before it is wrong. MBPP's challenge_test_list is not used.
    """
    path = local(source)
    examples = {}
    for number, item in read_json_lines(path):
        try:
            example = {"id": str(item["task_id"]), "task_id": item["task_id"]} | _task(item)
            require(example["id"] not in examples, f"task_id {example['id']} occurs twice")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            fault = f"not a task of MBPP ({type(error).__name__}: {error})"
            raise ValueError(f"{path}, line {number}: {fault}") from None
        examples[example["id"]] = example
    return list(examples.values())


def _task(item: dict) -> dict:
    split = next((split for split, ids in SPLITS.items() if item["task_id"] in ids), None)
    require(split, f"task_id must be 1 to 974, got {item['task_id']!r}")
    tests = item["test_list"]
    require(tests and type(tests) is list, f"test_list must be a list of tests, got {tests!r}")
    asserts = [unix_lines(test).strip() for test in tests]
    setup = unix_lines(item["test_setup_code"]).strip("\n")
    docstring = "\n".join([item["text"].strip(), *asserts])
    return {
        "split": split,
        "prefix": f'"""\n{docstring}\n"""\n',
        "tests": "\n".join([*([setup] if setup else []), *asserts]) + "\n",
        "target": unix_lines(item["code"]).strip("\n").rstrip(),
    }


def main(argv: list[str]) -> None:
    cfg = configure(MbppConfig, argv)
    examples = read(cfg.source)
    train = [example for example in examples if example["split"] == "train"]
    valid = [example for example in examples if example["split"] == "validation"]
    counts = Counter(example["split"] for example in examples)
    write_set(cfg, {"train": train, "valid": valid}, ["data.mbpp", *argv], tasks=counts)


if __name__ == "__main__":
    run(main, MbppConfig)
