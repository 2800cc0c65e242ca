"""Workers in one process, trained for a claim; judged by the weights that they agreed on last."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from sterna.comm.in_process import run_in_process
from sterna.comm.solo import Solo
from sterna.data import Dataset
from sterna.evaluation import evaluate
from sterna.exchange.weights import assign
from sterna.flat import Flat
from sterna.loop import Streams, fit
from sterna.objectives import CrossEntropy
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.samplers import Shuffle
from sterna.schedules import Polynomial
from sterna.seams import Comm, Exchange, NotFinite


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, apart from how replicas agree.

    Args:
        data: training and test examples.
        model: builds the network.
        lr: learning rate at the start.
        momentum: of SGD.
        power: the rate falls as what is left to do to this power.
        clip_norm: gradients are shortened to it; None: they are not.
        weight_decay: added on each worker.
        epochs: passes over the training examples.
        batch_size: examples per step over all workers.
        workers: how many.
        seed: of everything.
    """

    data: Dataset
    model: Callable[[], nn.Module]
    lr: float
    momentum: float = 0.9
    power: float = 0.5
    clip_norm: float | None = None
    weight_decay: float = 0.0
    epochs: int = 2
    batch_size: int = 64
    workers: int = 4
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of it.

    Args:
        accuracy: of the weights agreed on last, on the test examples; None where it diverged.
        perplexity: of the same weights.
        own_accuracy: mean over the workers of what each one's own replica reaches.
        bits_sent: by one worker, the mean over all.
        bits_by_epoch: of it, sent by rank 0 in each epoch.
        steps: how many.
        model: rank 0's replica with the weights agreed on last.
    """

    accuracy: float | None
    perplexity: float | None
    own_accuracy: float | None
    bits_sent: float
    bits_by_epoch: tuple[int, ...]
    steps: int
    model: nn.Module | None


def train(
    task: Task,
    exchange: Exchange,
    watch: Callable[[int, nn.Module], None] | None = None,
) -> Trained:
    """Train; ``watch`` is shown step and model of rank 0 before the first step and after each epoch."""
    worker = partial(_worker, task=task, exchange=exchange, watch=watch)
    try:
        found = run_in_process(worker, task.workers)
    except NotFinite:
        return Trained(
            accuracy=None,
            perplexity=None,
            own_accuracy=None,
            bits_sent=0,
            bits_by_epoch=(),
            steps=0,
            model=None,
        )
    first = found[0]
    return Trained(
        accuracy=first.accuracy,
        perplexity=first.perplexity,
        own_accuracy=sum(one.own_accuracy or 0.0 for one in found) / len(found),
        bits_sent=sum(one.bits_sent for one in found) / len(found),
        bits_by_epoch=first.bits_by_epoch,
        steps=first.steps,
        model=first.model,
    )


def _worker(
    comm: Comm,
    task: Task,
    exchange: Exchange,
    watch: Callable[[int, nn.Module], None] | None,
) -> Trained:
    with isolated(task.seed, "model"):
        model = task.model()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay
    )
    sampler = Shuffle(
        len(task.data.train),
        task.batch_size // comm.size,
        rank=comm.rank,
        size=comm.size,
        seed=task.seed,
    )
    steps, schedule = task.epochs * len(sampler), Polynomial(power=task.power)
    replica = Replica(model, optimizer, lambda step: schedule(step / steps), task.clip_norm)
    streams = Streams.start(replica, exchange, task.seed, comm.rank)
    tell = watch if watch is not None and comm.rank == 0 else lambda step, model: None
    tell(0, model)
    bits = [0]
    for record in fit(
        replica,
        task.data.train,
        sampler,
        CrossEntropy(),
        exchange=exchange,
        comm=comm,
        epochs=task.epochs,
        streams=streams,
    ):
        if record.step % len(sampler) == 0:
            tell(record.step, model)
            bits.append(comm.ledger.spent().bits_sent)
    own = evaluate(model, task.data.test, Solo())
    if "anchor" in streams.state:
        assign(replica, Flat.of(streams.state["anchor"]))
    agreed = evaluate(model, task.data.test, Solo()) if comm.rank == 0 else own
    return Trained(
        accuracy=agreed.accuracy,
        perplexity=agreed.perplexity,
        own_accuracy=own.accuracy,
        bits_sent=bits[-1],
        bits_by_epoch=tuple(after - before for before, after in pairwise(bits)),
        steps=replica.step,
        model=model if comm.rank == 0 else None,
    )
