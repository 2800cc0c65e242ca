"""What an edit left of each layer: parameters and multiply-adds, before and after."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sterna.runs.multiply_adds import UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one layer of the original had, and what is left of it. Multiply-adds are of one example."""

    name: str
    kind: str
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int


def kept_by_layer(dense: nn.Module, small: nn.Module, example: torch.Tensor) -> tuple[Layer, ...]:
    """Every module of the original that has parameters of its own, and what stands in its place.

    Args:
        dense: the original.
        small: the compressed model, whose modules have the same names, or names below them.
        example: one input, shape (1, ...).
    """
    before, after = _costs(dense, example), _costs(small, example)
    there, found = dict(small.named_modules()), []
    for name, module in dense.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if not own:
            continue
        leaf = not any(m is not module and any(m.parameters()) for m in module.modules())
        stands = there.get(name)
        if stands is None:
            left = 0
        else:
            left = sum(p.numel() for p in stands.parameters(recurse=leaf))
        found.append(
            Layer(
                name=name or type(module).__name__,
                kind=type(module).__name__,
                parameters_before=own,
                parameters_after=left,
                multiply_adds_before=before.get(name, 0) if leaf else 0,
                multiply_adds_after=after.get(name, 0) if leaf and stands is not None else 0,
            )
        )
    return tuple(found)


def _costs(model: nn.Module, example: torch.Tensor) -> dict[str, int]:
    """Multiply-adds by module, with all that is in it."""
    root = type(model).__name__
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
        model.eval()(example.clone())
    counts = counter.get_flop_counts()
    return {
        name.removeprefix(root).removeprefix("."): sum(by.values()) // 2
        for name, by in counts.items()
        if name != "Global"
    }
