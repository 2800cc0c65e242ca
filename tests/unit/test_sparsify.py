"""Sparsify: the penalty sees what surgery removes; the report equals real counts; never a silent no-op."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sterna.data import Dataset, Examples, digits
from sterna.models import LSTMLanguageModel, ResNet
from sterna.objectives import CrossEntropy, Force, GroupLasso, proximal_step
from sterna.procedures.cut import Cut
from sterna.procedures.sparsify import front, sparsify
from sterna.procedures.structures import Structures, branch_ends, parts_of
from sterna.procedures.training import Training
from sterna.randomness import generator, isolated
from sterna.surgery import couple, load, nonzero, save, shrink
from unit import surgery_zoo as zoo


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


@pytest.fixture(scope="module")
def training() -> Training:
    data = digits.load()
    images = [
        Examples(part.inputs[:640].view(-1, 1, 8, 8), part.targets[:640])
        for part in (data.train, data.test)
    ]
    return Training(
        data=Dataset("digits, 8x8", *images, classes=10),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        batch_size=32,
    )


@pytest.fixture(scope="module")
def dense(training: Training) -> nn.Module:
    with isolated(0, "network"):
        model = conv_net()
    training.fit(model, 8)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_sparsify_gives_a_smaller_model_that_still_works(training, dense, tmp_path: Path) -> None:
    before = state(dense)
    small, report = sparsify(dense, training, strength=0.02, epochs=4, finetune_epochs=2)
    assert same(before, state(dense))
    assert all(p.grad is None for p in dense.parameters())
    assert set(report.widths) == {"0", "3", "6"}
    assert [report.widths["0"][1], report.widths["3"][1], report.widths["6"][1]] == [
        small[0].out_channels,
        small[3].out_channels,
        small[6].out_features,
    ]
    assert sum(after for _, after in report.widths.values()) < 0.8 * (8 + 12 + 24)
    assert report.parameters_before == sum(p.numel() for p in dense.parameters())
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    for model, adds in ((dense, report.multiply_adds_before), (small, report.multiply_adds_after)):
        assert couple(model, training.example).multiply_adds == adds
    assert report.finetuned == training.judge(small)
    assert report.dense == training.judge(dense)
    assert report.finetuned.accuracy > report.dense.accuracy - 0.02
    assert (report.epochs, report.strength) == (6, 0.02)
    save(small, report.description, tmp_path / "small.safetensors")
    with isolated(1, "network"):
        again = load(conv_net(), tmp_path / "small.safetensors").eval()
    x = training.data.test.inputs[:50]
    assert torch.equal(again(x), small.eval()(x))


def test_what_is_cut_at_zero_changes_nothing(training, dense) -> None:
    """With vanished at 0 only exact zeros of the proximal step go."""
    small, report = sparsify(
        dense, training, strength=0.03, epochs=4, finetune_epochs=0, vanished=0.0, exclude=("0",)
    )
    assert report.widths["3"][1] < 12
    assert report.left["0"] == "it was excluded" and "0" not in report.widths
    assert small[0].out_channels == 8
    # Statistics of the batch norm are taken anew, so the losses differ by them alone.
    assert report.shrunk.accuracy == pytest.approx(report.penalised.accuracy, abs=0.006)
    assert report.finetuned == report.shrunk


def test_the_same_seed_gives_the_same_bits(training, dense) -> None:
    runs = [
        sparsify(dense, t, strength=0.02, epochs=2, finetune_epochs=1)
        for t in (training, training, replace(training, seed=1))
    ]
    assert same(state(runs[0][0]), state(runs[1][0]))
    assert runs[0][1] == runs[1][1]
    assert not same(state(runs[0][0]), state(runs[2][0]))


def test_widths_are_rounded_up(training, dense) -> None:
    _, report = sparsify(dense, training, strength=0.03, epochs=4, finetune_epochs=0, round_to=4)
    assert any(after < before for before, after in report.widths.values())
    assert all(after % 4 == 0 for _, after in report.widths.values())


@pytest.mark.parametrize("round_to", [1, 4])
def test_a_target_is_met_with_the_least_that_must_go(training, dense, round_to: int) -> None:
    options = {"strength": 0.01, "epochs": 1, "finetune_epochs": 0, "round_to": round_to}
    small, report = sparsify(dense, training, multiply_adds=0.4, **options)
    assert report.multiply_adds_after <= 0.4 * report.multiply_adds_before
    assert couple(small, training.example).multiply_adds == report.multiply_adds_after
    widths = {name: after for name, (_, after) in report.widths.items()}
    assert all(after % round_to == 0 for after in widths.values())
    _, more = sparsify(dense, training, multiply_adds=0.5, **options)
    assert report.multiply_adds_after <= more.multiply_adds_after
    assert more.multiply_adds_after <= 0.5 * more.multiply_adds_before
    assert more.multiply_adds_after > 0.3 * more.multiply_adds_before, "more went than had to"


def test_a_target_that_is_met_by_what_vanished_cuts_no_more(training, dense) -> None:
    options = {"strength": 0.03, "epochs": 2, "finetune_epochs": 0}
    plain, report = sparsify(dense, training, **options)
    share = report.multiply_adds_after / report.multiply_adds_before
    assert share < 1
    again, _ = sparsify(dense, training, multiply_adds=min(0.999, share + 0.001), **options)
    assert same(state(plain), state(again))


def test_nothing_removed_is_said(training, dense) -> None:
    with pytest.warns(UserWarning, match=r"nothing was removed.*Raise strength \(1e-07\)"):
        small, report = sparsify(dense, training, strength=1e-7, epochs=1, finetune_epochs=0)
    assert report.parameters_after == report.parameters_before
    assert all(before == after for before, after in report.widths.values())
    assert sum(p.numel() for p in small.parameters()) == report.parameters_before


def test_a_layer_that_all_depends_on_is_kept_at_one(training, dense) -> None:
    with pytest.warns(UserWarning, match="'0' was to lose all of its units; one is kept"):
        small, report = sparsify(
            dense, training, strength=1.0, epochs=1, finetune_epochs=0, layers=("0",)
        )
    assert report.widths == {"0": (8, 1)}
    assert small(training.example).shape == (1, 10)


@pytest.mark.parametrize("strength", [0.03, 0.05])
def test_the_papers_slope_removes_too(training, dense, strength: float) -> None:
    _, report = sparsify(
        dense,
        training,
        strength=strength,
        epochs=4,
        finetune_epochs=0,
        proximal=False,
        vanished=0.0,
    )
    assert sum(after for _, after in report.widths.values()) < 0.8 * (8 + 12 + 24)
    assert report.shrunk.accuracy == pytest.approx(report.penalised.accuracy, abs=0.01)


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("strength", [3.0, 1e6])
def test_a_layer_that_died_stays_dead(training, dense, strength: float, epochs: int) -> None:
    """Momentum moves what the penalty has set to zero; that is no reason to keep it."""
    with pytest.warns(UserWarning, match="'6' was to lose all of its units; one is kept"):
        _, report = sparsify(
            dense, training, strength=strength, epochs=epochs, finetune_epochs=0, layers=("6",)
        )
    assert report.widths == {"6": (24, 1)}


def test_frozen_weights_stay_and_are_said(training, dense) -> None:
    model = deepcopy(dense)
    model[3].weight.requires_grad_(False)
    small, report = sparsify(model, training, strength=0.03, epochs=2, finetune_epochs=1)
    assert set(report.widths) == {"6"}
    assert "3.weight is frozen" in report.left["0"] and "3.weight is frozen" in report.left["3"]
    assert torch.equal(small[3].weight, dense[3].weight)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing is left that may go.*is frozen"):
        sparsify(model, training, strength=0.03, epochs=1, finetune_epochs=0)
    before = state(model)
    proximal_step(model, GroupLasso(rows=1.0, filters=1.0), 0.1)
    assert same(before, state(model))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adaptive_spares_the_long_units(training, dense) -> None:
    options = {"strength": 0.02, "epochs": 2, "finetune_epochs": 0, "vanished": 0.0}
    longest = []
    for adaptive in (None, 0.1):
        small, _ = sparsify(dense, training, adaptive=adaptive, **options)
        norms = Structures.of(small, training.example).norms(small)
        longest.append({name: float(x.max()) for name, x in norms.items()})
    alike, spared = longest
    assert all(spared[name] > 1.2 * alike[name] for name in ("0", "3", "6"))


def test_a_front_goes_from_weak_to_strong(training, dense) -> None:
    found = list(
        front(dense, training, strengths=(0.08, 0.04), epochs=2, finetune_epochs=0, vanished=0.2)
    )
    assert [report.strength for _, report in found] == [0.04, 0.08]
    assert found[0][1].parameters_after > found[1][1].parameters_after


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_objective_of_ones_own_acts_with_the_penalty(training, dense) -> None:
    plain, _ = sparsify(dense, training, strength=0.12, epochs=1, finetune_epochs=0)
    forced, _ = sparsify(
        dense,
        training,
        strength=0.12,
        epochs=1,
        finetune_epochs=0,
        objective=CrossEntropy() + 1e-3 * Force(),
    )
    assert not same(state(plain), state(forced))


def test_parts_are_the_slices_of_the_coupling() -> None:
    """Zeroing unit k of every part is removing unit k: nonzero sees it go, and only it."""
    with isolated(0, "network"):
        cases = (
            (zoo.LeNet(), torch.ones(1, 1, 28, 28), "conv2"),
            (LSTMLanguageModel(vocabulary=9, hidden=5), torch.zeros(1, 4).long(), "lstm.l0"),
            (ResNet(depth=8, width=4), torch.ones(1, 3, 32, 32), "conv"),
        )
    for model, example, name in cases:
        coupling = couple(model, example)
        lasso = GroupLasso(units=1.0, tied=(parts_of(model, coupling.groups[name]),))
        ((block, _),) = lasso.blocks(model)
        factors = torch.ones(coupling.groups[name].size)
        factors[2] = 0.0
        with torch.no_grad():
            block.scale_(factors)
        gone = [k for k in range(len(factors)) if k != 2]
        assert nonzero(model, coupling) == {name: tuple(gone)}
        _, report = shrink(model, example, {name: gone})
        assert report.difference < 1e-5


def test_the_proximal_step_takes_units_with_all_their_parts() -> None:
    with isolated(0, "network"):
        model = zoo.LeNet()
    found = Structures.of(model, torch.ones(1, 1, 28, 28), layers=("conv1",))
    (lasso,) = found.penalties(model, strength=1.0)
    before = found.norms(model)["conv1"]
    threshold = 0.5 * float(before.mean())
    proximal_step(model, lasso, 0.5)
    expected = (before - threshold).clamp(min=0)
    torch.testing.assert_close(found.norms(model)["conv1"], expected)


def test_one_strength_means_the_same_in_every_layer() -> None:
    """Every group shrinks by the same share of its mean length."""
    with isolated(0, "network"):
        model = zoo.LeNet()
    found = Structures.of(model, torch.ones(1, 1, 28, 28))
    for lasso in found.penalties(model, strength=1.0):
        ((block, strength),) = lasso.blocks(model)
        assert strength == pytest.approx(float(block.norms().detach().mean()), rel=1e-5)
    doubled = found.penalties(model, strength=1.0, factors=(("conv*", 2.0),))
    plain = found.penalties(model, strength=1.0)
    ratios = [a.units / b.units for a, b in zip(doubled, plain, strict=True)]
    assert ratios == pytest.approx([2.0, 2.0, 1.0])


def test_branches_end_in_the_layer_that_makes_the_block_pass_on() -> None:
    with isolated(0, "network"):
        model, other = ResNet(depth=14, width=4), zoo.LeNet()
    found = branch_ends(model, torch.ones(1, 3, 32, 32))
    assert list(found) == ["stage1.0", "stage1.1", "stage2.1", "stage3.1"]
    assert [part.parameter for part in found["stage2.1"]] == [
        "stage2.1.norm2.weight",
        "stage2.1.norm2.bias",
    ]
    assert branch_ends(other, torch.ones(1, 1, 28, 28)) == {}


class PreActivation(nn.Module):
    """Registers the layers in another order than they run in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(torch.relu(self.norm(x)))


