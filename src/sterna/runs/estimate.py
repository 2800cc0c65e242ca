"""Means over seeds, with the interval and the test of Student's distribution.

Over n seeds a figure has the mean m, the standard deviation s (n - 1 in the denominator) and the
interval m +- t s / sqrt(n), where t is the quantile of Student's distribution with n - 1 degrees of
freedom (Student, "The probable error of a mean", Biometrika, 1908). One seed gives no interval.
Equal values give an interval of width nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtr, stdtrit


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: the mean of the finite values.
        low: lower end of the confidence interval; None where there is one value only.
        high: upper end of it.
        num: how many values.
    """

    mean: float
    low: float | None
    high: float | None
    num: int

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """This experiment minus the baseline, paired by seed.

    Args:
        p_value: two-sided paired t-test; 1 where all differences are zero, None where there is one
            seed only or all differences are the same number, for which the test has no answer.
    """

    p_value: float | None

    @property
    def shown(self) -> bool:
        """Whether the interval leaves zero out, so that the seeds show a difference."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate | None:
    """Mean and confidence interval; None for no values.

    Example:
        >>> round(estimate([1.0, 2.0, 3.0]).half_width, 3)
        2.484
        >>> estimate([2.0])
        Estimate(mean=2.0, low=None, high=None, num=1)
    """
    if not values:
        return None
    mean, deviation = _moments(values)
    if len(values) == 1:
        return Estimate(mean=mean, low=None, high=None, num=1)
    quantile = float(stdtrit(len(values) - 1, (1 + confidence) / 2))
    half = quantile * deviation / math.sqrt(len(values))
    return Estimate(mean=mean, low=mean - half, high=mean + half, num=len(values))


def paired(differences: Sequence[float], confidence: float = 0.95) -> Difference | None:
    """Mean difference, interval and p-value of the paired t-test; None for no pairs."""
    mean = estimate(differences, confidence)
    if mean is None:
        return None
    deviation = _moments(differences)[1]
    if mean.num == 1:
        p_value = None
    elif deviation == 0:
        p_value = 1.0 if mean.mean == 0 else None
    else:
        t = abs(mean.mean) / (deviation / math.sqrt(mean.num))
        p_value = 2 * float(stdtr(mean.num - 1, -t))
    return Difference(mean=mean.mean, low=mean.low, high=mean.high, num=mean.num, p_value=p_value)


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; differences below the rounding of the values count as none."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1 or max(values) - min(values) <= 1e-12 * max(map(abs, values)):
        return mean, 0.0
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))
