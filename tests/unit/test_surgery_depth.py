"""Blocks that pass their input on."""

import pytest
import torch
from torch import nn

from sterna.randomness import isolated
from sterna.surgery import Refused, load, remove_blocks, save, shrink
from unit.surgery_zoo import ResNet, images


def built():
    with isolated(0, "model"):
        return ResNet().eval()


def silence(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


@pytest.mark.parametrize("layer", ["bn2", "conv2"])
def test_a_block_with_a_branch_of_zeros_goes(layer):
    model, x = built(), images()
    silence(model.layer1[1].get_submodule(layer))
    if layer == "conv2":  # the norm behind it must add nothing either
        nn.init.zeros_(model.layer1[1].bn2.running_mean)
    small, report = remove_blocks(model, x)
    assert report.replaced == {"layer1.1": "relu"}
    assert isinstance(small.layer1[1], nn.ReLU) and isinstance(model.layer1[1].conv1, nn.Conv2d)
    assert torch.equal(small(x), model(x)) and report.difference == 0
    gone = sum(p.numel() for p in model.layer1[1].parameters())
    assert report.parameters_after == report.parameters_before - gone
    assert report.multiply_adds_before - report.multiply_adds_after == 2 * 2 * 8 * 8 * 8 * 72


def test_a_block_that_only_looks_idle_on_the_example_stays():
    class Late(nn.Module):
        """Adds something where the input is large."""

        def __init__(self):
            super().__init__()
            self.inner, self.zero = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return x + torch.relu(self.inner(x) - 50) + self.zero(x)

    with isolated(0, "model"):
        model = nn.Sequential(Late(), nn.Linear(4, 2))
    silence(model[0].zero)
    x = torch.full((1, 4), 0.1)
    assert torch.equal(model[0](x), x)
    with pytest.warns(UserWarning, match="nothing was removed"):
        _, report = remove_blocks(model, x)
    assert report.replaced == {}


def test_a_block_of_another_shape_or_with_weights_stays():
    model = built()
    silence(model.layer2[0].bn2)
    with pytest.warns(UserWarning, match="nothing was removed: no block with a layer of zeros"):
        small, report = remove_blocks(model, images())
    assert report.parameters_before == report.parameters_after
    assert torch.equal(small(images()), model(images()))


def test_depth_and_width_together_come_back_from_a_file(tmp_path):
    model, x = built(), images()
    silence(model.layer1[0].bn2)
    first, depth = remove_blocks(model.train(), x)
    assert first.layer1[0].training and first.training
    second, width = shrink(first, x, {"layer1.1.conv1": [0, 3], "layer2.1.conv1": range(8)})
    save(second, depth.description.then(width.description), tmp_path / "m.safetensors")
    again = load(built(), tmp_path / "m.safetensors")
    assert torch.equal(again.eval()(x), second.eval()(x))


def test_a_block_is_removed_after_it_was_shrunk(tmp_path):
    model, x = built(), images()
    silence(model.layer1[0].bn2)
    first, width = shrink(model, x, {"layer1.0.conv1": [0, 3], "layer2.1.conv1": range(8)})
    second, depth = remove_blocks(first, x)
    both = width.description.then(depth.description)
    assert not any(name.startswith("layer1.0") for name in both.shapes)
    save(second, both, tmp_path / "m.safetensors")
    assert torch.equal(load(built(), tmp_path / "m.safetensors").eval()(x), second(x))


def test_a_model_that_cannot_be_traced_is_refused():
    class Branch(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with isolated(0, "model"):
        model = Branch(4, 4)
    with pytest.raises(Refused, match=r"^Branch cannot be traced"):
        remove_blocks(model, torch.ones(1, 4))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.branch(x)


class Listed(nn.Module):
    """Blocks that are registered by name, and run from a plain list."""

    def __init__(self):
        super().__init__()
        self.stages = []
        for num in range(2):
            block = Residual()
            self.add_module(f"stage{num}", block)
            self.stages.append(block)

    def forward(self, x):
        for block in self.stages:
            x = block(x)
        return x


class Twice(nn.Sequential):
    """One block under two names of one parent."""

    def __init__(self):
        block = Residual()
        super().__init__(block, nn.ReLU(), block, nn.Linear(6, 3))


def seeded(kind, seed):
    with isolated(seed, "model"):
        return kind().eval()


@pytest.mark.parametrize(("kind", "name", "uses"), [(Listed, "stage0", 1), (Twice, "0", 2)])
def test_a_block_goes_from_all_its_places(kind, name, uses, tmp_path):
    model, x = seeded(kind, 0), torch.ones(2, 6)
    silence(model.get_submodule(name))
    small, report = remove_blocks(model, x)
    assert report.replaced == {name: "identity"}
    assert report.multiply_adds_before - report.multiply_adds_after == uses * 2 * 36
    save(small, report.description, tmp_path / "m.safetensors")
    again = load(seeded(kind, 1), tmp_path / "m.safetensors")
    for one in (small, again):
        assert torch.equal(one(x), model(x))
        assert isinstance(one.get_submodule(name), nn.Identity)


class Uncopied(Listed):
    """A copy of it is itself."""

    def __deepcopy__(self, memo):
        return self


def test_a_block_that_still_runs_is_refused():
    model = nn.Sequential(seeded(Uncopied, 0))
    silence(model[0].stage0)
    with pytest.raises(
        Refused, match=r"Sequential: '0.stage0' \(Residual\) cannot be replaced: .* old"
    ):
        remove_blocks(model, torch.ones(2, 6))
    assert not model[0].stage0._forward_pre_hooks
