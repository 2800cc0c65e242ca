"""Multiply-adds of a model: the one counter, on the operators of a forward pass.

    n x m by m x k:  n m k        recurrent layer:  every weight once for each word

torch's counter knows products of matrices and convolutions, `_MORE` what it leaves out. The fast path of
``nn.MultiheadAttention`` and fused attention are off while it counts, since it cannot see into them.
Element-wise operators, norms and embeddings count nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from sterna.quiet import quiet
from sterna.randomness import isolated

Sizes: TypeAlias = tuple[int, ...]

# Two flops a multiply-add. Arguments are those of the operator, with shapes in the place of tensors.


def _vector(a: Sizes, *rest: Any, **named: Any) -> int:
    return 2 * prod(a)


def _added_vector(to: Sizes, a: Sizes, *rest: Any, **named: Any) -> int:
    return 2 * prod(a)


def _added_batches(to: Sizes, a: Sizes, b: Sizes, *rest: Any, **named: Any) -> int:
    return 2 * prod(a) * b[-1]


def _bilinear(a: Sizes, weight: Sizes, *rest: Any, **named: Any) -> int:
    return 2 * prod(a[:-1]) * prod(weight)


def _rnn_layer(x: Sizes, to_gates: Sizes, from_units: Sizes, *rest: Any, **named: Any) -> int:
    return 2 * prod(x[:-1]) * (prod(to_gates) + prod(from_units))


def _rnn(x: Sizes, weights: list[Sizes], *rest: Any, **named: Any) -> int:
    return 2 * prod(x[:-1]) * sum(prod(w) for w in weights if len(w) == 2)


_ATEN = torch.ops.aten
_MORE: dict[Any, Any] = {
    _ATEN.mv: _vector,
    _ATEN.dot: _vector,
    _ATEN.vdot: _vector,
    _ATEN.addmv: _added_vector,
    _ATEN.addbmm: _added_batches,
    _ATEN._trilinear: _bilinear,
    _ATEN.mkldnn_rnn_layer: _rnn_layer,
    _ATEN._cudnn_rnn: _rnn,
    _ATEN.miopen_rnn: _rnn,
}


def counted(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """Multiply-adds of one forward pass in evaluation mode; the model, its mode and the inputs stay.

    Args:
        model: any module that runs.
        inputs: positional arguments, on the model's device.

    Returns:
        Of each module by its name, with all that is in it, and of the whole under the empty name.
        Modules that count nothing may be left out.

    Example:
        >>> counted(nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2)), (torch.ones(5, 4),))
        {'': 260, '0': 60, '1': 200}
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with (
            torch.no_grad(),
            isolated(0, "multiply-adds"),
            quiet(),
            _in_the_open(),
            FlopCounterMode(display=False, custom_mapping=_MORE) as counter,
        ):
            # Clones: the counter keeps what it saw, and a model may work in place.
            model.eval()(*tree_map_only(Tensor, Tensor.clone, inputs))
    finally:
        for module, training in modes.items():
            module.training = training
    root, found = type(model).__name__, {"": int(counter.get_total_flops()) // 2}
    for name, operators in counter.get_flop_counts().items():
        if name.startswith(f"{root}."):
            found[name.removeprefix(f"{root}.")] = sum(map(int, operators.values())) // 2
    return found


@contextmanager
def _in_the_open() -> Iterator[None]:
    """No operator that hides what it multiplies."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
