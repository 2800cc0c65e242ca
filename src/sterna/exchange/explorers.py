"""Who decides which weights outside the core travel: chance, or each worker's best response.

Once the core C is fixed, worker i may send m more weights, a set E^i, and keeps the rest to itself. What
it keeps is its cost, for nobody else learns of it, and what is sent late is sent stale:

    cost_i(E^i) = sum_{k not in C + E^i} (w^i_k - a_k)^2                               (1)

Symbols: w^i the worker's weights, a the merged ones. No other worker's choice enters (1) before the
merge, so the best response is the same whatever they do: the m largest |w^i_k - a_k| outside C.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from sterna.randomness import generator
from sterna.seams import Comm

Residual = Float[Tensor, "n"]
Core = Bool[Tensor, "n"]
Indices = Int64[Tensor, "m"]


class Explorer(Protocol):
    """Chooses weights outside the core, anew in every round."""

    @property
    def shared(self) -> bool:
        """Whether all workers choose the same, so that no index need travel."""
        ...

    def choose(
        self, residual: Residual, core: Core, num: int, comm: Comm, rng: torch.Generator
    ) -> Indices:
        """``num`` indices outside the core, at most all of them; ascending."""
        ...


@dataclass(frozen=True, kw_only=True)
class AtRandom:
    """Uniformly, the same for all workers: rank 0 draws a seed and sends it, in 64 bits."""

    @property
    def shared(self) -> bool:
        """All workers draw from one seed."""
        return True

    def choose(
        self, residual: Residual, core: Core, num: int, comm: Comm, rng: torch.Generator
    ) -> Indices:
        """``num`` of those outside the core, each equally likely."""
        outside = (~core).nonzero().squeeze(1)
        if num == 0 or num >= len(outside):
            return outside[:num]
        seed = comm.broadcast_(torch.randint(2**62, (1,), generator=rng).to(core.device))
        order = torch.randperm(len(outside), generator=generator(int(seed), "explorer"))
        return outside[order[:num].to(core.device).sort().values]


@dataclass(frozen=True, kw_only=True)
class BestResponse:
    """Each worker its own: what it knows best and the merged weights know least, Eq. (1).

    Indices travel beside the values, 32 bits each, and every worker gathers those of all.
    """

    @property
    def shared(self) -> bool:
        """Every worker has a residual of its own."""
        return False

    def choose(
        self, residual: Residual, core: Core, num: int, comm: Comm, rng: torch.Generator
    ) -> Indices:
        """The best response; see `best_response`."""
        return best_response(residual, core, num)


def best_response(residual: Residual, core: Core, num: int) -> Indices:
    """The set outside ``core`` of at most ``num`` weights with the least cost, Eq. (1).

    Args:
        residual: w - a, what this worker knows and the merged weights do not.
        core: what travels in any case.
        num: how many more may travel.

    Returns:
        Indices, ascending.

    Example:
        >>> core = torch.tensor([True, False, False, False])
        >>> best_response(torch.tensor([9.0, 0.1, -3.0, 2.0]), core, 2)
        tensor([2, 3])
    """
    num = min(num, len(core) - int(core.sum()))
    size = residual.abs().masked_fill(core, -1.0)
    return size.topk(num, sorted=False).indices.sort().values
