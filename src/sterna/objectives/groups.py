"""Groups of weights that a structured penalty treats as one: views of a model's own parameters.

A convolution's weight is seen as W[group, n, c, k...] with filters n and channels c, a linear layer's
as W[0, row, column]. A structure is then a set of dimensions to sum over; no group is copied or looped
over. One block holds all groups of one structure in one layer.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Kind = Literal["filters", "channels", "shapes", "depth", "rows", "columns"]
PerGroup = Float[Tensor, " groups"]


class Part(NamedTuple):
    """Where the weights of tied groups stand in one parameter: group k has slice k along ``axis``.

    Args:
        parameter: name in the model.
        axis: dimension that the groups divide.
        gates: times that the groups repeat along it: 4 in an LSTM, whose gates are stacked.
        span: entries of one group that stand together: height x width, where maps were flattened.
        first: where the groups begin along the axis, behind other maps after a concatenation.
        length: entries from ``first`` that they take up; None: all that follow.
    """

    parameter: str
    axis: int
    gates: int = 1
    span: int = 1
    first: int = 0
    length: int | None = None


class Block(NamedTuple):
    """The groups of one structure in one layer.

    Args:
        name: the layer.
        kind: the structure.
        views: each a view of a parameter and its dimensions inside a group.
        frozen: whether one of the parameters does not require a gradient.
    """

    name: str
    kind: str
    views: tuple[tuple[Tensor, tuple[int, ...]], ...]
    frozen: bool = False

    @property
    def size(self) -> int:
        """Number of weights in each group."""
        return sum(math.prod(view.shape[d] for d in dims) for view, dims in self.views)

    def norms(self) -> PerGroup:
        """Euclidean norm of each group; its gradient is 0 where the norm is 0."""
        parts: list[Tensor] = [
            torch.linalg.vector_norm(view, dim=dims).reshape(-1) for view, dims in self.views
        ]
        if len(parts) == 1:
            return parts[0]
        norms: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return norms

    def scale_(self, factors: PerGroup) -> None:
        """Multiply each group by its factor, in place; one that two groups share by both."""
        for view, dims in self.views:
            view.mul_(factors.view([1 if d in dims else n for d, n in enumerate(view.shape)]))


def blocks(model: nn.Module, kind: Kind, who: str, writable: bool = False) -> list[Block]:
    """One block for each layer that has this structure: convolutions, or linear layers for rows and columns.

    Args:
        model: any module.
        kind: the structure.
        who: class that asks, for the error.
        writable: whether the views will be written to.

    Raises:
        ValueError: no layer has the structure, or one that is to be written to computes its weight.

    Example:
        >>> (block,) = blocks(nn.Linear(3, 2), "columns", "Example")
        >>> block.size, block.norms().shape
        (2, torch.Size([3]))
    """
    wanted: type[nn.Module] = nn.Linear if kind in ("rows", "columns") else _ConvNd
    found = []
    for name, module in model.named_modules():
        if isinstance(module, wanted):
            if writable and not isinstance(module.weight, nn.Parameter):
                raise ValueError(
                    f"{who}: layer {name!r} computes its weight (a parametrization, a mask or weight "
                    "normalisation), so it cannot be changed in place. Remove that first, or use the "
                    "penalty's gradient."
                )
            view = by_filter(module)
            frozen = not module.weight.requires_grad
            found.append(Block(name, kind, ((view, _inside(kind, view.dim())),), frozen))
    if not found:
        layer = "linear layer" if wanted is nn.Linear else "convolution"
        raise ValueError(
            f"{who}: {kind} needs a {layer} in the model; {type(model).__name__} has none. Set "
            f"{kind}=0 or choose another structure."
        )
    return found


def by_filter(module: nn.Module) -> Tensor:
    """The weight of a convolution or linear layer as (groups, filters, channels, ...), a view.

    Example:
        >>> by_filter(nn.Conv2d(4, 6, 3, groups=2)).shape
        torch.Size([2, 3, 2, 3, 3])
        >>> by_filter(nn.ConvTranspose1d(4, 6, 5, groups=2)).shape
        torch.Size([2, 3, 2, 5])
    """
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"by_filter: {type(module).__name__} has no weight of its own.")
    view = weight.view(getattr(module, "groups", 1), -1, *weight.shape[1:])
    return view.transpose(1, 2) if isinstance(module, _ConvTransposeNd) else view


def _inside(kind: Kind, dim: int) -> tuple[int, ...]:
    """The dimensions of ``by_filter`` that lie inside one group."""
    if kind in ("filters", "rows"):
        return tuple(range(2, dim))
    if kind in ("channels", "columns"):
        return (1, *range(3, dim))
    return (1,) if kind == "shapes" else tuple(range(dim))


def tied_block(model: nn.Module, name: str, parts: tuple[Part, ...], who: str) -> Block:
    """One block of groups that reach over several parameters.

    Raises:
        ValueError: there is no such parameter, a part does not fit it, or the parts differ in the
            number of groups.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        >>> hidden = (Part("0.weight", 0), Part("0.bias", 0), Part("1.weight", 1))
        >>> tied_block(model, "hidden", hidden, "Example").size
        8
    """
    views = tuple(_view(model, part, who) for part in parts)
    counts = [next(n for d, n in enumerate(v.shape) if d not in dims) for v, dims in views]
    if len(set(counts)) != 1:
        raise ValueError(
            f"{who}: tied parts must hold equally many groups; got "
            f"{dict(zip((p.parameter for p in parts), counts, strict=True))}. Give gates, span, first "
            "and length where slices repeat or stand together."
        )
    frozen = not all(model.get_parameter(part.parameter).requires_grad for part in parts)
    return Block(name, "units", views, frozen)


def _view(model: nn.Module, part: Part, who: str) -> tuple[Tensor, tuple[int, ...]]:
    try:
        weight = model.get_parameter(part.parameter)
        axis = range(weight.dim())[part.axis]
        length = weight.shape[axis] - part.first if part.length is None else part.length
        before, after = weight.shape[:axis], weight.shape[axis + 1 :]
        view = weight.narrow(axis, part.first, length)
        view = view.view(*before, part.gates, -1, part.span, *after)
    except (AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{who}: {part} does not fit {type(model).__name__}: {error}. Parameters are named as in "
            "named_parameters()."
        ) from error
    return view, tuple(d for d in range(view.dim()) if d != axis + 1)


def unit_parts(
    model: nn.Module, readers: tuple[tuple[str, str], ...], who: str
) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """For each layer (and direction) of the recurrent modules, all that is tied to its hidden units.

    For unit k: its rows in every gate of ``weight_ih`` and ``weight_hh``, column k of ``weight_hh``,
    and column k of each layer that reads it. Biases are left out.

    Args:
        model: holds the modules.
        readers: pairs of names: an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, and a linear or recurrent
            module that reads the outputs of its last layer.
        who: class that asks, for the errors.

    Raises:
        ValueError: a name is not in the model, a module of another type, or a reader of another width.
    """
    for name in dict.fromkeys(name for name, _ in readers):
        rnn = _module(model, name, who)
        if not isinstance(rnn, nn.RNNBase) or rnn.proj_size:
            raise ValueError(
                f"{who}: readers must begin with an nn.LSTM, nn.GRU or nn.RNN without proj_size; got "
                f"{name!r}, which is {rnn}."
            )
        ways, h = ("", "_reverse")[: 1 + rnn.bidirectional], rnn.hidden_size
        gates = {"LSTM": 4, "GRU": 3}.get(rnn.mode, 1)
        for layer in range(rnn.num_layers):
            if layer + 1 < rnn.num_layers:
                read = [f"{name}.weight_ih_l{layer + 1}{way}" for way in ways]
            else:
                read = [w for n, r in readers if n == name for w in _reads(model, r, who)]
            for weight in read:
                width = model.get_parameter(weight).shape[1]
                if width != len(ways) * h:
                    raise ValueError(
                        f"{who}: readers of {name!r} must take its {len(ways) * h} outputs and nothing "
                        f"else; {weight} takes {width}. Write the groups out in tied."
                    )
            for d, way in enumerate(ways):
                ih, hh = (f"{name}.weight_{x}_l{layer}{way}" for x in ("ih", "hh"))
                yield (
                    f"{name}.l{layer}{way}",
                    (
                        Part(ih, 0, gates),
                        Part(hh, 0, gates),
                        Part(hh, 1),
                        *(Part(weight, 1, first=d * h, length=h) for weight in read),
                    ),
                )


def _reads(model: nn.Module, name: str, who: str) -> list[str]:
    """The weights by which a module reads its input."""
    module = _module(model, name, who)
    if isinstance(module, nn.Linear):
        return [f"{name}.weight"]
    if isinstance(module, nn.RNNBase):
        return [f"{name}.weight_ih_l0{way}" for way in ("", "_reverse")[: 1 + module.bidirectional]]
    raise ValueError(
        f"{who}: readers must end with a linear or recurrent module; got {name!r}, a "
        f"{type(module).__name__}. Write the groups out in tied."
    )


def _module(model: nn.Module, name: str, who: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        names = [n for n, m in model.named_modules() if isinstance(m, nn.RNNBase | nn.Linear)]
        raise ValueError(
            f"{who}: readers names {name!r}, which is not in the model. Its recurrent and linear "
            f"modules: {', '.join(names) or 'none'}."
        ) from error


@torch.no_grad()
def cut(model: nn.Module, below: float = 1e-4) -> None:
    """Set each single weight smaller than ``below`` to 0, in place: in SSL and ISS after every step.

    Args:
        model: all its parameters are changed, biases and the scales of norms too.
        below: weights of at least this size stay.

    Raises:
        ValueError: ``below`` is negative or not finite.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = model.load_state_dict({"weight": torch.tensor([[0.5, -5e-5]])})
        >>> cut(model)
        >>> model.weight.tolist()
        [[0.5, 0.0]]
    """
    if not 0 <= below < math.inf:
        raise ValueError(f"cut: below must be at least 0 and finite; got {below!r}.")
    for parameter in model.parameters():
        parameter.masked_fill_(parameter.abs() < below, 0.0)
