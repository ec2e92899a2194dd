"""configurator.py: typed settings. A mistake is one line that names the setting, and status 2."""

import math
import os
import re
import sys
from dataclasses import dataclass

import pytest
from eval_models import CACHED, save_model
from processes import TINY, make_copy_set

import ar2diff
import autoregressive
import configurator
import diffusion
import sample
import train
from configurator import build, configure, flatten, read_settings, setting
from extras import speculative
from model import ModelConfig
from view.help import describe


@dataclass
class Inner:
    compile: bool = setting(False, "a switch")
    temperature: float = setting(0.5, "", minimum=1e-3, maximum=2, zero_ok=True)
    kind: str = setting("a", "", ("a", "b"))
    vocab_size: int = setting(9, "", hidden=True)
    __post_init__ = configurator.validate


@dataclass
class Settings:
    inner: Inner = configurator.group(Inner)
    prompt: str = setting("hello", "the text")
    steps: int = setting(10, "calls", minimum=1)
    path: str = setting("", "a file", path=True)
    __post_init__ = configurator.validate


@pytest.mark.parametrize(
    ("arg", "value"),
    [
        ("--prompt=42", "42"),
        ("--prompt=a=b --steps=3", "a=b --steps=3"),
        ("--steps=100_000", 100_000),
        ("--temperature=1", 1.0),
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
        ("--gradient_checkpointing", "'gradient_checkpointing' is now --activation_checkpointing"),
        ("--bucket=4", "'bucket' was removed"),
        ("bucket = 4", "config.py: 'bucket' was removed"),
        ("--steps=1.5", "expected --steps=VALUE (int)"),
        ("--prompt", "expected --prompt=VALUE (str)"),
        ("--compile=maybe", "expected --compile=VALUE (bool)"),
        ("--steps=0", "steps must be at least 1, got 0"),
        ("--kind=c", "kind must be one of a, b; got 'c'"),
        ("-steps=3", "-steps=3: no such config file (settings are given as --key=value)"),
        ("setps = 3", "config.py: unknown setting 'setps', did you mean 'steps'?"),
        ("steps = '3'", "steps must be of type int, got '3'"),
        ("compile = 1", "compile must be of type bool, got 1"),
        ("steps = = 3", "config.py: SyntaxError"),
        ("steps = missing", "config.py: NameError"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(arg, message, tmp_path):
    if arg[0] != "-":
        (tmp_path / "config.py").write_text(arg)
        arg = str(tmp_path / "config.py")
    with pytest.raises(ValueError) as error:
        configure(Settings, [arg])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_old_name_is_in_use_nowhere_and_its_new_name_exists():
    classes = (train.TrainConfig, sample.SampleConfig, *sample.sampler_configs())
    known = configurator.all_fields(*classes)
    for old, remedy in configurator.OLD_NAMES.items():
        assert old not in known
        new = re.search(r"--(\w+)", remedy)
        assert new is None or new[1] in known


def test_a_file_holds_assignments_and_the_later_argument_wins(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("import os\n_half = 5\nsteps = 2 * _half\ntemperature = 1\ndef f(): pass\n")
    argv = [str(path), "--steps=6"]
    assert configure(Settings, argv[:1]) == Settings(Inner(temperature=1.0), steps=10)
    assert read_settings((Settings,), argv) == {"steps": 6, "temperature": 1.0}
    assert read_settings((Settings,), argv[::-1])["steps"] == 10
    with pytest.raises(ValueError, match="no such config file"):
        configure(Settings, [str(tmp_path)])


def test_settings_survive_flattening_and_description():
    cfg = configure(Settings, ["--steps=3", "--compile", "--temperature=0.25"])
    assert build(Settings, flatten(cfg)) == cfg == configure(Settings, describe(cfg).split())
    assert describe(Settings()) == "(all defaults)"


def test_help_lists_what_can_be_typed_and_runs_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py", "--seed=1", "-h"])
    configurator.run(lambda argv: pytest.fail("it ran"), Settings)
    printed = capsys.readouterr().out
    assert __doc__ in printed and printed.count("  --") == 6
    configurator.run(lambda argv: pytest.fail("it ran"), Settings, diffusion.SamplerConfig)
    assert "\nDiffusion: how a canvas becomes text.\n  --sampler=" in capsys.readouterr().out
    assert "--kind=a" in printed and "(a | b)" in printed


# Every setting of every command, at and beyond its limits.

AR = "--init_from=ar.pt --prompt=a"
COMMANDS = {
    "train": (train.main, train.TrainConfig, f"{' '.join(TINY)} --data=copy --out_dir=o"),
    "ar2diff": (ar2diff.main, ar2diff.ConvertConfig, "--init_from=ar.pt --out_dir=o"),
    "sample": (sample.main, sample.SampleConfig, AR),
    "ar": (sample.main, autoregressive.SamplerConfig, AR),
    "diffusion": (sample.main, diffusion.SamplerConfig, "--init_from=ours.pt --prompt=a"),
    "speculative": (sample.main, speculative.SamplerConfig, f"{AR} --draft=drafts"),
}


def values(field) -> list[str]:
    kind = type(field.default)
    if kind is bool:
        return ["true", "0", "", "maybe", "2"]
    found = ["", "nan", "inf", "-1", "x", "1.5", "1e400", "1e-320", str(2**64), "9" * 400]
    for limit in {"minimum", "maximum", "above"} & field.metadata.keys():
        value = field.metadata[limit]
        if kind is int:
            found += [str(value - 1), str(value), str(value + 1)]
        else:
            found += [repr(math.nextafter(value, way)) for way in (-math.inf, value, math.inf)]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    make_copy_set(folder / "copy")
    save_model(folder / "ar.pt", block_size=11, target_length=6)
    save_model(folder / "ours.pt", block_size=11, target_length=6, **CACHED)
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_value_is_accepted_or_refused_by_name(command, place, monkeypatch, capsys):
    main, cls, base = COMMANDS[command]
    monkeypatch.chdir(place)
    files = sorted(place.rglob("*"))
    cases = [(n, v) for n, f in configurator.user_fields(cls).items() for v in values(f)]
    for name, value in cases:
        flag = f"--{name}={value}"
        monkeypatch.setattr(sys, "argv", ["command", *base.split(), flag])
        try:
            build(cls, read_settings((cls, ModelConfig), [flag]))
            continue  # accepted
        except ValueError:
            with pytest.raises(SystemExit) as stopped:
                configurator.run(main)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1, (flag, error)
        assert error.startswith("error: ") and name in error, (flag, error)
        assert sorted(place.rglob("*")) == files, flag
