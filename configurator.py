"""Settings: a dataclass lists them, a Python file changes some, flags more.

    python train.py config/toy_copy_ar.py --learning_rate=1e-3 --compile

Later arguments win. A config file holds plain assignments.
A mistake stops the run with one line.
"""

import dataclasses
import difflib
import math
import os
import runpy
import sys
from collections.abc import Callable

# Settings of earlier versions, and the remedy.
OLD_NAMES = {
    "beside": "is now --compare",
    "gradient_checkpointing": "is now --activation_checkpointing",
    "plan": "is now --estimate",
    "ramp_from": "is now --temperature_start",
    "ramp_to": "is now --temperature_end",
    "resume": "is now --init_from=resume",
    "settle_entropy": "is now --stop_entropy",
    "draft_steps": "is now --draft_tokens, with --draft=FOLDER",
}
REMOVED = (
    "against anchors anneal_form ar_loss_weight ar_weight beta1 beta2 block_length "
    "bucket import_cost keep lookahead mask_schedule matrices max_new_tokens "
    "mean_span min_lr_ratio muon_lr_ratio patience rate_exponent "
    "self_conditioning_prob span_density split"
)
OLD_NAMES |= dict.fromkeys(REMOVED.split(), "was removed; drop it")
BOOLEANS = {None: True, "true": True, "1": True, "false": False, "0": False}


def setting(default, help: str, choices: tuple = (), **limits):
    """Return a dataclass field that validate() checks.

    limits: minimum (default 0), maximum, above; zero_ok: or 0.
    Marks: path (~ is expanded), hidden (not settable by users),
    may_change (by a resumed run).
    """
    metadata = {"help": help, "choices": choices} | limits
    return dataclasses.field(default=default, metadata=metadata)


def group(cls: type):
    """Return a field that holds another dataclass."""
    return dataclasses.field(default_factory=cls, metadata={"group": cls})


def all_fields(*classes: type) -> dict[str, dataclasses.Field]:
    """Return all settings by name, those of groups too."""
    found = {}
    for cls in classes:
        for field in dataclasses.fields(cls):
            inner = field.metadata.get("group")
            found |= all_fields(inner) if inner else {field.name: field}
    return found


