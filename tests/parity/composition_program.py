"""Local steps, error feedback, coder, ternaries, warm-up together; importable by worker processes."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sterna.codecs.entropy import Entropy
from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.fp16 import Fp16
from sterna.codecs.quantise import Quantise
from sterna.codecs.terngrad import TernGrad
from sterna.codecs.warm_up import WarmUp
from sterna.comm import wire
from sterna.data.examples import Examples
from sterna.exchange import ddp_hook
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.loop import Streams, fit
from sterna.objectives.cross_entropy import CrossEntropy
from sterna.randomness import generator, isolated
from sterna.replica import Replica
from sterna.runs import checkpoint
from sterna.samplers.shuffle import Shuffle
from sterna.seams import Codec, Comm, Exchange, PeerLost

STEPS, EXAMPLES = 24, 96
CODED = ErrorFeedback(inner=Entropy(inner=TernGrad()))
ROUNDED = ErrorFeedback(inner=Entropy(inner=Quantise(step=2.0)), decay=1.0)
EXCHANGES: dict[str, Exchange] = {
    "the composition": ModelAverage(every=8, codec=CODED),
    "with an outer momentum": ModelAverage(every=4, codec=ROUNDED, outer_momentum=0.5),
    "at every step": AllReduce(codec=CODED),
    "after a warm-up": AllReduce(codec=WarmUp(inner=CODED, steps=10)),
    "fed back through a warm-up": AllReduce(
        codec=ErrorFeedback(inner=WarmUp(inner=TernGrad(), steps=10, first=Fp16()))
    ),
    "rounds after a warm-up": ModelAverage(every=4, codec=WarmUp(inner=CODED, steps=2)),
    "coarser in stages": AllReduce(
        codec=ErrorFeedback(
            inner=WarmUp(
                inner=WarmUp(
                    inner=Entropy(inner=Quantise(step=2.0)), steps=8, first=Quantise(step=0.5)
                ),
                steps=8,
            ),
            decay=1.0,
        )
    ),
}
Said = tuple[list[float], int, int]


def points() -> Examples:
    rng = generator(0, "points")
    inputs = torch.randn(EXAMPLES, 60, generator=rng)
    return Examples(inputs, (inputs @ torch.randn(60, 5, generator=rng)).argmax(1))


def net() -> nn.Module:
    with isolated(0, "model"):
        return nn.Sequential(nn.Linear(60, 300), nn.Tanh(), nn.Linear(300, 5))


def train(
    comm: Comm, exchange: Exchange, folder: str = "", first: int = 0, last: int = STEPS
) -> Said:
    """Steps ``first`` + 1 to ``last``; weights, bits and messages. Goes on from the folder or saves there."""
    model = net()
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    sampler = Shuffle(EXAMPLES, 16 // comm.size, rank=comm.rank, size=comm.size, seed=3)
    streams = Streams.start(replica, exchange, 0 if not first else 99, comm.rank)
    if first:
        assert checkpoint.restore(Path(folder), replica, sampler, streams, comm)
    assert replica.step == first
    records = fit(
        replica,
        points(),
        sampler,
        CrossEntropy(),
        exchange=exchange,
        comm=comm,
        epochs=STEPS * 16 // EXAMPLES,
        streams=streams,
    )
    for _ in range(last - first):
        next(records)
    if folder and not first:
        checkpoint.save(Path(folder), replica, sampler, streams, comm)
    records.close()  # type: ignore[attr-defined]
    spent = comm.ledger.spent()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return weights.tolist(), spent.bits_sent, spent.messages


def train_all(comm: Comm) -> dict[str, Said]:
    """Every exchange, and what each cost."""
    found, bits, messages = {}, 0, 0
    for name, exchange in EXCHANGES.items():
        weights, all_bits, all_messages = train(comm, exchange)
        found[name] = weights, all_bits - bits, all_messages - messages
        bits, messages = all_bits, all_messages
    return found


def own_loops(comm: Comm) -> dict[str, Said]:
    """With the hook, each codec with its coder and without; without a coin also with the exchange."""
    hooked = {
        "coded": CODED,
        "plain": ErrorFeedback(inner=TernGrad()),
        "coded after a warm-up": WarmUp(inner=CODED, steps=5),
        "plain after a warm-up": WarmUp(inner=ErrorFeedback(inner=TernGrad()), steps=5),
        "rounded": WarmUp(inner=ROUNDED, steps=5),
    }
    found = {name: own_loop(comm, codec, True) for name, codec in hooked.items()}
    return {**found, "rounded, by the exchange": own_loop(comm, hooked["rounded"], False)}


def own_loop(comm: Comm, codec: Codec, wrap: bool) -> Said:
    """A user's own loop of 12 steps: with the hook in DDP, or with the exchange itself."""
    model, rng = net(), generator(5, comm.rank)
    model = model if not wrap else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if wrap:
        with ddp_hook.register(model, codec, seed=1) as hook:  # type: ignore[arg-type]
            for _ in range(12):
                optimizer.zero_grad()
                model(torch.randn(4, 60, generator=rng)).square().mean().backward()
                optimizer.step()
            spent = hook.ledger.spent()
    else:
        replica, exchange = Replica(model, optimizer), AllReduce(codec=codec)
        state, coins = exchange.init(replica), generator(1, "ddp", comm.rank)
        for _ in range(12):
            model(torch.randn(4, 60, generator=rng)).square().mean().backward()
            state = exchange(replica, state, comm, coins)
        spent = comm.ledger.spent()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return weights.tolist(), spent.bits_sent, spent.messages


def disagree(comm: Comm) -> str:
    """Two workers with another share of the residual each; what the first is told."""
    try:
        train(comm, AllReduce(codec=ErrorFeedback(inner=TernGrad(), decay=0.9 - 0.1 * comm.rank)))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def other_version(comm: Comm) -> str:
    """The second worker runs another version; what the first is told."""
    wire._VERSION += comm.rank
    try:
        train(comm, AllReduce())
    except (wire.WireError, PeerLost) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
