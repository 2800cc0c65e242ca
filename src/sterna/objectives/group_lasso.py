"""Group lasso: a penalty on the length of whole structures, which go to zero together.

    R(W)    = sum_l s_l sum_g ||w_g||,    ||w_g|| = sqrt(sum of w^2 in the group g)      (1)
    dR/dw_g = s_l w_g / ||w_g||,  and 0 where ||w_g|| = 0                                (2)
    w_g    <- max(0, 1 - t s_l / ||w_g||) w_g          the proximal step                 (3)
    R(W)    = sum_l s_l sum_g e log(1 + ||w_g|| / e)   adaptive: s_l e / (e + ||w_g||)   (4)

Symbols: l layer, s_l its strength, t learning rate times coefficient, e ``adaptive``. With W[n, c, k]
filters n, channels c and kernel positions k the groups are W[n] (``filters``), W[:, c] (``channels``),
W[:, c, k] (``shapes``: a column of the lowered matrix), W (``depth``), rows and columns of a linear
layer (neurons), and all weights tied to one hidden unit of a recurrent network (``units``).
Reference: W. Wen, C. Wu, Y. Wang, Y. Chen, H. Li, "Learning Structured Sparsity in Deep Neural
    Networks", NIPS 2016, arXiv:1608.03665 (SSL). Hidden units: W. Wen et al., "Learning Intrinsic
    Sparse Structures within Long Short-Term Memory", ICLR 2018, arXiv:1709.05027 (ISS). Square root of
    the group's size: M. Yuan, Y. Lin, JRSS B 68(1), 2006. (4): E. Candes, M. Wakin, S. Boyd, 2008,
    arXiv:0711.1612, with its weights taken anew at each step.
Differs from the paper: the proximal step (3), ``by_size`` and (4) are offered beside it. ISS adds 1e-8
    below the root; here the gradient at zero is 0. Weight decay and the cut of single weights below
    1e-4 (`cut`, after every update in both papers) are the caller's.
Cost per step: one pass over the penalised weights for each structure, forward and backward. By (2)
    alone no group ever gets to zero, it swings about it: use (3) or the cut. Hurts before batch
    normalisation, which undoes any shrinking of W, so that all groups shrink alike; tie its scale and
    shift to the filter (``tied``). The coefficient does not carry over between losses that are means
    and sums. Overlapping structures (filters with channels, units) have no closed proximal step: (3) is
    then done for one after the other.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import get_args

import torch
from torch import nn

from sterna.objectives.algebra import Composable, penalty_only
from sterna.objectives.groups import Block, Kind, Part, PerGroup, blocks, tied_block, unit_parts
from sterna.seams import Batch, Loss

_KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class GroupLasso(Composable):
    """The penalty (1), or (4), over the structures whose strength is above 0.

    Args:
        filters: strength for filters of convolutions, at least 0; as all strengths, 0 leaves it out.
        channels: for input channels of convolutions.
        shapes: for filter shapes: one kernel position of one channel over all filters.
        depth: for whole convolutions, those in ``branches``.
        rows: for rows of linear layers, their outputs.
        columns: for columns of linear layers, their inputs.
        units: for the groups of ``readers`` and ``tied``.
        branches: `fnmatch` patterns of the convolutions that a shortcut leads around.
        readers: pairs (recurrent module, linear or recurrent module that reads its outputs): every
            hidden unit of the first, in each of its layers, with all that reads it, is a group.
        tied: groups that you write out, each as the parts of one structure.
        by_size: multiply each strength by the square root of the number of weights in the group.
        adaptive: e in (4), the norm at which the strength has halved; None is (1).
        strengths: pairs (pattern of layers, factor), the first that fits counts; 0 leaves a layer out.

    Raises:
        ValueError: a value is out of range, or all strengths are 0; when called, what is asked for is
            not in the model.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.load_state_dict({"weight": torch.tensor([[3.0, 4.0], [0.0, 0.0]])})
        >>> batch = Batch(torch.ones(1, 2), torch.zeros(1), torch.zeros(1))
        >>> GroupLasso(rows=1.0)(model, batch, torch.Generator()).penalty.item()
        5.0
        >>> zero_groups(model, GroupLasso(rows=1.0))
        {'rows': (1, 2)}
    """

    filters: float = 0.0
    channels: float = 0.0
    shapes: float = 0.0
    depth: float = 0.0
    rows: float = 0.0
    columns: float = 0.0
    units: float = 0.0
    branches: tuple[str, ...] = ()
    readers: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[Part, ...], ...] = ()
    by_size: bool = False
    adaptive: float | None = None
    strengths: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        given = [(name, getattr(self, name)) for name in (*_KINDS, "units")]
        for name, value in (*given, *((f"strengths[{p!r}]", x) for p, x in self.strengths)):
            if not 0 <= value < math.inf:
                raise ValueError(
                    f"GroupLasso: {name} must be at least 0 and finite; got {value!r}."
                )
        if not any(value for _, value in given):
            raise ValueError(
                f"GroupLasso: one of {', '.join(name for name, _ in given)} must be above 0; got 0 for "
                "all. For no penalty leave GroupLasso out."
            )
        if self.adaptive is not None and not 0 < self.adaptive < math.inf:
            raise ValueError(
                "GroupLasso: adaptive (e) must be above 0 and finite, or None for equal strengths; "
                f"got {self.adaptive!r}."
            )
        for name, needs in (("depth", ("branches",)), ("units", ("readers", "tied"))):
            if (getattr(self, name) > 0) != any(getattr(self, need) for need in needs):
                raise ValueError(
                    f"GroupLasso: {name} and {' or '.join(needs)} go together; got {name}="
                    f"{getattr(self, name)!r} and {', '.join(repr(getattr(self, n)) for n in needs)}."
                )

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        """The penalty, and 0 for each example; the model is not run and ``rng`` not used."""
        terms = [s * self._bent(block.norms()).sum() for block, s in self.blocks(model)]
        return penalty_only(torch.stack(terms).sum(), batch)

    def _bent(self, norms: torch.Tensor) -> torch.Tensor:
        return norms if (e := self.adaptive) is None else e * torch.log1p(norms / e)

    def slope(self, norms: PerGroup, strength: float) -> PerGroup:
        """How much the penalty gains with the length of groups, by their lengths now."""
        e = self.adaptive
        return torch.full_like(norms, strength) if e is None else strength * e / (e + norms)

    def blocks(self, model: nn.Module, writable: bool = False) -> list[tuple[Block, float]]:
        """The groups, a block for each structure of each layer, with their strength s_l."""
        found: list[tuple[Block, float]] = []
        for kind in _KINDS:
            if strength := getattr(self, kind):
                layers = blocks(model, kind, "GroupLasso", writable)
                if kind == "depth":
                    _all_used("branches", self.branches, layers)
                    layers = [
                        b for b in layers if any(fnmatchcase(b.name, p) for p in self.branches)
                    ]
                found += [(block, strength) for block in layers]
        if self.units:
            named = [*unit_parts(model, self.readers, "GroupLasso")]
            named += [(parts[0].parameter, parts) for parts in self.tied]
            found += [(tied_block(model, *n, "GroupLasso"), self.units) for n in named]
        _all_used("strengths", tuple(p for p, _ in self.strengths), [block for block, _ in found])
        weighed = [(b, s * self._factor(b) * math.sqrt(b.size) ** self.by_size) for b, s in found]
        if not (kept := [(block, s) for block, s in weighed if s]):
            raise ValueError(f"GroupLasso: strengths leaves no layer over; got {self.strengths!r}.")
        return kept

    def _factor(self, block: Block) -> float:
        return next((x for p, x in self.strengths if fnmatchcase(block.name, p)), 1.0)


def _all_used(parameter: str, patterns: tuple[str, ...], found: list[Block]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(block.name, pattern) for block in found):
            raise ValueError(
                f"GroupLasso: each pattern in {parameter} must fit a layer; got {pattern!r}, and the "
                f"layers are {', '.join(dict.fromkeys(block.name for block in found))}."
            )


def zero_groups(
    model: nn.Module, penalty: GroupLasso, tolerance: float = 0.0
) -> dict[str, tuple[int, int]]:
    """For each layer and structure: groups with a norm of at most ``tolerance``, and all groups."""
    return {
        f"{block.name}.{block.kind}".lstrip("."): (int((n <= tolerance).sum()), len(n))
        for block, _ in penalty.blocks(model)
        for n in [block.norms().detach()]
    }


EXAMPLES = (GroupLasso(rows=1.0, columns=0.5), GroupLasso(rows=1.0, by_size=True, adaptive=0.3))