def test_branches_end_where_they_end_and_may_be_a_single_layer() -> None:
    with isolated(0, "network"):
        model = nn.Sequential(PreActivation(6), Residual(6, 4), OneLayer(6), nn.Linear(6, 3))
    found = branch_ends(model, torch.ones(2, 6))
    ends = {name: [part.parameter for part in parts] for name, parts in found.items()}
    assert ends == {
        "0": ["0.last.weight", "0.last.bias"],
        "1": ["1.b.weight", "1.b.bias"],
        "2": ["2.only.weight", "2.only.bias"],
    }


def test_whole_blocks_go() -> None:
    rng = generator(0, "pictures")
    pictures = Examples(torch.randn(32, 3, 8, 8, generator=rng), torch.arange(32) % 4)
    training = Training(
        data=Dataset("noise", pictures, pictures, 4),
        optimizer=partial(torch.optim.SGD, lr=0.01),
        batch_size=8,
    )
    with isolated(0, "network"):
        model = ResNet(depth=14, width=4, classes=4)
    with torch.no_grad():
        model.stage2[1].norm2.weight.mul_(1e-3)
        model.stage1[0].norm1.weight[1] *= 1e-3
        model.stage1[0].conv2.weight[:, 1] *= 1e-3
    small, report = sparsify(
        model, training, strength=0.0, depth=0.05, epochs=1, finetune_epochs=1, layers=("stage*.1",)
    )
    assert report.blocks == ("stage2.1",)
    assert report.widths == {}
    assert isinstance(small.stage2[1], nn.ReLU | nn.Identity)
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    assert report.multiply_adds_after < report.multiply_adds_before
    assert not any(name.startswith("stage2.1") for name in report.widths)
    both, report = sparsify(model, training, strength=0.5, depth=0.05, epochs=1, finetune_epochs=0)
    assert not any(name.startswith("stage2.1") for name in report.widths)
    assert "stage2.1" in report.blocks
    assert report.widths["stage1.0.conv1"] == (4, 3)
    assert both(training.example).shape == (1, 4)


