"""Who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from architecture.source import ROOT, at_import, dotted, files, imported, imports, is_of, parsed

OPTIONAL = (
    "tensorboard",
    "torch.utils.tensorboard",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch.onnx",
    "matplotlib",
    "gymnasium",
)


def test_layers() -> None:
    lint = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [str(lint), "--config", str(ROOT / "pyproject.toml"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_contract_knows_every_package() -> None:
    """A package that no layer names is checked by nobody."""
    layers = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    named = {word.strip('",:|') for word in layers.split()}
    there = {f"sterna.{Path(name).with_suffix('').parts[0]}" for name in files()}
    free = {"sterna.__init__", "sterna.__main__"}
    assert there - free <= named, f"add {sorted(there - free - named)} to the layers in pyproject"


def _uses_distributed(tree: ast.Module) -> bool:
    if any(is_of(name, "torch.distributed") for name in imports(tree)):
        return True
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return any(is_of(dotted(node), "torch.distributed") for node in nodes)


@pytest.mark.parametrize("name", files())
def test_torch_distributed_stays_in_comm(name: str) -> None:
    if _uses_distributed(parsed(name)):
        assert name.startswith("comm/") or name == "exchange/ddp_hook.py"


@pytest.mark.parametrize("name", files())
def test_ray_stays_where_it_belongs(name: str) -> None:
    if any(is_of(module, "ray") for module in imports(parsed(name))):
        assert name == "server/ray.py" or name.startswith("rl/")


@pytest.mark.parametrize("name", files())
def test_optional_libraries_are_imported_where_they_are_used(name: str) -> None:
    early = [
        module
        for node in at_import(parsed(name))
        for module in imported(node)
        if is_of(module, *OPTIONAL)
    ]
    assert not early, f"import {early[0]} inside the function that needs it"


def test_these_tests_can_fail() -> None:
    bad = ast.parse(
        "import torch\nfrom torch import distributed\n"
        "try:\n    import onnx\nexcept ImportError:\n    pass\n"
        "def f():\n    import matplotlib\n"
    )
    assert _uses_distributed(bad)
    assert _uses_distributed(ast.parse("x = torch.distributed.get_rank()"))
    assert not _uses_distributed(ast.parse("import torch"))
    early = [m for node in at_import(bad) for m in imported(node) if is_of(m, *OPTIONAL)]
    assert early == ["onnx"]


def test_importing_sterna_is_cheap() -> None:
    """Neither torch nor anything else of weight is loaded by ``import sterna``."""
    code = "import sys, sterna; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("torch", "numpy", "numba", "sklearn", "rich", "tyro"):
        assert f"'{heavy}'" not in done.stdout, f"import sterna loads {heavy}"


def test_importing_everything_leaves_optional_libraries_alone() -> None:
    from architecture.source import module_name

    starts_something = ("__main__.py", "comm/preload.py")  # the second loads them on purpose
    modules = [module_name(name) for name in files() if name not in starts_something]
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "print([m for m in ('ray', 'tensorboard', 'onnx', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