def require(holds, message: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not holds:
        raise ValueError(message)


def needs(settings: dict, reason: str, **wanted) -> None:
    """Check what a setting, `name` or `name=value`, needs."""
    name, _, value = reason.partition("=")
    applies = str(settings[name]) == value if value else settings[name]
    for other, value in wanted.items():
        got = settings[other]
        holds = not applies or got == value
        require(holds, f"{reason} needs {other}={value}, got {got}")


def validate(cfg) -> None:
    """Check all values. ValueError names setting and value."""
    for field in dataclasses.fields(cfg):
        if "group" in field.metadata:
            continue
        value = _check_type(getattr(cfg, field.name), field)
        _check_limits(value, field)
        if field.metadata.get("path"):
            value = os.path.expanduser(value)
        setattr(cfg, field.name, value)


def _check_type(value, field):
    # An int is accepted for a float, and returned as one.
    kind = type(field.default)
    if kind is float and type(value) is int:
        value = float(value)
    fits = type(value) is kind
    require(fits, f"{field.name} must be of type {kind.__name__}, got {value!r}")
    return value


def _check_limits(value, field) -> None:
    limits = field.metadata
    if options := limits["choices"]:
        known = ", ".join(options)
        require(value in options, f"{field.name} must be one of {known}; got {value!r}")
    zero_ok = limits.get("zero_ok", False)
    if isinstance(value, bool | str) or (zero_ok and value == 0):
        return
    whole = isinstance(value, int)
    minimum = limits.get("minimum", 0)
    above = limits.get("above", -math.inf)
    maximum = limits.get("maximum", 2**31 - 1 if whole else math.inf)
    rules = {
        "a finite number": whole or math.isfinite(value),
        f"above {above}": value > above,
        f"at least {minimum}": value >= minimum,
        f"at most {maximum}": value <= maximum,
    }
    for rule, holds in rules.items():
        zero = "0 or " if zero_ok else ""
        require(holds, f"{field.name} must be {zero}{rule}, got {value}")


def configure(cls: type, argv: list[str]):
    """Return a `cls` from config files and flags."""
    return build(cls, read_settings((cls,), argv))


def build(cls: type, values: dict):
    """Return a `cls` from a flat dict. Ignore other names."""
    parts = {}
    for field in dataclasses.fields(cls):
        if "group" in field.metadata:
            parts[field.name] = build(field.metadata["group"], values)
        elif field.name in values:
            parts[field.name] = values[field.name]
    return cls(**parts)


def flatten(cfg) -> dict:
    """Return all settings as one dict, those of groups too."""
    flat = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        flat |= flatten(value) if "group" in field.metadata else {field.name: value}
    return flat


def from_stored(cls: type, stored: dict, source: str):
    """Return a `cls` from the settings in a checkpoint."""
    fields = all_fields(cls)
    for name in stored:
        message = f"{source}: unknown setting {name!r}{suggest(name, fields)}"
        require(name in fields, message)
    return build(cls, stored)


def read_settings(classes, argv: list[str]) -> dict:
    """Return what files and flags set, as a flat dict.

    Types are checked here, limits when a class is built.
    """
    fields = user_fields(*classes)
    values = {}
    for arg in argv:
        if arg.startswith("--"):
            name, equals, text = arg[2:].partition("=")
            field = _known_field(name, fields, arg)
            values[name] = _parse(text if equals else None, field, arg)
        else:
            for name, value in _read_file(arg).items():
                values[name] = _check_type(value, _known_field(name, fields, arg))
    return values


def user_fields(*classes: type) -> dict[str, dataclasses.Field]:
    """Return the settings that are not hidden."""
    fields = all_fields(*classes)
    return {name: f for name, f in fields.items() if not f.metadata.get("hidden")}


def _known_field(name: str, fields: dict, arg: str) -> dataclasses.Field:
    if name in fields:
        return fields[name]
    require(name not in OLD_NAMES, f"{arg}: {name!r} {OLD_NAMES.get(name)}")
    hint = suggest(name, fields, "; see --help")
    raise ValueError(f"{arg}: unknown setting {name!r}{hint}")


def _read_file(path: str) -> dict:
    path = os.path.expanduser(path)
    is_file = os.path.exists(path) and not os.path.isdir(path)
    require(is_file, f"{path}: no such config file (settings are given as --key=value)")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    skipped = (type(os), type, Callable)  # by an import or a def
    public = {name: value for name, value in names.items() if name[0] != "_"}
    return {k: v for k, v in public.items() if not isinstance(v, skipped)}


def _parse(text: str | None, field, arg: str):
    kind = type(field.default)
    try:
        if kind is bool:
            return BOOLEANS[text and text.lower()]
        if text is not None:
            return kind(text)
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{arg}: expected --{field.name}=VALUE ({kind.__name__})")


def refuse_changes(given: dict, fixed: dict, context, hint="drop the setting", allowed=()):
    """Raise ValueError if a given setting differs from a fixed one."""
    for name, value in given.items():
        if name in fixed and name not in allowed and value != fixed[name]:
            reason = f"{context} {name}={fixed[name]}; {hint}"
            raise ValueError(f"cannot set {name}={value}: {reason}")


def suggest(name: str, known, otherwise="") -> str:
    """Return ", did you mean 'x'?" or the known names."""
    names = list(map(str, known))
    if close := difflib.get_close_matches(str(name), names, n=1):
        return f", did you mean {close[0]!r}?"
    return otherwise or f"; available: {', '.join(names)}"


def run(main: Callable[[list[str]], object], *classes: type) -> None:
    """Call main(sys.argv[1:]), or print the help of the classes."""
    from view.help import help_text
    from view.streams import secure_streams

    secure_streams()
    try:
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(sys.modules[main.__module__].__doc__, help_text(*classes), sep="\n")
        else:
            main(sys.argv[1:])
        sys.stdout.flush()  # here, so that a closed pipe is one line
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a fault of the program, not of what was typed
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(error: Exception) -> str:
    """Return the message of an error without line breaks."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    return "\\n".join(text.splitlines())