class Residual(nn.Module):
    """``x + b(relu(a(x)))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


class OneLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.only = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.only(x)


class BlockFirst(nn.Module):
    """Registers a block before the layer that makes its input: the stream is named after the block."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.stem, self.head = Residual(12, 6), nn.Linear(4, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(torch.relu(self.stem(x))))


@pytest.fixture(scope="module")
def tiny() -> Training:
    inputs = torch.randn(32, 4, generator=generator(0, "tiny"))
    points = Examples(inputs, inputs.argmax(1))
    data = Dataset("tiny", points, points, 4)
    return Training(data=data, optimizer=partial(torch.optim.SGD, lr=1e-6), batch_size=8)


def test_targets_are_met_with_blocks_too(tiny) -> None:
    with isolated(0, "network"), torch.no_grad():
        model = nn.Sequential(
            nn.Linear(4, 12), Residual(12, 16), Residual(12, 16), nn.Linear(12, 4)
        )
        for layer in (model[0], model[3]):
            layer.weight.mul_(0.05)
        model[0].weight[:6].mul_(20)
    for share in (0.03, 0.1, 0.4, 0.9):
        small, report = sparsify(
            model,
            tiny,
            strength=0.0,
            depth=1e-3,
            epochs=1,
            finetune_epochs=0,
            multiply_adds=share,
        )
        assert couple(small, tiny.example).multiply_adds == report.multiply_adds_after
        assert report.multiply_adds_after <= share * report.multiply_adds_before
        for name, (_, after) in report.widths.items():
            assert not any(name.startswith(f"{block}.") for block in report.blocks)
            assert small.get_submodule(name).out_features == after


