"""The watchers in ``tests/conftest.py`` bite."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import leaks
import shapes
import sterna.data.examples
import sterna.objectives.cross_entropy
from sterna.randomness import isolated


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> leaks.Snapshot:
    monkeypatch.setattr(leaks, "PATIENCE_S", 0.05)
    return leaks.Snapshot.take()


def only(before: leaks.Snapshot, words: str) -> bool:
    left = leaks.left_behind(before)
    return len(left) == 1 and words in left[0]


def test_nothing_left(before: leaks.Snapshot) -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    subprocess.run([sys.executable, "-c", ""], check=True)
    with isolated(0, "hygiene"):
        torch.rand(3)
    assert leaks.left_behind(before) == []


@pytest.mark.parametrize("daemon", [False, True])
def test_threads(before: leaks.Snapshot, daemon: bool) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="left-over", daemon=daemon)
    thread.start()
    assert only(before, "thread left-over")
    end.set()
    thread.join()


def test_processes(before: leaks.Snapshot) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert only(before, f"process {process.pid}")
        process.kill()


def test_environment_and_folder(before: leaks.Snapshot, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STERNA_LEAK", "1")
        assert only(before, "STERNA_LEAK")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert only(before, "current directory")
        assert os.getcwd() == str(tmp_path)  # noqa: PTH109


def test_global_random_state(before: leaks.Snapshot) -> None:
    with torch.random.fork_rng():
        torch.rand(1)
        assert only(before, "global random state of torch")


def test_modes(before: leaks.Snapshot) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert only(before, "default dtype")
    finally:
        torch.set_default_dtype(torch.float32)


def test_arithmetic_is_repeatable() -> None:
    assert torch.get_num_threads() == 1
    assert torch.are_deterministic_algorithms_enabled()


# Shape annotations are executed.


Matrix = Float[Tensor, "n k"]
Square = Float[Tensor, "n n"]
Vector = Float[Tensor, " n"]


def double(x: Matrix, refuses: bool = False) -> Vector:
    if refuses and x.dim() != 2:
        raise ValueError("double: x must have two dimensions")
    return (2 * x).sum(1) if x.dim() == 2 else x


def rows(x: Matrix) -> Iterator[Vector]:
    yield from x


def test_shapes_are_executed() -> None:
    checked = shapes.checked(double)
    assert checked(torch.ones(3, 2)).tolist() == [4.0, 4.0, 4.0]
    with pytest.raises(TypeCheckError, match="parameters"):
        checked(torch.ones(3))
    with pytest.raises(TypeCheckError, match="parameters"):
        checked(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must have two dimensions"):
        checked(torch.ones(3), refuses=True)
    assert [x.tolist() for x in shapes.checked(rows)(torch.ones(2, 1))] == [[1.0], [1.0]]


def test_a_wrong_result_is_found() -> None:
    def square(x: Matrix) -> Square:
        return x @ x.T if len(x) < 3 else x

    checked = shapes.checked(square)
    assert checked(torch.ones(2, 3)).shape == (2, 2)
    with pytest.raises(TypeCheckError, match="return value"):
        checked(torch.ones(3, 2))


def test_the_library_is_checked() -> None:
    for function in (
        sterna.objectives.cross_entropy.CrossEntropy.per_example,
        sterna.data.examples.Examples.__getitem__,
    ):
        assert getattr(function, "checks_shapes", False)
