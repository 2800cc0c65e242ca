"""Multiply-adds of one example, on the model's own device."""

import torch
from torch import nn

from sterna.multiply_adds import counted


def multiply_adds(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-adds of one forward pass on ``example``, shape (1, ...).

    Raises:
        ValueError: the model does not take such an example.
    """
    device = next(model.parameters()).device
    try:
        return counted(model, (example.to(device),))[""]
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} does not take inputs of shape {tuple(example.shape)} and type "
            f"{example.dtype}: {error}"
        ) from error
