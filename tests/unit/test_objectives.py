"""Cross entropy, sums and multiples of objectives, and augmentation."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sterna.objectives import Augment, CrossEntropy, MeanOutput, Scaled, Sum, penalty_only
from sterna.objectives.algebra import Composable
from sterna.randomness import generator
from sterna.seams import Batch, Loss


@dataclass(frozen=True, kw_only=True)
class Weights(Composable):
    """Half the squared weights."""

    power: int = 2

    def __call__(self, model, batch, rng):
        return penalty_only(sum(p.pow(self.power).sum() for p in model.parameters()), batch)


class Counting(nn.Module):
    """A linear model that counts its forward passes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, generator=generator(1)))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x @ self.weight


def batch(n=5, dtype=torch.float32):
    inputs = torch.randn(n, 3, generator=generator(0), dtype=dtype)
    return Batch(inputs, torch.arange(n) % 4, torch.arange(n))


def logits(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(2), dtype=dtype)


def on(x, targets):
    return Batch(x, targets, torch.arange(len(targets)))


def test_cross_entropy_of_a_hand_computed_case():
    x = torch.tensor([[math.log(1.0), math.log(3.0)]])
    loss = CrossEntropy()(nn.Identity(), on(x, torch.tensor([0])), generator(0))
    assert loss.per_example.tolist() == pytest.approx([math.log(4)])
    smooth = CrossEntropy(label_smoothing=0.5)(
        nn.Identity(), on(x, torch.tensor([0])), generator(0)
    )
    expected = -(0.75 * math.log(0.25) + 0.25 * math.log(0.75))
    assert smooth.per_example.tolist() == pytest.approx([expected])
    assert smooth.penalty.shape == ()
    assert smooth.penalty.item() == 0


def test_cross_entropy_averages_over_positions():
    x, targets = logits(2, 7, 4), torch.arange(14).view(2, 7) % 4
    loss = CrossEntropy()(nn.Identity(), on(x, targets), generator(0))
    each = torch.stack([F.cross_entropy(x[k], targets[k]) for k in range(2)])
    torch.testing.assert_close(loss.per_example, each)
    deeper = CrossEntropy().per_example(x.view(2, 7, 1, 4), targets.view(2, 7, 1))
    torch.testing.assert_close(deeper, each)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_gradcheck(smoothing):
    x = logits(4, 3, 5, dtype=torch.float64).requires_grad_()
    targets = torch.arange(12).view(4, 3) % 5
    objective = CrossEntropy(label_smoothing=smoothing)
    assert torch.autograd.gradcheck(lambda z: objective.per_example(z, targets), (x,))


def test_cross_entropy_keeps_the_dtype():
    x = logits(3, 4, dtype=torch.float64)
    loss = CrossEntropy()(nn.Identity(), on(x, torch.zeros(3, dtype=torch.int64)), generator(0))
    assert loss.per_example.dtype == loss.penalty.dtype == torch.float64


@pytest.mark.parametrize(
    ("x", "targets", "error", "message"),
    [
        (logits(3, 4), torch.tensor([0, 1, 4]), ValueError, r"lie in \[0, 4\).* got 0..4"),
        (logits(3, 4), torch.tensor([0, 1, -100]), ValueError, r"lie in \[0, 4\).* got -100..1"),
        (logits(3, 4), torch.tensor([0, 1]), ValueError, r"got \(3, 4\) and \(2,\)"),
        (logits(3), torch.tensor([0, 1, 2]), ValueError, r"shape \(batch, ..., classes\)"),
        (logits(3, 4, 2), torch.tensor([0, 1, 1]), ValueError, r"got \(3, 4, 2\) and \(3,\)"),
        (logits(3, 4), torch.zeros(3), TypeError, r"got torch.float32 and torch.float32.*long"),
        (logits(3, 4), torch.zeros(3, dtype=torch.uint8), TypeError, r"and torch.uint8"),
        (torch.ones(3, 4).long(), torch.zeros(3).long(), TypeError, r"got torch.int64 and"),
    ],
)
def test_cross_entropy_names_what_does_not_fit(x, targets, error, message):
    with pytest.raises(error, match=f"CrossEntropy: .*{message}"):
        CrossEntropy()(nn.Identity(), on(x, targets), generator(0))


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, float("nan")])
def test_label_smoothing_is_a_fraction(epsilon):
    with pytest.raises(ValueError, match=r"label_smoothing \(epsilon\) must lie in \[0, 1\]"):
        CrossEntropy(label_smoothing=epsilon)


def test_a_sum_adds_and_takes_one_forward_pass():
    model = Counting()
    objective = CrossEntropy() + 0.1 * Weights() + 2 * Weights(power=4)
    assert isinstance(objective, Sum)
    assert len(objective.terms) == 3
    loss = objective(model, batch(), generator(0))
    assert model.calls == 1
    plain = F.cross_entropy(model(batch().inputs), batch().targets, reduction="none")
    torch.testing.assert_close(loss.per_example, plain)
    w = model.weight
    torch.testing.assert_close(loss.penalty, 0.1 * w.pow(2).sum() + 2 * w.pow(4).sum())
    torch.testing.assert_close(loss.total, plain.mean() + loss.penalty)
    loss.total.backward()
    assert w.grad is not None


def test_scaled_scales_both_parts_and_either_side():
    model = Counting()
    inner = CrossEntropy() + Weights()
    one, three = (f(model, batch(), generator(0)) for f in (inner, 3 * inner))
    torch.testing.assert_close(three.per_example, 3 * one.per_example)
    torch.testing.assert_close(three.penalty, 3 * one.penalty)
    assert inner * 3 == 3 * inner == Scaled(3, inner)


