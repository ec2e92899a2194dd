"""Random inputs, seeded, so that a failure comes back."""

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import one_line


def repeat(n: int, check: Callable, *strategies) -> None:
    """Run check(*drawn) n times."""
    quiet = dict(suppress_health_check=list(HealthCheck), deadline=None, database=None)
    settings(max_examples=n, derandomize=True, **quiet)(given(*strategies)(check))()


def few_or_many(few: int, many: int):
    """Mark a test that takes n, the number of cases. Many take long."""
    slow = pytest.param(many, marks=[pytest.mark.slow, pytest.mark.long])
    return pytest.mark.parametrize("n", [few, slow])


def anything(numbers=st.integers()):  # noqa: B008
    """Values of JSON: plain ones, lists and dicts."""
    return st.recursive(
        st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=4,
    )


def error_of(function: Callable, *args) -> str:
    """Return the message of a ValueError or OSError, in one line, or "" if there was none."""
    try:
        function(*args)
    except (ValueError, OSError) as error:
        message = one_line(error)
        assert message and "\n" not in message, args
        return message
    return ""
