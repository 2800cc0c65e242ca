"""Cutting a part out of a data set, class by class."""

import torch
from jaxtyping import Int64
from torch import Tensor

Targets = Int64[Tensor, "examples *positions"]


def stratified(targets: Targets, num_cut: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split positions in two, with the classes in equal shares as nearly as whole numbers allow.

    Args:
        targets: classes, shape (examples,); with more dimensions there is only one stratum.
        num_cut: size of the second part.
        rng: which examples of a class are cut.

    Returns:
        Positions of the first and of the second part, each in ascending order.
    """
    strata = targets if targets.dim() == 1 else torch.zeros(len(targets), dtype=torch.int64)
    shuffled = torch.randperm(len(strata), generator=rng)
    grouped = shuffled[strata[shuffled].argsort(stable=True)]  # by class, random within a class
    counts = strata.bincount()
    first = (counts.cumsum(0) - counts)[strata[grouped]]
    within = torch.arange(len(strata)) - first
    share = (within + 0.5) / counts[strata[grouped]]  # position within the class, in (0, 1)
    order = grouped[share.argsort(stable=True)]
    return order[num_cut:].sort().values, order[:num_cut].sort().values
