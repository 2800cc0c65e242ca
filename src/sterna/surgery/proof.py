"""Running a model on an example, and whether two models agree on it."""

import traceback
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sterna.randomness import generator, isolated
from sterna.surgery.program import TORCH, copied


class Differs(Exception):
    """The smaller model is not (1)."""


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Any]:
    """All outputs of a model in one list; the inputs and global random state stay as they are."""
    with torch.no_grad(), isolated(0, "shrink"):
        return _leaves(model(*deepcopy(inputs)))


def noise_like(inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Random floats of the inputs' shapes, the rest as it is; None where there are no floats."""
    rng, found = generator(0, "proof"), False

    def random(x: Any) -> Any:
        nonlocal found
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        found = True
        return torch.randn(x.shape, generator=rng, dtype=torch.float32).to(x)

    noise = tree_map(random, inputs)
    return noise if found else None


def finite(values: list[Any]) -> bool:
    """Whether all numbers are."""
    return all(bool(x.isfinite().all()) for x in values if isinstance(x, Tensor))


def trains(small: nn.Module, original: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Why a model does not run in training mode where its original does; empty if it runs.

    Copies run, so statistics stay. Where the original does not train on the example, the example is
    taken twice: a batch norm may want more than one.
    """
    for some in (inputs, tree_map(_twice, inputs)):
        why = _training_error(small, some)
        if not why:
            return ""
        if not _training_error(original, some):
            return why
    return ""


def _twice(x: Any) -> Any:
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() else x


def _training_error(model: nn.Module, inputs: tuple[Any, ...]) -> str:
    copy = copied(model).train()
    inside: list[str] = []
    names = {module: name for name, module in copy.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        inside.append(names[module])

    def leave(*_: Any) -> None:
        inside.pop()

    for module in names:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    try:
        outputs(copy, inputs)
    except Exception as error:
        name = inside[-1] if inside else ""
        kind = type(copy.get_submodule(name)).__name__
        (first, *_) = str(error).splitlines() or [type(error).__name__]
        return (
            f"in training mode the smaller model does not run in {f'{name!r} ({kind})' if name else kind}: "
            f"{first.rstrip('.')}. In evaluation mode the example does not reach all that reads these "
            "units, so that part keeps its size, as an auxiliary head does. Leave these units as they "
            "are, or take that part out of the model first"
        )
    return ""


def compare(after: list[Any], masked: list[Any]) -> str:
    """What is wrong with an output; empty if nothing."""
    for ours, theirs in zip(after, masked, strict=False):
        if not isinstance(theirs, Tensor):
            continue
        if not isinstance(ours, Tensor) or ours.shape != theirs.shape:
            found = tuple(ours.shape) if isinstance(ours, Tensor) else type(ours).__name__
            return (
                f"the smaller model's output has shape {found} instead of {tuple(theirs.shape)}; probably "
                "its forward has a size written in numbers, as in view(-1, 400): write flatten(1)"
            )
        if not theirs.is_floating_point():
            continue
        if not theirs.isfinite().all():
            return "the model gives infinity or NaN on the example, so nothing can be compared"
        allowed = 1e-9 if theirs.dtype == torch.float64 else 1e-4
        allowed = 2e-2 if theirs.dtype in (torch.float16, torch.bfloat16) else allowed
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        if distance(ours, theirs) > allowed * scale + 1e-7:
            return (
                f"the smaller model's output is off by {distance(ours, theirs):.3g} from the original "
                "with those units unread; something in its forward depends on the width, or is random in "
                "evaluation mode"
            )
    return "" if len(after) == len(masked) else "the smaller model gives another number of outputs"


def said(error: Exception) -> str:
    """The user's line that failed, and the first line of the error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if TORCH not in f.filename]
    (first, *_) = str(error).splitlines() or [type(error).__name__]
    line = frames[-1].line if frames and frames[-1].name != "outputs" else None
    place = f" at `{line}`" if line else ""
    return (
        f"the smaller model does not run{place}: {first.rstrip('.')}. Probably a size is written there in "
        "numbers: take it from the tensor's shape, as flatten(1) and x.shape do"
    )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [x for item in value.values() for x in _leaves(item)]
    if isinstance(value, list | tuple):
        return [x for item in value for x in _leaves(item)]
    return [value]


def distance(a: Any, b: Any) -> float:
    """Largest absolute difference; 0 for what is no tensor."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.numel():
        return float((a.double() - b.double()).abs().max())
    return 0.0
