"""A model's program: what `torch.export` makes of it on an example, or why it does not."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from sterna.quiet import quiet

TORCH = str(nn.__file__).rpartition("/nn/")[0]
"""Where torch's own files are."""


class Refused(ValueError):
    """A model, or a part of it, that cannot be traced or shrunk; the message says which and why."""


def arguments(example: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    """The positional arguments that an example stands for."""
    return example if isinstance(example, tuple) else (example,)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy without gradients.

    Raises:
        Refused: the model cannot be copied.
    """
    try:
        copy = deepcopy(model)
    except Exception as error:
        (why, *_) = str(error).split(". ")
        raise Refused(
            f"{type(model).__name__}: the model must be copied, since it is never changed in place; "
            f"copy.deepcopy failed: {why}. Keep computed tensors out of its attributes; "
            "torch.nn.utils.prune.remove and remove_weight_norm take out theirs."
        ) from error
    copy.zero_grad(set_to_none=True)
    return copy


def program(model: nn.Module, inputs: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The traced graph of a copy of a model, in evaluation mode.

    Raises:
        Refused: the model cannot be traced, or is quantised or scripted.
    """
    name = type(model).__name__
    for path, module in model.named_modules():
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule) or "quantized" in kind.__module__:
            raise Refused(
                f"{path or name} ({kind.__name__}) is quantised or scripted, and its weights cannot be "
                "cut. Shrink the model that it was made from, and quantise or script after that."
            )
    copy = copied(model).eval()
    try:
        with quiet():
            return torch.export.export(copy, inputs, strict=False)
    except Exception as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        why = (lines[0] if lines else type(error).__name__).rstrip(".")
        raise Refused(
            f"{name} cannot be traced on the example: {why}. "
            "The forward must run on the example, and may branch on shapes, not on values; pull a "
            "branch on values out of it, or shrink the submodules one by one."
        ) from error
