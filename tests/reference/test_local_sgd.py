"""Model averaging against the literal transcription, over ten steps of three workers."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sterna.comm.in_process import run_in_process
from sterna.exchange.model_average import ModelAverage
from sterna.randomness import generator
from sterna.replica import Replica

_spec = importlib.util.spec_from_file_location(
    "reference_local_sgd", Path(__file__).with_name("local_sgd.py")
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

STEPS, WORKERS, SIZE = 10, 3, 7


def _draw(*shape, seed):
    return torch.randn(*shape, generator=generator(seed, "reference"), dtype=torch.float64)


START = _draw(SIZE, seed=0)
INPUTS = _draw(STEPS, WORKERS, 5, SIZE, seed=1)
TARGETS = _draw(STEPS, WORKERS, 5, seed=2)


def _train(comm, exchange, momentum):
    model = torch.nn.Linear(SIZE, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(START[None])
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum))
    state, rng, history = exchange.init(replica), generator(0, comm.rank), []
    for t in range(STEPS):
        error = model(INPUTS[t, comm.rank]).squeeze(1) - TARGETS[t, comm.rank]
        (0.5 * error.square().mean()).backward()
        state = exchange(replica, state, comm, rng)
        history.append(model.weight.detach().clone().squeeze(0))
    return history


@pytest.mark.parametrize("every", [1, 3, 4])
@pytest.mark.parametrize("local_momentum", [0.0, 0.9])
@pytest.mark.parametrize("outer", [(1.0, 0.0, False), (0.7, 0.9, True), (0.5, 0.8, False)])
def test_ten_steps_of_three_workers_equal_the_reference(every, local_momentum, outer):
    exchange = ModelAverage(
        every=every, outer_lr=outer[0], outer_momentum=outer[1], nesterov=outer[2]
    )
    found = run_in_process(lambda comm: _train(comm, exchange, local_momentum), WORKERS)
    batches = [
        [(INPUTS[t, i].tolist(), TARGETS[t, i].tolist()) for i in range(WORKERS)]
        for t in range(STEPS)
    ]
    expected = reference.train(START.numpy(), batches, every, (0.1, local_momentum), outer)
    for t in range(STEPS):
        for i in range(WORKERS):
            torch.testing.assert_close(found[i][t], torch.from_numpy(expected[t][i]))
