"""A tiny training run, for the laws of exchanges; importable by worker processes."""

import pickle
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn

from sterna.data.examples import Examples
from sterna.ledger import Spent
from sterna.loop import fit
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
