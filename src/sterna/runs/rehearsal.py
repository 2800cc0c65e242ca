"""A round on a toy model before the clock starts: kernels are compiled and libraries loaded then.

The first use of a codec compiles its kernels, once for an installation, and loads them, once for a
process. Seconds of that in the first step would be told as the method's.
"""

import torch
from torch import nn

from sterna.comm.solo import Solo
from sterna.randomness import generator, isolated
from sterna.replica import Replica
from sterna.seams import Exchange

_MOST_STEPS = 1000


def rehearse(exchange: Exchange) -> None:
    """Run ``exchange`` on two by two weights, up to its first round. Nothing is left of it."""
    with isolated(0, "rehearsal"):
        model = nn.Linear(2, 2)
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
    state, rng = exchange.init(replica), generator(0, "rehearsal")
    for _ in range(min(getattr(exchange, "every", 1), _MOST_STEPS)):
        replica.gradients.buffer.copy_(torch.linspace(-1, 1, len(replica.gradients.buffer)))
        state = exchange(replica, state, Solo(), rng)
