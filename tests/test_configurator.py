"""configurator.py: typed settings. A mistake is one line that names the setting, and status 2."""

import math
import os
import sys
from dataclasses import dataclass

import pytest
from processes import make_copy_set

import ar2diff
import autoregressive
import diffusion
import sample
import train
from configurator import (
    all_fields,
    build,
    configure,
    describe,
    flatten,
    group,
    help_text,
    one_line,
    read_settings,
    run,
    setting,
    suggest,
    validate,
)
from extras import speculative
from infra.checkpoint import save
from model import ModelConfig, Transformer


@dataclass
class Inner:
    compile: bool = setting(False, "a switch")
    temperature: float = setting(0.5, "", minimum=1e-3, maximum=2, zero_ok=True)
    kind: str = setting("a", "", ("a", "b"))
    vocab_size: int = setting(9, "", hidden=True)

    def __post_init__(self):
        validate(self)


@dataclass
class Settings:
    inner: Inner = group(Inner)
    prompt: str = setting("hello", "the text")
    steps: int = setting(10, "calls", minimum=1)
    path: str = setting("", "a file", path=True)

    def __post_init__(self):
        validate(self)


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "config.py").write_text(text, encoding="utf-8")
        return str(tmp_path / "config.py")

    return write


@pytest.mark.parametrize(
    ("arg", "value"),
    [
        ("--prompt=42", "42"),
        ("--prompt=", ""),
        ("--prompt=a=b --steps=3", "a=b --steps=3"),
        ("--steps=100_000", 100_000),
        ("--temperature=1", 1.0),
        ("--temperature=1e-1", 0.1),
        ("--temperature=0", 0.0),
        ("--compile", True),
        ("--compile=False", False),
        ("--path=~/x", os.path.expanduser("~/x")),
    ],
)
def test_a_text_is_read_as_the_type_of_its_setting(arg, value):
    found = flatten(configure(Settings, [arg]))[arg[2:].partition("=")[0]]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("--step=3", "--step=3: unknown setting 'step', did you mean 'steps'?"),
        ("--zzz=3", "unknown setting 'zzz'"),
        ("--vocab_size=3", "unknown setting 'vocab_size'"),
        ("--gradient_checkpointing", "is now --activation_checkpointing"),
        ("--bucket=4", "'bucket' was removed"),
        ("--steps=1.5", "expected --steps=VALUE (int)"),
        ("--prompt", "expected --prompt=VALUE (str)"),
        ("--compile=maybe", "expected --compile=VALUE (bool)"),
        ("--steps=0", "steps must be at least 1, got 0"),
        ("--temperature=nan", "temperature must be 0 or a finite number, got nan"),
        ("--kind=c", "kind must be one of a, b; got 'c'"),
        ("-steps=3", "-steps=3: no such config file (settings are given as --key=value)"),
        ("setps = 3", "unknown setting 'setps', did you mean 'steps'?"),
        ("steps = '3'", "steps must be of type int, got '3'"),
        ("steps = True", "steps must be of type int, got True"),
        ("compile = 1", "compile must be of type bool, got 1"),
        ("prompt = 42", "prompt must be of type str, got 42"),
        ("steps = = 3", "SyntaxError"),
        ("steps = missing", "NameError"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arg, message, config):
    """On the command line or in a file. The error also names the file."""
    arg = arg if arg[0] == "-" else config(arg)
    with pytest.raises(ValueError) as error:
        configure(Settings, [arg])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "config.py" in str(error.value) or arg[0] == "-" or "must be" in message


def test_a_file_holds_assignments_and_the_later_argument_wins(config, tmp_path):
    text = "import os\n_half = 5\nsteps = 2 * _half\ntemperature = 1\n\ndef f(): pass\n"
    path = config(text)
    cfg = configure(Settings, [path])
    assert cfg == Settings(Inner(temperature=1.0), steps=10)
    assert type(cfg.inner.temperature) is float
    assert configure(Settings, [path, "--steps=6"]).steps == 6
    assert configure(Settings, ["--steps=6", path]).steps == 10
    assert read_settings((Settings,), [path, "--steps=6"]) == {"steps": 6, "temperature": 1.0}
    with pytest.raises(ValueError, match="no such config file"):
        configure(Settings, [str(tmp_path)])


