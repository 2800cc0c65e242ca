"""From values to places on a chart, and where the ticks go."""

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear or logarithmic axis.

    Args:
        low: value at ``start``.
        high: value at ``end``.
        start: place of ``low``, in the units of the drawing.
        end: place of ``high``.
        log: whether equal ratios take equal room.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; it may lie beyond the ends."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def shows(self, value: float) -> bool:
        """Whether the value has a place: finite, and positive on a logarithmic axis."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self) -> list[float]:
        """Round values within the axis, about five."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def decades(values: Iterable[float]) -> float:
    """How many powers of ten the positive finite values span."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    return math.log10(max(positive) / min(positive)) if positive else 0.0


def around(
    values: Iterable[float], *, log: bool = False, zero: bool = False
) -> tuple[float, float]:
    """Ends of an axis that holds the finite values (on a log axis the positive ones) and some air.

    Args:
        values: what is to be shown.
        log: for a logarithmic axis.
        zero: start at zero and end at the largest value.

    Example:
        >>> around([0.5, 1.0], zero=True)
        (0.0, 1.0)
    """
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not known:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        air = max((high / low) ** 0.03, 1.05)
        return low / air, high * air
    if zero:
        return 0.0, high if high > 0 else 1.0
    air = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-9)
    return low - air, high + air


def from_tick(low: float, high: float) -> float:
    """Where a linear axis starts so that a label says where: at the tick below; at or below zero, there.

    Example:
        >>> from_tick(67.2, 96.0), from_tick(-0.1, 2.0)
        (65.0, -0.1)
    """
    for _ in range(4):  # a longer axis may have wider steps
        step = _step(low, high)
        low = _multiple(math.floor(low / step + 1e-9), step) if low > 0 else low
    return low


def _step(low: float, high: float, about: int = 5) -> float:
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= 0.7 * rough)


def _multiple(count: int, step: float) -> float:
    return round(count * step, 12 - math.floor(math.log10(step)))


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [_multiple(i, step) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    whole = [10.0**i for i in range(first, last + 1, stride) if low <= 10.0**i <= high]
    if len(whole) >= 3:
        return whole
    finer = [d * 10.0**i for i in range(first, last + 1) for d in (1, 2, 5)]
    return [tick for tick in finer if low <= tick <= high]
