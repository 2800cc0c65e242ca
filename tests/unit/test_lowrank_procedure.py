"""The low-rank procedure: input untouched, the control is the same path, the report equals real counts."""

from functools import partial

import pytest
import torch
from torch import nn

from sterna.data import digits
from sterna.models import MLP
from sterna.objectives import Force
from sterna.procedures.lowrank import factorise, front
from sterna.procedures.training import Training
from sterna.randomness import isolated
from sterna.surgery.low_rank import low_rank


@pytest.fixture(scope="module")
def training() -> Training:
    return Training(
        data=digits.load(),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        batch_size=64,
    )


@pytest.fixture(scope="module")
def dense(training: Training) -> nn.Module:
    with isolated(0, "network"):
        model = MLP((64, 48, 32, 10))
    training.fit(model, 4)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_input_stays_and_the_report_counts(training, dense) -> None:
    before = state(dense)
    first = linear_names(dense)[0]
    small, report = factorise(
        dense,
        training,
        force=1e-3 * Force(linear=True),
        epochs=2,
        finetune_epochs=2,
        ranks={first: 10},
    )
    assert same(before, state(dense))
    assert report.cut.ranks == {first: 10}
    assert report.cut.parameters_before == sum(p.numel() for p in dense.parameters())
    assert report.cut.parameters_after == sum(p.numel() for p in small.parameters())
    assert report.finetuned == training.judge(small)
    assert report.dense == training.judge(dense)
    assert report.forced != report.dense
    assert report.epochs == 4
    assert report.finetuned.accuracy > 0.9
    again, _ = low_rank(dense, training.example, ranks=report.cut.ranks, form=report.form)
    again.load_state_dict(small.state_dict())
    assert training.judge(again) == report.finetuned


def test_without_training_it_is_the_surgery(training, dense) -> None:
    small, report = factorise(dense, training, finetune_epochs=0, variance=0.5)
    plain, cut = low_rank(dense, training.example, variance=0.5)
    assert same(state(small), state(plain))
    assert report.cut == cut
    assert (report.forced, report.finetuned) == (report.dense, report.decomposed)


def test_the_control_differs_by_the_force_alone(training, dense) -> None:
    """No force and a force of strength zero are the same training, bit for bit."""
    first = linear_names(dense)[0]
    options = {"epochs": 1, "finetune_epochs": 0, "ranks": {first: 12}}
    control, without = factorise(dense, training, **options)
    zero, nothing = factorise(dense, training, force=0.0 * Force(linear=True), **options)
    forced, _ = factorise(dense, training, force=1e-2 * Force(linear=True), **options)
    assert same(state(control), state(zero)) and without == nothing
    assert not same(state(control), state(forced))


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_the_force_lowers_the_error_of_a_cut(training, dense, norm) -> None:
    first = linear_names(dense)[0]
    options = {"epochs": 2, "finetune_epochs": 0, "ranks": {first: 4}}
    force = 4e-3 * Force(linear=True, norm=norm, strengths=((first, 1.0), ("*", 0.0)))
    errors = [
        factorise(dense, training, force=f, **options)[1].cut.layers[0].error for f in (None, force)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_a_front_cuts_one_forced_model(training, dense) -> None:
    found = list(
        front(
            dense,
            training,
            multiply_adds=(0.3, 0.6),
            force=1e-3 * Force(linear=True),
            epochs=1,
            finetune_epochs=1,
        )
    )
    shares = [r.cut.multiply_adds_after / r.cut.multiply_adds_before for _, r in found]
    assert shares[0] <= 0.6 and shares[1] <= 0.3 < shares[0]
    first, second = (report for _, report in found)
    assert first.forced == second.forced
    assert first.dense == second.dense == training.judge(dense)
    assert first.epochs == second.epochs == 2


def test_a_force_needs_epochs(training, dense) -> None:
    with pytest.raises(ValueError, match="epochs must be at least 1 for the force"):
        factorise(dense, training, force=Force(linear=True), finetune_epochs=1, variance=0.5)


def test_nothing_replaced_is_said(training, dense) -> None:
    with pytest.warns(UserWarning, match="no layer was replaced"):
        factorise(dense, training, finetune_epochs=0, variance=1.0)


def test_a_target_that_cannot_be_met_is_refused_before_training(training, dense) -> None:
    with pytest.raises(ValueError, match="cannot be met"):
        factorise(dense, training, epochs=10**6, finetune_epochs=1, multiply_adds=1e-4)
