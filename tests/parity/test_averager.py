"""Model averaging equals torch's ``PeriodicModelAverager``, in two real processes."""

import pytest

from parity.averager_program import STEPS, train_both
from sterna.comm.launch import launch


@pytest.mark.parametrize(("every", "momentum"), [(1, 0.0), (3, 0.0), (4, 0.9)])
def test_equals_the_periodic_averager(every: int, momentum: float) -> None:
    for found in launch(train_both, (every, momentum), workers=2, timeout_s=60.0):
        assert len(found) == STEPS
        for step, (off, apart) in enumerate(found, start=1):
            assert off < 1e-6
            assert (apart == 0) == (step % every == 0)
