"""Settings for people: what --help prints, and which ones a run changed."""

from configurator import all_fields, flatten, user_fields


def help_text(*classes: type) -> str:
    """Return a line for each setting: default, meaning, choices. Later classes have a title."""
    lines = []
    for cls in classes:
        if cls is not classes[0]:
            lines.append(cls.__doc__.splitlines()[0])
        for name, field in user_fields(cls).items():
            choices = " | ".join(field.metadata["choices"])
            choices = f" ({choices})" if choices else ""
            default = f"--{name}={field.default}"
            lines.append(f"  {default:<40} {field.metadata['help']}{choices}")
    return "\n".join(lines)


def describe(cfg) -> str:
    """Return the flags that differ from the defaults."""
    fields = all_fields(type(cfg))
    flat = flatten(cfg).items()
    changed = [f"--{k}={v}" for k, v in flat if v != fields[k].default]
    return " ".join(changed) or "(all defaults)"
