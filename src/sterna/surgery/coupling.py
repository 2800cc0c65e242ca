"""Coupling: which slices of a model's parameters must be removed together, found from the model itself.

A unit is a set of slices (channel 3 of a convolution, its batch norm, column 3 of what reads it; across a
residual sum also channel 3 of every other branch). A group is the units that live in the same dimensions
of the same parameters: the output channels of a layer, usually. `couple` traces the model on an example,
carries a label for every index of every parameter dimension through each operator (`labels`, `rules`),
and reads units and groups off the merged labels. What cannot shrink is said, with the reason.

Why `torch.export` and not `torch.fx`: export runs the user's own Python on tensors without data, so
functional calls, bare parameters, loops and branches on shapes all trace; an operator has one spelling,
with a schema; recurrent layers stay one operator; a branch on values is an error instead of a guess. What
it loses, which sizes were computed and which were numbers in the code, is found out by a trial run
(`sterna.surgery.shrink.shrinkable`).
Why not the library Torch-Pruning: its graph is read off autograd per layer, not per index. Version 1.6.1
crashes on a single LSTM, silently leaves an LSTM language model and functional convolutions as they are,
and gives no reasons; its files are pickles. For plain CNNs it would have served as well.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node

from sterna.surgery.labels import Along, Book, Labels, Traced
from sterna.surgery.operators import NORMS, RULES, STATES
from sterna.surgery.program import TORCH, arguments, multiply_adds, program
from sterna.surgery.rules import Site, settle, tensors, unknown

Unit: TypeAlias = tuple[str, int]
"""Name of the group, and which of its units."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Where the units of a group stand in one dimension of one parameter or buffer.

    Args:
        parameter: name in the model.
        dim: the dimension.
        index: for each unit its entries along the dimension; one column per channel, say, or 49 of them
            behind a flattened 7 x 7 image, or the rows of four gates.
        role: ``"reads"`` for weight columns that multiply the unit's value, ``"writes"`` for what makes
            the value, ``"both"`` for a shared weight that does both, ``"carries"`` for the rest: running
            statistics, weights in front of a batch norm.
    """

    parameter: str
    dim: int
    index: tuple[tuple[int, ...], ...]
    role: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that live in the same parameters; each may go alone.

    Args:
        name: of the first layer that writes them; ``lstm.l0`` for layer 0 of an LSTM.
        size: number of units.
        slices: where they stand.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True, kw_only=True)
class Width:
    """An attribute that counts units: of ``module``, how many of ``units`` are left (None: one that stays).

    ``guessed``: it merely equals the width, and is changed only where the model does not run otherwise.
    """

    module: str
    attribute: str
    units: tuple[Unit | None, ...]
    guessed: bool


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """What may be removed from a model, and what may not.

    Args:
        groups: by name, in the model's order.
        fixed: name of each layer whose units stay, with the reason.
        unreached: parameters that the example did not use; they keep their sizes.
        multiply_adds: of the example as it was given.
        widths: attributes that follow.
        views: for each group that passes a ``view`` or the like, the line of code.
        recurrent: for each recurrent module the units of its layers (and directions).
        states: for each of the model's outputs the units of its last dimension, layer by layer; None
            where its size is fixed.
    """

    groups: Mapping[str, Group]
    fixed: Mapping[str, str]
    unreached: tuple[str, ...]
    multiply_adds: int
    widths: tuple[Width, ...]
    views: Mapping[str, str]
    recurrent: Mapping[str, tuple[tuple[Unit | None, ...], ...]]
    states: tuple[tuple[tuple[Unit | None, ...], ...] | None, ...]


def couple(model: nn.Module, example: Tensor | tuple[Any, ...]) -> Coupling:
    """Trace a model and find what may be removed together. The model is not changed.

    Args:
        model: any module whose forward `torch.export` can follow.
        example: an input, or a tuple of positional arguments, on the model's device. Shapes count;
            of the values only that the model runs on them.

    Raises:
        Refused: the model cannot be traced, does not run, or is quantised or scripted.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> found = couple(model, torch.ones(1, 4))
        >>> [(s.parameter, s.dim, s.role) for s in found.groups["0"].slices]
        [('0.weight', 0, 'writes'), ('0.bias', 0, 'writes'), ('2.weight', 1, 'reads')]
        >>> found.fixed["2"]
        "it is part of the model's output"
    """
    return _Tracing(model, arguments(example)).coupling()


class _Tracing:
    """One walk over the graph; then groups."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.model, self.inputs, self.book = model, inputs, Book()
        self.program = program(model, inputs)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        first: dict[int, str] = {}
        self.canonical: dict[str, str] = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                self.canonical[name] = first.setdefault(id(tensor), name)
        self.known: dict[str, Traced] = {}
        self.buffers = {self.canonical[name] for name, _ in model.named_buffers()}
        self.outputs: list[Traced | None] = []
        self.walk()

    def walk(self) -> None:
        """Apply the rules in the order of the graph."""
        values: dict[Node, Any] = {}
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                values[node] = self.given(node, specs[node.name])
            elif node.op == "call_function":
                values[node] = self.apply(node, values)
            elif node.op == "output":
                self.finish(node, values)

    def given(self, node: Node, spec: Any) -> Traced | None:
        """A parameter or buffer has labels, an input has none."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        shape = tuple(value.shape)
        fixed = Traced(shape=shape, along=(None,) * len(shape))
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or spec.persistent is False:
            return fixed
        if not node.users:
            return fixed
        name = self.canonical[spec.target]
        if name not in self.known:
            along = tuple(self.book.fresh(size) for size in shape)
            is_parameter = spec.kind is InputKind.PARAMETER
            self.known[name] = Traced(shape=shape, along=along, parameter=is_parameter)
            if not is_parameter:
                self.book.carry(*along)
        return self.known[name]

    def apply(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """The rule of one operator."""
        args: Any = torch.fx.node.map_arg(node.args, values.get)
        target: Any = node.target
        if getattr(target, "__name__", "") == "getitem" and isinstance(args[0], list | tuple):
            return args[0][args[1]]
        found = node.meta.get("val")
        outs = found if isinstance(found, list | tuple) else [found]
        shapes = tuple(tuple(x.shape) for x in outs if isinstance(x, Tensor))
        if not shapes:
            return None
        kwargs: Any = torch.fx.node.map_arg(node.kwargs, values.get)
        site = self.site(node, shapes)
        self.book.where = site.where if site.stock else f"{site.name} in {site.where}"
        if isinstance(target, torch._ops.OpOverload):
            args = [
                args[k] if k < len(args) else kwargs.get(a.name, a.default_value)
                for k, a in enumerate(target._schema.arguments)
            ]
            known = RULES.get(site.name, unknown) if target._overloadname != "data" else unknown
        else:
            args, known = [*args, kwargs], unknown
        if site.name not in ("select", *STATES):
            args = [self.settled(site, x) for x in args]
        try:
            result = known(site, *args)
        except (IndexError, KeyError, TypeError, ValueError):
            result = unknown(site, *args)  # a use that the rule does not foresee
        return result

    def settled(self, site: Site, x: Any) -> Any:
        """Arguments without stacked states."""
        if isinstance(x, Traced):
            return settle(site, x)
        return [self.settled(site, y) for y in x] if isinstance(x, list | tuple) else x

    def site(self, node: Node, shapes: tuple[tuple[int, ...], ...]) -> Site:
        """Where an operator stands in the user's model."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = stack[-1][0].split("@")[0] if stack else ""
        module = self.modules.get(path, self.model)
        kind = type(module)
        stock = kind.__module__.startswith("torch.nn")
        where = f"{path or 'the model'} ({kind.__name__})"
        line = "" if stock else _line(node.stack_trace or "")
        if line:
            where += f", `{line}`"
        return Site(
            book=self.book,
            name=_name(node),
            where=where,
            path=path,
            stock=stock,
            attributes={} if stock else {k: v for k, v in vars(module).items() if type(v) is int},
            shapes=shapes,
            covered=len(node.users) == 1 and _name(next(iter(node.users))) in NORMS,
        )

    def finish(self, node: Node, values: Mapping[Node, Any]) -> None:
        """Outputs stay as wide as they are, but for the states of recurrent layers."""
        flat: Any = node.args[0]
        for spec, item in zip(self.program.graph_signature.output_specs, flat, strict=True):
            value = values.get(item) if isinstance(item, Node) else None
            state = isinstance(item, Node) and _is_state(item)
            for x in tensors([] if state else [value]):
                for labels in (*x.along, *(x.stacked or ())):
                    self.book.pin(labels, "it is part of the model's output")
            if spec.kind is OutputKind.USER_OUTPUT:
                self.outputs.append(value if state else None)

    def level(self) -> None:
        """Where the states of a stack are handed out as one tensor, a layer that stays holds the others."""
        for x in self.outputs:
            layers = x.stacked if x is not None and x.stacked else ()
            if any(int(k) in self.book.reasons for some in layers for k in self.book.roots(some)):
                for labels in layers:
                    self.book.pin(
                        labels, "its states leave the model in one tensor with a layer that stays"
                    )

    def coupling(self) -> Coupling:
        """Units by their labels, groups by where they stand."""
        self.level()
        places: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for name in self.canonical:
            x = self.known.get(name)
            for dim, labels in enumerate(x.along if x else ()):
                for k, root in enumerate(self.book.roots(labels) if labels is not None else ()):
                    places[int(root)][name, dim].append(k)
        by_place: dict[tuple[bool, tuple[tuple[str, int], ...]], list[int]] = defaultdict(list)
        for root, found in places.items():
            by_place[root in self.book.reasons, tuple(found)].append(root)
        groups: dict[str, Group] = {}
        fixed: dict[str, str] = {}
        unit: dict[int, Unit] = {}
        for (pinned, where), roots in by_place.items():
            slices = tuple(self.slice(key, [places[r][key] for r in roots]) for key in where)
            name = _group_name(slices)
            if pinned:
                why = self.book.reasons[roots[0]]
                if why and any(s.role != "reads" for s in slices):
                    fixed.setdefault(name, why)
                continue
            while name in groups:
                name += "'"
            groups[name] = Group(name=name, size=len(roots), slices=slices)
            unit |= {root: (name, k) for k, root in enumerate(roots)}
        for name, why in self.tied(groups).items():
            fixed.setdefault(name, why)
            del groups[name]
        unit = {root: (name, k) for root, (name, k) in unit.items() if name in groups}

        def units(labels: Labels) -> tuple[Unit | None, ...]:
            return tuple(unit.get(int(root)) for root in self.book.roots(labels))

        first = {module: path for path, module in reversed(self.modules.items())}
        unreached = [name for name, _ in self.model.named_parameters() if name not in self.known]
        return Coupling(
            groups=groups,
            fixed={name: why for name, why in fixed.items() if name not in groups},
            unreached=tuple(unreached),
            multiply_adds=multiply_adds(self.model, self.inputs),
            widths=tuple(
                Width(
                    module=s.path, attribute=s.attribute, units=units(s.labels), guessed=s.guessed
                )
                for s in self.book.sizes
            ),
            views={
                u[0]: line
                for labels, line in self.book.views
                for u in units(labels)
                if u is not None
            },
            recurrent={
                first[self.modules[path]]: tuple(units(labels) for labels in layers)
                for path, layers in self.book.recurrent.items()
            },
            states=tuple(None if x is None else _layers(x, units) for x in self.outputs),
        )

    def tied(self, groups: Mapping[str, Group]) -> dict[str, str]:
        """Groups that are one unit of several channels, and what makes them one."""
        labels: dict[str, Labels] = {}
        for name, group in groups.items():
            part, along = group.slices[0], self.known[group.slices[0].parameter].along
            if group.size == 1 and min(len(s.index[0]) for s in group.slices) > 1:
                found = along[part.dim]
                if found is not None:
                    labels[name] = found[list(part.index[0])]
        if not labels:
            return {}
        return {
            name: f"its units are tied to each other by {' and '.join(by[:3])}"
            for name, by in zip(labels, self.book.tied_by(labels.values()), strict=True)
        }

    def slice(self, key: tuple[str, int], index: list[list[int]]) -> Slice:
        """One slice with its role."""
        name, dim = key
        labels: Along = self.known[name].along[dim]
        label = int(labels[index[0][0]]) if labels is not None else -1
        role = "writes"
        if label in self.book.carries:
            role = "carries"
        if label in self.book.reads:
            role = "both" if label in self.book.makes else "reads"
        return Slice(parameter=name, dim=dim, index=tuple(map(tuple, index)), role=role)


def _layers(x: Traced, units: Any) -> tuple[tuple[Unit | None, ...], ...] | None:
    if x.stacked is not None:
        return tuple(units(labels) for labels in x.stacked)
    return None if x.along[-1] is None else (units(x.along[-1]),)


def _name(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else str(node.target)
    return name if name.endswith("__") else name.removesuffix("_")


def _line(trace: str) -> str:
    """The last line of code in a trace that is not torch's own."""
    lines, found = [line.strip() for line in trace.splitlines()], ""
    for place, code in pairwise(lines):
        if place.startswith("File ") and TORCH not in place:
            found = code
    return found


def _is_state(node: Node) -> bool:
    source = node.args[0] if node.args else None
    return isinstance(source, Node) and _name(source) in STATES and bool(node.args[1])


def _group_name(slices: tuple[Slice, ...]) -> str:
    """After the first parameter that makes the value."""
    makers = [s for s in slices if s.role != "reads"]
    name = (makers or slices)[0].parameter
    path, _, last = name.rpartition(".")
    if last.startswith(("weight_ih_", "weight_hh_")):
        last = last.removeprefix("weight_ih_").removeprefix("weight_hh_")
        return f"{path}.{last}" if path else last
    return path if path and last in ("weight", "bias") else name
