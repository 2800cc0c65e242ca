"""A model's program: what `torch.export` makes of it on an example, or why it does not."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from sterna.multiply_adds import counted
from sterna.quiet import quiet

TORCH = str(nn.__file__).rpartition("/nn/")[0]
"""Where torch's own files are."""


class Refused(ValueError):
    """A model, or a part of it, that cannot be traced or shrunk; the message says which and why."""


def arguments(example: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    """The positional arguments that an example stands for."""
    return example if isinstance(example, tuple) else (example,)


def copied(model: nn.Module, instead: Mapping[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A deep copy without gradients.

    Args:
        model: it stays as it is.
        instead: modules of it, and what stands in their places in the copy, in their mode. All places
            change, also a second name, and an entry of a plain list or dict.

    Raises:
        Refused: the model cannot be copied.
    """
    instead = instead or {}
    for old, new in instead.items():
        new.train(old.training)
    try:
        # deepcopy takes what it finds here for already copied.
        copy: nn.Module = deepcopy(model, {id(old): new for old, new in instead.items()})
    except Exception as error:
        (why, *_) = str(error).split(". ")
        raise Refused(
            f"{type(model).__name__}: the model must be copied, since it is never changed in place; "
            f"copy.deepcopy failed: {why}. Keep computed tensors out of its attributes; "
            "torch.nn.utils.prune.remove and remove_weight_norm take out theirs."
        ) from error
    copy.zero_grad(set_to_none=True)
    return copy


@contextmanager
def not_running(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Refuses inside the block, by name, a module of ``model`` that runs, though it was replaced."""

    def found(module: nn.Module, _: Any) -> NoReturn:
        raise Refused(
            f"{type(model).__name__}: {gone[module]!r} ({type(module).__name__}) cannot be replaced: the "
            "smaller model still runs the old one, which it holds outside of what copy.deepcopy copies. "
            "Keep it as an attribute of its module, or leave it as it is."
        )

    gone = {model.get_submodule(name): name for name in names}
    handles = [module.register_forward_pre_hook(found) for module in gone]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refuse_converted(model: nn.Module) -> None:
    """Raises for a model whose weights cannot be cut.

    Raises:
        Refused: it is quantised or scripted, or a part of it is.
    """
    name = type(model).__name__
    for path, module in model.named_modules():
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule) or "quantized" in kind.__module__:
            raise Refused(
                f"{path or name} ({kind.__name__}) is quantised or scripted, and its weights cannot be "
                "cut. Shrink the model that it was made from, and quantise or script after that."
            )


def multiply_adds(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Multiply-adds of a copy of a model, for all of the batch.

    Raises:
        Refused: the model does not run.
    """
    copy = copied(model)
    try:
        return counted(copy, inputs)[""]
    except Exception as error:
        (why, *_) = str(error).splitlines() or [type(error).__name__]
        raise Refused(
            f"{type(model).__name__} does not run on the example: {why.rstrip('.')}. Pass an example "
            "that the model takes."
        ) from error


def program(model: nn.Module, inputs: tuple[Any, ...]) -> torch.export.ExportedProgram:
    """The traced graph of a copy of a model, in evaluation mode.

    Raises:
        Refused: the model cannot be traced, or is quantised or scripted.
    """
    refuse_converted(model)
    name = type(model).__name__
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
