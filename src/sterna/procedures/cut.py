"""What vanished is cut out: whole residual blocks first, then units; to a target where there is one.

    gone  =  { g in l : ||w_g|| <= v m_l }  and  the shortest s n_l of each layer l               (1)

Symbols: w_g all weights of unit g, n_l number of units of layer l, m_l mean length of those that are not
zero (`Structures.mean_lengths`), v ``vanished``, s the least share that meets the target (0 without one). The
branches of all residual blocks count as one layer, with their typical length when the structures were found
for m_l. So lengths say what has vanished, and which of a layer go first; how many more is the same for all
layers, since lengths near the mean tell nothing of one layer beside another, and an even cut keeps the most
at small targets. All lengths are those before anything is cut, so that (1) grows with s.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from sterna.procedures.structures import Norms, Structures, parts_of
from sterna.surgery.coupling import couple
from sterna.surgery.depth import remove_blocks
from sterna.surgery.description import Description
from sterna.surgery.program import copied
from sterna.surgery.shrink import shrink

Mask = Bool[Tensor, "n"]


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a cut made.

    Args:
        model: the smaller one, or the given one where nothing went.
        widths: units before and after, by group; of groups that are still there.
        blocks: residual blocks that went.
        multiply_adds: of one example.
        description: how to rebuild the model.
    """

    model: nn.Module
    widths: Mapping[str, tuple[int, int]]
    blocks: tuple[str, ...]
    multiply_adds: int
    description: Description

    @property
    def removed(self) -> bool:
        """Whether anything went."""
        return bool(self.blocks) or any(before > after for before, after in self.widths.values())


@dataclass(frozen=True)
class Cut:
    """Takes out of a model what is short.

    Args:
        found: the structures that may go.
        round_to: widths are rounded up to multiples of it.
        example: one input, shape (1, ...).
    """

    found: Structures
    round_to: int
    example: Tensor

    def make(self, model: nn.Module, v: float, s: float = 0.0) -> Made:
        """Cut by (1); ``model`` is not changed."""
        units = self.found.norms(model)
        means = self.found.mean_lengths(units)
        alive = {
            name: (norms > v * means[name]) & ~shortest(norms, s) for name, norms in units.items()
        }
        lengths = self.found.branch_lengths(model)
        branches = torch.tensor(list(lengths.values()))
        gone = (branches <= v * self.found.branch_length) | shortest(branches, s)
        blocks = [name for name, goes in zip(lengths, gone, strict=True) if goes]
        description, multiply_adds = Description(), self.found.multiply_adds
        if blocks:
            model = copied(model)
            for name in blocks:
                for part in self.found.branches[name]:
                    model.get_parameter(part.parameter).detach().zero_()
            model, report = remove_blocks(model, self.example)
            description, multiply_adds = report.description, report.multiply_adds_after
            blocks = list(report.replaced)
        names = self._named_now(model) if blocks else {name: name for name in units}
        keep = {names[old]: mask for old, mask in alive.items() if old in names and not mask.all()}
        widths = {old: (len(alive[old]), len(alive[old])) for old in units if old in names}
        if keep:
            model, report = shrink(model, self.example, keep, round_to=self.round_to)
            description = description.then(report.description)
            multiply_adds = report.multiply_adds_after
            widths = {old: report.widths.get(names[old], two) for old, two in widths.items()}
        return Made(
            model=model,
            widths=widths,
            blocks=tuple(blocks),
            multiply_adds=multiply_adds,
            description=description,
        )

    def _named_now(self, model: nn.Module) -> dict[str, str]:
        """The groups of before that are still there, by what they are called without the blocks."""
        now = {
            name: set(parts_of(model, g)) for name, g in couple(model, self.example).groups.items()
        }
        return {
            old: new
            for old, parts in self.found.units.items()
            for new, others in now.items()
            if others & set(parts)
        }

    def left(self, model: nn.Module, v: float, s: float) -> int:
        """Multiply-adds after the cut."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the cut that is made in the end warns
            return self.make(model, v, s).multiply_adds

    def require(self, model: nn.Module, target: float) -> None:
        """See that a target can be met.

        Raises:
            ValueError: no cut leaves as little.
        """
        least, dense = self.left(model, 0.0, 1.0), self.found.multiply_adds
        if least > target:
            left = "; ".join(f"{name!r}: {why}" for name, why in self.found.left.items())
            raise ValueError(
                f"sparsify: multiply_adds={target / dense:.4g} cannot be met: with one unit in each layer, "
                f"rounded up to {self.round_to}, {least / dense:.4f} of the {dense} multiply-adds are left. "
                "Ask for that or more, or lower round_to."
                + (f" Left alone: {left}." if left else "")
            )

    def least(self, model: nn.Module, v: float, target: float) -> float:
        """The least s with which no more than the target is left, by bisection."""
        sizes = {len(x) for x in self.found.norms(model).values()} | {len(self.found.branches)}
        steps = sorted({k / n for n in sizes for k in range(n + 1) if n} | {0.0, 1.0})
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            if self.left(model, v, steps[middle]) <= target:
                high = middle
            else:
                low = middle + 1
        return steps[low]


def shortest(lengths: Norms, s: float) -> Mask:
    """Which ones make the share ``s`` of all that is the shortest, rounded down."""
    those = torch.zeros(len(lengths), dtype=torch.bool, device=lengths.device)
    those[lengths.argsort(stable=True)[: int(s * len(lengths) + 1e-6)]] = True
    return those
