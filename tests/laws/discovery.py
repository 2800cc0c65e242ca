"""Finds every method of the library: what stands in an ``EXAMPLES`` tuple at the foot of a module."""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sterna

SOURCE = Path(sterna.__file__).parent
METHOD_PACKAGES = ("codecs", "exchange", "objectives", "samplers", "server")


@cache
def sources() -> dict[str, Path]:
    """Every module of the library by its dotted name, without importing it."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = ("sterna", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _has_examples(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    targets = [
        target
        for node in body
        for target in (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
    ]
    return any(isinstance(target, ast.Name) and target.id == "EXAMPLES" for target in targets)


@cache
def method_modules(package: str = "") -> dict[str, ModuleType]:
    """The modules with ``EXAMPLES``, of one package such as ``codecs`` or of all."""
    start = f"sterna.{package}." if package else "sterna."
    return {
        name: importlib.import_module(name)
        for name, path in sources().items()
        if name.startswith(start) and _has_examples(path)
    }


def examples(package: str = "") -> list[Any]:
    """The examples of one package or of all, as parameters with readable, repeatable ids.

    A wrapper, a method with a hyperparameter ``inner``, stands here around the first two examples of
    each of the package's other methods too: it may not import one to make an example of its own.
    """
    if not package:
        return [case for package in METHOD_PACKAGES for case in examples(package)]
    own = [
        (f"{module.rpartition('.')[2]}-{k}", example)
        for module, loaded in method_modules(package).items()
        for k, example in enumerate(loaded.EXAMPLES)
    ]
    around = [
        (f"{name}-in-{wrapper.__name__}", wrapper(inner=inner, **_needed(wrapper)))
        for wrapper in wrappers(package)
        for name, inner in own
        if type(inner) is not wrapper and name.endswith(("-0", "-1"))
    ]
    return [pytest.param(example, id=name) for name, example in own + around]


def _required(wrapper: type) -> list[dataclasses.Field[Any]]:
    missing = dataclasses.MISSING
    return [
        field
        for field in dataclasses.fields(wrapper)
        if field.default is missing and field.default_factory is missing
    ]


def _needed(wrapper: type) -> dict[str, int]:
    """1 for each count without a default: the laws of several steps then see what comes after."""
    return {field.name: 1 for field in _required(wrapper) if field.type in (int, "int")}


@cache
def wrappers(package: str) -> tuple[type, ...]:
    """The dataclasses of a package that users wrap around another method, their ``inner``."""
    return tuple(
        value
        for name, module in modules_of(package).items()
        for value in vars(module).values()
        if inspect.isclass(value)
        and value.__module__ == name
        and dataclasses.is_dataclass(value)
        and "inner" in (names := {field.name for field in _required(value)})
        and names == {"inner", *_needed(value)}
    )


def modules_of(package: str) -> dict[str, ModuleType]:
    """Every module of a package, imported."""
    folder = importlib.import_module(f"sterna.{package}")
    return {
        f"sterna.{package}.{module.name}": importlib.import_module(
            f"sterna.{package}.{module.name}"
        )
        for module in pkgutil.iter_modules(folder.__path__)
    }


@cache
def namespace() -> dict[str, Any]:
    """The public classes of the method packages: what the repr of a method may mention."""
    return {
        name: value
        for package in METHOD_PACKAGES
        for module in modules_of(package).values()
        for name, value in vars(module).items()
        if inspect.isclass(value) and not name.startswith("_")
    }


def fresh(method: Any) -> Any:
    """An equal method that is another object."""
    return eval(repr(method), dict(namespace()))
