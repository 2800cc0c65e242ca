"""Curves over training: one per experiment, the mean over its seeds with the range they span.

Seeds are averaged step by step, so a point of the mean has one step, the mean of the seconds and
the mean of the bits. Training losses, one per step, are smoothed by a centred window mean and
thinned out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.runs.reading import Finished, Row

AXES = ("step", "seconds", "bits")
POINTS = 300
"""No curve has more points."""

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One experiment's line.

    Args:
        name: the experiment.
        place: its place among the experiments, which decides colour, dash and marker.
        x: for each of `AXES`, where the points lie.
        mean: mean over the seeds; NaN where one of them is not finite.
        low: smallest over the seeds.
        high: largest over the seeds.
        num_seeds: over how many seeds.
        window: steps per window of the smoothing, 1 where there is none.
    """

    name: str
    place: int
    x: Mapping[str, Values]
    mean: Values
    low: Values
    high: Values
    num_seeds: int
    window: int = 1


def score_curves(runs: Sequence[Finished], key: str) -> list[Curve]:
    """Test figure ``key`` (accuracy, loss, ...) at each evaluation."""
    curves = []
    for place, (name, group) in enumerate(_groups(runs).items()):
        lines = []
        for run in group:
            if any(row.get(key) is not None for row in run.evaluations):
                x = {axis: _column(run.evaluations, axis) for axis in ("step", "seconds")}
                x["bits"] = _column(run.evaluations, "bits_sent")
                lines.append((x, _column(run.evaluations, key)))
        if lines:
            curves.append(_curve(name, place, lines))
    return curves


def loss_curves(runs: Sequence[Finished]) -> list[Curve]:
    """Training loss, smoothed; bits between two evaluations are interpolated."""
    curves = []
    for place, (name, group) in enumerate(_groups(runs).items()):
        lines = []
        group = [run for run in group if any(row.get("loss") is not None for row in run.steps)]
        window = max([1, *(len(run.steps) // 40 for run in group)])
        for run in group:
            x = {axis: _column(run.steps, axis) for axis in ("step", "seconds")}
            known = _column(run.evaluations, "step"), _column(run.evaluations, "bits_sent")
            x["bits"] = (
                np.interp(x["step"], *known, left=np.nan, right=np.nan)
                if len(run.evaluations)
                else np.full_like(x["step"], np.nan)
            )
            lines.append((x, smooth(_column(run.steps, "loss"), window)))
        if lines:
            curves.append(_curve(name, place, lines, window))
    return curves


def smooth(values: Values, window: int) -> Values:
    """Mean over ``window`` neighbours on centre, fewer at the ends; NaN spreads over its windows.

    Example:
        >>> smooth(np.array([1.0, 2.0, 3.0, 8.0]), 3).round(2).tolist()
        [1.5, 2.0, 4.33, 5.5]
    """
    if window <= 1:
        return values
    kernel = np.ones(min(window, len(values)))
    counts = np.convolve(np.ones_like(values), kernel, mode="same")
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    spoilt = np.convolve((~finite).astype(np.float64), kernel, mode="same") > 0.5
    result: Values = np.where(spoilt, np.nan, sums / counts)
    return result


def thin(num: int, most: int = POINTS) -> NDArray[np.intp]:
    """Which of ``num`` points stay: all, or ``most`` evenly spread with both ends."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(np.intp))


def _groups(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(run.experiment, []).append(run)
    return groups


def _column(rows: Sequence[Row], key: str) -> Values:
    values = [row.get(key) for row in rows]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _curve(
    name: str, place: int, lines: Sequence[tuple[Mapping[str, Values], Values]], window: int = 1
) -> Curve:
    """Put the seeds on common steps: all steps within the range that every seed covers."""
    first = max(x["step"][0] for x, _ in lines)
    last = min(x["step"][-1] for x, _ in lines)
    steps = np.unique(np.concatenate([x["step"] for x, _ in lines]))
    steps = steps[(steps >= first) & (steps <= last)]
    steps = steps[thin(len(steps))] if len(steps) else steps
    ys = np.stack([np.interp(steps, x["step"], y) for x, y in lines])
    others = {
        axis: np.mean([np.interp(steps, x["step"], x[axis]) for x, _ in lines], axis=0)
        for axis in ("seconds", "bits")
    }
    return Curve(
        name=name,
        place=place,
        x={"step": steps, **others},
        mean=ys.mean(axis=0),
        low=ys.min(axis=0),
        high=ys.max(axis=0),
        num_seeds=len(lines),
        window=window,
    )
