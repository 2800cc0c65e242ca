"""The mean over workers of named tensors, sent through a codec.

Where the sum of messages decodes to the sum of what they say, the engine's all-reduce adds them on the
way: 2 (N-1)/N of a message per worker. Otherwise each worker gathers the N messages and decodes their
mean, N-1 messages per worker, in rank order on every worker, so that all hold the same bits.
"""

import torch

from sterna.codecs.form import decode_mean
from sterna.flat import Flat, Named
from sterna.seams import Codec, Comm, Message, State


def mean(
    named: Named, codec: Codec, state: State, comm: Comm, rng: torch.Generator
) -> tuple[Flat, State]:
    """Mean of ``named`` over all workers, equal to the bit on each of them.

    Args:
        named: this worker's tensors; their memory may be overwritten.
        codec: what travels.
        state: the codec's state on this worker.
        comm: the transport.
        rng: the codec's coins; must differ between workers.

    Returns:
        The mean, and the codec's next state.

    Raises:
        NotFinite: a tensor of this worker holds NaN or infinity.
        PeerLost: another worker failed.
    """
    message, state = codec.encode(named, state, comm, rng)
    return mean_of(message, codec, named, comm), state


def mean_of(message: Message, codec: Codec, like: Named, comm: Comm) -> Flat:
    """Mean of what all workers' messages say, equal to the bit on each of them.

    Args:
        message: this worker's; its memory may be overwritten.
        codec: what made it.
        like: tensors of the names and shapes in it.
        comm: the transport.

    Raises:
        PeerLost: another worker failed.
    """
    if codec.summable or message.summable:
        for buffer in message.buffers.values():
            comm.sum_(buffer.div_(comm.size))
        return Flat.of(codec.decode(message, like))
    return decode_mean(codec, comm.gather(message), like)