def test_settings_survive_flattening_and_description():
    cfg = configure(Settings, ["--steps=3", "--compile", "--temperature=0.25"])
    assert build(Settings, flatten(cfg)) == cfg == configure(Settings, describe(cfg).split())
    assert describe(Settings()) == "(all defaults)"
    assert suggest("mimi", ["mini", "toy"]) == ", did you mean 'mini'?"
    assert suggest("xyz", ["mini", "toy"]) == "; available: mini, toy"


def test_help_lists_what_can_be_typed_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed=1", "-h"])
    run(lambda argv: pytest.fail("it ran"), Settings)
    printed = capsys.readouterr().out
    assert __doc__ in printed and help_text(Settings) in printed
    assert printed.count("  --") == 6 and "--kind=a" in printed and "(a | b)" in printed


def test_an_error_is_one_line_whatever_it_quotes():
    assert one_line(ValueError("--steps=\n: no")) == "--steps=\\n: no"
    assert one_line(FileNotFoundError(2, "No such file", "a\r\nb")) == "a\\nb: No such file"


# Every setting of every command, at and beyond its limits.

SMALL = ["--device=cpu", "--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=4"]
SMALL += ["--max_steps=1", "--eval_batches=1", "--data=copy", "--out_dir=made"]
COMMANDS = {
    "train": (train.main, train.TrainConfig, SMALL),
    "ar2diff": (ar2diff.main, ar2diff.ConvertConfig, ["--init_from=ar.pt", "--out_dir=made"]),
    "sample": (sample.main, sample.SampleConfig, ["--init_from=ar.pt", "--prompt=a"]),
    "ar": (sample.main, autoregressive.SamplerConfig, ["--init_from=ar.pt", "--prompt=a"]),
    "diffusion": (sample.main, diffusion.SamplerConfig, ["--init_from=ours.pt", "--prompt=a"]),
    "speculative": (
        sample.main,
        speculative.SamplerConfig,
        ["--init_from=ours.pt", "--prompt=a", "--sampler=speculative"],
    ),
}


def values(field) -> list[str]:
    kind = type(field.default)
    if kind is bool:
        return ["true", "0", "", "maybe", "2"]
    found = ["", "nan", "inf", "-1", "x", "1.5", str(2**64), "1e400", "9" * 400]
    if kind is str:
        return found + list(field.metadata["choices"])
    for limit in ("minimum", "maximum", "above"):
        value = field.metadata.get(limit)
        if kind is int and value is not None:
            found += [str(value - 1), str(value), str(value + 1)]
        elif value is not None:
            found += [repr(math.nextafter(value, way)) for way in (-math.inf, value, math.inf)]
    return found + ["2147483648", "1e-320"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_copy_set(folder / "copy")
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=11, target_length=6)
    ours = dict(paradigm="diffusion", target_attention="bidirectional")
    for name, settings in {"ar": {}, "ours": ours | dict(prefix_attention="bidirectional")}.items():
        save(folder / f"{name}.pt", Transformer(ModelConfig(**sizes | settings)), 0, "bytes")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_value_is_accepted_or_refused_by_name(command, place, monkeypatch, capsys):
    main, cls, base = COMMANDS[command]
    monkeypatch.chdir(place)
    files = sorted(place.rglob("*"))
    for name, field in all_fields(cls).items():
        for value in values(field) if not field.metadata.get("hidden") else ():
            argv = [*base, f"--{name}={value}"]
            try:
                build(cls, read_settings((cls, ModelConfig), [argv[-1]]))
                continue  # accepted
            except ValueError:
                monkeypatch.setattr(sys, "argv", ["command", *argv])
            with pytest.raises(SystemExit) as stopped:
                run(main)
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and error.count("\n") == 1, (argv, error)
            assert error.startswith("error: ") and name in error, (argv, error)
            assert sorted(place.rglob("*")) == files, argv
