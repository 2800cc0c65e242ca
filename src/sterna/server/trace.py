"""Replay recorded delays, so that a run can be repeated under other rules or on other hardware.

    seconds of worker r's clock c = what was recorded                                   (1)

The record of a simulated run is ``compute_s`` of its `sterna.server.virtual.Update` records, by worker.
Cost per step: a look-up.
"""

from dataclasses import dataclass

import torch

from sterna.server import require


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Recorded seconds, Eq. (1).

    Args:
        seconds: one tuple a worker, of the seconds of its clocks; > 0.

    Raises:
        ValueError: it is not such a tuple.

    Example:
        >>> Trace(seconds=((1.0, 2.0), (3.0,)))(0, 1, torch.Generator())
        2.0
    """

    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        way_out = "Write one tuple of seconds for each worker."
        if not isinstance(self.seconds, tuple):
            raise ValueError(f"Trace: seconds must be a tuple; got {self.seconds!r}. {way_out}")
        for own in self.seconds:
            require.all_positive("Trace", "seconds", own, way_out)

    def __call__(self, worker: int, clock: int, rng: torch.Generator) -> float:
        """What was recorded.

        Raises:
            ValueError: the worker or the clock was not recorded.
        """
        if worker >= len(self.seconds) or clock >= len(self.seconds[worker]):
            raise ValueError(
                f"Trace: seconds must hold clock {clock} of worker {worker}; got {len(self.seconds)} "
                f"workers with {[len(own) for own in self.seconds][:8]} clocks. Record a longer run."
            )
        return self.seconds[worker][clock]


EXAMPLES = (Trace(seconds=((1.0, 2.0), (3.0,))),)
