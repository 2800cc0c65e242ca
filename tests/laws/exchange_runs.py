"""A tiny training run, for the laws of exchanges; importable by worker processes."""

import itertools
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sterna.data.examples import Examples
from sterna.ledger import Spent
from sterna.loop import Streams, fit
from sterna.objectives.cross_entropy import CrossEntropy
from sterna.randomness import generator, isolated
from sterna.replica import Replica
from sterna.samplers.shuffle import Shuffle
from sterna.seams import Comm, Exchange, Message

NUM_EXAMPLES, GLOBAL_BATCH, EPOCHS = 48, 12, 2
STEPS = EPOCHS * NUM_EXAMPLES // GLOBAL_BATCH


@cache
def data() -> Examples:
    rng = generator(0, "points")
    inputs = torch.randn(NUM_EXAMPLES, 6, generator=rng)
    return Examples(inputs, (inputs @ torch.randn(6, 3, generator=rng)).argmax(1))


def replica() -> Replica:
    with isolated(0, "model"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    return Replica(model, torch.optim.SGD(model.parameters(), **options))


def sampler(comm: Comm) -> Shuffle:
    batch_size = GLOBAL_BATCH // comm.size
    return Shuffle(NUM_EXAMPLES, batch_size, rank=comm.rank, size=comm.size, seed=3)


def weights(trained: Replica) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trained.parameters.values()])


def train(comm: Comm, exchange: Exchange) -> tuple[Tensor, Spent, list[float]]:
    own = replica()
    records = fit(
        own, data(), sampler(comm), CrossEntropy(), exchange=exchange, comm=comm, epochs=EPOCHS
    )
    losses = [float(record.loss) for record in records]
    assert len(losses) == own.step == STEPS
    return weights(own), comm.ledger.spent(), losses


@dataclass(frozen=True)
class Moment:
    """One worker after ``step`` steps: its weights, what the workers agreed on last, bits sent."""

    step: int
    weights: Tensor
    agreed: Tensor
    bits_sent: int


class _Watched:
    """A transport that tells somebody before each collective."""

    def __init__(self, comm: Comm, tell: Callable[[], None]) -> None:
        self._comm, self._tell = comm, tell

    def __getattr__(self, name: str) -> Any:
        if name in ("gather", "sum_", "max_", "broadcast_"):
            self._tell()
        return getattr(self._comm, name)


def watch(comm: Comm, exchange: Exchange) -> tuple[list[Moment], list[Moment]]:
    """The moments after each step (and before the first), and those before each collective.

    Where the state has a slot ``anchor``, that is what the workers agree on; else it is the weights.
    """
    own = replica()
    streams = Streams.start(own, exchange, 0, comm.rank)
    calls: list[Moment] = []

    def now() -> Moment:
        anchor = streams.state.get("anchor")
        agreed = [] if anchor is None else [x.reshape(-1) for x in anchor.values()]
        found = weights(own)
        return Moment(
            len(steps), found, torch.cat(agreed) if agreed else found, comm.ledger.spent().bits_sent
        )

    steps: list[Moment] = []
    steps.append(now())
    records = fit(
        own,
        data(),
        sampler(comm),
        CrossEntropy(),
        exchange=exchange,
        comm=_Watched(comm, lambda: calls.append(now())),
        epochs=EPOCHS,
        streams=streams,
    )
    for _ in records:
        steps.append(now())
    return steps, calls


def meetings(steps: Sequence[Moment]) -> list[int]:
    """The numbers of the steps in which something was sent."""
    return [
        after.step
        for before, after in itertools.pairwise(steps)
        if after.bits_sent > before.bits_sent
    ]


def train_all(comm: Comm, exchanges: Sequence[Exchange]) -> list[bytes] | None:
    """Train with each exchange in turn; for each rank its weights and bits, pickled, on rank 0."""
    found = []
    for exchange in exchanges:
        before = comm.ledger.spent().bits_sent
        own, spent, _ = train(comm, exchange)
        found.append((own.tolist(), spent.bits_sent - before))
    data = torch.frombuffer(bytearray(pickle.dumps(found)), dtype=torch.uint8)
    messages = comm.gather(Message({"found": data}, ragged=True))
    return [bytes(m.buffers["found"].tolist()) for m in messages] if comm.rank == 0 else None
