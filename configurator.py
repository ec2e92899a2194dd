"""Settings: a dataclass says what exists, a flat Python file what differs, the command line what is tried today.

    python train.py config/toy_copy_ar.py --learning_rate=1e-3 --compile

Later arguments win. A config file holds assignments only; a name that is no setting stops the run, and so does a
value of the wrong type. Command-line text is read by the type of the setting it is for: --prompt=42 is the text "42".
"""

import dataclasses
import difflib
import os
import runpy
import sys
from collections.abc import Callable


def configure(cls: type, argv: list[str]):
    """A `cls` built from config files and --key=value flags; later arguments win.

    Raises ValueError, one line that names the argument and the nearest valid setting.
    """
    values, _ = read_settings(cls, argv)
    return cls(**values)


def checked(cls: type, stored: dict, source: str):
    """A `cls` from settings that a file holds. Raises ValueError, one line, for unknown names and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values = {key: _check(value, _field(str(key), fields, source), source) for key, value in stored.items()}
    return cls(**values)


def read_settings(cls: type, argv: list[str]) -> tuple[dict, set[str]]:
    """(every setting that was given, the names given on the command line rather than in a file)."""
    fields, values, typed = {f.name: f for f in dataclasses.fields(cls)}, {}, set()
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            field = _field(key, fields, arg)
            values[key] = _parse(text if equals else None, field, arg)
            typed.add(key)
        else:
            for key, value in _read_file(arg).items():
                values[key] = _check(value, _field(key, fields, arg), arg)
    return values, typed


def describe(cfg) -> str:
    """The settings that differ from their defaults, as flags: what to type to get this run again."""
    changed = [(f.name, getattr(cfg, f.name)) for f in dataclasses.fields(cfg) if getattr(cfg, f.name) != f.default]
    return " ".join(f"--{name}={value}" for name, value in changed) or "(all defaults)"


def run(main: Callable[[list[str]], object]) -> None:
    """Call main(sys.argv[1:]) as a command: an error that the user can mend is one line and exit status 2.

    --help and -h print how it is called, the text at the top of its file, and where its settings stand.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        told = sys.modules[main.__module__]
        print(f"{told.__doc__}\nEvery setting, its default and what it means: the dataclasses in {told.__file__}")
        return
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader left, as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(error: Exception) -> str:
    """What an error says, in one line whatever it quotes."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    return "\\n".join(text.splitlines())


def refuse_changes(given: dict, fixed: dict, says: str, hint: str = "drop the setting", except_for=frozenset()) -> None:
    """Raise ValueError where an explicit setting contradicts what is fixed already."""
    for name, value in given.items():
        if name in fixed and name not in except_for and value != fixed[name]:
            raise ValueError(f"{says} {name}={fixed[name]}, but {name}={value} is asked for; {hint}")


def nearest(name: str, known) -> str:
    """', did you mean X?' for a mistyped name, or the list of what exists."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"


def _field(key, fields, arg):
    if key not in fields:
        close = difflib.get_close_matches(key, fields, n=1)
        raise ValueError(f"{arg}: unknown setting {key!r}" + (f", did you mean {close[0]!r}?" if close else ""))
    return fields[key]


def _read_file(path):
    try:
        found = runpy.run_path(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such config file (settings are given as --key=value)") from None
    except Exception as error:  # whatever the file does wrong is the user's to mend
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    return {key: value for key, value in found.items() if not key.startswith("_") and not hasattr(value, "__path__")}


def _parse(text, field, arg):
    want = type(field.default)
    if want is bool:
        if text is None or text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise ValueError(f"{arg}: {field.name!r} wants true or false, got {text!r}")
    if text is None:
        raise ValueError(f"{arg}: expected --{field.name}=VALUE ({want.__name__})")
    if want is str:
        return text
    try:
        value = want(text.replace("_", "")) if want is int else want(text)
    except ValueError:
        raise ValueError(f"{arg}: {field.name!r} wants {want.__name__}, got {text!r}") from None
    if want is float and value != value:
        raise ValueError(f"{arg}: {field.name!r} wants a number, got {text!r}")
    return value


def _check(value, field, source):
    want = type(field.default)
    if want is float and type(value) is int:
        value = float(value)  # learning_rate = 1 means 1.0
    if type(value) is not want:
        raise ValueError(f"{source}: {field.name!r} wants {want.__name__}, got {value!r}")
    return value
