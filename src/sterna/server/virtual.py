"""An asynchronous server and its workers on a virtual clock: real gradients, no processes.

    worker:  read w -> compute for a drawn time -> push g -> wait to be admitted -> read w ...
    server:  on a push: decode -> clip -> correct -> one step of the optimizer -> version + 1

A heap holds what happens next. A gradient is computed when its time comes, at the weights that its worker
read; what a worker read is kept once for each version, however many read it. Everything runs in one
thread: the same arguments give the same bits. Data order, delays and coins are separate streams, the
last two of each worker, so that two methods meet the same examples in the same order and each worker the
same delays.

The workers take their batches from one sampler, each the next when it begins: an epoch has every example
once, and a fast worker does more of it. With one worker this is `sterna.loop.fit`, bit for bit.

The account: a push goes from worker to server, a read from server to worker, both as their packed bytes;
the start weights are left out, as for every engine. Seconds are virtual: a worker computes for the drawn
time and waits for transfers and for admission.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sterna.activations import kept_for_backward
from sterna.comm import wire
from sterna.comm.solo import Solo
from sterna.flat import Flat
from sterna.ledger import Ledger, Spent, total
from sterna.randomness import generator
from sterna.replica import Replica
from sterna.seams import Message, Objective, Push, Sampler, Source, State
from sterna.server.cluster import Cluster
from sterna.server.server import Server


@dataclass(frozen=True)
class Update:
    """One update of the server.

    Args:
        step: updates so far, this one included: the version of the weights.
        epoch: of the batch.
        loss: mean over the batch at the weights that the worker read; 0-dim, detached.
        worker: who pushed.
        staleness: updates between its reading and this one.
        time_s: virtual seconds since the start.
        compute_s: virtual seconds that the worker computed for it.
    """

    step: int
    epoch: int
    loss: Tensor
    worker: int
    staleness: int
    time_s: float
    compute_s: float


@dataclass
class Account:
    """What was spent: a ledger for each worker, and the server's own, whose steps are the updates.

    Example:
        >>> account = Account.start(2)
        >>> account.workers[0].add(bits_sent=64, messages=1)
        >>> account.server.add(bits_received=64)
        >>> account.total().bits_sent
        64
    """

    workers: tuple[Ledger, ...]
    server: Ledger = field(default_factory=Ledger)

    @classmethod
    def start(cls, workers: int) -> "Account":
        """Empty ledgers of so many workers."""
        return cls(tuple(Ledger() for _ in range(workers)))

    def total(self) -> Spent:
        """Of all workers and the server."""
        return total([*(ledger.spent() for ledger in self.workers), self.server.spent()])


def simulate(
    replica: Replica,
    data: Source,
    sampler: Sampler,
    objective: Objective,
    *,
    server: Server | None = None,
    cluster: Cluster | None = None,
    epochs: int = 1,
    seed: int = 0,
    account: Account | None = None,
) -> Iterator[Update]:
    """Train ``replica``, the server's, until the pushes of ``epochs`` epochs have arrived.

    One record per update, after it. Between two records the replica holds the server's weights, so the
    caller may evaluate or save them, but not change them. Its schedule is driven by its step, which is
    the server's version. Only parameters belong to a worker: buffers, such as batch-norm statistics, are the
    replica's, and whoever computes updates them.

    Args:
        replica: model and optimizer of the server.
        data: examples by index.
        sampler: batches of the workers; told the losses when they arrive.
        objective: what is minimised.
        server: its rules; plain ASGD by default.
        cluster: the workers, their speed and the network.
        epochs: stop when ``sampler.epoch`` has reached it and all pushes have arrived.
        seed: seeds the delays and the coins of objective and codec, different for every worker.
        account: where to enter what is spent.

    Raises:
        NotFinite: a gradient holds NaN or infinity; it has not changed the replica.
        ValueError: ``account`` has ledgers for another number of workers, or codec or delay refuse.
        RuntimeError: the admission lets nobody go on.

    Example:
        >>> from sterna.data import Examples
        >>> from sterna.objectives import CrossEntropy
        >>> from sterna.samplers import Shuffle
        >>> points = Examples(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8))
        >>> model = torch.nn.Linear(4, 4)
        >>> replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.3))
        >>> order = Shuffle(32, batch_size=8)
        >>> updates = list(simulate(replica, points, order, CrossEntropy(), epochs=20))
        >>> len(updates), updates[-1].step, max(update.staleness for update in updates) >= 7
        (80, 80, True)
    """
    cluster = cluster or Cluster()
    account = account or Account.start(cluster.workers)
    if len(account.workers) != cluster.workers:
        raise ValueError(
            f"simulate: account must have a ledger for each of the {cluster.workers} workers; got "
            f"{len(account.workers)}. Make it with Account.start({cluster.workers})."
        )
    batches = _batches(sampler, epochs)
    simulation = _Simulation(replica, data, objective, server or Server(), cluster, account, seed)
    yield from simulation.run(sampler, batches)


def _batches(sampler: Sampler, epochs: int) -> Iterator[tuple[int, Tensor]]:
    while sampler.epoch < epochs:
        epoch = sampler.epoch
        for index in sampler:
            yield epoch, index


class _Worker:
    """What a worker keeps from one clock to the next."""

    def __init__(self, rank: int, server: Server, weights: Flat, seed: int, ledger: Ledger) -> None:
        self.ledger = ledger
        self.codec_state: State = server.codec.init(weights)
        self.codec_coins = generator(seed, "exchange", rank)
        self.objective_coins = generator(seed, "objective", rank)
        self.delays = generator(seed, "delay", rank)
        self.idle_since = 0.0


@dataclass(frozen=True)
class _Clock:
    """A worker that computes: its batch, and the weights that it read."""

    rank: int
    epoch: int
    index: Tensor
    backup: Flat
    version: int
    compute_s: float


@dataclass(frozen=True)
class _Arrival:
    """A push on its way."""

    clock: _Clock
    losses: Tensor
    message: Message


class _Simulation:
    def __init__(
        self,
        replica: Replica,
        data: Source,
        objective: Objective,
        server: Server,
        cluster: Cluster,
        account: Account,
        seed: int,
    ) -> None:
        self.replica, self.data, self.objective = replica, data, objective
        self.server, self.cluster, self.account = server, cluster, account
        self.weights = self._read()
        self.weight_bits = 8 * wire.num_bytes(Message({"values": self.weights.buffer}))
        self.state = server.correction.init(self.weights)
        self.workers = [
            _Worker(rank, server, self.weights, seed, ledger)
            for rank, ledger in enumerate(account.workers)
        ]
        self.clocks = [0] * cluster.workers
        self.waiting = list(range(cluster.workers))  # in the order of their arrival
        self.now, self.measure, self.over = 0.0, True, False
        self.events: list[tuple[float, int, _Clock | _Arrival]] = []
        self.planned = 0

    def run(self, sampler: Sampler, batches: Iterator[tuple[int, Tensor]]) -> Iterator[Update]:
        """Let things happen in the order of their times; at equal times as they were planned."""
        self.replica.clear()
        self._admit(batches)
        while self.events:
            self.now, _, event = heapq.heappop(self.events)
            if isinstance(event, _Clock):
                self._compute(event)
                continue
            update = self._land(event)
            sampler.observe(event.clock.index, event.losses)
            yield update
            self._admit(batches)
        if self.waiting:
            raise RuntimeError(
                f"simulate: admission must admit a worker that is furthest behind; got none of "
                f"{len(self.waiting)} from {self.server.admission!r} at clocks {self.clocks[:8]}. "
                "All would wait for ever."
            )

    def _admit(self, batches: Iterator[tuple[int, Tensor]]) -> None:
        """Ask for those who wait, once for each clock, and send them on while there are batches."""
        answers: dict[int, bool] = {}
        left = []
        for rank in self.waiting:
            clock = self.clocks[rank]
            if clock not in answers:
                answers[clock] = self.server.admission.admits(self.clocks, rank)
            if not answers[clock]:
                left.append(rank)
                continue
            batch = next(batches, None)
            if batch is None:
                self.over = True
                break
            self._start(rank, *batch)
        self.waiting = [] if self.over else left

    def _start(self, rank: int, epoch: int, index: Tensor) -> None:
        """The worker reads the weights of now and begins a clock."""
        worker, number = self.workers[rank], self.clocks[rank]
        travel_s = 0.0
        if number:  # the start weights are there
            travel_s = self.cluster.transfer_s(self.weight_bits)
            worker.ledger.add(bits_received=self.weight_bits)
            self.account.server.add(bits_sent=self.weight_bits, messages=1)
        worker.ledger.add(wait_s=self.now - worker.idle_since + travel_s)
        compute_s = self.cluster.delay(rank, number, worker.delays)
        clock = _Clock(rank, epoch, index, self.weights, self.replica.step, compute_s)
        self._plan(self.now + travel_s + compute_s, clock)

    def _plan(self, time_s: float, event: _Clock | _Arrival) -> None:
        heapq.heappush(self.events, (time_s, self.planned, event))
        self.planned += 1

    def _compute(self, clock: _Clock) -> None:
        """The worker has its gradient, at the weights that it read, and pushes it."""
        worker, replica = self.workers[clock.rank], self.replica
        if not replica.model.training:  # the caller may have evaluated it
            replica.model.train()
        batch = self.data[clock.index]
        elsewhere = clock.version != replica.step
        if elsewhere:
            self._load(clock.backup)
        try:
            if self.measure:  # what autograd keeps is the same at every step; look once
                with kept_for_backward(worker.ledger, replica.model.parameters()):
                    loss = self.objective(replica.model, batch, worker.objective_coins)
                self.measure = False
            else:
                loss = self.objective(replica.model, batch, worker.objective_coins)
            loss.total.backward()  # type: ignore[no-untyped-call]
        finally:
            if elsewhere:
                self._load(self.weights)
        gradient = replica.gradients.clone()
        replica.clear()
        codec = self.server.codec
        message, worker.codec_state = codec.encode(
            gradient, worker.codec_state, Solo(), worker.codec_coins
        )
        bits = 8 * wire.num_bytes(message)
        travel_s = self.cluster.transfer_s(bits)
        worker.ledger.add(examples=len(clock.index), bits_sent=bits, messages=1)
        worker.ledger.add(compute_s=clock.compute_s, wait_s=travel_s)
        self.account.server.add(bits_received=bits)
        self._plan(self.now + travel_s, _Arrival(clock, loss.per_example.detach(), message))

    def _land(self, arrival: _Arrival) -> Update:
        """The push is at the server: one update."""
        clock, replica, server = arrival.clock, self.replica, self.server
        gradient = Flat.of(server.codec.decode(arrival.message, self.weights))
        if server.clip is not None:
            _clip(gradient.buffer, server.clip)
        staleness = replica.step - clock.version
        push = Push(clock.rank, gradient, self.weights, clock.backup, replica.step, staleness)
        update, self.state = server.correction.correct(push, self.state)
        replica.gradients.buffer.copy_(Flat.of(update).buffer)
        replica.update()
        self.weights = self._read()
        worker = self.workers[clock.rank]
        worker.idle_since = self.now
        worker.ledger.add(steps=1, staleness_sum=staleness, staleness_max=staleness)
        self.account.server.add(steps=1)
        self.clocks[clock.rank] += 1
        self.waiting.append(clock.rank)
        return Update(
            replica.step,
            clock.epoch,
            arrival.losses.mean(),
            clock.rank,
            staleness,
            self.now,
            clock.compute_s,
        )

    def _read(self) -> Flat:
        """A copy of the server's weights, for all who read this version."""
        return Flat.of(self.replica.parameters)

    def _load(self, weights: Flat) -> None:
        with torch.no_grad():
            for name, parameter in self.replica.parameters.items():
                parameter.copy_(weights[name])


def _clip(gradient: Tensor, limit: float) -> None:
    """Shorten in place to the norm ``limit`` if it is longer."""
    norm = torch.linalg.vector_norm(gradient)
    gradient.mul_((limit / norm).clamp_(max=1.0))
