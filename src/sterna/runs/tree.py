"""Nested values with tensors in them, as tensors by key plus JSON: what a checkpoint file can hold.

safetensors stores a flat mapping of tensors and strings, and loads without running anything. State
dicts are nested and mix tensors with numbers; `split` and `join` go between the two.
"""

from typing import Any

from torch import Tensor

from sterna.flat import Flat

_TENSOR, _PAIRS, _TUPLE = "$tensor", "$pairs", "$tuple"


def split(tree: Any, *, copy: bool = True) -> tuple[dict[str, Tensor], Any]:
    """Tensors by key, and the rest as JSON values with references to them.

    Args:
        tree: the values.
        copy: give each tensor memory of its own; safetensors refuses tensors that share memory.

    Raises:
        TypeError: the tree holds something that is neither tensor, number, string, None nor container.

    Example:
        >>> import torch
        >>> tensors, rest = split({"momentum": [torch.zeros(2), 0.9]})
        >>> sorted(tensors), rest
        (['momentum/0'], {'momentum': [{'$tensor': 'momentum/0'}, 0.9]})
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().clone().contiguous() if copy else value.detach()
            return {_TENSOR: path}
        if isinstance(value, dict | Flat):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {
                    key: visit(item, f"{path}/{key}".lstrip("/")) for key, item in value.items()
                }
            return {
                _PAIRS: [[key, visit(x, f"{path}/{key}".lstrip("/"))] for key, x in value.items()]
            }
        if isinstance(value, list | tuple):
            items = [visit(item, f"{path}/{k}".lstrip("/")) for k, item in enumerate(value)]
            return items if isinstance(value, list) else {_TUPLE: items}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{path or 'value'} cannot be saved: {type(value).__name__}.")

    return tensors, visit(tree, "")


def join(tensors: dict[str, Tensor], rest: Any) -> Any:
    """The tree that `split` took apart."""
    if isinstance(rest, dict):
        if _TENSOR in rest:
            return tensors[rest[_TENSOR]]
        if _PAIRS in rest:
            return {key: join(tensors, item) for key, item in rest[_PAIRS]}
        if _TUPLE in rest:
            return tuple(join(tensors, item) for item in rest[_TUPLE])
        return {key: join(tensors, item) for key, item in rest.items()}
    if isinstance(rest, list):
        return [join(tensors, item) for item in rest]
    return rest
