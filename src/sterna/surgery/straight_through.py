"""Straight-through estimator: train float weights through their rounding, by ordinary gradients.

The forward pass uses the rounded weights, the backward pass takes the rounding for the identity:

    y = f(x; Q(W))                                                                     (1)
    dL/dW := dL/dQ(W)                                                                  (2)

and what is kept in the end is Q(W). The edit puts (1) and (2) into a copy of the model, as a
parametrization of ``torch.nn.utils``; any loop and any optimizer then train W. `settle` takes the
parametrization out and leaves Q(W).

Symbols: W float weights, Q the rounding of `sterna.value_sets`, with a scale fitted at every step.
Reference: Y. Bengio, N. Leonard, A. Courville: Estimating or propagating gradients through stochastic
    neurons for conditional computation. 2013, arXiv:1308.3432; with (3) of `sterna.value_sets` it is
    F. Li, B. Zhang, B. Liu: Ternary weight networks. 2016, arXiv:1605.04711.
Differs from the paper: the rounding is deterministic; no gradient passes through the scale; biases and
    activations stay float, and nothing is clipped.
Cost per step: a few passes over the weights beside the ordinary step, as many again for sets without a
    threshold, whose scale is fitted in several rounds; the float weights and the optimizer's state stay
    in memory. (2) is no gradient of anything: weights near a threshold may swing about it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sterna.surgery.program import copied
from sterna.value_sets import TWN, Grids, Sets, ValueSet, check_sets, choose, require_plain

Weight = Float[Tensor, "*shape"]


class Rounded(nn.Module):
    """(1) and (2) for one tensor.

    Args:
        values: its set.
        name: what an error calls the tensor.

    Example:
        >>> weight = torch.tensor([0.6, -0.1], requires_grad=True)
        >>> rounded = Rounded(ValueSet(values=(-1.0, 0.0, 1.0), scaled=False), "weight")(weight)
        >>> (rounded * torch.tensor([2.0, 3.0])).sum().backward()
        >>> rounded.tolist(), weight.grad.tolist()
        ([1.0, 0.0], [2.0, 3.0])
    """

    def __init__(self, values: ValueSet, name: str) -> None:
        super().__init__()
        self.values, self.name = values, name

    def forward(self, weight: Weight) -> Weight:
        """The rounded tensor, whose gradient goes to ``weight`` as it is."""
        codes, grid = self.values.round(weight, self.name)
        return grid[codes.long()] + (weight - weight.detach())


@dataclass(frozen=True)
class StraightThroughReport:
    """Names of the parameters that are trained through their rounding."""

    parameters: tuple[str, ...]


def straight_through(
    model: nn.Module, *, sets: Sets = TWN
) -> tuple[nn.Module, StraightThroughReport]:
    """A copy of ``model`` that computes with rounded weights and trains the float ones.

    Args:
        model: any module.
        sets: one set for all weights, or pairs of a pattern of parameter names and its set.

    Raises:
        Refused: the model cannot be copied.
        ValueError: a pattern matches nothing; a parameter is shared by several modules or has a
            parametrization.

    Example:
        >>> training, report = straight_through(nn.Linear(8, 4))
        >>> len(training.weight.unique()) <= 3, report.parameters
        (True, ('weight',))
        >>> settled, grids = settle(training)
        >>> type(settled).__name__, len(grids["weight"])
        ('Linear', 3)
    """
    check_sets(sets, "straight_through")
    out = copied(model)
    places: dict[int, list[str]] = {}
    for name, x in out.named_parameters(remove_duplicate=False):
        places.setdefault(id(x), []).append(name)
    named = dict(out.named_parameters())
    chosen = choose(sets, named, "straight_through")
    require_plain(chosen, "straight_through")
    for name, values in chosen.items():
        if len(places[id(named[name])]) > 1:
            raise ValueError(
                "straight_through: every parameter must belong to one module; got "
                f"{places[id(named[name])]}, which are one tensor. Leave it out with patterns in sets."
            )
        owner, _, attribute = name.rpartition(".")
        module = out.get_submodule(owner)
        parametrize.register_parametrization(module, attribute, Rounded(values, name))
    return out, StraightThroughReport(tuple(chosen))


@torch.no_grad()
def settle(model: nn.Module) -> tuple[nn.Module, Grids]:
    """A copy of what `straight_through` gave, with plain parameters on their grids, and the grids.

    Raises:
        ValueError: nothing in the model is trained through its rounding.
    """
    out, grids = copied(model), {}
    for prefix, module in list(out.named_modules()):
        if not parametrize.is_parametrized(module):
            continue
        lists = dict(module.parametrizations.items())
        if not all(isinstance(step, Rounded) for steps in lists.values() for step in steps):
            continue
        # By hand: torch's own removal also takes the parameter from the class, which a copy shares.
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]
        for attribute, steps in lists.items():
            name = f"{prefix}.{attribute}" if prefix else attribute
            codes, grid = steps[0].values.round(steps.original, name)
            grids[name] = tuple(grid.tolist())
            module.register_parameter(attribute, nn.Parameter(grid[codes.long()]))
    if not grids:
        raise ValueError(
            "settle: the model must come from straight_through; got a "
            f"{type(model).__name__} without a rounded parameter. Call straight_through first."
        )
    return out, grids
