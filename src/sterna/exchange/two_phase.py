"""The mean over workers in two phases, for codes that are small integers with a shared scaler.

Of n codes from [-L, L] on each of N workers, in N shards, with the scaler s of their tensor:

    phase 1   worker i sends the codes t^i of shard j to worker j, for all j;  S = sum_i t^i     (1)
    phase 2   worker j sends S of its shard to all:  N L + S from [0, 2NL]                       (2)
    mean      G = S s/N                                                                          (3)

Bytes that each worker sends, where a code takes b bits and a sum c >= log2(2NL + 1):

    gather        (N-1) n b/8                                                                    (4)
    two phases    (N-1) n (b + c) / (8N)                                                         (5)

The sums are exact: they are kept in 32 bits, and in float32, which holds any whole number to 2^24. So
for `TernGrad` the mean is bitwise that of the gather to N = 127, where the gather adds integers too. With
more workers the gather adds floats, and the two differ by its rounding: 2^-24 N max|G| at most.
Reference: W. Wen et al., "TernGrad", NIPS 2017, arXiv:1705.07878 (log2(2N + 1) bits for the sum of N
    ternary codes); R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication
    Operations in MPICH", IJHPCA 2005 (an all-reduce as a reduce-scatter and an all-gather).
Differs from the paper: in TernGrad a server adds up; here every worker does, for its shard. c is 64/k
    bits with (2NL + 1)^k <= 2^64 (`radix`), for 2NL + 1 <= 65536. Shards are whole blocks of the codec's
    packing.
Cost per step: (5), 2 (N-1) messages instead of N-1; one pass over n/N codes of each worker, one division
    an element. Hurts with few workers, and with small models, whose shards are not full.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sterna.codecs import radix
from sterna.comm import wire
from sterna.exchange import averaging
from sterna.exchange.integers import Integers, integers_of
from sterna.flat import Flat, Named
from sterna.seams import Codec, Comm, Message, State

MESSAGE_BYTES = 4096
"""What a further message costs, in bytes that could have been sent: 33 microseconds at 1 Gbit/s."""


@dataclass(frozen=True)
class Plan:
    """How the workers come to the mean; prints as the reason.

    Args:
        two_phase: whether in two phases.
        gather_bytes: what each worker sends where the messages are gathered; None if not known before
            they are made.
        two_phase_bytes: what each worker sends in two phases; None if the codec cannot.
        reason: one sentence.
    """

    two_phase: bool
    gather_bytes: int | None
    two_phase_bytes: int | None
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class _Shards:
    """Who adds up which codes: rank r those from r ``size`` on."""

    num_codes: int
    size: int
    row_bytes: int
    base: int

    @classmethod
    def of(cls, integers: Integers, like: Named, workers: int) -> "_Shards":
        codes, num_bytes = integers.block
        num_codes = integers.num_codes(like)
        blocks = -(-num_codes // (codes * workers))
        return cls(
            num_codes, blocks * codes, blocks * num_bytes, 2 * workers * integers.largest + 1
        )

    def length(self, rank: int) -> int:
        return min(max(self.num_codes - rank * self.size, 0), self.size)


def choose(codec: Codec, like: Named, workers: int) -> Plan:
    """The plan that costs least: bytes sent, and `MESSAGE_BYTES` a message; the same on every worker.

    Args:
        codec: what travels.
        like: tensors of the names and shapes that will.
        workers: N.

    Example:
        >>> from sterna.codecs.terngrad import TernGrad
        >>> like = {"w": torch.zeros(1000, 1000)}
        >>> print(choose(TernGrad(), like, 8))
        two phases: 8 workers send 696.4 kB each instead of 1.75 MB
        >>> print(choose(TernGrad(), like, 2))
        gather: 2 workers send 250.0 kB each; two phases would take 275.2 kB in twice as many messages
    """
    integers = integers_of(codec)
    if integers is None or 2 * workers * integers.largest + 1 > radix.LARGEST_BASE:
        which = "are added up by the engine" if codec.summable else "cannot be added up as integers"
        return Plan(False, None, None, f"one phase: messages of {type(codec).__name__} {which}")
    others, form, shards = workers - 1, integers.form(like), _Shards.of(integers, like, workers)
    sums = torch.empty(radix.num_bytes(shards.size, shards.base), dtype=torch.uint8, device="meta")
    second = wire.num_bytes(Message({"sums": sums, **integers.rest(form)}))
    gather, two = others * wire.num_bytes(form), others * (shards.row_bytes + second)
    if two + others * MESSAGE_BYTES < gather:
        said = f"{workers} workers send {_size(two)} each instead of {_size(gather)}"
        return Plan(True, gather, two, f"two phases: {said}")
    said = f"{workers} workers send {_size(gather)} each; two phases would take {_size(two)}"
    return Plan(False, gather, two, f"gather: {said} in twice as many messages")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.2f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.1f} kB"


def mean(
    named: Named,
    codec: Codec,
    state: State,
    comm: Comm,
    rng: torch.Generator,
    plan: Plan | None = None,
) -> tuple[Flat, State]:
    """Mean of ``named`` over all workers, equal to the bit on each of them.

    Args:
        named: this worker's tensors; their memory may be overwritten.
        codec: what travels.
        state: the codec's state on this worker.
        comm: the transport.
        rng: the codec's coins; must differ between workers.
        plan: how, the same on every worker; None chooses by cost.

    Returns:
        The mean, and the codec's next state.

    Raises:
        ValueError: the plan has two phases, and the codec has no integers with a shared scaler.
        NotFinite: a tensor of this worker holds NaN or infinity.
        PeerLost: another worker failed.
    """
    plan = plan or choose(codec, named, comm.size)
    if not plan.two_phase:
        return averaging.mean(named, codec, state, comm, rng)
    integers = integers_of(codec)
    if integers is None:
        raise ValueError(
            f"two_phase.mean: the codec must say small integers with a shared scaler; got {codec!r}. "
            "Use TernGrad(share_scalers=True), or plan=None, which gathers where it has to."
        )
    message, state = codec.encode(named, state, comm, rng)
    expected = integers.form(named).buffers
    if set(message.buffers) != set(expected):  # not yet: the codec is warming up
        return averaging.mean_of(message, codec, named, comm), state
    shards = _Shards.of(integers, named, comm.size)
    sums = _add_up(integers, integers.packed(message), shards, comm)
    gathered = comm.gather(Message({"sums": sums, **integers.rest(message)}))
    total = torch.cat(
        [
            radix.unpack(one.buffers["sums"], shards.size, shards.base)[: shards.length(rank)]
            for rank, one in enumerate(gathered)
        ]
    )
    return integers.mean_of_sums(total, message, gathered, named), state


def _add_up(integers: Integers, packed: Tensor, shards: _Shards, comm: Comm) -> Tensor:
    """Phase 1: the sums of this worker's shard as digits, Eq. (2)."""
    rows = packed.new_zeros(comm.size * shards.row_bytes)
    rows[: len(packed)] = packed
    received = comm.all_to_all(rows.view(comm.size, shards.row_bytes))
    length = shards.length(comm.rank)
    codes, num_bytes = integers.block
    whole, left = divmod(length, codes)
    per_byte = codes // num_bytes
    used = whole * num_bytes + -(-left // per_byte)
    digits = torch.zeros(shards.size, dtype=torch.int32, device=packed.device)
    digits[:length] = integers.add_up(received[:, :used].contiguous(), length)
    digits[:length] += comm.size * integers.largest
    return radix.pack(digits, shards.base)
