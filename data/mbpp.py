'''MBPP: write a Python function from a sentence and three asserts (Austin et al. 2021, 2108.07732).

    python -m data.mbpp [--source=mbpp.jsonl] [--tokenizer=gpt2] [--target_length=256]

    """
    Write a function to double a number.
    assert double(2) == 4                          ->  def double(x):
    """                                                    return 2 * x

The prompt is a docstring: Python, as in pretraining. It holds all asserts, because only they name
the function. The AR2Diff paper does not show its prompt.

Splits by task_id (2108.07732): 1-10 few-shot, 11-510 test, 511-600 validation, 601-974 train. The
data set holds train, and validation as held-out split. The paper's MBPP scores are multiples of
1/90, so it probably scores the 90 validation tasks, although it says test.

`read` also reads HumanEval (Chen et al. 2021, 2107.03374), for evaluation only.
'''

import shlex
from collections import Counter
from dataclasses import dataclass

from configurator import configure, run, setting
from data.sources import SetConfig, local, read_json_lines, write_set

GITHUB = "https://raw.githubusercontent.com"
MBPP = f"{GITHUB}/google-research/google-research/master/mbpp/mbpp.jsonl"
SPLITS = {
    "few-shot": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}  # task_id of MBPP
MBPP_FIELDS = {
    "task_id": int,
    "text": str,
    "code": str,
    "test_list": list,
    "test_setup_code": str,
}
HUMANEVAL_FIELDS = {
    "task_id": str,
    "prompt": str,
    "canonical_solution": str,
    "test": str,
    "entry_point": str,
}


@dataclass
class MbppConfig(SetConfig):
    source: str = setting(MBPP, "mbpp.jsonl or its URL", path=True)
    name: str = setting("mbpp", "the data set becomes the folder out/name")


def read(source: str) -> list[dict]:
    """Return the tasks of an MBPP or HumanEval file (.jsonl, .jsonl.gz) in file order.

    Fields: id, task_id, split, prefix, target, and tests: Python source that raises if the program
    before it is wrong. MBPP's challenge_test_list is not used.
    """
    path = local(source)
    examples = {}
    for number, item in read_json_lines(path):
        where = f"{path}, line {number}"
        example = _example(item, where)
        if example["id"] in examples:
            raise ValueError(f"{where}: task_id {example['task_id']!r} occurs twice")
        examples[example["id"]] = example
    if len({"entry_point" in example for example in examples.values()}) > 1:
        raise ValueError(f"{path}: has tasks of both MBPP and HumanEval; give one kind")
    return list(examples.values())


def program(example: dict, completion: str) -> str:
    """Return the source to test: the completion, in HumanEval after the prompt."""
    return example["prefix"] + completion if "entry_point" in example else completion


def _example(item: dict, where: str) -> dict:
    names = set(item) if isinstance(item, dict) else set()
    formats = (MBPP_FIELDS, HUMANEVAL_FIELDS)
    fields = next((f for f in formats if set(f) <= names), None)
    if fields is None:
        found = ", ".join(sorted(names)) or "none"
        hint = " (this looks like sanitized-mbpp)" if "test_imports" in names else ""
        wanted = f"need {', '.join(MBPP_FIELDS)}, or of HumanEval {', '.join(HUMANEVAL_FIELDS)}"
        raise ValueError(f"{where}: wrong fields{hint}: {found}; {wanted}")
    for field, kind in fields.items():
        if type(item[field]) is not kind:
            got = str(item[field])[:60]
            raise ValueError(f"{where}: {field!r} must be of type {kind.__name__}, got {got}")
    example = _mbpp(item, where) if fields is MBPP_FIELDS else _humaneval(item)
    return {"id": str(item["task_id"]), "task_id": item["task_id"]} | example


def _mbpp(item: dict, where: str) -> dict:
    split = next((split for split, ids in SPLITS.items() if item["task_id"] in ids), None)
    if split is None:
        raise ValueError(f"{where}: task_id must be 1 to 974, got {item['task_id']}")
    if not item["test_list"] or not all(isinstance(test, str) for test in item["test_list"]):
        raise ValueError(f"{where}: 'test_list' must hold at least one test, all of them text")
    asserts = [_newlines(test).strip() for test in item["test_list"]]
    setup = _newlines(item["test_setup_code"]).strip("\n")
    docstring = "\n".join([item["text"].strip(), *asserts])
    return {
        "split": split,
        "text": item["text"].strip(),
        "prefix": f'"""\n{docstring}\n"""\n',
        "tests": "\n".join([*([setup] if setup else []), *asserts]) + "\n",
        "target": _newlines(item["code"]).strip("\n").rstrip(),
    }


def _humaneval(item: dict) -> dict:
    return {
        "split": "test",
        "entry_point": item["entry_point"],
        "prefix": item["prompt"],
        "tests": f"{item['test']}\ncheck({item['entry_point']})\n",
        "target": item["canonical_solution"],
    }


def _newlines(code: str) -> str:
    """Replace MBPP's Windows and old Macintosh line ends."""
    return code.replace("\r\n", "\n").replace("\r", "\n")


def main(argv: list[str]) -> None:
    cfg = configure(MbppConfig, argv)
    examples = read(cfg.source)
    if "entry_point" in examples[0]:
        raise ValueError(f"{cfg.source}: HumanEval has no training tasks; it is for evaluation")
    train = [e for e in examples if e["split"] == "train"]
    valid = [e for e in examples if e["split"] == "validation"]
    counts = Counter(example["split"] for example in examples)
    command = shlex.join(["python", "-m", "data.mbpp", *argv])
    write_set(cfg, train, valid, command, tasks=dict(counts))
    shares = [f"{split} {counts[split]} of {len(ids)}" for split, ids in SPLITS.items()]
    print(f"tasks in the file: {', '.join(shares)}")


if __name__ == "__main__":
    run(main, MbppConfig)
