"""How long a simulated worker takes for one gradient: laws of the delay.

With u uniform in (0, 1], z standard normal and mean m, the seconds of one clock are

    Constant    m                                                                       (1)
    Gamma       -m / k sum_{j=1..k} ln u_j,        standard deviation m / sqrt(k)       (2)
    LogNormal   m exp(s z - s^2 / 2),              s^2 = ln(1 + cv^2)                   (3)
    Pareto      m (a - 1) / a u^(-1/a),            P(x > y) falls as y^-a               (4)
    PerWorker   another law's times a factor of the worker                              (5)
    Fifo        m, the first clock of worker r: m (1 + r / depth)                       (6)

Each worker draws from a stream of its own, so that two methods with the same seed meet the same delays.
N workers that are always busy have a mean staleness of N - 1 under every law; laws differ in the spread.
Under (6) with N = depth it is N - 1 at every update, as in a pipeline.
Cost per step: k draws for (2), one or none for the others.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch

from sterna.server import require


class Delay(Protocol):
    """Seconds that a worker computes for one gradient."""

    def __call__(self, worker: int, clock: int, rng: torch.Generator) -> float:
        """Seconds of the clock number ``clock``, from 0, of ``worker``; draws from its ``rng``."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same for all, Eq. (1).

    Args:
        mean: seconds; > 0.
    """

    mean: float = 1.0

    def __post_init__(self) -> None:
        require.seconds(self, self.mean)

    def __call__(self, worker: int, clock: int, rng: torch.Generator) -> float:
        """``mean``."""
        return self.mean


@dataclass(frozen=True, kw_only=True)
class Gamma:
    """Jitter, Eq. (2): mild with shape 100, memoryless with shape 1.

    Args:
        mean: seconds; > 0.
        shape: k, >= 1; the coefficient of variation is 1 / sqrt(k).
    """

    mean: float = 1.0
    shape: int = 100

    def __post_init__(self) -> None:
        require.seconds(self, self.mean)
        require.count("Gamma", "shape", self.shape, 1, "100 is mild, 1 is memoryless.")

    def __call__(self, worker: int, clock: int, rng: torch.Generator) -> float:
        """One draw."""
        u = 1.0 - torch.rand(self.shape, dtype=torch.float64, generator=rng)
        return float(-u.log().mean()) * self.mean


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Now and then a slow one, Eq. (3).

    Args:
        mean: seconds; > 0.
        cv: coefficient of variation, standard deviation over mean; >= 0.
    """

    mean: float = 1.0
    cv: float = 0.5

    def __post_init__(self) -> None:
        require.seconds(self, self.mean)
        must = "at least 0"
        require.number("LogNormal", "cv", self.cv, lambda x: x >= 0, must, "0 does not vary.")

    def __call__(self, worker: int, clock: int, rng: torch.Generator) -> float:
        """One draw."""
        z = float(torch.randn((), dtype=torch.float64, generator=rng))
        variance = math.log1p(self.cv * self.cv)
        return self.mean * math.exp(math.sqrt(variance) * z - variance / 2)


@dataclass(frozen=True, kw_only=True)
class Pareto:
    """A heavy tail, Eq. (4).

    Args:
        mean: seconds; > 0.
        tail: a, > 1; up to 2 the variance is infinite.
    """

    mean: float = 1.0
    tail: float = 2.5

    def __post_init__(self) -> None:
        require.seconds(self, self.mean)
        must = "above 1"
        require.number("Pareto", "tail", self.tail, lambda x: x > 1, must, "Else there is no mean.")

    def __call__(self, worker: int, clock: int, rng: torch.Generator) -> float:
        """One draw."""
        u = 1.0 - float(torch.rand((), dtype=torch.float64, generator=rng))
        return float(self.mean * (self.tail - 1) / self.tail * u ** (-1 / self.tail))


@dataclass(frozen=True, kw_only=True)
class PerWorker:
    """Workers of unequal speed, Eq. (5).

    Args:
        factors: of the seconds of worker 0, 1, ...; > 0. Workers beyond them have factor 1.
        law: seconds at factor 1.

    Example:
        >>> straggler = PerWorker(factors=(4.0,), law=Constant())
        >>> [straggler(worker, 0, torch.Generator()) for worker in range(3)]
        [4.0, 1.0, 1.0]
    """

    factors: tuple[float, ...] = (4.0,)
    law: Delay = field(default_factory=Gamma)

    def __post_init__(self) -> None:
        require.all_positive(
            "PerWorker", "factors", self.factors, "(4.0,) makes worker 0 a straggler."
        )

    def __call__(self, worker: int, clock: int, rng: torch.Generator) -> float:
        """The law's seconds times the worker's factor."""
        factor = self.factors[worker] if worker < len(self.factors) else 1.0
        return factor * self.law(worker, clock, rng)


@dataclass(frozen=True, kw_only=True)
class Fifo:
    """A pipeline: pushes leave in turn at equal distances, Eq. (6).

    Args:
        depth: workers in the pipeline; >= 1.
        mean: seconds; > 0.
    """

    depth: int = 8
    mean: float = 1.0

    def __post_init__(self) -> None:
        require.count("Fifo", "depth", self.depth, 1, "Take the number of workers.")
        require.seconds(self, self.mean)

    def __call__(self, worker: int, clock: int, rng: torch.Generator) -> float:
        """``mean``; of the first clock, later by the place in the pipeline."""
        return self.mean * (1 + worker / self.depth) if clock == 0 else self.mean


EXAMPLES = (Constant(), Gamma(), Gamma(shape=1), LogNormal(), Pareto(), PerWorker(), Fifo())
