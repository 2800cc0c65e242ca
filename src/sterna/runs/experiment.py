"""Experiments by name: ``digits.terngrad``, or ``my_experiment.py:train`` from a user's own file."""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sterna.runs.run import Run

_PACKAGE = "sterna.experiments"


class UnknownExperiment(LookupError):
    """No experiment has that name; the message says which there are."""


def resolve(name: str) -> Callable[..., Run]:
    """The experiment function of that name.

    Args:
        name: ``<data>.<method>``, or ``path/to/file.py:function``.

    Raises:
        UnknownExperiment: there is no such file, function or name.
    """
    if ".py" in name:
        return _from_file(name)
    module_name, _, function_name = name.partition(".")
    if module_name in _module_names():
        found = experiments_of(importlib.import_module(f"{_PACKAGE}.{module_name}"))
        if function_name in found:
            return found[function_name]
        near = ", ".join(f"{module_name}.{other}" for other in found)
    else:
        near = ", ".join(f"{other}.*" for other in _module_names())
    raise UnknownExperiment(
        f"There is no experiment {name!r}; there is {near}. `sterna list` describes them, and "
        "your own is named path/to/file.py:function."
    )


def located(name: str) -> str:
    """The name by which `resolve` finds it from any folder."""
    file_name, colon, function_name = name.partition(":")
    return f"{Path(file_name).resolve()}{colon}{function_name}" if ".py" in name else name


def restored(function: Callable[..., Run], plain: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that went through JSON, in the types that the experiment's signature gives."""
    hints = get_type_hints(function)
    return {name: _typed(value, hints.get(name, Any)) for name, value in plain.items()}


def _typed(value: Any, hint: Any) -> Any:
    choices = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if isinstance(value, str) and Path in choices and str not in choices:
        return Path(value)
    if isinstance(value, list) and any(get_origin(choice) is tuple for choice in choices):
        return tuple(value)
    return value


def experiments_of(module: ModuleType) -> dict[str, Callable[..., Run]]:
    """The public functions of a module that return a `Run`, in the order of the file."""
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__ == module.__name__
        and inspect.signature(function).return_annotation in (Run, "Run")
    }


def all_experiments() -> dict[str, Callable[..., Run]]:
    """Every experiment that comes with the library, by name."""
    return {
        f"{module_name}.{name}": function
        for module_name in _module_names()
        for name, function in experiments_of(
            importlib.import_module(f"{_PACKAGE}.{module_name}")
        ).items()
    }


def _module_names() -> list[str]:
    package = importlib.import_module(_PACKAGE)
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def _from_file(name: str) -> Callable[..., Run]:
    file_name, _, function_name = name.partition(":")
    path = Path(file_name).resolve()
    if not path.is_file():
        raise UnknownExperiment(f"There is no file {file_name} for the experiment {name!r}.")
    module_name = f"sterna_user_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # noqa: S101  a .py file has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    if str(path.parent) not in sys.path:  # for what it imports, now or when it is called
        sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    function: Any = getattr(module, function_name, None)
    if not callable(function):
        there = ", ".join(experiments_of(module)) or "no function that is annotated to return a Run"
        raise UnknownExperiment(
            f"{file_name} has no function {function_name!r}; it has {there}. Name it as "
            f"{file_name}:function."
        )
    return function  # type: ignore[no-any-return]
