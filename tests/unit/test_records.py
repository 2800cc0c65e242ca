"""Flat, Replica, Ledger, schedules: the records that everything else is made of."""

import math

import pytest
import torch
from torch import nn

from sterna.flat import Flat, Layout
from sterna.ledger import Ledger, Spent, total
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.schedules import Constant, Cosine, Polynomial


def test_flat_views_share_the_buffer_in_order() -> None:
    flat = Flat.of({"a": torch.ones(2, 2), "b": torch.zeros(()), "c": torch.zeros(0)})
    assert flat.layout.bounds.tolist() == [0, 4, 5, 5]
    flat["b"].fill_(3.0)
    assert flat.buffer.tolist() == [1, 1, 1, 1, 3]
    assert {name: tuple(x.shape) for name, x in flat.items()} == {"a": (2, 2), "b": (), "c": (0,)}


def test_flat_of_a_flat_is_itself_and_a_clone_is_not() -> None:
    flat = Flat.of({"a": torch.ones(2)})
    assert Flat.of(flat) is flat
    copy = flat.clone()
    copy["a"].zero_()
    assert flat["a"].tolist() == [1, 1]


def test_flat_packs_mixed_dtypes_in_the_wider_one() -> None:
    flat = Flat.of({"a": torch.ones(1, dtype=torch.float16), "b": torch.ones(1)})
    assert flat.buffer.dtype == torch.float32


def test_flat_refuses_a_buffer_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\).*got \(5,\)"):
        Flat(Layout(("a",), ((2, 2),)), torch.zeros(5))


def test_fingerprint_tells_names_and_shapes_apart() -> None:
    layouts = [
        Layout(("a",), ((2, 3),)),
        Layout(("b",), ((2, 3),)),
        Layout(("a",), ((3, 2),)),
        Layout(("a", "b"), ((2, 3), ())),
    ]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)


def linear(fan_in: int = 2, fan_out: int = 1) -> nn.Linear:
    with isolated(0, "model"):
        return nn.Linear(fan_in, fan_out)


def linear_replica(**options: float) -> Replica:
    model = linear()
    return Replica(model, torch.optim.SGD(model.parameters(), lr=0.5, **options))


def test_replica_gradients_are_where_backward_writes() -> None:
    replica = linear_replica()
    replica.model(torch.tensor([[1.0, 2.0]])).sum().backward()
    assert replica.gradients["weight"].tolist() == [[1.0, 2.0]]
    before = replica.parameters["weight"].detach().clone()
    replica.update()
    torch.testing.assert_close(before - replica.parameters["weight"], torch.tensor([[0.5, 1.0]]))
    assert replica.gradients.buffer.abs().sum() == 0 and replica.step == 1


def test_replica_recovers_from_gradients_set_to_none() -> None:
    replica = linear_replica()
    replica.optimizer.zero_grad(set_to_none=True)
    replica.clear()
    replica.model(torch.tensor([[1.0, 2.0]])).sum().backward()
    assert replica.gradients["weight"].tolist() == [[1.0, 2.0]]


def test_replica_schedule_scales_the_rate_of_each_group() -> None:
    model = linear()
    groups = [{"params": [model.weight], "lr": 1.0}, {"params": [model.bias], "lr": 0.1}]
    replica = Replica(model, torch.optim.SGD(groups), schedule=lambda step: 0.5**step)
    replica.update()
    replica.update()
    assert [group["lr"] for group in replica.optimizer.param_groups] == [0.5, 0.05]


def test_replica_leaves_frozen_parameters_out() -> None:
    model = linear()
    model.bias.requires_grad_(False)
    replica = Replica(model, torch.optim.SGD([model.weight], lr=0.5))
    assert list(replica.parameters) == ["weight"] and model.bias.grad is None


def test_replica_says_what_does_not_fit() -> None:
    model = linear()
    with pytest.raises(ValueError, match=r"'bias'.*requires_grad_\(False\)"):
        Replica(model, torch.optim.SGD([model.weight], lr=0.1))
    frozen = linear().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        Replica(frozen, torch.optim.SGD(model.parameters(), lr=0.1))
    mixed = nn.Sequential(linear(2, 2), linear().double())
    with pytest.raises(ValueError, match="one dtype and one device"):
        Replica(mixed, torch.optim.SGD(mixed.parameters(), lr=0.1))


def test_ledger_adds_and_keeps_the_largest_peak() -> None:
    ledger = Ledger()
    ledger.add(bits_sent=8, peak_memory_bytes=5)
    ledger.add(bits_sent=8, peak_memory_bytes=3)
    with ledger.paused():
        ledger.add(bits_sent=1000, peak_memory_bytes=1000)
    assert ledger.spent() == Spent(bits_sent=16, peak_memory_bytes=5)


def test_total_adds_workers_but_not_steps_and_peaks() -> None:
    workers = [
        Spent(steps=10, bits_sent=3, staleness_max=4, compute_s=1.0),
        Spent(steps=12, bits_sent=5, staleness_max=2, compute_s=2.0),
    ]
    assert total(workers) == Spent(steps=12, bits_sent=8, staleness_max=4, compute_s=3.0)


def test_schedules_start_at_one_and_end_at_zero() -> None:
    assert Constant()(0.7) == 1.0
    assert (Polynomial(power=0.5)(0.0), Polynomial(power=0.5)(1.0)) == (1.0, 0.0)
    assert math.isclose(Cosine(warmup=0.25)(0.25), 1.0) and math.isclose(Cosine()(1.0), 0.0)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_polynomial_names_a_bad_power(power: float) -> None:
    with pytest.raises(ValueError, match="Polynomial: power"):
        Polynomial(power=power)


@pytest.mark.parametrize("warmup", [1.0, -0.1, math.nan])
def test_cosine_names_a_bad_warmup(warmup: float) -> None:
    with pytest.raises(ValueError, match="Cosine: warmup"):
        Cosine(warmup=warmup)
