"""The library's source as syntax trees, for tests that look at its structure."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import sterna

SOURCE = Path(sterna.__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[2]


@cache
def files() -> dict[str, Path]:
    """Every source file by its path within the package, such as ``comm/solo.py``."""
    return {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}


@cache
def text(name: str) -> str:
    """The text of one source file."""
    return files()[name].read_text(encoding="utf-8")


@cache
def parsed(name: str) -> ast.Module:
    """The syntax tree of one source file."""
    return ast.parse(text(name))


def module_name(name: str) -> str:
    """``sterna.comm.solo`` for ``comm/solo.py``."""
    parts = ("sterna", *Path(name).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def dotted(node: ast.expr) -> str:
    """``a.b.c`` for an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported(node: ast.AST) -> list[str]:
    """What an import statement loads, with every name that may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def imports(tree: ast.AST) -> list[str]:
    """Everything that is imported anywhere."""
    return [name for node in ast.walk(tree) for name in imported(node)]


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not those in functions or for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if _is_for_types(node):
            continue
        yield node
        yield from at_import(node)


def calls(tree: ast.AST) -> list[str]:
    """The dotted names of everything that is called."""
    found = [dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [name for name in found if name]


def is_of(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of the packages or lies in it."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)
