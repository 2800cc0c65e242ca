"""Multiply-adds of a model, counted on the operators that run, with those that torch's counter leaves out."""

import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def _lstm_flops(inputs: Any, to_gates: Any, from_units: Any, *rest: Any, **named: Any) -> int:
    """Of one layer in one direction: a multiply-add for every weight of the gates and every word."""
    words: int = inputs[0] * inputs[1]
    weights: int = math.prod(to_gates) + math.prod(from_units)
    return 2 * words * weights


UNKNOWN: dict[Any, Any] = {torch.ops.aten.mkldnn_rnn_layer: _lstm_flops}
"""Operators that torch's counter leaves out, and what counts them; two flops a multiply-add."""


def multiply_adds(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-adds of one forward pass on ``example``, shape (1, ...), counted on the operators run.

    Raises:
        ValueError: the model does not take such an example.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNKNOWN) as counter:
            # A copy: the counter keeps what it saw, and a view would keep the whole data set.
            model(example.to(device, copy=True))
    except RuntimeError as error:
        raise ValueError(
            f"{type(model).__name__} does not take inputs of shape {tuple(example.shape)} and type "
            f"{example.dtype}: {error}"
        ) from error
    model.train(was_training)
    return int(counter.get_total_flops()) // 2
