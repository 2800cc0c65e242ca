"""Kernels of the server's rules for host memory, compiled by numba: one pass, in place, no allocation.

A rule in plain torch reads and writes its operands once for every operation; here each is read once and
written once. Arithmetic is that of the rule's equations, in float32, without fast-math. Other dtypes and
devices go the way of plain torch.
"""
# mypy: disable-error-code="no-untyped-def"

import numpy as np
import torch
from torch import Tensor

from sterna.compiled import compiled


@compiled(error_model="numpy")
def _compensate(g, w, backup, strength):
    for i in range(g.shape[0]):
        g[i] = g[i] + strength * (g[i] * (g[i] * (w[i] - backup[i])))


@compiled(error_model="numpy")
def _compensate_adaptively(g, w, backup, v, decay, rest, strength, epsilon):
    for i in range(g.shape[0]):
        x = g[i]
        square = decay * v[i] + rest * (x * x)
        v[i] = square
        g[i] = x + strength * (x * (x * (w[i] - backup[i]) / np.sqrt(square + epsilon)))


@compiled(error_model="numpy")
def _mean_square(g, v, decay, rest):
    for i in range(g.shape[0]):
        v[i] = decay * v[i] + rest * (g[i] * g[i])


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels take these: contiguous float32 on the CPU."""
    return all(
        x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() for x in tensors
    )


def compensate(g: Tensor, w: Tensor, backup: Tensor, strength: float) -> None:
    """``g + strength g g (w - backup)``, in place; all of shape (n,)."""
    _compensate(g.numpy(), w.numpy(), backup.numpy(), np.float32(strength))


def compensate_adaptively(
    g: Tensor, w: Tensor, backup: Tensor, v: Tensor, decay: float, strength: float, epsilon: float
) -> None:
    """The mean square ``v`` of ``g``, then `compensate` with ``strength / sqrt(v + epsilon)``, in place."""
    _compensate_adaptively(
        g.numpy(),
        w.numpy(),
        backup.numpy(),
        v.numpy(),
        np.float32(decay),
        np.float32(1 - decay),
        np.float32(strength),
        np.float32(epsilon),
    )


def mean_square(g: Tensor, v: Tensor, decay: float) -> None:
    """``decay v + (1 - decay) g g``, in place."""
    _mean_square(g.numpy(), v.numpy(), np.float32(decay), np.float32(1 - decay))
