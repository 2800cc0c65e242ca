"""Executes the shape annotations of the library: every call of an annotated function is checked.

``jaxtyping.install_import_hook`` would do nearly this. It rewrites the syntax tree of every module,
numba kernels included, and it raises its own error before a function can refuse a wrong argument with
the message that it has for users, which tests want to see. So this hook wraps the annotated functions
when a module has been loaded, and lets them refuse first.
"""

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any, get_args

import torch.fx
from beartype import beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped


def has_shapes(annotation: Any) -> bool:
    """Whether an annotation says anything about a shape."""
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return True
    return any(has_shapes(part) for part in get_args(annotation))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its annotations executed; what it refuses by itself, it refuses as before."""
    strict = jaxtyped(_only_shapes(function), typechecker=beartype)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, torch.fx.Proxy) for x in args):
            return function(*args, **kwargs)  # being traced: there are no shapes yet
        try:
            return strict(*args, **kwargs)
        except TypeCheckError as violation:
            if "checking the parameters" in str(violation):
                function(*args, **kwargs)  # raises, if it looks at its arguments
            raise

    call.checks_shapes = True  # type: ignore[attr-defined]
    return call


def _only_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same call without the other annotations: mypy's task, and beartype draws from ``random``."""

    @functools.wraps(function)
    def shim(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    signature = inspect.signature(function)
    empty = inspect.Parameter.empty
    shim.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            p if has_shapes(p.annotation) else p.replace(annotation=empty)
            for p in signature.parameters.values()
        ],
        return_annotation=(
            signature.return_annotation if has_shapes(signature.return_annotation) else empty
        ),
    )
    return shim


def _annotated(function: Any) -> bool:
    return isinstance(function, FunctionType) and any(
        has_shapes(annotation) for annotation in function.__annotations__.values()
    )


def _wrapped(value: Any) -> Any:
    """The checked form of a function, method or property; None where there is nothing to check."""
    if _annotated(value):
        return checked(value)
    if isinstance(value, classmethod | staticmethod) and _annotated(value.__func__):
        return type(value)(checked(value.__func__))
    if isinstance(value, property) and _annotated(value.fget):
        return property(checked(value.fget), value.fset, value.fdel, value.__doc__)
    return None


def check_module(module: ModuleType) -> int:
    """Wrap the functions and methods that ``module`` defines; how many there are."""
    spaces: list[Any] = [module]
    for value in vars(module).values():
        if inspect.isclass(value) and value.__module__ == module.__name__:
            spaces.append(value)
    count = 0
    for space in spaces:
        for name, value in list(vars(space).items()):
            if getattr(value, "__module__", module.__name__) != module.__name__:
                continue
            wrapped = _wrapped(value)
            if wrapped is not None:
                setattr(space, name, wrapped)
                count += 1
    return count


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        check_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self.package:
            return None
        for finder in self._others():
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None

    def _others(self) -> Iterator[Any]:
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                yield finder


def install(package: str) -> None:
    """Check every module of ``package`` that is imported from now on."""
    sys.meta_path.insert(0, _Finder(package))
