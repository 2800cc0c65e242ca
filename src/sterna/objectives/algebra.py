"""Objectives add and scale: ``CrossEntropy() + 1e-4 * GroupLasso(...)``.

With terms f_k that return ``Loss(per_example, penalty)`` and factors c_k, the sum returns::

    per_example = sum_k c_k per_example_k      penalty = sum_k c_k penalty_k

Each term is evaluated once, in order, and all draw from the same generator. So a loss on the data
plus any number of penalties takes one forward pass.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sterna.seams import Batch, Loss, Objective


class Composable:
    """Base of objectives: gives them ``+`` and ``*`` by a number."""

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        """The loss of ``model`` on ``batch``."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__.")

    def __add__(self, other: Objective) -> "Sum":
        return Sum((*_terms(self), *_terms(other))) if callable(other) else NotImplemented

    def __radd__(self, other: Objective) -> "Sum":
        return Sum((*_terms(other), *_terms(self))) if callable(other) else NotImplemented

    def __mul__(self, factor: float) -> "Scaled":
        return Scaled(factor, self) if isinstance(factor, int | float) else NotImplemented

    __rmul__ = __mul__


@dataclass(frozen=True, kw_only=True)
class MeanOutput(Composable):
    """The mean of the model's outputs for each example: for a model that computes its own loss.

    Example:
        >>> batch = Batch(torch.tensor([[1.0, 3.0]]), torch.zeros(1), torch.zeros(1))
        >>> MeanOutput()(nn.Identity(), batch, torch.Generator()).total
        tensor(2.)
    """

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        """One number an example; draws nothing from ``rng``."""
        outputs: Tensor = model(batch.inputs)
        return Loss(outputs.reshape(len(outputs), -1).mean(1), outputs.new_zeros(()))


@dataclass(frozen=True)
class Sum(Composable):
    """The sum of several objectives.

    Args:
        terms: objectives, each evaluated once.

    Raises:
        ValueError: there is no term.
        TypeError: a term is not callable.

    Example:
        >>> def weights(model, batch, rng):
        ...     return penalty_only(model.weight.square().sum(), batch)
        >>> model = nn.Linear(2, 1, bias=False)
        >>> nn.init.ones_(model.weight) is model.weight
        True
        >>> batch = Batch(torch.ones(3, 2), torch.zeros(3), torch.arange(3))
        >>> total = MeanOutput() + Scaled(0.5, weights)
        >>> total(model, batch, torch.Generator()).total.item()
        3.0
    """

    terms: tuple[Objective, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        if not self.terms:
            raise ValueError("Sum: terms must hold at least one objective; got none.")
        for term in self.terms:
            _check_objective("Sum", "terms", term)

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        """The sum of the terms' losses.

        Raises:
            ValueError: two terms give per-example losses of different shapes.
        """
        per_example, penalty = self.terms[0](model, batch, rng)
        for term in self.terms[1:]:
            loss = term(model, batch, rng)
            if loss.per_example.shape != per_example.shape:
                raise ValueError(
                    "Sum: every term must give one loss an example, shape "
                    f"{tuple(per_example.shape)} as the first does; got "
                    f"{tuple(loss.per_example.shape)} from {term!r}. A penalty returns "
                    "penalty_only(penalty, batch)."
                )
            per_example, penalty = per_example + loss.per_example, penalty + loss.penalty
        return Loss(per_example, penalty)


@dataclass(frozen=True)
class Scaled(Composable):
    """An objective times a number.

    Args:
        factor: any finite number.
        inner: the objective.

    Raises:
        ValueError: ``factor`` is not finite.
        TypeError: ``inner`` is not callable.
    """

    factor: float
    inner: Objective

    def __post_init__(self) -> None:
        if not math.isfinite(self.factor):
            raise ValueError(f"Scaled: factor must be a finite number; got {self.factor}.")
        _check_objective("Scaled", "inner", self.inner)

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        """The inner loss times ``factor``."""
        per_example, penalty = self.inner(model, batch, rng)
        return Loss(self.factor * per_example, self.factor * penalty)


def penalty_only(penalty: Tensor, batch: Batch) -> Loss:
    """The loss of an objective that does not look at the examples: zero for each, and a penalty."""
    return Loss(penalty.new_zeros(len(batch.targets)), penalty)


def _terms(objective: Objective) -> Iterator[Objective]:
    """The terms of a sum, or the one objective that it is."""
    if isinstance(objective, Sum):
        yield from objective.terms
    else:
        yield objective


def _check_objective(who: str, parameter: str, value: object) -> None:
    if not callable(value) or isinstance(value, type):
        raise TypeError(
            f"{who}: {parameter} must be an objective, called with (model, batch, rng); got "
            f"{value!r}."
        )
