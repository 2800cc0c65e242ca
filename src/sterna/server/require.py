"""Refuse a hyperparameter that is not a number, or not in its range."""

import math
from collections.abc import Callable


def number(
    who: str, name: str, value: object, holds: Callable[[float], bool], must: str, way_out: str
) -> None:
    """Raise unless ``value`` is a finite number for which ``holds``.

    Args:
        who: class name.
        name: the parameter.
        value: what was received.
        holds: the range.
        must: the requirement in words, such as ``above 0``.
        way_out: a sentence.

    Raises:
        ValueError: it is not.
    """
    if not (isinstance(value, int | float) and math.isfinite(value) and holds(value)):
        raise ValueError(f"{who}: {name} must be {must}; got {value!r}. {way_out}")


def count(who: str, name: str, value: object, least: int, way_out: str) -> None:
    """Raise unless ``value`` is a whole number of at least ``least``.

    Args:
        who: class name.
        name: the parameter.
        value: what was received.
        least: the smallest that is allowed.
        way_out: a sentence.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{who}: {name} must be a whole number of at least {least}; got {value!r}. {way_out}"
        )


def seconds(law: object, mean: object) -> None:
    """Raise unless the mean of a delay law is a finite number above 0.

    Raises:
        ValueError: it is not.
    """
    number(type(law).__name__, "mean", mean, lambda x: x > 0, "above 0", "It is in seconds.")


def all_positive(who: str, name: str, values: object, way_out: str) -> None:
    """Raise unless ``values`` is a tuple of finite numbers above 0.

    Args:
        who: class name.
        name: the parameter.
        values: what was received.
        way_out: a sentence.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(values, tuple):
        raise ValueError(f"{who}: {name} must be a tuple of numbers; got {values!r}. {way_out}")
    for value in values:
        number(who, name, value, lambda x: x > 0, "numbers above 0", way_out)
