"""A worker's own step: what torch's SGD takes, from gradients that no buffer holds."""

import pytest
import torch
from torch import nn

from sterna.exchange.alone import step_alone
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.seams import NotFinite


def _replica(**options: float) -> tuple[nn.Module, Replica]:
    with isolated(0, "model"):
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    return model, Replica(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options
    )


def _backward(model: nn.Module, step: int) -> None:
    x = torch.linspace(-1, 1, 20).view(4, 5) * (step + 1)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0])).backward()


def _bits(model: nn.Module) -> list[bytes]:
    return [p.detach().numpy().tobytes() for p in model.parameters()]


def test_the_weights_are_those_of_the_step_through_the_buffer() -> None:
    (alone, one), (buffered, other) = _replica(), _replica()
    for step in range(4):
        _backward(alone, step)
        step_alone(one, "Test")
        _backward(buffered, step)
        assert other.gradients.buffer.any()
        other.update()
        assert _bits(alone) == _bits(buffered)
        assert all(p.grad is None for p in alone.parameters())
    assert one.step == other.step == 4


def test_the_backward_pass_hands_its_tensors_over() -> None:
    model, replica = _replica()
    for step in range(2):
        _backward(model, step)
        if step:
            buffer = replica._flat.buffer
            inside = range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes)
            assert all(p.grad.data_ptr() not in inside for p in model.parameters())
        step_alone(replica, "Test")
    _backward(model, 2)
    own = [p.grad.clone() for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(own, replica.gradients.values(), strict=True))
    replica.update()  # now they lie in the buffer, and are zeroed there
    assert not replica.gradients.buffer.any()


def test_clipping_still_holds() -> None:
    (alone, one), (buffered, other) = _replica(clip_norm=0.01), _replica(clip_norm=0.01)
    for step in range(3):
        _backward(alone, step)
        step_alone(one, "Test")
        _backward(buffered, step)
        other.update()
    assert _bits(alone) == _bits(buffered)


def test_momentum_goes_on_for_a_parameter_that_the_step_did_not_use() -> None:
    model, replica = _replica()
    _backward(model, 0)
    step_alone(replica, "Test")
    before = model[2].bias.detach().clone()
    model[0](torch.ones(1, 5)).sum().backward()
    step_alone(replica, "Test")
    assert not torch.equal(before, model[2].bias)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    model, replica = _replica()
    for step in range(2):
        _backward(model, step)
        before = _bits(model)
        model[2].weight.grad[0, 0] = float("nan")
        with pytest.raises(NotFinite, match=r"Test: gradient of '2\.weight'"):
            step_alone(replica, "Test")
        assert _bits(model) == before and replica.step == step
        model[2].weight.grad[0, 0] = 0.0
        step_alone(replica, "Test")
