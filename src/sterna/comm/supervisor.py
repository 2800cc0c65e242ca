"""The launcher's side of a group of worker processes: who works, who is lost, who is replaced.

What passes through each worker's pipe: from the worker `Joined` when it has met the others, `Lost` when
it has lost contact with one and waits, `Outcome` when it has ended; to a worker that waits the path of
the file through which all meet next.
"""

import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_GRACE_S = 3.0
_BUSY_S = 30.0
"""How long a worker that computes may take to notice that another has died."""
_SILENT_S = 10.0
"""How long a worker may be silent after the collectives of the others have run out of time."""
_HEAR_ALL_S = 1.0
"""Peers of a dead worker fail too, a moment later or earlier: hear them all before giving up."""


class WorkerFailed(RuntimeError):
    """A worker process died or raised; the message names its rank and the reason.

    Args:
        message: rank and reason, in one sentence.
        details: the worker's traceback, where there is one.
        lost: the worker died or stopped answering, rather than raised an error of its own.
    """

    def __init__(self, message: str, details: str = "", lost: bool = False) -> None:
        super().__init__(message)
        self.details = details
        self.lost = lost


@dataclass(frozen=True)
class Joined:
    """It has met the others."""


@dataclass(frozen=True)
class Lost:
    """It has lost contact with another worker, has left the group, and waits to meet again."""

    reason: str


@dataclass(frozen=True)
class Outcome:
    """How a worker ended: with a ``result`` or an ``error`` of its own."""

    result: Any = None
    error: str | None = None
    details: str = ""


class _Phase(Enum):
    JOINING = auto()
    WORKING = auto()
    WAITING = auto()  # it lost contact
    ENDED = auto()
    DEAD = auto()


@dataclass
class _Seat:
    """One rank: the process that has it now."""

    rank: int
    process: ForkServerProcess
    pipe: Connection
    phase: _Phase = _Phase.JOINING
    reason: str = ""
    result: Any = None

    def hear(self) -> None:
        """Take in what the worker says, or that it has died.

        Raises:
            WorkerFailed: it raised an error of its own, which would only come again.
        """
        try:
            received = self.pipe.recv_bytes()
        except (EOFError, OSError):
            self.phase, self.reason = _Phase.DEAD, self._cause_of_death()
            return
        said: Joined | Lost | Outcome = pickle.loads(received)  # noqa: S301, TID251  from our own child
        if isinstance(said, Joined):
            self.phase = _Phase.WORKING
        elif isinstance(said, Lost):
            self.phase, self.reason = _Phase.WAITING, said.reason
        elif said.error is not None:
            raise WorkerFailed(f"rank {self.rank}: {said.error}", said.details)
        else:
            self.phase, self.result = _Phase.ENDED, said.result

    def _cause_of_death(self) -> str:
        self.process.join(_GRACE_S)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"the process was killed by {signal.Signals(-code).name}"
        return f"the process ended without a result (exit code {code})"


Start = Callable[[int, Path], tuple[ForkServerProcess, Connection]]


class Supervisor:
    """Starts the workers of one launch, watches them, and replaces those that are lost.

    Args:
        start: starts a process for a rank, which meets the others through a path; gives it and its pipe.
        size: number of workers.
        folder: where the workers may meet.
        timeout_s: seconds after which a collective without an answer fails.
    """

    def __init__(self, start: Start, size: int, folder: Path, timeout_s: float) -> None:
        self._start, self._folder, self._timeout_s = start, folder, timeout_s
        self._meetings = 0
        self._seats: list[_Seat] = []
        self._size = size

    def run(self, max_restarts: int, on_restart: Callable[[str], None] | None) -> Any:
        """Rank 0's result.

        Raises:
            WorkerFailed: a worker raised an error of its own, or was lost and no restart is left.
        """
        store = self._meeting()
        for rank in range(self._size):
            self._seats.append(_Seat(rank, *self._start(rank, store)))
        for restarts in range(max_restarts + 1):
            last = restarts == max_restarts
            if self._all_end(last):
                break
            if last:
                raise WorkerFailed(self._loss(), lost=True)
            if on_restart is not None:
                on_restart(self._loss())
            self._replace()
        return self._seats[0].result

    def _meeting(self) -> Path:
        self._meetings += 1
        return self._folder / f"store-{self._meetings}"

    def _all_end(self, last: bool) -> bool:
        """Watch until all have ended well, or until a loss is complete: all have been heard of.

        Args:
            last: nobody would be replaced, so nobody need be waited for.
        """
        begun: float | None = None
        while open_ := [s for s in self._seats if s.phase in (_Phase.JOINING, _Phase.WORKING)]:
            left = None if begun is None else min(self._deadline(s, begun, last) for s in open_)
            patience = None if left is None else max(left - time.monotonic(), 0.0)
            ready = connection.wait([seat.pipe for seat in open_], patience)
            for seat in open_:
                if seat.pipe in ready:
                    seat.hear()
            if begun is None and self._of(_Phase.WAITING, _Phase.DEAD):
                begun = time.monotonic()
            if not ready and begun is not None:
                if last:
                    return False
                self._give_up_silent(begun)
        return begun is None

    def _deadline(self, seat: _Seat, begun: float, last: bool) -> float:
        """Until when to wait for a worker to say that it has noticed."""
        if last:
            return begun + _HEAR_ALL_S
        if seat.phase is _Phase.JOINING:
            return begun + _GRACE_S  # nobody tells it that another has died
        most = _BUSY_S if self._of(_Phase.DEAD) else _SILENT_S
        return begun + max(min(self._timeout_s, most), _GRACE_S)

    def _give_up_silent(self, begun: float) -> None:
        now = time.monotonic()
        silent = [
            seat
            for seat in self._of(_Phase.JOINING, _Phase.WORKING)
            if self._deadline(seat, begun, last=False) <= now
        ]
        for seat in silent:  # what it kept outlives it
            seat.process.kill()
            seat.phase, seat.reason = _Phase.DEAD, "the process did not answer"

    def _of(self, *phases: _Phase) -> list[_Seat]:
        return [seat for seat in self._seats if seat.phase in phases]

    def _loss(self) -> str:
        """Who was lost and why; or who noticed, where nobody died."""
        found = self._of(_Phase.DEAD) or self._of(_Phase.WAITING)[:1]
        return "; ".join(f"rank {seat.rank}: {seat.reason}" for seat in found)

    def _replace(self) -> None:
        """Let all meet anew: replacements for who is not there, and who waits."""
        store = self._meeting()
        for k, seat in enumerate(self._seats):
            if seat.phase is _Phase.WAITING:
                try:
                    seat.pipe.send_bytes(str(store).encode())
                    seat.phase = _Phase.JOINING
                    continue
                except OSError:  # it has died while it waited
                    pass
            seat.process.kill()  # who has ended well is needed again, and goes on from what it kept
            seat.process.join()
            self._seats[k] = _Seat(seat.rank, *self._start(seat.rank, store))
            seat.process.close()  # not before: where nobody can be started, `stop` ends all seats
            seat.pipe.close()

    def stop(self) -> None:
        """End all processes; those that do not end when asked are killed."""
        processes = [seat.process for seat in self._seats]
        for process in processes:
            if process.is_alive():
                process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.0))
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        for seat in self._seats:
            seat.pipe.close()
