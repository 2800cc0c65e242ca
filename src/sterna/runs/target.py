"""Time to a target: the seconds of training after which a run's test accuracy was first high enough."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sterna.data.merit import ACCURACY, Merit
from sterna.runs.files import StoreError, read_json, read_rows

KEY = "seconds_to_target"
"""Under which a summary in ``compare.json`` holds it; null where it was never reached."""


def require_target(value: float) -> float:
    """The target accuracy itself.

    Raises:
        ValueError: it is no fraction in [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(
            f"target_accuracy must be a fraction in [0, 1], got {value!r}; 0.95 means 95 %"
        )
    return float(value)


def require_judged_by_accuracy(experiment: str, merit: Merit) -> None:
    """Nothing, where there is a target accuracy.

    Raises:
        ValueError: the experiment is judged by something else.
    """
    if merit != ACCURACY:
        raise ValueError(
            f"target_accuracy is for runs that are judged by accuracy; {experiment} is judged by "
            f"{merit.name}. Leave the target out, or compare without {experiment}."
        )


def seconds_to_target(folder: Path, target_accuracy: float) -> float | None:
    """After how many seconds a run reached the target; None where it never did.

    Args:
        folder: a run folder.
        target_accuracy: fraction in [0, 1].

    Raises:
        ValueError: the target is out of range.
        StoreError: ``metrics.jsonl`` cannot be read, or an evaluation is damaged.
    """
    path = folder / "metrics.jsonl"
    evaluations = [row for row in read_rows(path) if row.get("kind") == "eval"]
    return first_reached(evaluations, target_accuracy, path)


def first_reached(
    evaluations: Sequence[Mapping[str, Any]], target_accuracy: float, path: Path
) -> float | None:
    """`seconds_to_target` of evaluations that have been read from ``path``. Raises what it raises.

    Example:
        >>> rows = [{"accuracy": 0.5, "seconds": 1.0}, {"accuracy": 0.9, "seconds": 2.0}]
        >>> first_reached(rows, 0.8, Path("metrics.jsonl"))
        2.0
    """
    target = require_target(target_accuracy)
    for row in evaluations:
        accuracy = row.get("accuracy")
        if accuracy is None:
            continue
        if _number(path, row, "accuracy") >= target:
            return _number(path, row, "seconds")
    return None


def stored_target(folders: Sequence[Path]) -> float | None:
    """The target of the first comparison folder that has one.

    Raises:
        StoreError: a ``compare.json`` cannot be read, or its target is no fraction.
    """
    for folder in folders:
        path = folder / "compare.json"
        if path.exists():
            found = read_json(path, "a comparison folder").get("target_accuracy")
            if found is not None:
                try:
                    return require_target(found)
                except ValueError as error:
                    raise StoreError(f"{path}: {error}. Run `sterna compare` again.") from error
    return None


def _number(path: Path, row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise StoreError(
            f"{path}: the evaluation at step {row.get('step')} is damaged: {key} must be a number, got "
            f"{value!r}. Run the experiment again."
        )
    return float(value)