def test_a_stream_named_after_a_block_that_goes_is_cut_all_the_same(tiny) -> None:
    with isolated(0, "network"):
        model = BlockFirst()
    found = Structures.of(model, tiny.example, depth=True)
    with torch.no_grad():
        for parameter in (model.block.b.weight, model.block.b.bias):
            parameter.zero_()
        model.block.a.weight[:, 6:] = 0
        model.stem.weight[6:] = 0
        model.stem.bias[6:] = 0
        model.head.weight[:, 6:] = 0
    assert "stem" not in found.units
    made = Cut(found, 1, tiny.example).make(model, 0.05)
    assert made.blocks == ("block",) and made.model.stem.out_features == 6
    assert list(made.widths.values()) == [(12, 6)]
    x = tiny.data.train.inputs
    torch.testing.assert_close(made.model(x), model(x))


def test_a_target_takes_the_same_share_of_each_layer_and_what_vanished_counts(tiny) -> None:
    with isolated(0, "network"), torch.no_grad():
        model = nn.Sequential(
            nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)
        )
        model[0].weight.mul_(torch.linspace(0.3, 3.0, 12)[:, None])
    found = Structures.of(model, tiny.example)
    cut = Cut(found, 1, tiny.example)
    made = cut.make(model, 0.0, 0.25)
    assert made.widths == {"0": (12, 9), "2": (16, 12)}
    longest = found.norms(model)["0"].argsort(descending=True)[:9].sort().values
    torch.testing.assert_close(made.model[0].weight, model[0].weight[longest])
    with torch.no_grad():
        for tensor in (model[0].weight[:5], model[0].bias[:5], model[2].weight[:, :5]):
            tensor.zero_()
    assert cut.make(model, 0.0, 0.25).widths == {"0": (12, 7), "2": (16, 12)}


def test_the_only_structure_may_be_a_block(tiny) -> None:
    with isolated(0, "network"):
        model = nn.Sequential(Residual(4, 16), nn.Linear(4, 4))
    cut = Cut(Structures.of(model, tiny.example, depth=True), 1, tiny.example)
    with torch.no_grad():
        for parameter in model[0].b.parameters():
            parameter.mul_(1e-3)
    made = cut.make(model, 0.05)
    assert made.blocks == ("0",) and made.widths == {}
    assert isinstance(made.model[0], nn.Identity)


