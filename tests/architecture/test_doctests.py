"""Every example in a docstring does what it says."""

import doctest
import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType

import pytest

from architecture.source import files, module_name, text
from sterna.randomness import isolated

MODULES = [module_name(name) for name in files() if ">>>" in text(name)]


class _Finder(doctest.DocTestFinder):
    """Sees through the wrappers that execute shape annotations."""

    def _from_module(self, module: ModuleType | None, object: object) -> bool:
        if inspect.isfunction(object) and module is not None:
            return object.__module__ == module.__name__
        return super()._from_module(module, object)  # type: ignore[misc]


def doctests(module: str) -> Iterator[doctest.DocTest]:
    loaded = importlib.import_module(module)
    for test in _Finder(exclude_empty=True).find(loaded, module):
        if test.examples:
            yield test


def test_there_are_doctests() -> None:
    assert len(MODULES) >= 15


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module: str) -> None:
    found, said = 0, []
    for test in doctests(module):
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.FAIL_FAST)
        with isolated(0, "doctest"):
            result = runner.run(test, out=said.append, clear_globs=True)
        found += result.attempted
        assert not result.failed, f"{test.name}\n{''.join(said)}"
    written = sum(line.strip().startswith(">>>") for line in _source(module))
    assert found == written, f"{written} examples are written and {found} were run"


def _source(module: str) -> list[str]:
    return inspect.getsource(importlib.import_module(module)).splitlines()
