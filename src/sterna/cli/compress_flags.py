"""The flags of ``sterna compress`` and ``sterna export``, which of them a method reads, and their ranges."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from sterna.cli.usage import UsageError, dashed, require
from sterna.runs.subject import LOADERS

_arg = tyro.conf.arg
Method = Literal["ssl", "force", "low-rank", "ternary", "magnitude"]
EngineName = Literal["onnxruntime", "eager", "compiled"]


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What is compressed or exported."""

    weights: Annotated[
        Path | None, _arg(help="your_module.py:build only: safetensors file of the trained weights")
    ] = None
    data: Annotated[
        str | None,
        _arg(help=f"your_module.py:build only: {', '.join(LOADERS)}, or your_file.py:function"),
    ] = None
    batch: Annotated[
        int | None, _arg(help="examples in a call when models are timed; default: 64")
    ] = None
    threads: Annotated[
        int | None, _arg(help="threads inside an operator when models are timed; default: 1")
    ] = None
    engines: Annotated[
        tuple[EngineName, ...] | None,
        _arg(
            help="what models are timed in; default: onnxruntime eager; compiled first builds each model"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class CompressFlags(ModelFlags):
    """Make a trained network smaller and faster, and prove it: shrink, factorise or ternarise it."""

    model: Annotated[
        str,
        tyro.conf.Positional,
        _arg(metavar="RUN|MODEL", help="a folder of sterna run, or your_module.py:build"),
    ]
    method: Annotated[
        Method,
        _arg(
            help="ssl: group lasso, then removal; force, low-rank: two layers for one, with and without "
            "a force before; ternary: values by coordinate descent; magnitude: the shortest units go"
        ),
    ] = "ssl"
    keep_accuracy: Annotated[
        float, _arg(help="percentage points of validation accuracy that may be lost")
    ] = 0.5
    out: Annotated[
        Path | None, _arg(help="folder; default: runs/compress-<method>-<date>-<time>")
    ] = None
    epochs: Annotated[
        int | None,
        _arg(
            help="ssl, force: epochs with the penalty or the force, before the cut; low-rank: as many "
            "without; default: 5"
        ),
    ] = None
    finetune_epochs: Annotated[
        int | None, _arg(help="all but ternary: epochs after the cut; default: 5")
    ] = None
    strength: Annotated[
        tuple[float, ...],
        _arg(
            help="ssl: strengths to try, by default six; force: lambda, one value, by default 0.03"
        ),
    ] = ()
    depth: Annotated[
        float | None,
        _arg(
            help="ssl: strength for whole residual blocks over that for units; default: 0, which keeps them"
        ),
    ] = None
    shares: Annotated[
        tuple[float, ...],
        _arg(
            help="ssl: multiply-adds that may be left, one strength for all; force, low-rank: those that "
            "are; magnitude: units that are; by default, but for ssl, 0.75 0.5 0.35 0.25 0.15"
        ),
    ] = ()
    form: Annotated[
        Literal["channel", "spatial"] | None,
        _arg(help="force, low-rank: how a convolution is cut in two; default: channel"),
    ] = None
    multiple_of: Annotated[
        int | None, _arg(help="all but ternary: widths and ranks are multiples of it; default: 8")
    ] = None
    rate: Annotated[
        float | None,
        _arg(help="all but ternary: factor of the learning rate in all phases; default: 1"),
    ] = None
    lr: Annotated[
        float | None,
        _arg(
            help="your_module.py:build only, not ternary: learning rate, SGD with momentum 0.9; default: 0.01"
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        _arg(
            help="your_module.py:build only, not ternary: examples per training step; default: 64"
        ),
    ] = None
    passes: Annotated[
        int | None, _arg(help="ternary: most passes over all weights; default: 10")
    ] = None
    validate_on: Annotated[
        Literal["test", "train"],
        _arg(
            help="cut the examples that candidates are judged on out of the test part, which the model has "
            "not seen; or out of the training part, which flatters the dense model"
        ),
    ] = "test"
    validation: Annotated[
        float | None, _arg(help="share of that part; default: 0.5 of test, 0.1 of train")
    ] = None
    seed: Annotated[
        int | None, _arg(help="seeds all phases and the validation part; default: the run's, or 0")
    ] = None
    quiet: Annotated[bool, _arg(help="show no progress")] = False


@dataclass(frozen=True, kw_only=True)
class ExportFlags(ModelFlags):
    """Write a trained model as ONNX, after comparing it with torch in ONNX Runtime."""

    model: Annotated[
        str,
        tyro.conf.Positional,
        _arg(
            metavar="RUN|MODEL",
            help="a folder of sterna run or sterna compress, or your_module.py:build",
        ),
    ]
    path: Annotated[
        Path,
        tyro.conf.Positional,
        _arg(metavar="FILE", help="the file to write, such as model.onnx"),
    ]
    fixed_batch: Annotated[
        bool, _arg(help="fix the batch size of the file to 2, where a model cannot leave it free")
    ] = False
    time: Annotated[bool, _arg(help="also time it")] = False


_TRAINED = ("ssl", "force", "low-rank", "magnitude")
_ONLY_FOR: Mapping[str, tuple[str, ...]] = {
    "strength": ("ssl", "force"),
    "depth": ("ssl",),
    "shares": ("ssl", "force", "low-rank", "magnitude"),
    "form": ("force", "low-rank"),
    "passes": ("ternary",),
    "epochs": ("ssl", "force", "low-rank"),
    "finetune_epochs": _TRAINED,
    "multiple_of": _TRAINED,
    "rate": _TRAINED,
    "lr": _TRAINED,
    "batch_size": _TRAINED,
}
"""Flags that only some methods read."""

ONLY_OF_MODULES = ("weights", "data", "lr", "batch_size")
OF_TIMING = ("batch", "threads", "engines")
USUAL: Mapping[str, Any] = {
    "batch": 64,
    "threads": 1,
    "engines": ("onnxruntime", "eager"),
    "epochs": 5,
    "finetune_epochs": 5,
    "depth": 0.0,
    "form": "channel",
    "multiple_of": 8,
    "rate": 1.0,
    "lr": 0.01,
    "batch_size": 64,
    "passes": 10,
}
"""What stands for a flag that is not given."""


def check(flags: CompressFlags) -> None:
    """Refuse what the method does not read, and values out of range.

    Raises:
        UsageError: there is such a flag.
    """
    for name, methods in _ONLY_FOR.items():
        if flags.method not in methods and getattr(flags, name) not in (None, ()):
            raise UsageError(
                f"{dashed(name)} is for --method {' and '.join(methods)}; got {flags.method}."
            )
    if flags.method == "force" and len(flags.strength) > 1:
        raise UsageError("--strength takes one value with --method force.")
    if flags.method == "ssl" and flags.shares and len(flags.strength) > 1:
        raise UsageError("--strength takes one value beside --shares.")
    for strength in flags.strength:
        least = 0.0 if flags.method == "ssl" else -math.inf
        must = "above 0 and finite" if flags.method == "ssl" else "finite"
        require(least < strength < math.inf, "--strength", must, strength)
    for share in flags.shares:
        require(0 < share < 1, "--shares", "shares in (0, 1)", share)
    for name, least in (
        ("epochs", 1),
        ("finetune_epochs", 0),
        ("depth", 0),
        ("multiple_of", 1),
        ("batch_size", 1),
        ("passes", 1),
    ):
        given = value(flags, name)
        require(least <= given < math.inf, dashed(name), f"{least} or more", given)
    require(0 <= flags.keep_accuracy < 100, "--keep-accuracy", "in [0, 100)", flags.keep_accuracy)
    part = flags.validation
    require(part is None or 0 < part < 1, "--validation", "a share in (0, 1)", part)
    for name in ("rate", "lr"):
        given = value(flags, name)
        require(0 < given < math.inf, dashed(name), "above 0 and finite", given)
    check_timing(flags)


def check_timing(flags: ModelFlags) -> None:
    """Refuse values of the flags of timing that are out of range.

    Raises:
        UsageError: there is one.
    """
    for name in ("batch", "threads"):
        given = value(flags, name)
        require(given >= 1, dashed(name), "1 or more", given)
    engines = value(flags, "engines")
    require(bool(engines), "--engines", "at least one of onnxruntime, eager, compiled", "none")


def value(flags: ModelFlags, name: str) -> Any:
    """A flag's value, or the usual one where it is not given."""
    given = getattr(flags, name)
    return USUAL[name] if given is None else given
