"""How long a file may be."""

import ast

import pytest

from architecture.source import files, parsed, text

METHOD, OTHER, FIT = 200, 400, 45


def is_method(name: str) -> bool:
    """Whether the file has ``EXAMPLES`` at its foot."""
    assigned = {
        target.id
        for node in parsed(name).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return "EXAMPLES" in assigned


def test_there_are_methods() -> None:
    assert sum(map(is_method, files())) >= 6


@pytest.mark.parametrize("name", files())
def test_no_file_is_too_long(name: str) -> None:
    lines = len(text(name).splitlines())
    budget = METHOD if is_method(name) else OTHER
    assert lines <= budget, f"{name} has {lines} lines; the budget is {budget}: what can go?"


def test_the_loop_is_short() -> None:
    """The one gradient loop fits a screen."""
    (fit,) = [
        node
        for node in parsed("loop.py").body
        if isinstance(node, ast.FunctionDef) and node.name == "fit"
    ]
    assert ast.get_docstring(fit)
    first, last = fit.body[1].lineno, fit.body[-1].end_lineno
    assert last is not None and last - first + 1 <= FIT
