"""Slim-DP against the literal transcription with a server, over ten steps of three workers."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sterna.comm.in_process import run_in_process
from sterna.exchange.explorers import BestResponse
from sterna.exchange.slim_dp import SlimDP
from sterna.randomness import generator
from sterna.replica import Replica

_spec = importlib.util.spec_from_file_location(
    "reference_slim_dp", Path(__file__).with_name("slim_dp.py")
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

STEPS, WORKERS, SIZE, RATE = 10, 3, 20, 0.1


def _draw(*shape, seed):
    return torch.randn(*shape, generator=generator(seed, "reference"), dtype=torch.float64)


START = _draw(SIZE, seed=0)
CENTRES = _draw(STEPS, WORKERS, SIZE, seed=1)  # the gradient is w - centre


def _train(comm, exchange):
    model = torch.nn.Linear(SIZE, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(START[None])
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=RATE))
    state, rng, history = exchange.init(replica), generator(5, comm.rank), []
    for t in range(STEPS):
        (0.5 * (model.weight.squeeze(0) - CENTRES[t, comm.rank]).square().sum()).backward()
        state = exchange(replica, state, comm, rng)
        anchor = state["anchor"]["weight"].clone().squeeze(0)
        history.append((anchor, model.weight.detach().clone().squeeze(0)))
    return history


def _slope(t, i):
    return lambda w: w - CENTRES[t, i].numpy()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("core_ratio", "explorer_ratio"), [(0.2, 0.3), (0.4, 0.0), (0.0, 0.25), (0.5, 0.5)]
)
@pytest.mark.parametrize("gradient_weight", [0.0, 2.0])
def test_ten_steps_of_three_workers_equal_the_reference(
    every, core_ratio, explorer_ratio, gradient_weight
):
    exchange = SlimDP(
        every=every,
        core_ratio=core_ratio,
        explorer_ratio=explorer_ratio,
        refresh_every=2,
        gradient_weight=gradient_weight,
    )
    coins = generator(5, 0)  # those of rank 0
    seeds = [int(torch.randint(2**62, (1,), generator=coins)) for _ in range(STEPS)]

    def at_random(turn, residuals, outside):
        coins = generator(seeds[turn], "explorer")
        order = torch.randperm(len(outside), generator=coins).tolist()
        return [[outside[j] for j in order] for _ in residuals]

    _agrees(exchange, at_random)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    ("core_ratio", "explorer_ratio"), [(0.2, 0.3), (0.4, 0.0), (0.0, 0.25), (0.5, 0.5)]
)
def test_best_responses_equal_the_reference(every, core_ratio, explorer_ratio):
    exchange = SlimDP(
        every=every,
        core_ratio=core_ratio,
        explorer_ratio=explorer_ratio,
        refresh_every=2,
        explorer=BestResponse(),
    )
    _agrees(exchange, reference.best_responses)


def _agrees(exchange, explore):
    found = run_in_process(lambda comm: _train(comm, exchange), WORKERS)
    core, explorer = exchange.core_ratio, exchange.explorer_ratio
    server = reference.Server(START.numpy(), round(core * SIZE), 2, exchange.gradient_weight)
    slopes = [[_slope(t, i) for i in range(WORKERS)] for t in range(STEPS)]
    expected = reference.train(
        START.numpy(), slopes, exchange.every, RATE, server, explore, round(explorer * SIZE)
    )
    for t, (weights, workers) in enumerate(expected):
        for i in range(WORKERS):
            anchor, own = found[i][t]
            torch.testing.assert_close(anchor, torch.from_numpy(weights))
            torch.testing.assert_close(own, torch.from_numpy(workers[i]))