def test_coefficient_zero_is_the_plain_loss():
    model = Counting()
    plain, more = (
        f(model, batch(), generator(0)) for f in (CrossEntropy(), CrossEntropy() + 0.0 * Weights())
    )
    assert torch.equal(plain.per_example, more.per_example)
    assert more.penalty.item() == 0


def test_plain_functions_are_objectives_on_either_side():
    def ones(model, batch, rng):
        return Loss(torch.ones(len(batch.targets)), torch.zeros(()))

    left, right = ones + CrossEntropy(), CrossEntropy() + ones
    assert left.terms == (ones, CrossEntropy())
    assert right.terms == (CrossEntropy(), ones)
    nested = (CrossEntropy() + Weights()) + (Weights() + CrossEntropy())
    assert len(nested.terms) == 4


@pytest.mark.parametrize(
    "objective",
    [
        CrossEntropy(label_smoothing=0.1),
        CrossEntropy() + 1e-4 * Weights(power=4),
        0.5 * (CrossEntropy() + Weights()),
        Augment(inner=CrossEntropy() + 0.1 * Weights(), flip=False, pad=2),
        MeanOutput(),
    ],
)
def test_repr_evaluates_back(objective):
    assert eval(repr(objective)) == objective
    assert hash(eval(repr(objective))) == hash(objective)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sum(()), ValueError, "Sum: terms must hold at least one objective"),
        (lambda: Sum((1,)), TypeError, "Sum: terms must be an objective.* got 1"),
        (lambda: Sum((CrossEntropy,)), TypeError, "Sum: terms must be an objective.*CrossEntropy"),
        (lambda: Scaled(float("inf"), CrossEntropy()), ValueError, "Scaled: factor .* got inf"),
        (lambda: Scaled(1.0, None), TypeError, "Scaled: inner must be an objective"),
        (lambda: CrossEntropy() + 1, TypeError, "unsupported operand"),
        (lambda: "2" * CrossEntropy(), TypeError, "unsupported operand|can't multiply"),
        (lambda: Augment(inner=3), TypeError, "Augment: inner must be an objective.* got 3"),
        (lambda: Augment(inner=MeanOutput(), pad=-1), ValueError, "Augment: pad .* got -1"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_terms_must_agree_in_shape():
    def scalar(model, batch, rng):
        return Loss(torch.zeros(()), torch.zeros(()))

    with pytest.raises(
        ValueError, match=r"Sum: every term .* shape \(5,\).* got \(\).*penalty_only"
    ):
        (CrossEntropy() + scalar)(Counting(), batch(), generator(0))


def pictures(n=6, channels=2, height=5, width=7):
    count = n * channels * height * width
    return torch.arange(1.0, count + 1).view(n, channels, height, width)


def test_augment_without_change_is_the_identity_and_draws_nothing():
    rng = generator(0)
    x = pictures()
    assert Augment(inner=MeanOutput(), flip=False, pad=0).images(x, rng) is x
    assert torch.equal(rng.get_state(), generator(0).get_state())


def test_augment_gives_shifted_and_mirrored_copies_picture_by_picture():
    x, pad = pictures(64), 2
    before = x.clone()
    out = Augment(inner=MeanOutput(), flip=True, pad=pad).images(x, generator(5))
    assert torch.equal(x, before)
    assert out.shape == x.shape
    seen = set()
    for k, (source, result) in enumerate(zip(x, out, strict=True)):
        padded = F.pad(source, (pad,) * 4)
        found = None
        for down in range(2 * pad + 1):
            for right in range(2 * pad + 1):
                part = padded[:, down : down + 5, right : right + 7]
                for mirrored in (False, True):
                    if torch.equal(result, part.flip(2) if mirrored else part):
                        found = (down, right, mirrored)
        assert found is not None, f"picture {k} is no shifted copy"
        seen.add(found)
    assert {down for down, _, _ in seen} == {right for _, right, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == {False, True}


@pytest.mark.parametrize(("flip", "pad"), [(True, 0), (False, 3)])
def test_augment_with_one_change_only(flip, pad):
    x = pictures(32)
    out = Augment(inner=MeanOutput(), flip=flip, pad=pad).images(x, generator(0))
    if flip:
        rows = [torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(x, out, strict=True)]
        assert all(rows)
        assert 0 < sum(torch.equal(a, b) for a, b in zip(x, out, strict=True)) < 32
    else:
        assert not torch.equal(out, x)


def test_augment_follows_its_generator_and_keeps_targets_and_index():
    seen = []

    def inner(model, batch, rng):
        seen.append(batch)
        return Loss(batch.inputs.flatten(1).sum(1), torch.zeros(()))

    given = Batch(pictures(), torch.arange(6), torch.arange(6) + 10)
    objective = Augment(inner=inner)
    a, b, c = (objective(nn.Identity(), given, generator(s)) for s in (1, 1, 2))
    assert torch.equal(a.per_example, b.per_example)
    assert not torch.equal(a.per_example, c.per_example)
    assert seen[0].targets is given.targets
    assert seen[0].index is given.index


def test_augment_needs_pictures():
    with pytest.raises(ValueError, match=r"Augment: inputs must have shape .* got \(5, 3\)"):
        Augment(inner=MeanOutput())(nn.Identity(), batch(), generator(0))


def test_augment_takes_pictures_of_any_dtype():
    x = pictures().to(torch.uint8)
    assert Augment(inner=MeanOutput()).images(x, generator(0)).dtype == torch.uint8
