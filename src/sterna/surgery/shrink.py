"""Shrink: remove units from a model for real, and prove it on the example.

    y = f(x; W)      the model; W[..., k] the columns that read unit k
    y' = f'(x; W')   the smaller model, with every slice of the removed units cut out of the parameters
    proof: y' = f(x; W with W[..., k] = 0 for the removed k)     for any choice of units        (1)
    so y' = y where the removed units were not read, or where their value was zero

The smaller model is the user's own class with smaller parameters; nothing of ours stays in it, but for a
`RecurrentStack` where the layers of an LSTM end with different widths. Its output on the example, and on
random numbers in its place, is compared with (1) every time, and a difference refuses the edit. So does a
model that no longer runs in training mode where the original does.

Reference: structured sparsity that this makes use of: W. Wen, C. Wu, Y. Wang, Y. Chen, H. Li, "Learning
    Structured Sparsity in Deep Neural Networks", NIPS 2016, arXiv:1608.03665; for LSTMs
    arXiv:1709.05027.
Differs from the paper: the papers leave the zeros in place, or rely on a library that skips them.
Cost: two traces and a handful of forward passes, on copies. Hurts where units were not zero: then the
    output changes (`Report.difference`), and batch-norm statistics and weights want training again.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sterna.surgery.choice import Keep, Kept, chosen_units, family
from sterna.surgery.coupling import Coupling, Unit, couple
from sterna.surgery.description import Description, Report, named, resize
from sterna.surgery.program import Refused, arguments, copied
from sterna.surgery.proof import (
    Differs,
    compare,
    distance,
    finite,
    noise_like,
    outputs,
    said,
    trains,
)
from sterna.surgery.shrink_lstm import renamed

Example: TypeAlias = Tensor | tuple[Any, ...]


def shrink(
    model: nn.Module, example: Example, keep: Keep, *, round_to: int = 1
) -> tuple[nn.Module, Report]:
    """A smaller copy of a model that keeps the named units; the model is not changed.

    Args:
        model: any module that `couple` can trace.
        example: an input, or a tuple of positional arguments, on the model's device.
        keep: for each group its units to keep, as numbers or as a mask with one truth value per unit;
            groups that are not named keep all. See `shrinkable` for the groups and `nonzero` for
            units worth keeping. An empty choice keeps the strongest unit, with a warning.
        round_to: widths are rounded up to multiples of it where the original allows, by keeping the
            strongest of the units that were to go; 8 or 16 are fast on most processors.

    Returns:
        The smaller model, in the original's mode (training or evaluation), and what was done.

    Raises:
        Refused: the model cannot be traced; a named group cannot shrink; the smaller model does not run,
            in evaluation or in training mode, or does not give (1).
        ValueError: an unknown group, a unit that does not exist, or ``round_to`` below 1.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> small, report = shrink(model, torch.ones(1, 4), {"0": [0, 2, 5]})
        >>> small[0], report.widths, (report.parameters_before, report.parameters_after)
        (Linear(in_features=4, out_features=3, bias=True), {'0': (8, 3)}, (58, 23))
    """
    if not (isinstance(round_to, int) and round_to >= 1):
        raise ValueError(f"shrink: round_to must be a whole number, at least 1; got {round_to!r}.")
    coupling = couple(model, example)
    kept = chosen_units(model, coupling, keep, round_to)
    if coupling.unreached:
        warnings.warn(
            f"shrink: the example did not use {', '.join(coupling.unreached)}; they keep their sizes, and "
            "may not fit any more. Pass an example that uses them.",
            stacklevel=2,
        )
    if not kept:
        warnings.warn(
            "shrink: nothing was removed: every group keeps all of its units. Name units to keep, or "
            "lower round_to.",
            stacklevel=2,
        )
    inputs = arguments(example)
    try:
        small, description, difference = _proved(model, inputs, coupling, kept)
    except Differs as error:
        culprits = [name for name in kept if _fails(model, inputs, coupling, {name: kept[name]})]
        why = "; ".join([str(error), *(_view(coupling, name) for name in culprits)]).rstrip("; ")
        raise Refused(
            f"{type(model).__name__}: {' and '.join(map(repr, culprits or kept))} cannot shrink: {why}"
        ) from error
    return small, Report(
        parameters_before=_count(model),
        parameters_after=_count(small),
        multiply_adds_before=coupling.multiply_adds,
        multiply_adds_after=couple(small, example).multiply_adds,
        widths={name: (coupling.groups[name].size, len(units)) for name, units in kept.items()},
        replaced={},
        difference=difference,
        description=description,
    )


def shrinkable(model: nn.Module, example: Example) -> Coupling:
    """`couple`, and each group tried out: what the model's own code does not follow is moved to ``fixed``.

    One unit less in every group; where that does not run or not give (1), each group by itself.

    Raises:
        Refused: the model cannot be traced, or nothing in it can shrink.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> {name: group.size for name, group in shrinkable(model, torch.ones(1, 4)).groups.items()}
        {'0': 8}
    """
    coupling, inputs = couple(model, example), arguments(example)
    less = {name: tuple(range(g.size - 1)) for name, g in coupling.groups.items() if g.size > 1}
    fixed = dict(coupling.fixed)
    if less and _fails(model, inputs, coupling, less):
        for name in less:
            why = _fails(model, inputs, coupling, {n: less[n] for n in family(coupling, name)})
            if why:
                fixed[name] = "; ".join([why, _view(coupling, name)]).rstrip("; ")
    groups = {name: g for name, g in coupling.groups.items() if name not in fixed}
    if not any(g.size > 1 for g in groups.values()):
        reasons = "; ".join(f"{name!r}: {why}" for name, why in fixed.items())
        reasons = reasons or "No layer has more than one unit."
        raise Refused(f"{type(model).__name__}: nothing in it can shrink. {reasons}")
    return replace(coupling, groups=groups, fixed=fixed)


def _view(coupling: Coupling, name: str) -> str:
    """Where a size in numbers is most likely."""
    return f"its units pass {coupling.views[name]}" if name in coupling.views else ""


def _fails(model: nn.Module, inputs: tuple[Any, ...], coupling: Coupling, kept: Kept) -> str:
    """Why a choice of units does not give (1); empty if it does."""
    try:
        _proved(model, inputs, coupling, kept)
    except Differs as error:
        return str(error)
    return ""


def _proved(
    model: nn.Module, inputs: tuple[Any, ...], coupling: Coupling, kept: Kept
) -> tuple[nn.Module, Description, float]:
    """The smaller model, if it gives (1); guessed attributes are changed only if it does not run."""
    dense = copied(model).eval()
    tried = [(inputs, outputs(dense, inputs))]
    noise = noise_like(inputs)
    with suppress(Exception):  # a model need not run on numbers that mean nothing
        tried += [(noise, outputs(dense, noise))] if noise is not None else []
    _mask(dense, coupling, kept)
    proofs = []
    for given, before in tried:
        masked = _cut_states(outputs(dense, given), coupling, kept)
        if given is inputs or finite(masked):
            proofs.append((given, masked, _cut_states(before, coupling, kept)))
    reasons = []
    for guessed in (False, True):
        if guessed and not any(w.guessed for w in coupling.widths):
            continue
        small, description = _smaller(model, coupling, kept, guessed)
        modes = {name: module.training for name, module in model.named_modules()}
        try:
            found = [outputs(small.eval(), given) for given, _, _ in proofs]
        except Exception as error:
            reasons.append(said(error))
            continue
        pairs = list(zip(found, proofs, strict=True))
        wrong = next(filter(None, (compare(after, masked) for after, (_, masked, _) in pairs)), "")
        wrong = wrong or trains(small, model, inputs)
        if wrong:
            reasons.append(wrong)
            continue
        for name, module in small.named_modules():
            module.training = modes.get(name, model.training)
        apart = zip(found[0], proofs[0][2], strict=True)
        return small, description, max((distance(a, b) for a, b in apart), default=0.0)
    raise Differs(reasons[0])


def _smaller(
    model: nn.Module, coupling: Coupling, kept: Kept, guessed: bool
) -> tuple[nn.Module, Description]:
    tensors = named(model)
    gone: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name, units in kept.items():
        stays = set(units)
        for part in coupling.groups[name].slices:
            for k, index in enumerate(part.index):
                if k not in stays:
                    gone[part.parameter][part.dim].update(index)
    alive = {name: set(units) for name, units in kept.items()}

    def left(units: Iterable[Unit | None]) -> int:
        return sum(u is None or u[0] not in alive or u[1] in alive[u[0]] for u in units)

    stacks: dict[str, tuple[int, ...]] = {}
    for path, layers in coupling.recurrent.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.RNNBase):
            step = 2 if module.bidirectional else 1
            widths = tuple(left(units) for units in layers[::step])
            if len(set(widths)) > 1:
                stacks[path] = widths
    values: dict[str, Tensor] = {}
    for name, dims in gone.items():
        value = tensors[name].detach()
        for dim, indices in dims.items():
            stay = [k for k in range(value.shape[dim]) if k not in indices]
            value = value.index_select(dim, torch.tensor(stay, device=value.device))
        values[name] = value
    for path in stacks:
        prefix = f"{path}." if path else ""
        inside = [n for n in tensors if n.startswith(prefix)]
        moved = {n: values.pop(n, tensors[n].detach()) for n in inside}
        values |= {prefix + renamed(n.removeprefix(prefix)): v for n, v in moved.items()}
    options: dict[tuple[str, str], set[int]] = defaultdict(set)
    for width in coupling.widths:
        if guessed or not width.guessed:
            options[width.module, width.attribute].add(left(width.units))
    attributes: dict[str, dict[str, int]] = defaultdict(dict)
    for (path, attribute), counts in options.items():
        if len(counts) == 1 and getattr(model.get_submodule(path), attribute, None) not in counts:
            attributes[path][attribute] = counts.pop()
    description = Description(
        shapes={name: tuple(value.shape) for name, value in values.items()},
        attributes=dict(attributes),
        stacks=stacks,
    )
    small = resize(model, description)
    new = named(small)
    for name, value in values.items():
        new[name].data.copy_(value)
    return small, description


def _mask(dense: nn.Module, coupling: Coupling, kept: Kept) -> None:
    """Right side of (1): what reads a removed unit becomes zero."""
    tensors = dict(dense.named_parameters())
    for name, units in kept.items():
        stays = set(units)
        for part in coupling.groups[name].slices:
            if part.role in ("reads", "both"):
                some = [i for k, index in enumerate(part.index) if k not in stays for i in index]
                weight = tensors[part.parameter].data
                weight.index_fill_(part.dim, torch.tensor(some, device=weight.device), 0.0)


def _cut_states(values: list[Any], coupling: Coupling, kept: Kept) -> list[Any]:
    """Outputs as the smaller model gives them: states of recurrent layers without the removed units."""
    if len(values) != len(coupling.states):
        return values
    found = []
    for value, layers in zip(values, coupling.states, strict=True):
        if layers is None:
            found.append(value)
            continue
        stay = [
            [k for k, u in enumerate(units) if u is None or u[0] not in kept or u[1] in kept[u[0]]]
            for units in layers
        ]
        if len(stay) == 1:
            found.append(value[..., stay[0]])
        else:
            found.append(torch.stack([x[..., s] for x, s in zip(value, stay, strict=True)]))
    return found


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
