"""What a penalty treats as one, and surgery removes as one.

A unit of a coupled group (`sterna.surgery.coupling`) is a filter with its bias, the scale and shift of its
batch norm and the columns of all that reads it; a channel of a residual stream; a hidden unit of an LSTM;
a head. A residual branch ends in a layer; with that layer at zero, the whole block passes its input on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sterna.objectives.group_lasso import GroupLasso
from sterna.objectives.groups import Part, tied_block
from sterna.randomness import isolated
from sterna.surgery.coupling import Group, Slice
from sterna.surgery.program import copied
from sterna.surgery.shrink import shrinkable

Norms = Float[Tensor, " units"]

_LEAST = 0.1
"""Of a layer's first mean length: what its mean length counts for at least, should all of it die."""


@dataclass(frozen=True, kw_only=True)
class Structures:
    """The removable structures of one model.

    Args:
        units: for each coupled group the parts of its units, as the penalty sees them.
        branches: for each residual block the parts of the layer that its branch ends in.
        left: layers that are not penalised, with the reason.
        multiply_adds: of the model, for one example.
        lengths: mean length of the units that are not zero, by group, when the structures were found.
        branch_length: mean root mean square of the branches' last layers, those at zero left out, when
            the structures were found.
    """

    units: Mapping[str, tuple[Part, ...]]
    branches: Mapping[str, tuple[Part, ...]]
    left: Mapping[str, str]
    multiply_adds: int
    lengths: Mapping[str, float]
    branch_length: float = 0.0

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Tensor,
        *,
        layers: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        depth: bool = False,
    ) -> "Structures":
        """The structures whose layer's name one of ``layers`` fits and none of ``exclude``.

        Args:
            model: not changed.
            example: one input, shape (1, ...), on the model's device.
            layers: `fnmatch` patterns of groups, and of blocks.
            exclude: patterns of those that are left as they are.
            depth: whether to look for residual blocks.

        Raises:
            Refused: the model cannot be traced, or nothing in it can shrink.
            ValueError: a pattern fits no group and no block, or nothing is left.

        Example:
            >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
            >>> found = Structures.of(model, torch.ones(1, 4))
            >>> [(part.parameter, part.axis) for part in found.units["0"]]
            [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
        """
        coupling = shrinkable(model, example)
        left = dict(coupling.fixed)
        units = {name: parts_of(model, group) for name, group in coupling.groups.items()}
        for name in [name for name, parts in units.items() if not parts]:
            left[name] = "its units do not stand in a regular order in its parameters"
            del units[name]
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        branches = branch_ends(model, example) if depth else {}
        known = (*units, *branches)
        for name, parts in (units | branches).items():
            if stays := [part.parameter for part in parts if part.parameter in frozen]:
                left[name] = f"{', '.join(dict.fromkeys(stays))} is frozen (requires_grad is False)"
        for pattern in (*layers, *exclude):
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(
                    f"Structures: each pattern in layers and exclude must fit a group or a block; got "
                    f"{pattern!r}, and there are {', '.join(known) or 'none'}."
                )

        def wanted(name: str) -> bool:
            fits = any(fnmatchcase(name, p) for p in layers)
            return fits and not any(fnmatchcase(name, p) for p in exclude)

        left |= {name: "it was excluded" for name in known if not wanted(name)}
        units = {name: parts for name, parts in units.items() if name not in left}
        branches = {name: parts for name, parts in branches.items() if name not in left}
        if not units and not branches:
            why = "; ".join(f"{name!r}: {reason}" for name, reason in left.items())
            raise ValueError(f"Structures: nothing is left that may go. {why}.")
        lengths = [_root_mean_square(model, name, parts) for name, parts in branches.items()]
        return cls(
            units=units,
            branches=branches,
            left=left,
            multiply_adds=coupling.multiply_adds,
            lengths={name: typical(_norms(model, name, parts)) for name, parts in units.items()},
            branch_length=typical(torch.tensor(lengths)),
        )

    def norms(self, model: nn.Module) -> dict[str, Norms]:
        """The length of each unit, by group."""
        return {name: _norms(model, name, parts) for name, parts in self.units.items()}

    def mean_lengths(self, norms: Mapping[str, Norms]) -> dict[str, float]:
        """m_l of each group: of the units that are not zero, but never below a tenth of what it was.

        A layer that has died as a whole is so neither spared by the penalty nor measured by what is
        left of it.
        """
        return {name: max(typical(x), _LEAST * self.lengths[name]) for name, x in norms.items()}

    def branch_lengths(self, model: nn.Module) -> dict[str, float]:
        """Root mean square of the last layer of each branch, by block."""
        return {
            name: _root_mean_square(model, name, parts) for name, parts in self.branches.items()
        }

    def penalties(
        self,
        model: nn.Module,
        strength: float,
        depth: float = 0.0,
        factors: Sequence[tuple[str, float]] = (),
        adaptive: float | None = None,
    ) -> list[GroupLasso]:
        """One group lasso for each group, as strong as its living units are long on average now.

        A branch's is as strong as all were long on average when they were found.

        So one strength fits all layers, whatever their sizes; in front of batch norms, where lengths
        mean nothing, it falls with them.

        Args:
            model: whose lengths count.
            strength: of units; 0 leaves them out.
            depth: of residual branches; 0 leaves them out.
            factors: pairs (pattern, factor) by group or block, the first that fits counts.
            adaptive: e in (4) of `GroupLasso`, in average lengths.

        Raises:
            ValueError: a pattern of ``factors`` fits nothing.
        """
        found = [
            (name, strength, self.units[name], mean)
            for name, mean in self.mean_lengths(self.norms(model)).items()
        ]
        for name, parts in self.branches.items():
            found.append((name, depth, parts, self.branch_length * math.sqrt(_size(model, parts))))
        for pattern, _ in factors:
            if not any(fnmatchcase(name, pattern) for name, *_ in found):
                raise ValueError(
                    f"Structures: each pattern in factors must fit a group or a block; got {pattern!r}, "
                    f"and there are {', '.join(name for name, *_ in found) or 'none'}."
                )
        lassos = []
        for name, basic, parts, mean in found:
            factor = next((x for p, x in factors if fnmatchcase(name, p)), 1.0)
            if basic * factor * mean > 0:
                bend = None if adaptive is None else adaptive * mean
                lassos.append(GroupLasso(units=basic * factor * mean, tied=(parts,), adaptive=bend))
        return lassos


