"""What a worker of a synchronous run keeps, so that a lost worker ends neither the run nor its state.

Each worker keeps all that a checkpoint holds, in memory that outlives it (`sterna.comm.member`): weights,
optimizer, buffers, sampler position, exchange state, generators, ledger. When a worker is lost, the
processes of the others and a replacement go back to the newest state that fits together:

    all have ended step k           all go on with step k + 1
    some have, others have not      those go back; all do step k again, with the same bits

So the run ends at the bits of the run that nothing disturbed. In particular: error feedback's residuals
and the generators of the lost worker are not lost, as it kept them itself. With `ModelAverage` and
`SlimDP`, whose replicas differ between rounds, each worker goes on from its own local steps, on the anchor
of the last round that all have ended: a round is taken back where some have not, and not where all have.
An evaluation or a checkpoint in which a worker dies is done again with the step before it.

`keep` copies a small state after every step, a large one every few steps: a step for every MiB of
weights; and `sterna.runs.worker` whatever its size when a checkpoint is written. So what is done again are
the steps since the last copy, never more than since the last checkpoint that all have ended. That costs
time, not bits.
"""

import json

from sterna.comm.member import Member
from sterna.loop import Streams
from sterna.replica import Replica
from sterna.runs import checkpoint, tree
from sterna.seams import Comm, Sampler

_BYTES_A_STEP = 1 << 20


def steps_between(replica: Replica) -> int:
    """Steps from one `keep` to the next; the same on every worker.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1000, 1000)
        >>> steps_between(Replica(model, torch.optim.SGD(model.parameters(), lr=0.1)))
        4
    """
    num_bytes = sum(p.nbytes for p in replica.parameters.values())
    return max(1, -(-num_bytes // _BYTES_A_STEP))


def is_due(comm: Comm, replica: Replica) -> bool:
    """Whether `keep` should be called after this step: a lost worker would be replaced, and it is time."""
    return isinstance(comm, Member) and comm.keeps and replica.step % steps_between(replica) == 0


def keep(comm: Comm, replica: Replica, sampler: Sampler, streams: Streams) -> None:
    """Keep this worker's state of now; nothing happens where nobody would be replaced.

    All workers must call it after the same steps, with the same evaluations before it.
    """
    if isinstance(comm, Member) and comm.keeps:
        values = checkpoint.values_of(replica, sampler, streams, comm)
        tensors, rest = tree.split(values, copy=False)
        comm.keep(tensors, json.dumps(rest))


def recall(comm: Comm, replica: Replica, sampler: Sampler, streams: Streams) -> bool:
    """Go back to the newest kept state that fits that of the others; False where there is none.

    All workers must call it, with freshly made arguments, before they train.
    """
    kept = comm.recall() if isinstance(comm, Member) else None
    if kept is None:
        return False
    tensors, text = kept
    values = tree.join(tensors, json.loads(text))
    checkpoint.load_replica("What was kept", replica, values)
    checkpoint.load_streams(values, replica, sampler, streams, comm)
    return True
