'''MBPP: a sentence and three asserts, answered with a Python function (Austin et al. 2021, 2108.07732).

    python -m data.mbpp [--source=mbpp.jsonl] [--tokenizer=gpt2] [--target_length=256]

    """
    Write a function to double a number.
    assert double(2) == 4                          ->  def double(x):
    """                                                    return 2 * x

The prompt is a docstring: Python, as in pretraining. It holds all three asserts, as in the MBPP paper, for nothing else
names the function. AR2Diff's paper does not show its prompt.

Splits by task_id (2108.07732): 1-10 few-shot, 11-510 test, 511-600 validation, 601-974 train. The set holds train, and
validation for the held-out loss. AR2Diff's MBPP percentages are all multiples of 1/90, so it very probably scores the
90 validation tasks, though it says test.

`read` also reads HumanEval (Chen et al. 2021, 2107.03374), which is for evaluation only.
'''

import json
from collections import Counter
from dataclasses import dataclass

from configurator import configure, run
from data.sources import Download, SetConfig, local, write_set
from data.text_file import read_text

MBPP = Download("https://raw.githubusercontent.com/google-research/google-research/master/mbpp/mbpp.jsonl")
HUMANEVAL = Download("https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz")
SPLITS = {
    "few-shot": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}  # task_id of MBPP
MBPP_FIELDS = {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str}
HUMANEVAL_FIELDS = {"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str}


@dataclass
class MbppConfig(SetConfig):
    source: str = MBPP.url
    name: str = "mbpp"


def read(source: str) -> list[dict]:
    """The tasks of an MBPP or HumanEval file (.jsonl, .jsonl.gz) in its order.

    Each has id, task_id as in the file, split (a key of SPLITS; HumanEval is all test), prefix, target, and tests:
    Python source that raises if the code before it is wrong. `program` makes that code of a completion. MBPP's
    challenge_test_list is not used. Raises ValueError that names the line; another format is refused by its fields.
    """
    path, found = local(source, (MBPP, HUMANEVAL)), {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            item = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{where}: not a line of JSON ({error}); wants mbpp.jsonl or HumanEval.jsonl") from None
        example = _example(item, where)
        if example["id"] in found:
            raise ValueError(f"{where}: task_id {example['task_id']!r} is there twice")
        found[example["id"]] = example
    if len({"entry_point" in example for example in found.values()}) > 1:
        raise ValueError(f"{path}: tasks of both MBPP and HumanEval; give one kind at a time")
    return list(found.values())


def prompt(example: dict) -> str:
    """What the model reads: HumanEval's own prompt, or MBPP's sentence and asserts as a docstring."""
    if "entry_point" in example:
        return example["prompt"]
    lines = [example["text"], *example["asserts"]]
    return '"""\n' + "".join(f"{line}\n" for line in lines) + '"""\n'


def program(example: dict, completion: str) -> str:
    """The Python source that the tests are run behind: of HumanEval prompt and completion, of MBPP the completion."""
    return example["prompt"] + completion if "entry_point" in example else completion


def _example(item: dict, where: str) -> dict:
    """An example of a line, by the format its fields belong to."""
    fields = list(item) if isinstance(item, dict) else []
    wanted = next((f for f in (MBPP_FIELDS, HUMANEVAL_FIELDS) if set(f) <= set(fields)), None)
    if wanted is None:
        hint = "; sanitized-mbpp has other fields and splits" if {"test_imports", "source_file"} & set(fields) else ""
        raise ValueError(
            f"{where}: has {', '.join(fields) or 'no fields'}; MBPP has {', '.join(MBPP_FIELDS)}, HumanEval "
            f"{', '.join(HUMANEVAL_FIELDS)}{hint}"
        )
    for field, kind in wanted.items():
        if not isinstance(item[field], kind):
            raise ValueError(f"{where}: {field!r} wants {kind.__name__}, got {str(item[field])[:60]}")
    example = _mbpp(item, where) if wanted is MBPP_FIELDS else _humaneval(item)
    return {"id": str(item["task_id"]), "task_id": item["task_id"]} | example | {"prefix": prompt(example)}


def _mbpp(item: dict, where: str) -> dict:
    split = next((split for split, ids in SPLITS.items() if item["task_id"] in ids), None)
    if split is None:
        raise ValueError(f"{where}: task_id {item['task_id']} is none of MBPP's 1 to 974")
    if not item["test_list"] or not all(isinstance(test, str) for test in item["test_list"]):
        raise ValueError(f"{where}: 'test_list' wants at least one test, each of them text")
    asserts = [_newlines(test).strip() for test in item["test_list"]]
    setup = _newlines(item["test_setup_code"]).strip("\n")
    return {
        "split": split,
        "text": item["text"].strip(),
        "asserts": asserts,
        "tests": "\n".join([*([setup] if setup else []), *asserts]) + "\n",
        "target": _newlines(item["code"]).strip("\n").rstrip(),
    }


def _humaneval(item: dict) -> dict:
    kept = {field: item[field] for field in ("prompt", "entry_point")}
    tests = f"{item['test']}\ncheck({item['entry_point']})\n"
    return kept | {"split": "test", "tests": tests, "target": item["canonical_solution"]}


def _newlines(code: str) -> str:
    """MBPP's code has Windows line ends, four tasks a bare "\\r"; Python reads all of them as "\\n"."""
    return code.replace("\r\n", "\n").replace("\r", "\n")


def main(argv: list[str]) -> None:
    cfg = configure(MbppConfig, argv)
    examples = read(cfg.source)
    if "entry_point" in examples[0]:
        raise ValueError(f"{cfg.source}: HumanEval has no training tasks; it is for evaluation only")
    train, valid = ([e for e in examples if e["split"] == split] for split in ("train", "validation"))
    counts = Counter(example["split"] for example in examples)
    write_set(cfg, train, valid, f"python -m data.mbpp {' '.join(argv)}".rstrip(), tasks=dict(counts))
    print("tasks in the file: " + ", ".join(f"{s} {counts[s]} of {len(ids)}" for s, ids in SPLITS.items()))


if __name__ == "__main__":
    run(main)
