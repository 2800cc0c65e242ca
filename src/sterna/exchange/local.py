"""No exchange: every worker trains its own copy on its own examples.

Cost per step: nothing travels. The copies drift apart; what to do with them is up to a procedure.
"""

from dataclasses import dataclass

import torch

from sterna.replica import Replica
from sterna.seams import Comm, State


@dataclass(frozen=True, kw_only=True)
class Local:
    """Step the optimizer on the worker's own gradients."""

    def init(self, replica: Replica) -> State:
        """No state."""
        return {}

    def __call__(self, replica: Replica, state: State, comm: Comm, rng: torch.Generator) -> State:
        """One local step."""
        replica.update()
        return state


EXAMPLES = (Local(),)
