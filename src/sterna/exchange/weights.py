"""A replica's trained weights as one flat buffer, and back: for exchanges that average weights."""

import torch

from sterna.flat import Flat
from sterna.replica import Replica


def packed(replica: Replica) -> Flat:
    """A packed copy of the trained weights, laid out as the gradients are."""
    return Flat.of(replica.parameters)


def assign(replica: Replica, weights: Flat) -> None:
    """Copy ``weights`` into the trained parameters; nothing else of the model is touched."""
    with torch.no_grad():
        for name, parameter in replica.parameters.items():
            parameter.copy_(weights[name])
