"""Group lasso between two updates: whole groups are set to zero, which its slope alone never does.

    w_g  <-  max(0, 1 - t s_l / ||w_g||) w_g            the proximal step                (1)
    w_g  <-  0  if ||w_g|| <= t s_l                     beside the slope                 (2)

Symbols: w_g group g of layer l, s_l its strength (with ``adaptive`` that at its length now), t learning rate
times coefficient.
Reference: N. Parikh, S. Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 1(3), 2014.
Cost: one pass over the penalised weights.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn

from sterna.objectives.group_lasso import GroupLasso
from sterna.objectives.groups import Block, PerGroup


@torch.no_grad()
def proximal_step(model: nn.Module, penalty: GroupLasso, threshold: float) -> None:
    """Eq. (1) in place, after the optimizer's step and instead of adding the penalty to the loss.

    Args:
        model: its parameters are changed; groups with a frozen parameter stay as they are.
        penalty: which groups, how strongly.
        threshold: t, learning rate times coefficient, at least 0.

    Raises:
        ValueError: ``threshold`` is negative or not finite, or a layer computes its weight.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.load_state_dict({"weight": torch.tensor([[3.0, 4.0], [0.3, 0.4]])})
        >>> proximal_step(model, GroupLasso(rows=1.0), 0.1 * 10.0)
        >>> model.weight.tolist()
        [[2.4000000953674316, 3.200000047683716], [0.0, 0.0]]
    """
    for block, norms, less in _reached(model, penalty, threshold, "proximal_step"):
        block.scale_(torch.where(norms <= less, 0.0, 1 - less / norms))


@torch.no_grad()
def land(model: nn.Module, penalty: GroupLasso, threshold: float) -> None:
    """Set to zero, in place, each group that one step of the slope would carry past zero: (2).

    The slope never ends at zero by itself, it steps over it. The papers cut single weights below 1e-4.

    Args:
        model: its parameters are changed; groups with a frozen parameter stay as they are.
        penalty: which groups, how strongly.
        threshold: learning rate times coefficient, at least 0.

    Raises:
        ValueError: ``threshold`` is negative or not finite, or a layer computes its weight.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.load_state_dict({"weight": torch.tensor([[3.0, 4.0], [0.3, 0.4]])})
        >>> land(model, GroupLasso(rows=1.0), 1.0)
        >>> model.weight.tolist()
        [[3.0, 4.0], [0.0, 0.0]]
    """
    for block, norms, less in _reached(model, penalty, threshold, "land"):
        block.scale_((norms > less).to(norms.dtype))


def _reached(
    model: nn.Module, penalty: GroupLasso, threshold: float, who: str
) -> Iterator[tuple[Block, PerGroup, PerGroup]]:
    """Each block that is not frozen, the lengths of its groups, and how far a step goes at each."""
    if not 0 <= threshold < math.inf:
        raise ValueError(f"{who}: threshold must be at least 0 and finite; got {threshold!r}.")
    for block, strength in penalty.blocks(model, writable=True):
        if not block.frozen:
            norms = block.norms()
            yield block, norms, threshold * penalty.slope(norms, strength)