def typical(norms: Norms) -> float:
    """The mean length of the units that are not zero; 0 if all are."""
    living = norms[norms > 0]
    return float(living.mean()) if len(living) else 0.0


def _size(model: nn.Module, parts: tuple[Part, ...]) -> int:
    """Number of weights in parts that are whole parameters."""
    return sum(model.get_parameter(part.parameter).numel() for part in parts)


@torch.no_grad()
def _norms(model: nn.Module, name: str, parts: tuple[Part, ...]) -> Norms:
    return tied_block(model, name, parts, "Structures").norms()


def _root_mean_square(model: nn.Module, name: str, parts: tuple[Part, ...]) -> float:
    return float(_norms(model, name, parts)) / math.sqrt(_size(model, parts))


def parts_of(model: nn.Module, group: Group) -> tuple[Part, ...]:
    """The weights that make or read the units of a group; those in front of a batch norm are left out.

    The norm's scale takes their place: their own length changes nothing.
    """
    own = {name for name, _ in model.named_parameters()}
    slices = [s for s in group.slices if s.parameter in own and s.role != "carries"]
    found = [_part(s) for s in slices]
    return tuple(part for part in found if part is not None)


def _part(where: Slice) -> Part | None:
    """A slice as `Part`; None where its entries do not repeat in equal steps."""
    count, per = len(where.index), len(where.index[0])
    if any(len(index) != per for index in where.index):
        return None
    index = torch.tensor(where.index).sort(dim=1).values
    first = int(index.min())
    for span in (s for s in range(per, 0, -1) if per % s == 0):
        gates = per // span
        regular = torch.arange(first, first + count * per).view(gates, count, span)
        if torch.equal(index, regular.transpose(0, 1).reshape(count, per)):
            return Part(where.parameter, where.dim, gates, span, first, count * per)
    return None


@torch.no_grad()
def branch_ends(model: nn.Module, example: Tensor) -> dict[str, tuple[Part, ...]]:
    """The residual blocks, and for each the whole last layer of its branch.

    A block is a module of one tensor in and one of the same shape out that gives its input, or its
    input's ReLU, when that layer is zero.

    Example:
        >>> from sterna.models import ResNet
        >>> sorted(branch_ends(ResNet(depth=8), torch.ones(1, 3, 32, 32)))
        ['stage1.0']
    """
    model = copied(model).eval()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    names = {module: name for name, module in model.named_modules() if name}
    ran: list[str] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        ran.append(names[module])
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if plain and isinstance(out, Tensor) and out.shape == args[0].shape:
            seen[names[module]] = (args[0].detach().clone(), out.detach().clone())

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in names]
    with isolated(0, "branches"):
        model(example)
    for hook in hooks:
        hook.remove()
    last_first = list(dict.fromkeys(reversed(ran)))
    found: dict[str, tuple[Part, ...]] = {}
    for name, (given, before) in seen.items():
        block = model.get_submodule(name)
        if torch.equal(before, given):
            continue
        for last in (x for x in last_first if x.startswith(f"{name}.")):
            layer = model.get_submodule(last)
            own = dict(layer.named_parameters(recurse=False))
            if own and _passes_on(block, layer, given):
                found[name] = tuple(Part(f"{last}.{key}", 0, span=len(p)) for key, p in own.items())
                break
    return {n: p for n, p in found.items() if not any(m.startswith(f"{n}.") for m in found)}


def _passes_on(block: nn.Module, layer: nn.Module, given: Tensor) -> bool:
    """Whether a block gives its input, or its ReLU, with a layer at zero, which is put back."""
    saved = {p: p.clone() for p in layer.parameters(recurse=False)}
    for p in saved:
        p.zero_()
    with isolated(0, "branches"):
        after = block(given.clone())
    for p, value in saved.items():
        p.copy_(value)
    return torch.equal(after, given) or torch.equal(after, torch.relu(given))
