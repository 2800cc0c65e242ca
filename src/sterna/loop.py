"""The one gradient loop.

    take indices -> evaluate the objective -> backward -> exchange (which steps the optimizer) -> report

`fit` is an iterator of records: the caller decides what to print, when to evaluate, save or stop.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sterna.activations import kept_for_backward
from sterna.comm.agreement import agree, told
from sterna.comm.solo import Solo
from sterna.exchange.all_reduce import AllReduce
from sterna.flat import Layout
from sterna.randomness import generator
from sterna.replica import Replica
from sterna.seams import Comm, Exchange, Objective, Sampler, Source, State


@dataclass(frozen=True)
class Record:
    """One step of one worker: ``loss`` is its own mean loss (0-dim, detached) before the update."""

    step: int
    epoch: int
    loss: torch.Tensor


@dataclass
class Streams:
    """The state of a worker beside its replica: coins of objective and exchange, exchange state."""

    objective: torch.Generator
    exchange: torch.Generator
    state: State

    @classmethod
    def start(cls, replica: Replica, exchange: Exchange, seed: int, rank: int) -> "Streams":
        """Fresh streams of one worker."""
        return cls(
            generator(seed, "objective", rank),
            generator(seed, "exchange", rank),
            exchange.init(replica),
        )


def fit(
    replica: Replica,
    data: Source,
    sampler: Sampler,
    objective: Objective,
    *,
    exchange: Exchange | None = None,
    comm: Comm | None = None,
    epochs: int = 1,
    seed: int = 0,
    streams: Streams | None = None,
) -> Iterator[Record]:
    """Train ``replica`` until the sampler has finished ``epochs`` epochs; one record per step.

    Every worker calls it with its own replica and sampler; replicas that start equal stay equal where
    the exchange says so. What was spent is in ``comm.ledger``.

    Args:
        replica: model and optimizer of this worker.
        data: examples by index.
        sampler: which examples; told the losses.
        objective: what is minimised.
        exchange: how replicas agree; all-reduce of plain gradients by default.
        comm: the transport; alone by default.
        epochs: stop when ``sampler.epoch`` reaches it.
        seed: seeds the coins of objective and exchange, different on every worker.
        streams: coins and exchange state to go on with, from a checkpoint.

    Raises:
        Disagreement: the workers were given different exchanges or models; names the ranks.
        NotFinite: a gradient holds NaN or infinity; no optimizer step was taken with it.
        PeerLost: another worker failed.

    Example:
        >>> from sterna.data import Examples
        >>> from sterna.objectives import CrossEntropy
        >>> from sterna.samplers import Shuffle
        >>> points = Examples(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8))
        >>> model = torch.nn.Linear(4, 4)
        >>> replica = Replica(model, torch.optim.SGD(model.parameters(), lr=1.0))
        >>> records = list(fit(replica, points, Shuffle(32, batch_size=8), CrossEntropy(), epochs=20))
        >>> len(records), bool(records[-1].loss < 0.3)
        (80, True)
    """
    exchange = exchange or AllReduce()
    comm = comm or Solo()
    streams = streams or Streams.start(replica, exchange, seed, comm.rank)
    if comm.size > 1:  # found out now, named; later it would be a wrong sum, or a wait in vain
        said = f"{told(exchange)} for {Layout.of(replica.parameters)!r}"
        agree(comm, "the exchange or the model", said)
    ledger, measure = comm.ledger, True
    replica.clear()
    while sampler.epoch < epochs:
        epoch = sampler.epoch
        for index in sampler:
            start, waited = time.perf_counter(), ledger.wait_s
            if not replica.model.training:  # the caller may have evaluated it
                replica.model.train()
            batch = data[index]
            if measure:  # what autograd keeps is the same at every step; look once
                with kept_for_backward(ledger, replica.model.parameters()):
                    loss = objective(replica.model, batch, streams.objective)
                measure = False
            else:
                loss = objective(replica.model, batch, streams.objective)
            loss.total.backward()  # type: ignore[no-untyped-call]
            streams.state = exchange(replica, streams.state, comm, streams.exchange)
            per_example = loss.per_example.detach()
            elapsed = time.perf_counter() - start
            ledger.add(steps=1, examples=len(index), compute_s=elapsed - (ledger.wait_s - waited))
            sampler.observe(index, per_example)
            yield Record(replica.step, epoch, per_example.mean())
