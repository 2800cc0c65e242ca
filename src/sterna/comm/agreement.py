"""Do all workers mean the same thing? Found out before the first step, with the ranks named."""

import hashlib
import re

import torch

from sterna.seams import Comm, Message


class Disagreement(ValueError):
    """Workers were started with different methods, models or settings."""


def agree(comm: Comm, what: str, value: str) -> None:
    """Check that ``value`` is the same on every worker.

    Args:
        comm: the transport; the check itself is not accounted.
        what: the noun for the error, such as "the method".
        value: anything that prints fully, such as a ``repr``.

    Raises:
        Disagreement: names the ranks that differ from rank 0, and this worker's value.
    """
    digest = hashlib.sha256(value.encode()).digest()
    own = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    with comm.ledger.paused():
        messages = comm.gather(Message({"digest": own}))
    digests = [message.buffers["digest"] for message in messages]
    odd = [rank for rank, other in enumerate(digests) if not torch.equal(other, digests[0])]
    if odd:
        raise Disagreement(
            f"The workers disagree about {what}: rank {', '.join(map(str, odd))} differs from rank 0. "
            f"Rank {comm.rank} has {value[:300]}. Start every worker with the same command."
        )


def told(method: object) -> str:
    """The repr without addresses in memory, which a lambda's holds: they differ between workers."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(method))
