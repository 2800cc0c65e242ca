"""A model's example as tensors: which dimension counts examples, and more or fewer of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Example: TypeAlias = Tensor | tuple[Any, ...]


def feeds(runner: Any, inputs: Sequence[Any]) -> dict[str, Any]:
    """The inputs of a session by name, in the example's order."""
    arrays = [x.numpy() for x in tensors(inputs)]
    return dict(zip((i.name for i in runner.get_inputs()), arrays, strict=True))


def at_batch(inputs: Any, num: int, batch_dim: int = 0) -> Any:
    """The inputs with ``num`` examples: the first ones, again and again where there are too few."""
    size = batch_size(inputs, batch_dim)

    def one(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() > batch_dim and x.shape[batch_dim] == size:
            return x.index_select(batch_dim, torch.arange(num, device=x.device) % size)
        return x

    return mapped(one, inputs)


def batch_size(inputs: Any, batch_dim: int) -> int:
    """How many examples the first tensor holds.

    Raises:
        ValueError: no tensor has such a dimension.
    """
    for x in tensors(inputs):
        if x.dim() > batch_dim:
            return int(x.shape[batch_dim])
    raise ValueError(
        f"to_onnx: example must hold a tensor with a dimension {batch_dim} that counts examples; got "
        f"{[tuple(x.shape) for x in tensors(inputs)]}."
    )


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same structure of tuples, lists and dictionaries, with every other value changed."""
    if isinstance(value, tuple | list):
        return type(value)(mapped(change, x) for x in value)
    if isinstance(value, dict):
        return {key: mapped(change, x) for key, x in value.items()}
    return change(value)


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a structure, in its order."""
    if isinstance(value, Mapping):
        return [x for item in value.values() for x in tensors(item)]
    if isinstance(value, list | tuple):
        return [x for item in value for x in tensors(item)]
    return [value] if isinstance(value, Tensor) else []
