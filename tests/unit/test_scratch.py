"""The control from scratch: the same shape, nothing of the old weights, the same for the same seed."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from sterna.data import Dataset, Examples
from sterna.procedures.scratch import from_scratch
from sterna.procedures.training import Training
from sterna.randomness import generator, isolated


@pytest.fixture
def training() -> Training:
    inputs = torch.randn(64, 6, generator=generator(0, "scratch"))
    points = Examples(inputs, inputs[:, :3].argmax(1))
    return Training(
        data=Dataset("points", points, points, 3),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        batch_size=16,
    )


@pytest.fixture
def shape() -> nn.Sequential:
    with isolated(1, "shape"), torch.no_grad():
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
        model[1].running_mean.fill_(7.0)
        for parameter in model.parameters():
            parameter.fill_(3.0)
    return model


def test_nothing_of_the_old_weights_is_left(training, shape) -> None:
    before = {name: x.clone() for name, x in shape.state_dict().items()}
    fresh = from_scratch(shape, training, epochs=0)
    assert all(torch.equal(x, before[name]) for name, x in shape.state_dict().items())
    assert {n: p.shape for n, p in fresh.named_parameters()} == {
        n: p.shape for n, p in shape.named_parameters()
    }
    assert not any((p == 3.0).any() for p in fresh.parameters())
    assert torch.equal(fresh[1].running_mean, torch.zeros(5))


def test_seeds_draw_and_train(training, shape) -> None:
    one, again = (from_scratch(shape, training, epochs=8) for _ in range(2))
    other = from_scratch(shape, replace(training, seed=1), epochs=8)
    assert torch.equal(one[0].weight, again[0].weight)
    assert not torch.equal(one[0].weight, other[0].weight)
    untrained = from_scratch(shape, training, epochs=0)
    assert training.judge(one).loss < training.judge(untrained).loss


def test_networks_may_draw_in_their_own_way(training, shape) -> None:
    def draw(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.5)

    assert (from_scratch(shape, training, epochs=0, draw=draw)[0].weight == 0.5).all()


def test_a_parameter_that_nobody_draws_is_refused(training) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.out = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.scale * x)

    with isolated(0, "scaled"):
        model = nn.Sequential(Scaled())
    with pytest.raises(
        ValueError, match=r"0\.scale cannot be drawn: Scaled has no reset_parameters"
    ):
        from_scratch(model, training, epochs=1)
