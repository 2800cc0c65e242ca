"""What an experiment makes of its flags, or which flag it cannot make anything of."""

import inspect
import math
import re
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import nn

from sterna.cli.usage import UsageError, dashed
from sterna.comm.launch import explains_itself
from sterna.runs.experiment import resolve
from sterna.runs.request import Request, build
from sterna.runs.run import Run

_OPTIMIZER: Mapping[str, tuple[float, str]] = {
    "lr": (math.inf, "at least 0 and finite"),
    "momentum": (1.0, "in [0, 1)"),
    "weight_decay": (math.inf, "at least 0 and finite"),
}
"""Of an optimizer: the limit of what is allowed from 0 on, and the range in words."""
_OF_TORCH = re.compile(r"Invalid (learning rate|momentum value|weight_decay value): (\S+)")
_NAMES = {"learning rate": "lr", "momentum value": "momentum", "weight_decay value": "weight_decay"}
_HANDED_ON_AS = {"clip": "clip_norm", "step_size": "lr", "part_words": "test_words"}
"""Parameters of the library, and the flags that the experiments hand on under these names."""


def built(request: Request) -> Run:
    """The run of a request whose arguments are in their ranges, those of its optimizer too.

    Raises:
        UsageError: the value of a flag is out of range.
        ValueError: something that is out of range is no flag.
    """
    try:
        run = build(request)
    except ValueError as error:
        text = flagged(str(error), _changed(request)) if explains_itself(error) else ""
        if text:
            raise UsageError(text) from None
        raise
    _check_optimizer(run, request)
    return run


def check_device(name: str) -> None:
    """Raise unless torch has the device.

    Raises:
        UsageError: it has not.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # the second where torch is built without it
        raise UsageError(
            f"--device must be one that torch has here, such as cpu; got {name}."
        ) from None


def flagged(text: str, names: Container[str]) -> str:
    """An error of the library's own in words of the flags; empty where it is about none of ``names``.

    Example:
        >>> flagged("mine.py:train: step_size must be above 0; got 0. Usual is 0.1.", {"lr"})
        '--lr must be above 0; got 0.'
    """
    found = re.match(r"\S+: (\w+) (must .*?; got .*?)\.(?: |$)", text, re.DOTALL)
    if found is None:
        return ""
    name = found[1] if found[1] in names else _HANDED_ON_AS.get(found[1], "")
    return f"{dashed(name)} {found[2].replace('None', 'none')}." if name in names else ""


def _changed(request: Request) -> dict[str, Any]:
    """The arguments that are not the experiment's own."""
    own = inspect.signature(resolve(request.source or request.experiment)).parameters
    return {k: v for k, v in request.arguments.items() if k in own and v != own[k].default}


def _check_optimizer(run: Run, request: Request) -> None:
    """Raise where the optimizer takes a value that no training can use, or refuses it."""
    try:
        groups = run.optimizer([nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1))])
        values = [(name, group.get(name)) for group in groups.param_groups for name in _OPTIMIZER]
    except ValueError as error:
        found = _OF_TORCH.match(str(error))
        values = [(_NAMES[found[1]], float(found[2]))] if found else []
    except Exception:  # it wants parameters of the model: then it speaks for itself later
        return
    for name, value in values:
        limit, must = _OPTIMIZER[name]
        if not isinstance(value, int | float) or 0 <= value < limit:
            continue
        if name in _changed(request):
            raise UsageError(f"{dashed(name)} must be {must}; got {value}.")
        raise ValueError(
            f"{request.experiment}: {name} of the optimizer must be {must}; got {value}."
        )
