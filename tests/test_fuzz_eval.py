"""Whatever is typed, or in a file of predictions: an evaluation ends well or with one line."""

import json

import pytest
from eval_models import KINDS, save_model, save_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import all_fields, one_line
from eval import bound, code, exact_match, python_code, qa, translation
from eval.common import PairsConfig, TaskConfig

COMMANDS = {
    bound: bound.BoundEvalConfig,
    code: code.CodeConfig,
    exact_match: exact_match.ExactMatchConfig,
    python_code: PairsConfig,
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
QUIET = dict(deadline=None, derandomize=True, database=None)
QUIET |= dict(suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz_eval")
    texts = [("def f(x):\n    'T'\n", "    return x"), ("def g():\n    'T'\n", "    pass")]
    save_pairs(folder / "pairs", texts, 16, 48)
    for kind, config in KINDS.items():
        sizes = dict(block_size=48, target_length=16)
        save_model(folder / f"{kind}.pt", folder / "pairs", **sizes, **config)
    return folder


def ends_well(main, argv: list[str]) -> bool:
    """Whether the command ends in good order. An error must be one line."""
    try:
        main(argv)
        return True
    except (ValueError, OSError) as error:
        assert one_line(error) and "\n" not in one_line(error), argv
        return False


@settings(max_examples=60, **QUIET)
@given(st.data())
def test_flags(place, data):
    module = data.draw(st.sampled_from(list(COMMANDS)))
    names = sorted({*all_fields(COMMANDS[module]), "temperature", "sampler"})
    pairs = st.tuples(st.sampled_from(names) | st.text(max_size=6), VALUES)
    drawn = data.draw(st.lists(pairs, min_size=1, max_size=3))
    kind = data.draw(st.sampled_from(list(KINDS)))
    argv = [f"--init_from={place / kind}.pt", "--n=2"]
    argv += [f"--{name}={value}" for name, value in drawn if name not in LEFT_OUT]
    argv += ["--steps=1", "--draws=1"][: data.draw(st.integers(0, 2))]
    ends_well(module.main, argv)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANSWER = PLAIN | st.text(max_size=5) | st.lists(st.text(max_size=5) | PLAIN, max_size=2)
ANSWERS = st.dictionaries(st.sampled_from(["0", "1", "2"]), ANSWER, max_size=3)
HOSTILE = ["[" * 100_000, "1" * 5000, '{"0": "\\ud800", "1": ""}', "\0", "\ufeff{}", "\r\r\n"]
CONTENT = (ANSWERS | ANSWER).map(json.dumps) | st.sampled_from(HOSTILE) | st.text(max_size=9)


@settings(max_examples=80, **QUIET)
@given(st.data())
def test_files_of_predictions(place, data):
    """The result is written if and only if the command ends well."""
    module = data.draw(st.sampled_from(TASKS))
    path = place / "predictions.json"
    path.write_bytes(data.draw(CONTENT).encode("utf-8", "surrogatepass"))
    result = place / "result.json"
    result.unlink(missing_ok=True)
    argv = [f"--data={place / 'pairs'}", f"--predictions={path}", f"--json={result}"]
    assert ends_well(module.main, argv) == result.exists()
