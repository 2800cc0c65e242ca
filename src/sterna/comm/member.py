"""A worker whose group can be formed anew, and what it keeps for that.

When a worker is lost, the group is broken for all. The others leave it, meet in a new one with the lost
worker's replacement (`sterna.comm.launch` says how), and everybody goes back to the newest state that
fits together. For that each worker keeps its own state as it goes, in memory that outlives it
(`sterna.comm.kept`), under a clock: the number of collectives that it has completed.

Workers that hold the same clock fit together, whatever step each has come to: none has heard anything
that another has not yet said. A worker that keeps at fixed steps, and completes a collective only when
all have entered it, is at most one kept clock ahead; so of the two newest clocks one is common to all.

    worker 0    keep 7 . collective 8 . keep 8 . (waits in 9)           goes back to 7, or
    worker 1    keep 7 . (killed in 8)                                  where both have kept 8, to 8

What is done again is done with the same bits: the same weights, residuals, generators and sampler
positions, on the lost worker too. Between two averages of local steps, where replicas differ, each
worker, the replacement included, goes on from its own latest steps.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sterna.comm.distributed import Distributed
from sterna.comm.kept import Kept
from sterna.seams import Message, PeerLost


class Member(Distributed):
    """One worker's end of a group that `launch` formed; the transport that its workers are given.

    Example:
        >>> def worker(comm: Member) -> float:
        ...     weights, step = torch.zeros(3), 0
        ...     kept = comm.recall()
        ...     if kept is not None:
        ...         weights, step = kept[0]["weights"], int(kept[1])
        ...     while step < 100:
        ...         weights += comm.sum_(torch.ones(3))
        ...         step += 1
        ...         comm.keep({"weights": weights}, str(step))
        ...     return weights.sum().item()

        Run as ``launch(worker, workers=4, max_restarts=3)`` from an importable module, it gives 1200.0
        whoever is killed on the way, three times at most.
    """

    clock = 0
    """Collectives completed; the same on all workers at the same point of the program."""
    kept: Kept | None = None

    @classmethod
    def join(
        cls, rank: int, size: int, store: Path, timeout_s: float, kept: Kept | None = None
    ) -> "Member":
        """Meet the others through the file ``store``.

        Raises:
            PeerLost: they did not come.
        """
        try:
            Distributed.connect(rank, size, store, timeout_s)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise PeerLost(f"rank {rank} could not meet the other workers: {reason}") from error
        comm = cls()
        comm.kept = kept
        return comm

    @property
    def keeps(self) -> bool:
        """Whether a lost worker would be replaced, so that keeping state is worth its cost."""
        return self.kept is not None

    def keep(self, tensors: Mapping[str, Tensor], text: str = "") -> None:
        """Keep this worker's state of now; nothing happens where no worker would be replaced.

        All workers must keep at the same points of the program, and after every collective that changes
        what they would do again.

        Raises:
            OSError: there is no memory left for it.
        """
        if self.kept is not None:
            self.kept.write(self.clock, tensors, text)

    def recall(self) -> tuple[dict[str, Tensor], str] | None:
        """What this worker kept last that fits what the others kept, or None; all must call it.

        None on a first start, and where a worker was lost before it had kept anything.
        """
        if self.kept is None:
            return None
        held = self.kept.clocks()
        offer = torch.tensor([-1, -1, *held][-2:])
        with self.ledger.paused():
            gathered = self.gather(Message({"clocks": offer}))
        offers = [set(message.buffers["clocks"].tolist()) - {-1} for message in gathered]
        common = set.intersection(*offers)
        newest = max(common, default=-1)
        # What is later comes to pass once more, or not at all. What is earlier fits nobody who does not
        # hold it; beside it the newest would be replaced where it lies, and be lost with its writer.
        self.kept.forget_others(newest)
        if not common:
            return None
        self.clock = newest
        return self.kept.read(self.clock)

    @contextmanager
    def _collective(self, call: str) -> Iterator[None]:
        with super()._collective(call):
            yield
        self.clock += 1
