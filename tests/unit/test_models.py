"""The small networks: shapes, counts, errors, and that torch.fx can trace them."""

import pytest
import torch
from torch import nn

from sterna.models import MLP, LeNet5, ResNet, SmallCNN
from sterna.models.resnet import Block
from sterna.randomness import generator, isolated

MODELS = [
    (lambda: MLP((64, 32, 10)), (64,)),
    (lambda: MLP((64, 10)), (1, 8, 8)),
    (lambda: LeNet5(), (1, 28, 28)),
    (lambda: SmallCNN(), (1, 28, 28)),
    (lambda: SmallCNN(channels=3), (3, 32, 32)),
    (lambda: ResNet(depth=8), (3, 32, 32)),
    (lambda: ResNet(depth=8, shortcut="B"), (3, 32, 32)),
    (lambda: ResNet(depth=8, channels=1), (1, 28, 28)),
]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_every_parameter_is_trained_and_the_outputs_are_logits(make, shape):
    with isolated(0, "model"):
        model = make()
    x = torch.randn(4, *shape, generator=generator(0))
    out = model(x)
    assert out.shape == (4, 10)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_fx_traces_to_the_same_function(make, shape):
    with isolated(0, "model"):
        model = make().eval()
    traced = torch.fx.symbolic_trace(model)
    x = torch.randn(3, *shape, generator=generator(0))
    assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize(("make", "shape"), MODELS)
def test_the_same_seed_gives_the_same_weights(make, shape):
    made = []
    for _ in range(2):
        with isolated(1, "model"):
            made.append(torch.nn.utils.parameters_to_vector(make().parameters()))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)]
)
def test_resnet_has_the_parameters_of_the_papers_table_6(depth, millions):
    with isolated(0, "model"):
        count = parameters(ResNet(depth=depth))
    assert round(count / 1e6, 2 if millions < 1 else 1) == millions


def test_option_b_adds_the_projections_only():
    with isolated(0, "model"):
        a, b = parameters(ResNet(depth=20)), parameters(ResNet(depth=20, shortcut="B"))
    assert b - a == (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


def test_a_block_with_zero_weights_passes_its_input_on():
    with isolated(0, "model"):
        block = Block(2, 4, "A").eval()
    for p in block.parameters():
        nn.init.zeros_(p)
    x = torch.rand(1, 2, 5, 5, generator=generator(0))
    out = block(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert not out[:, 2:].any()


def test_small_cnn_treats_every_example_alone():
    with isolated(0, "model"):
        model = SmallCNN()
    x = torch.randn(6, 1, 28, 28, generator=generator(0))
    torch.testing.assert_close(model(x)[2:4], model(x[2:4]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP((3,)), r"MLP: sizes must hold at least two .* got \(3,\)"),
        (lambda: MLP((3, 0, 2)), r"MLP: sizes .* each at least 1; got \(3, 0, 2\)"),
        (lambda: LeNet5(classes=0), "LeNet5: classes must be at least 1; got 0"),
        (lambda: LeNet5(channels=0), "LeNet5: channels must be at least 1; got 0"),
        (lambda: SmallCNN(width=12), "SmallCNN: width must be a positive multiple of 8; got 12"),
        (lambda: SmallCNN(channels=0), "SmallCNN: channels must be at least 1"),
        (lambda: ResNet(depth=18), r"ResNet: depth must be 6n \+ 2 .* got 18"),
        (lambda: ResNet(depth=2), r"ResNet: depth must be 6n \+ 2 .* got 2"),
        (lambda: ResNet(shortcut="C"), "ResNet: shortcut must be 'A' or 'B'; got 'C'"),
        (lambda: ResNet(width=0), "ResNet: width must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
