"""A replica's trained weights as one flat buffer, and back: for exchanges that average weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sterna.flat import Flat
from sterna.replica import Replica
from sterna.seams import State


def packed(replica: Replica) -> Flat:
    """A packed copy of the trained weights, laid out as the gradients are."""
    return Flat.of(replica.parameters)


def assign(replica: Replica, weights: Flat) -> None:
    """Copy ``weights`` into the trained parameters; nothing else of the model is touched."""
    with torch.no_grad():
        for name, parameter in replica.parameters.items():
            parameter.copy_(weights[name])


@contextmanager
def agreed(replica: Replica, state: State) -> Iterator[None]:
    """Inside, the model has the weights that all workers agreed on last; its own come back after.

    Those are what the workers have trained together, and what is to be judged and saved: between two
    rounds of local steps each worker has weights of its own. Nothing happens where an exchange keeps no
    slot ``anchor``, for its replicas are equal after every step.
    """
    if "anchor" not in state:
        yield
        return
    own = packed(replica)
    assign(replica, Flat.of(state["anchor"]))
    try:
        yield
    finally:
        assign(replica, own)