def test_a_block_alone_goes_when_it_is_short_beside_its_beginning(tiny) -> None:
    with isolated(0, "network"):
        model = nn.Sequential(nn.Linear(4, 8), Residual(8, 8), nn.Linear(8, 4))
    slow = replace(tiny, optimizer=partial(torch.optim.SGD, lr=0.01))
    _, report = sparsify(model, slow, strength=0.0, depth=10.0, epochs=3, finetune_epochs=0)
    assert report.blocks == ("1",)


def test_hidden_units_of_an_lstm_go() -> None:
    rng = generator(0, "words")
    words = torch.randint(0, 12, (64, 7), generator=rng)
    text = Examples(words[:, :-1].contiguous(), words[:, 1:].contiguous())
    training = Training(
        data=Dataset("words", text, text, 12),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        batch_size=16,
        clip_norm=5.0,
    )
    with isolated(0, "network"):
        model = LSTMLanguageModel(vocabulary=12, hidden=16)
    with torch.no_grad():
        model.lstm.weight_hh_l0[:, 10:] *= 0.01
        model.lstm.weight_ih_l1[:, 10:] *= 0.01
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(model.lstm, name).view(4, 16, -1)[:, 10:] *= 0.01
    dense = deepcopy(model)
    small, report = sparsify(
        model, training, strength=0.02, epochs=2, finetune_epochs=1, layers=("lstm.*",)
    )
    assert report.widths["lstm.l0"][0] == 16 and report.widths["lstm.l0"][1] <= 10
    assert report.parameters_after == sum(p.numel() for p in small.parameters())
    assert same(state(dense), state(model))
    assert small(training.example).shape == (1, 6, 12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": -1.0}, "strength must be at least 0"),
        ({"strength": float("nan")}, "strength must be at least 0"),
        ({"strength": 0.0}, "strength or depth must be above 0"),
        ({"depth": 1.0}, "depth must be 0 for Sequential: no residual block"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"multiply_adds": 1.0}, r"multiply_adds must be a share in \(0, 1\)"),
        (
            {"multiply_adds": 1e-4},
            r"multiply_adds=0\.0001 cannot be met: .* are left. Ask for that",
        ),
        ({"vanished": 1.0}, r"vanished must lie in \[0, 1\)"),
        ({"layers": ("conv9",)}, "layers and exclude must fit a group or a block; got 'conv9'"),
        ({"factors": (("conv9", 1.0),)}, "factors must fit a group or a block; got 'conv9'"),
        ({"finetune_epochs": -1}, "epochs must be at least 0"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"round_to": 0}, "round_to must be a whole number, at least 1; got 0"),
        ({"span": (0.5, 0.5)}, r"span must be a part of \[0, 1\]"),
        ({"span": (0.5, 2.0), "finetune_epochs": 1}, r"span must be a part of \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named(training, dense, options, words) -> None:
    arguments = {"strength": 0.01, "epochs": 1, "finetune_epochs": 0} | options
    with pytest.raises(ValueError, match=words):
        sparsify(dense, training, **arguments)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("proximal", [True, False])
def test_both_phases_share_one_schedule_or_have_their_own(training, dense, proximal: bool) -> None:
    seen: list[float] = []

    def schedule(done: float) -> float:
        seen.append(done)
        return 1.0

    spied = replace(training, schedule=schedule)
    options = {"strength": 0.01, "epochs": 1, "finetune_epochs": 3, "proximal": proximal}
    each = len(training.data.train) // training.batch_size
    for first, last in ((0.0, 1.0), (0.5, 1.0), (0.25, 0.5)):
        seen.clear()
        sparsify(dense, spied, span=(first, last), **options)
        parts = [first + (last - first) * step / (4 * each) for step in range(4 * each)]
        assert seen == pytest.approx(parts)
    seen.clear()
    sparsify(dense, spied, **options)
    assert seen[:each] == pytest.approx([step / each for step in range(each)])
    assert seen[each:] == pytest.approx([step / (3 * each) for step in range(3 * each)])


def test_training_says_what_is_wrong(training) -> None:
    with pytest.raises(ValueError, match="Training: batch_size must lie in"):
        replace(training, batch_size=0)
    with pytest.raises(ValueError, match=r"Training: span must be a part of \[0, 1\]"):
        training.fit(nn.Flatten(), 1, span=(0.5, 0.5))
    with pytest.raises(ValueError, match="Training: clip_norm"):
        replace(training, clip_norm=0.0)


def test_no_epoch_is_no_change(training, dense) -> None:
    model = deepcopy(dense)
    training.fit(model, 0)
    assert same(state(model), state(dense))
