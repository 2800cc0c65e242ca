"""Hygiene for every test: repeatable arithmetic, executed shapes, and nothing left behind."""

import contextlib
import os
import random  # noqa: TID251  to keep dependencies off the global generator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import rich.style
import torch
import tyro

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# Helper modules in tests/ are imported by name, also by worker processes.
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import leaks  # noqa: E402
import shapes  # noqa: E402

shapes.install("sterna")

torch.set_num_threads(1)
with contextlib.suppress(RuntimeError):  # too late where a plugin has used torch already
    torch.set_num_interop_threads(1)
torch.use_deterministic_algorithms(True)

# rich draws ids and tyro cache evictions from Python's global generator, which tests leave alone.
rich.style.getrandbits = random.Random(0).getrandbits
_cli = tyro.cli


def _cli_that_draws_nothing(*args: Any, **kwargs: Any) -> Any:
    state = random.getstate()
    try:
        return _cli(*args, **kwargs)
    finally:
        random.setstate(state)


tyro.cli = _cli_that_draws_nothing

hypothesis.settings.register_profile(
    "sterna", deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile("sterna")


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Fails a test that leaks threads, processes, variables, a group, or global random state."""
    before = leaks.Snapshot.take()
    yield
    left = leaks.left_behind(before)
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets; skips where there is none."""
    named = os.environ.get("STERNA_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set STERNA_DATA to the folder that holds them")
    return folder
