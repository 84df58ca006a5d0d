"""Checks at the boundary: one error type, one style.

A `UserError` is what the user can fix: a config, a file, the data. Its message is one line that says what is wrong, where it was
looked for and what to do. The command line prints it as `error: ...` and exits with status 2; in Python it is a `ValueError`.
"""

import math
import numbers
import sys
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """An error that the user can fix; the message is a single line of at most about 1,200 characters."""

    def __init__(self, message: str):
        # A lone surrogate in a foreign name could not be printed.
        line = " ".join(str(message).encode(errors="backslashreplace").decode().split())
        # The end says what to do; what a foreign file or library says may be of any length.
        super().__init__(line if len(line) <= 1200 else f"{line[:800]} ... {line[-395:]}")


class Diverged(UserError):
    """A loss or score of a model is not finite, on every process alike. Other runs of a sweep continue."""


class Preempted(Exception):
    """The process was asked to stop; its work is saved, and the same command continues from there."""


def nearest_names(name: str, choices: Iterable[str], count: int = 3, cutoff: float = 0.5) -> list[str]:
    """Returns up to `count` of `choices` that look like `name`, best first; `cutoff` is the least similarity, at most 1."""
    from difflib import get_close_matches  # here, because --help does without it

    return get_close_matches(str(name), [str(choice) for choice in choices], n=count, cutoff=cutoff)


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Returns `; did you mean 'x'?` for the choice nearest to `name`, else the empty string."""
    near = nearest_names(name, choices, count=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(names: Sequence, most: int = 8) -> str:
    """Returns the first `most` names in words, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def figures(value: float) -> str:
    """Returns a loss in words: three significant digits, and from 1,000 on whole numbers."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def check(condition: bool, message: str) -> None:
    """Raises `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def check_choice(field: str, value: str, choices: Iterable[str]) -> None:
    """Raises `UserError`, with the nearest right name, unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(choice or "'' (none)" for choice in choices)
        raise UserError(f"{field} is {value!r}; choose one of {listed}{suggestion(value, choices)}")


def check_int(field: str, value, minimum: int = 1, maximum: int | None = None) -> None:
    """Raises `UserError` unless `value` is an integer in [minimum, maximum]."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)  # NumPy's too
    if not whole or value < minimum or (maximum is not None and value > maximum):
        upper = "" if maximum is None else f" and at most {maximum}"
        raise UserError(f"{field} is {value!r}; it must be a whole number of at least {minimum}{upper}")


def check_number(field: str, value, minimum: float = -math.inf, maximum: float = math.inf, *, above: bool = False) -> None:
    """Raises `UserError` unless `value` is a finite number in [minimum, maximum], or (minimum, maximum] if `above`."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    low = number and -sys.float_info.max <= value and (value > minimum if above else value >= minimum)
    if not (low and value <= min(maximum, sys.float_info.max)):
        raise UserError(f"{field} is {value!r}; it must be a number in {'(' if above else '['}{minimum}, {maximum}]")
