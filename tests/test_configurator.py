"""configurator.py: what is typed is what is set, and a typo stops the run with one line that helps."""

import sys
from dataclasses import dataclass

import pytest

from configurator import configure, describe, nearest, one_line, read_settings, run


@dataclass
class Settings:
    prompt: str = "hello"
    steps: int = 10
    learning_rate: float = 1e-3
    compile: bool = False
    self_conditioning: bool = True


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "config.py").write_text(text, encoding="utf-8")
        return str(tmp_path / "config.py")

    return write


@pytest.mark.parametrize(
    "arg, name, value",
    [
        ("--prompt=42", "prompt", "42"),
        ("--prompt=True", "prompt", "True"),
        ("--prompt=", "prompt", ""),
        ("--prompt=a=b --steps=3", "prompt", "a=b --steps=3"),
        ("--steps=20", "steps", 20),
        ("--steps=100_000", "steps", 100_000),
        ("--steps=-1", "steps", -1),
        ("--learning_rate=3e-4", "learning_rate", 3e-4),
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--compile", "compile", True),
        ("--compile=true", "compile", True),
        ("--self_conditioning=False", "self_conditioning", False),
        ("--self_conditioning=0", "self_conditioning", False),
    ],
)
def test_text_is_read_by_the_type_of_its_setting(arg, name, value):
    found = getattr(configure(Settings, [arg]), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "arg, says",
    [
        ("--step=3", "unknown setting 'step', did you mean 'steps'?"),
        ("--learningrate=3", "did you mean 'learning_rate'?"),
        ("--zzz=3", "--zzz=3: unknown setting 'zzz'"),
        ("--steps=ten", "--steps=ten: 'steps' wants int, got 'ten'"),
        ("--steps=1.5", "'steps' wants int, got '1.5'"),
        ("--steps", "expected --steps=VALUE (int)"),
        ("--prompt", "expected --prompt=VALUE (str)"),
        ("--learning_rate=fast", "'learning_rate' wants float, got 'fast'"),
        ("--learning_rate=nan", "'learning_rate' wants a number"),
        ("--compile=maybe", "'compile' wants true or false, got 'maybe'"),
        ("-steps=3", "-steps=3: no such config file (settings are given as --key=value)"),
        ("nowhere.py", "nowhere.py: no such config file"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arg, says):
    with pytest.raises(ValueError) as error:
        configure(Settings, [arg])
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("setps = 3", "unknown setting 'setps', did you mean 'steps'?"),
        ("steps = '3'", "'steps' wants int, got '3'"),
        ("steps = 3.0", "'steps' wants int, got 3.0"),
        ("steps = True", "'steps' wants int, got True"),
        ("compile = 1", "'compile' wants bool, got 1"),
        ("prompt = 42", "'prompt' wants str, got 42"),
        ("steps = = 3", "SyntaxError"),
        ("steps = 1 / 0", "ZeroDivisionError"),
        ("steps = missing", "NameError"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_that_names_the_file(config, text, says):
    path = config(text)
    with pytest.raises(ValueError) as error:
        configure(Settings, [path])
    assert path in str(error.value) and says in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_no_config_file(tmp_path):
    with pytest.raises(ValueError, match="tmp|config"):
        configure(Settings, [str(tmp_path)])


def test_a_file_holds_assignments_and_a_whole_number_will_do_for_a_float(config):
    path = config("# a comment\n_half = 5\nsteps = 2 * _half\nlearning_rate = 1\ncompile = True\n")
    cfg = configure(Settings, [path])
    assert (cfg.steps, cfg.learning_rate, cfg.compile) == (10, 1.0, True)
    assert type(cfg.learning_rate) is float


def test_the_later_argument_wins_and_what_was_typed_is_known(config):
    path = config("steps = 5\nprompt = 'file'")
    assert configure(Settings, [path, "--steps=6"]).steps == 6
    assert configure(Settings, ["--steps=6", path]).steps == 5
    assert configure(Settings, ["--steps=6", "--steps=7"]).steps == 7
    assert read_settings(Settings, [path, "--steps=6"]) == ({"steps": 6, "prompt": "file"}, {"steps"})


def test_describe_is_what_to_type_to_get_the_settings_again():
    cfg = configure(Settings, ["--steps=3", "--compile", "--learning_rate=0.5"])
    assert configure(Settings, describe(cfg).split()) == cfg
    assert describe(Settings()) == "(all defaults)"


def test_nearest_names_what_is_meant_or_all_there_is():
    assert nearest("mimi", ["mini", "toy_copy"]) == ", did you mean 'mini'?"
    assert nearest("xyz", ["mini", "toy_copy"]) == "; there are: mini, toy_copy"


def test_a_command_ends_with_one_line_and_status_2(capsys):
    def main(argv):
        raise ValueError("steps must be 1 or more, got 0")

    with pytest.raises(SystemExit) as stopped:
        run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: steps must be 1 or more, got 0\n"


def test_an_error_is_one_line_whatever_it_quotes():
    assert one_line(ValueError("--steps=\n: wants int")) == "--steps=\\n: wants int"
    assert one_line(FileNotFoundError(2, "No such file", "a\r\nb")) == "a\\nb: No such file"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_how_it_is_called_and_runs_nothing(flag, monkeypatch, capsys):
    """What stands at the top of the file of main, here of this one."""
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed=1", flag])

    def main(argv):
        raise AssertionError("it ran")

    run(main)
    said = capsys.readouterr().out
    assert __doc__ in said and __file__ in said
