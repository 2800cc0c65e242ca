"""Local SGD by torch's own averager and by ours, in real processes; importable by workers."""

import warnings

import torch
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from sterna.exchange.model_average import ModelAverage
from sterna.randomness import generator, isolated
from sterna.replica import Replica
from sterna.seams import Comm, Message

STEPS = 9


def _model() -> nn.Sequential:
    with isolated(0, "model"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].bias.requires_grad_(False)
    return model


def _optimizer(model: nn.Module, momentum: float) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.2, momentum=momentum)


def train_both(comm: Comm, every: int, momentum: float) -> list[list[list[float]]]:
    """By rank and step: the largest difference between the two models, and between the two ranks."""
    ours, theirs = _model(), _model()
    replica, optimizer = Replica(ours, _optimizer(ours, momentum)), _optimizer(theirs, momentum)
    exchange, rng = ModelAverage(every=every), generator(0, comm.rank)
    state = exchange.init(replica)
    with warnings.catch_warnings():  # it says that a period of 1 is no use
        warnings.simplefilter("ignore")
        averager = PeriodicModelAverager(period=every)
    averager.step = 1  # it counts from 0 and would average after the first step
    found = []
    for step in range(STEPS):
        points = torch.randn(5, 6, generator=generator(1, step, comm.rank))
        ours(points).square().mean().backward()
        state = exchange(replica, state, comm, rng)
        optimizer.zero_grad()
        theirs(points).square().mean().backward()
        optimizer.step()
        averager.average_parameters(theirs.parameters())
        a, b = (
            torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            for model in (ours, theirs)
        )
        first, second = (m.buffers["weights"] for m in comm.gather(Message({"weights": a})))
        found.append([float((a - b).abs().max()), float((first - second).abs().max())])
    gathered = comm.gather(Message({"found": torch.tensor(found)}))
    return [m.buffers["found"].view(STEPS, 2).tolist() for m in gathered]
