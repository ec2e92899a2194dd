"""Whatever is typed, or in a file of predictions: an evaluation ends well or with one line."""

import json

import pytest
from eval_models import KINDS, save_model, save_pairs
from fuzzing import anything, error_of, repeat
from hypothesis import strategies as st

from configurator import all_fields
from eval import bound, code, exact_match, qa, translation
from eval.common import TaskConfig

COMMANDS = {
    bound: bound.BoundEvalConfig,
    code: code.CodeConfig,
    exact_match: exact_match.ExactMatchConfig,
    qa: TaskConfig,
    translation: translation.TranslationConfig,
}
TASKS = [qa, code, translation]
# Not drawn: they write where they please, read other files, or ask for hours of work.
LEFT_OUT = {"json", "init_from", "data", "source", "target_source", "predictions", "device"}
LEFT_OUT |= {"samples", "draws", "noise_steps", "steps", "candidates", "run_code"}
NUMBERS = [-(10**30), -7, -1, 0, 1, 2, 3, 64, 2**31, 2**63, 10**30]
WORDS = ["", "ar", "resample", "mixture", "all", "nan", "inf", "1e400", "1,2"]
VALUES = st.sampled_from([*map(str, NUMBERS), *WORDS]) | st.text(max_size=8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz_eval")
    texts = [("def f(x):\n    'T'\n", "    return x"), ("def g():\n    'T'\n", "    pass")]
    save_pairs(folder / "pairs", texts, 16, 48)
    for kind, config in KINDS.items():
        sizes = dict(block_size=48, target_length=16)
        save_model(folder / f"{kind}.pt", folder / "pairs", **sizes, **config)
    return folder


def test_flags(place):
    def check(data):
        module = data.draw(st.sampled_from(list(COMMANDS)))
        names = sorted({*all_fields(COMMANDS[module]), "temperature", "sampler"})
        pairs = st.tuples(st.sampled_from(names) | st.text(max_size=6), VALUES)
        drawn = data.draw(st.lists(pairs, min_size=1, max_size=3))
        kind = data.draw(st.sampled_from(list(KINDS)))
        argv = [f"--init_from={place / kind}.pt", "--n=2"]
        argv += [f"--{name}={value}" for name, value in drawn if name not in LEFT_OUT]
        argv += ["--steps=1", "--draws=1"][: data.draw(st.integers(0, 2))]
        error_of(module.main, argv)

    repeat(60, check, st.data())


ANSWERS = st.dictionaries(st.sampled_from(["0", "1", "2"]), anything(), max_size=3)
HOSTILE = ["[" * 100_000, "1" * 5000, '{"0": "\\ud800", "1": ""}', "\0", "\ufeff{}", "\r\r\n"]
CONTENT = (ANSWERS | anything()).map(json.dumps) | st.sampled_from(HOSTILE) | st.text(max_size=9)


def test_files_of_predictions(place):
    """The result is written if and only if the command ends well."""

    def check(module, content):
        path = place / "predictions.json"
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        result = place / "result.json"
        result.unlink(missing_ok=True)
        argv = [f"--data={place / 'pairs'}", f"--predictions={path}", f"--json={result}"]
        assert bool(error_of(module.main, argv)) != result.exists()

    repeat(80, check, st.sampled_from(TASKS), CONTENT)
