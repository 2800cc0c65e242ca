"""What an edit left of each layer: parameters and multiply-adds, before and after."""

from dataclasses import dataclass

import torch
from torch import nn

from sterna.multiply_adds import counted


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
    before, after = counted(dense, (example,)), counted(small, (example,))
    there, found = dict(small.named_modules()), []
    for name, module in dense.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if not own:
            continue
        leaf = not any(True for m in module.children() for _ in m.parameters())
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
