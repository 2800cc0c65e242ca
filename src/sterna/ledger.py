"""What was spent: one ledger per worker, the same for every way of training.

Bits and messages are counted where buffers are handed to the transport, on the packed buffers as they
leave. A collective's traffic follows from the algorithm that the transport runs (``comm`` says which);
the kernel's own counters agree within the framing overhead stated in ``docs/design.md``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Totals of one worker, or of several (see `total`).

    Args:
        steps: optimizer steps.
        examples: examples whose gradient was computed.
        bits_sent: bits handed to the transport.
        bits_received: bits taken from it.
        messages: point-to-point messages sent.
        compute_s: seconds computing (forward, backward, codec, update).
        wait_s: seconds inside collectives: transfer and waiting for the others.
        peak_activation_bytes: largest total size of the tensors that autograd kept for one backward pass.
        peak_memory_bytes: largest resident set of the process (or allocated device memory).
        staleness_sum: sum over updates of the number of foreign updates between read and write.
        staleness_max: the largest of them.
    """

    steps: int = 0
    examples: int = 0
    bits_sent: int = 0
    bits_received: int = 0
    messages: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    peak_activation_bytes: int = 0
    peak_memory_bytes: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0

    def __str__(self) -> str:
        """What was spent, without the zeros: one may stand for what nobody measured, as in a DDP loop.

        Example:
            >>> str(Spent(steps=2, bits_sent=640, wait_s=0.25))
            'steps=2, bits_sent=640, wait_s=0.25'
        """
        return ", ".join(f"{name}={value}" for name, value in asdict(self).items() if value)


_LARGEST = ("peak_activation_bytes", "peak_memory_bytes", "staleness_max")


def total(workers: Sequence[Spent]) -> Spent:
    """Sum over workers; of peaks and ``staleness_max`` the largest; ``steps`` of the busiest worker."""
    figures = {}
    for field in fields(Spent):
        values = [getattr(worker, field.name) for worker in workers]
        combine = max if field.name in (*_LARGEST, "steps") else sum
        figures[field.name] = combine(values)
    return Spent(**figures)


class Ledger:
    """A running account. The transport and the loop write to it; `spent` reads it.

    Example:
        >>> ledger = Ledger()
        >>> ledger.add(bits_sent=64, messages=2)
        >>> with ledger.paused():
        ...     ledger.add(bits_sent=1_000_000)
        >>> ledger.spent().bits_sent
        64
    """

    def __init__(self, spent: Spent | None = None) -> None:
        self._spent = asdict(spent or Spent())
        self._paused = False

    def add(self, **amounts: float) -> None:
        """Add to counters; peaks keep the larger value. Does nothing while paused."""
        if self._paused:
            return
        for name, amount in amounts.items():
            if name in _LARGEST:
                self._spent[name] = max(self._spent[name], amount)
            else:
                self._spent[name] += amount

    @property
    def wait_s(self) -> float:
        """Seconds in collectives so far."""
        return float(self._spent["wait_s"])

    def spent(self) -> Spent:
        """The totals so far."""
        return Spent(**self._spent)

    def reset(self, spent: Spent) -> None:
        """Go on from the totals of a checkpoint."""
        self._spent = asdict(spent)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside the block out of the account (evaluation, checkpoints)."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
