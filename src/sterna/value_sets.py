"""Finite sets of values for weights, and the nearest point of such a set.

A set V = {v_1 < ... < v_K} and one positive scale s a tensor allow a weight the values s v_k, its
grid. Rounding a tensor W to the nearest point of its grid leaves the scale to be chosen; it is the
fixed point of two steps that both lower |W - s v(C)|^2, from s = rms(W) / rms(V):

    C = nearest point of V to W / s                                                    (1)
    s = <W, v(C)> / <v(C), v(C)>                                                       (2)

With a ``threshold`` t, for V = {-1, 0, 1}, it is the rule of ternary weight networks instead:

    C = sign(W) [|W| > t mean|W|],   s = mean of |W| where C is not 0                  (3)

Symbols: W weights, C codes (positions in V), t 0.7 in the paper. A tie in (1) goes to the lower value.

Reference: for (3) F. Li, B. Zhang, B. Liu: Ternary weight networks. 2016, arXiv:1605.04711.
Differs from the paper: nothing.
Cost per step: a few passes over the tensor, at most 50 times for (1) and (2).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sterna.flat import Named

Weight = Float[Tensor, "*shape"]
Codes = UInt8[Tensor, "*shape"]
Grid = Float[Tensor, " values"]
Grids = Mapping[str, tuple[float, ...]]

_ROUNDS = 50


@dataclass(frozen=True, kw_only=True)
class ValueSet:
    """The values that a weight may take.

    Args:
        values: V, 2 to 256 different finite numbers; sorted on construction.
        scaled: True fits one scale a tensor; False takes ``values`` as they are.
        threshold: t, in means of the magnitude: (3) in place of (1) and (2). Only for the scaled set
            {-1, 0, 1}; None rounds to the nearest value.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> codes, grid = ValueSet().round(torch.tensor([0.5, -0.1, -0.5, 0.02]))
        >>> codes.tolist(), grid.tolist()
        ([2, 1, 0, 1], [-0.5, 0.0, 0.5])
    """

    values: tuple[float, ...] = (-1.0, 0.0, 1.0)
    scaled: bool = True
    threshold: float | None = None

    def __post_init__(self) -> None:
        given: object = self.values
        numbers = isinstance(given, tuple) and all(
            isinstance(v, int | float) and math.isfinite(v) for v in given
        )
        if not numbers or not 2 <= len(set(self.values)) == len(self.values) <= 256:
            raise ValueError(
                "ValueSet: values must be a tuple of 2 to 256 different finite numbers; got "
                f"{given!r}. The ternary set is (-1.0, 0.0, 1.0)."
            )
        object.__setattr__(self, "values", tuple(sorted(float(v) for v in self.values)))
        if self.threshold is None:
            return
        if not 0 <= self.threshold < math.inf:
            raise ValueError(
                "ValueSet: threshold must be at least 0 and finite, or None; got "
                f"{self.threshold!r}. It counts means of the magnitude; the paper takes 0.7."
            )
        if self.values != (-1.0, 0.0, 1.0) or not self.scaled:
            raise ValueError(
                "ValueSet: threshold must be None unless the set is {-1, 0, 1} with a scale; got "
                f"{self.threshold!r} with {self.values!r}, scaled={self.scaled!r}. None rounds to "
                "the nearest value, whatever the set."
            )

    def round(self, weight: Weight, name: str = "weight") -> tuple[Codes, Grid]:
        """Codes of the shape of ``weight``, and the grid in its dtype, ascending.

        ``grid[codes.long()]`` is the rounded tensor. A tensor of zeros, or one that no positive scale
        fits, has the scale 1.

        Args:
            weight: a floating-point tensor of any shape.
            name: what an error calls it.

        Raises:
            ValueError: ``weight`` holds NaN or infinity.
        """
        w = weight.detach().double()
        if not bool(w.isfinite().all()):
            raise ValueError(
                f"ValueSet: {name} must be finite to be rounded; it holds NaN or infinity. "
                "Train again with a lower learning rate, or mend the weights."
            )
        values = torch.tensor(self.values, dtype=torch.float64, device=w.device)
        if self.threshold is not None:
            magnitude = w.abs()
            kept = magnitude > self.threshold * magnitude.mean() if w.numel() else magnitude > 0
            scale = float(magnitude[kept].mean()) if bool(kept.any()) else 1.0
            return (1 + w.sign() * kept).to(torch.uint8), (values * scale).to(weight.dtype)
        scale = self._scale(w, values) if self.scaled else 1.0
        grid = (values * scale).to(weight.dtype)
        return nearest(weight, grid), grid

    def _scale(self, w: Tensor, values: Tensor) -> float:
        """Fixed point of (1) and (2)."""
        norm = float(w.square().sum())
        if norm == 0:
            return 1.0
        scale = math.sqrt(norm / w.numel() / float(values.square().mean()))
        before = None
        for _ in range(_ROUNDS):
            codes = nearest(w, values * scale)
            if before is not None and torch.equal(codes, before):
                break
            chosen = values[codes.long()]
            power = float(chosen.square().sum())
            fitted = float((w * chosen).sum()) / power if power else 0.0
            if fitted <= 0:
                break
            scale, before = fitted, codes
        return scale


TERNARY = ValueSet()
"""{-1, 0, 1} and a scale, rounded to the nearest."""

TWN = ValueSet(threshold=0.7)
"""{-1, 0, 1} and a scale, rounded as ternary weight networks do."""

Sets = ValueSet | tuple[tuple[str, ValueSet], ...]
"""One set for all weights, or pairs of a pattern (``fnmatch``) of parameter names and its set."""


def nearest(weight: Weight, grid: Grid) -> Codes:
    """Positions of the nearest values of an ascending grid.

    Example:
        >>> nearest(torch.tensor([0.4, -3.0, 0.6]), torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [1, 0, 2]
    """
    middle = (grid[1:] + grid[:-1]) / 2
    return torch.bucketize(weight.detach().contiguous(), middle).to(torch.uint8)


def choose(sets: Sets, named: Named, who: str) -> dict[str, ValueSet]:
    """The set of each parameter that is given one.

    A single set is for every parameter of two dimensions or more: weights, not biases and scales of
    normalisations. Patterns may name any parameter; the first that matches counts.

    Args:
        sets: one set, or pairs of pattern and set.
        named: the parameters by name.
        who: class or function for errors.

    Raises:
        ValueError: a pattern matches no parameter, or there is no weight.
    """
    if isinstance(sets, ValueSet):
        chosen = {name: sets for name, x in named.items() if x.dim() >= 2}
        if not chosen:
            raise ValueError(
                f"{who}: the model must have a parameter of at least two dimensions; got "
                f"{list(named)[:6]}. Name what is meant with sets=((pattern, ValueSet()),)."
            )
        return chosen
    chosen = {}
    for pattern, values in sets:
        matched = [name for name in named if fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f"{who}: pattern {pattern!r} of sets must match a parameter; it matches none of "
                f"{list(named)[:6]}. Patterns are those of fnmatch, on the names of parameters."
            )
        for name in matched:
            chosen.setdefault(name, values)
    return chosen


def require_plain(names: Iterable[str], who: str) -> None:
    """Refuse parameters that a parametrization, weight norm say, makes the weight of.

    Raises:
        ValueError: one of them is such a parameter.
    """
    for name in names:
        if ".parametrizations." in f".{name}":
            raise ValueError(
                f"{who}: every parameter must be one of a plain module; got {name!r}. Remove its "
                "parametrization first (torch.nn.utils.parametrize.remove_parametrizations), or leave "
                "it out with patterns in sets."
            )


def check_sets(sets: Sets, who: str) -> None:
    """Refuse what is neither a set nor pairs of pattern and set.

    Raises:
        ValueError: says which form is meant.
    """
    given: object = sets
    if isinstance(given, ValueSet):
        return
    pairs = isinstance(given, tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], ValueSet)
        for pair in given
    )
    if not pairs or not given:
        raise ValueError(
            f"{who}: sets must be a ValueSet, or a tuple of pairs of a name pattern and its "
            f'ValueSet; got {given!r}. Write sets=(("fc.*", ValueSet()),).'
        )
