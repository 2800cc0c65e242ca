"""Who may go on: never wait, wait for stragglers a little, or wait for all.

A worker's clock c_i is the number of gradients that it has pushed. Having pushed, worker i may read the
weights and begin its next clock if

    Async:   always                                                                     (1)
    Ssp:     c_i - min_j c_j <= s                                                       (2)
    Bsp:     c_i - min_j c_j <= 0                                                       (3)

Symbols: s slack, c clocks of the living workers. Under (2) no two clocks ever differ by more than s + 1,
and a worker that begins clock c + 1 reads weights that hold all pushes of clocks up to c - s.
Reference: Q. Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter
    Server", NIPS 2013; J. Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012 (never wait).
Differs from the paper: workers cache nothing, each reads all weights anew at every clock. With (3) the
    gradients of a clock are still applied one by one, at a mean staleness of (N - 1) / 2 with N workers;
    one step on their mean is `sterna.exchange.all_reduce.AllReduce`.
Cost per step: the smallest of N numbers. A slack hides jitter; a worker that is slow for good holds back
    all others sooner or later, whatever the slack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sterna.server import require


@dataclass(frozen=True, kw_only=True)
class Async:
    """Never wait, Eq. (1).

    Example:
        >>> Async().admits([9, 0], 0)
        True
    """

    def admits(self, clocks: Sequence[int], worker: int) -> bool:
        """Yes."""
        return True


@dataclass(frozen=True, kw_only=True)
class Ssp:
    """Stale synchronous parallel: wait for those who are more than ``slack`` clocks behind, Eq. (2).

    Args:
        slack: s, clocks; >= 0. 0 is `Bsp`.

    Raises:
        ValueError: ``slack`` is out of range.

    Example:
        >>> [Ssp(slack=2).admits([clock, 5], 0) for clock in (5, 7, 8)]
        [True, True, False]
    """

    slack: int = 3

    def __post_init__(self) -> None:
        require.count("Ssp", "slack", self.slack, 0, "Async() never waits; Bsp() waits for all.")

    def admits(self, clocks: Sequence[int], worker: int) -> bool:
        """Whether the slowest is at most ``slack`` clocks behind."""
        return clocks[worker] - min(clocks) <= self.slack


@dataclass(frozen=True, kw_only=True)
class Bsp:
    """Bulk synchronous parallel: begin a clock when all have ended the last, Eq. (3).

    Example:
        >>> Bsp().admits([5, 5], 0), Bsp().admits([5, 4], 0)
        (True, False)
    """

    def admits(self, clocks: Sequence[int], worker: int) -> bool:
        """Whether no worker is behind."""
        return clocks[worker] <= min(clocks)


EXAMPLES = (Async(), Ssp(), Ssp(slack=0), Ssp(slack=1), Bsp())
