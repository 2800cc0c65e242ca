"""Group lasso: structures, hidden units, the proximal step, counts, errors; and the LSTM it is for."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from sterna.models import LSTMLanguageModel
from sterna.objectives import CrossEntropy, GroupLasso, Part, cut, land, proximal_step, zero_groups
from sterna.objectives.groups import tied_block
from sterna.randomness import generator, isolated
from sterna.seams import Batch

BATCH = Batch(torch.zeros(1, 1), torch.zeros(1), torch.zeros(1))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test"), dtype=torch.float64)


def made(build, seed=0):
    with isolated(seed, "model"):
        return build().double()


def penalty(objective, model):
    return objective(model, BATCH, generator(0)).penalty


class Tagger(nn.Module):
    """A recurrent network and what reads it."""

    def __init__(self, kind=nn.LSTM, bidirectional=False, layers=2):
        super().__init__()
        self.rnn = kind(3, 4, num_layers=layers, batch_first=True, bidirectional=bidirectional)
        self.decoder = nn.Linear(8 if bidirectional else 4, 5)

    def forward(self, x):
        return self.decoder(self.rnn(x)[0])


class Branch(nn.Module):
    """Two convolutions with a shortcut around both."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 1)
        self.conv1 = nn.Conv2d(2, 2, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 2, 3, padding=1)


@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        ("filters", [math.sqrt(30), math.sqrt(174)]),
        ("channels", [math.sqrt(1 + 4 + 25 + 36), math.sqrt(9 + 16 + 49 + 64)]),
        ("shapes", [math.sqrt(k**2 + (k + 4) ** 2) for k in range(1, 5)]),
        ("depth", [math.sqrt(204)]),
    ],
)
def test_structures_of_a_convolution_by_hand(kind, norms):
    conv = made(lambda: nn.Conv2d(2, 2, (1, 2)))
    with torch.no_grad():
        conv.weight.copy_(torch.arange(1.0, 9.0).view(2, 2, 1, 2))
    more = {"branches": ("*",)} if kind == "depth" else {}
    plain, by_size = (GroupLasso(**{kind: 2.0}, **more, by_size=x) for x in (False, True))
    assert penalty(plain, conv).item() == pytest.approx(2 * sum(norms))
    size = 8 / len(norms)
    assert penalty(by_size, conv).item() == pytest.approx(2 * math.sqrt(size) * sum(norms))
    assert zero_groups(conv, plain) == {kind: (0, len(norms))}


def test_rows_and_columns_by_hand():
    model = made(lambda: nn.Linear(2, 2))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 5.0]]))
    assert penalty(GroupLasso(rows=1.0), model).item() == pytest.approx(10)
    assert penalty(GroupLasso(columns=1.0), model).item() == pytest.approx(3 + math.sqrt(41))
    both = penalty(GroupLasso(rows=2.0, columns=0.5), model).item()
    assert both == pytest.approx(20 + 0.5 * (3 + math.sqrt(41)))


def test_channels_of_a_grouped_convolution_are_those_of_each_group():
    conv = made(lambda: nn.Conv2d(4, 6, 3, groups=2))
    with torch.no_grad():
        conv.weight[:3, 1] = 0  # input map 1; the slice weight[:, 1] is also map 3
    assert zero_groups(conv, GroupLasso(channels=1.0)) == {"channels": (1, 4)}
    assert zero_groups(conv, GroupLasso(shapes=1.0)) == {"shapes": (9, 36)}
    assert zero_groups(conv, GroupLasso(filters=1.0)) == {"filters": (0, 6)}


def test_filters_of_a_transposed_convolution_are_its_outputs():
    conv = made(lambda: nn.ConvTranspose2d(4, 6, 3, groups=2))
    with torch.no_grad():
        conv.weight[:2, 1] = 0  # output map 1
    assert zero_groups(conv, GroupLasso(filters=1.0)) == {"filters": (1, 6)}
    x = draw(1, 4, 5, 5)
    assert (conv(x)[:, 1] == conv.bias[1]).all()
    with torch.no_grad():
        conv.weight[3] = 0  # input map 3
    assert zero_groups(conv, GroupLasso(channels=1.0)) == {"channels": (1, 4)}


def test_depth_is_one_group_for_each_branch_named():
    model = made(Branch)
    objective = GroupLasso(depth=1.0, branches=("conv*",))
    assert zero_groups(model, objective) == {"conv1.depth": (0, 1), "conv2.depth": (0, 1)}
    expected = model.conv1.weight.norm() + model.conv2.weight.norm()
    torch.testing.assert_close(penalty(objective, model), expected)


def test_the_gradient_is_finite_at_zero():
    model = made(Tagger)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    objective = GroupLasso(rows=1.0, columns=1.0, units=1.0, readers=(("rnn", "decoder"),))
    value = penalty(objective, model)
    value.backward()
    assert value == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_it_composes_with_a_loss():
    model = made(lambda: nn.Linear(3, 2))
    batch = Batch(draw(5, 3), torch.zeros(5, dtype=torch.int64), torch.arange(5))
    lasso = GroupLasso(rows=1.0)
    loss = (CrossEntropy() + 1e-2 * lasso)(model, batch, generator(0))
    plain = CrossEntropy()(model, batch, generator(0))
    assert torch.equal(loss.per_example, plain.per_example)
    torch.testing.assert_close(loss.total, plain.total + 1e-2 * penalty(lasso, model))


def test_adaptive_is_the_plain_penalty_for_short_groups_and_gentle_with_long_ones():
    model = made(lambda: nn.Linear(3, 2))
    plain = penalty(GroupLasso(rows=1.0), model)
    far = penalty(GroupLasso(rows=1.0, adaptive=1e9), model)
    torch.testing.assert_close(far, plain, rtol=1e-8, atol=0)
    gradients = []
    for e in (None, 0.5):
        model.zero_grad()
        penalty(GroupLasso(rows=1.0, adaptive=e), model).backward()
        gradients.append(model.weight.grad.norm(dim=1))
    norms = model.weight.detach().norm(dim=1)
    torch.testing.assert_close(gradients[1], gradients[0] * 0.5 / (0.5 + norms))


def test_strengths_by_layer_first_pattern_that_fits():
    model = made(lambda: nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 2)))
    lengths = [layer.weight.norm(dim=1).sum() for layer in model]
    objective = GroupLasso(rows=2.0, strengths=(("2", 0.0), ("[12]", 3.0)))
    torch.testing.assert_close(penalty(objective, model), 2 * lengths[0] + 6 * lengths[1])
    assert list(zero_groups(model, objective)) == ["0.rows", "1.rows"]


# Hidden units.


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_unit_whose_group_is_zero_is_read_by_nobody(kind, bidirectional, layers):
    model = made(lambda: Tagger(kind, bidirectional, layers))
    objective = GroupLasso(units=1.0, readers=(("rnn", "decoder"),))
    blocks = [block for block, _ in objective.blocks(model)]
    assert len(blocks) == layers * (1 + bidirectional)
    with torch.no_grad():
        for k, block in enumerate(blocks):
            keep = torch.ones(4, dtype=torch.float64)
            keep[k % 4] = 0
            block.scale_(keep)
    assert set(zero_groups(model, objective).values()) == {(1, 4)}
    x = draw(2, 6, 3)
    before = model(x)
    gates = len(model.rnn.bias_ih_l0) // 4
    with torch.no_grad():  # whatever the dead units compute, nobody sees it
        for k, block in enumerate(blocks):
            layer = block.name.partition(".")[2]
            bias = model.get_parameter(f"rnn.bias_ih_{layer}")
            bias.view(gates, 4)[:, k % 4] += 5.0
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model.rnn.bias_ih_l0.view(gates, 4)[:, 1] += 5.0
    assert not torch.equal(model(x), before), "a unit that lives is seen"


def test_the_group_of_a_unit_is_every_weight_at_it():
    model = made(Tagger)
    (first, _), (last, _) = GroupLasso(units=1.0, readers=(("rnn", "decoder"),)).blocks(model)
    assert (first.name, last.name) == ("rnn.l0", "rnn.l1")
    assert first.size == 4 * 3 + 4 * 4 + 16 + 16
    assert last.size == 4 * 4 + 4 * 4 + 16 + 5
    rnn, k = model.rnn, 2
    own = torch.cat([rnn.weight_ih_l0[k::4].flatten(), rnn.weight_hh_l0[k::4].flatten()])
    read = torch.cat([rnn.weight_hh_l0[:, k], rnn.weight_ih_l1[:, k]])
    torch.testing.assert_close(first.norms()[k], torch.cat([own, read]).norm())


def test_several_readers_and_stacks_of_modules():
    model = made(
        lambda: nn.ModuleDict(
            {"a": nn.LSTM(3, 4), "b": nn.GRU(4, 2, bidirectional=True), "c": nn.Linear(4, 2)}
        )
    )
    objective = GroupLasso(units=1.0, readers=(("a", "b"), ("a", "c"), ("b", "c")))
    blocks = {block.name: block for block, _ in objective.blocks(model)}
    assert list(blocks) == ["a.l0", "b.l0", "b.l0_reverse"]
    assert blocks["a.l0"].size == 4 * 3 + 4 * 4 + 16 + 2 * 3 * 2 + 2
    assert blocks["b.l0"].size == 3 * 4 + 3 * 2 + 6 + 2


def test_tied_groups_take_a_filter_with_its_norm_and_all_that_read_it():
    model = made(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 2)
        )
    )
    model.eval()
    parts = (
        Part("0.weight", 0),
        Part("0.bias", 0),
        Part("1.weight", 0),
        Part("1.bias", 0),
        Part("4.weight", 1, span=4),
    )
    objective = GroupLasso(units=1.0, tied=(parts,))
    ((block, _),) = objective.blocks(model)
    assert block.size == 4 + 1 + 1 + 1 + 8
    with torch.no_grad():
        block.scale_(torch.tensor([1.0, 0.0, 1.0]))
    assert zero_groups(model, objective) == {"0.weight.units": (1, 3)}
    assert not model[4].weight[:, 4:8].any()
    assert model[4].weight[:, :4].all()
    assert model[4].weight[:, 8:].all()
    maps = model[:3](draw(1, 1, 3, 3))
    assert not maps[:, 1].any()
    assert maps[:, 0].any() or maps[:, 2].any()


def test_tied_groups_behind_others_in_a_concatenation():
    model = made(lambda: nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 2), nn.Linear(5, 1)]))
    block = tied_block(model, "x", (Part("1.weight", 0), Part("2.weight", -1, first=3)), "Test")
    assert block.norms().shape == (2,)
    with torch.no_grad():
        block.scale_(torch.zeros(2))
    assert (model[2].weight != 0).tolist() == [[True, True, True, False, False]]


# The proximal step.


def trained(proximal, steps=400, rate=0.05, strength=0.1):
    """Linear regression in which two of six inputs matter."""
    model = made(lambda: nn.Linear(6, 3, bias=False))
    x = draw(64, 6)
    y = x[:, :2] @ draw(2, 3, seed=1)
    lasso = GroupLasso(columns=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        if not proximal:
            loss = loss + strength * penalty(lasso, model)
        loss.backward()
        optimizer.step()
        if proximal:
            proximal_step(model, lasso, rate * strength)
    return model, lasso


def test_the_proximal_step_comes_to_exact_zeros_and_the_subgradient_does_not():
    model, lasso = trained(proximal=True)
    assert zero_groups(model, lasso) == {"columns": (4, 6)}
    assert not model.weight[:, 2:].any()
    swinging, lasso = trained(proximal=False)
    assert zero_groups(swinging, lasso) == {"columns": (0, 6)}
    assert zero_groups(swinging, lasso, tolerance=0.02) == {"columns": (4, 6)}
    torch.testing.assert_close(model.weight, swinging.weight, atol=0.02, rtol=0)


def test_proximal_step_by_hand_and_with_fading_strength():
    rows = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=torch.float64)
    for e, factor in ((None, 0.8), (5.0, 0.9)):
        model = made(lambda: nn.Linear(2, 3, bias=False))
        model.load_state_dict({"weight": rows})
        proximal_step(model, GroupLasso(rows=2.0, adaptive=e), 0.5)
        torch.testing.assert_close(model.weight[0].detach(), factor * rows[0])
        assert not model.weight[1:].any()


def test_a_proximal_step_of_nothing_changes_nothing():
    model = made(Tagger)
    before = [p.detach().clone() for p in model.parameters()]
    lasso = GroupLasso(rows=1.0, units=1.0, readers=(("rnn", "decoder"),))
    proximal_step(model, lasso, 0.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_large_proximal_steps_end_hidden_units():
    model = made(Tagger)
    lasso = GroupLasso(units=1.0, readers=(("rnn", "decoder"),))
    with torch.no_grad():
        for block, _ in lasso.blocks(model):
            block.scale_(torch.tensor([1e-3, 1.0, 1e-3, 1.0], dtype=torch.float64))
    proximal_step(model, lasso, 0.1)
    assert zero_groups(model, lasso) == {"rnn.l0.units": (2, 4), "rnn.l1.units": (2, 4)}


def test_nan_is_not_taken_for_zero():
    model = made(lambda: nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    proximal_step(model, GroupLasso(rows=1.0), 0.1)
    assert model.weight[0].isnan().all()
    assert zero_groups(model, GroupLasso(rows=1.0)) == {"rows": (0, 2)}


def test_cut_takes_small_weights_of_all_parameters():
    model = nn.BatchNorm1d(3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([1.0, -9e-5, 1.1e-4]))
        model.bias.copy_(torch.tensor([9e-5, -1.0, 0.0]))
    cut(model)
    assert (model.weight == 0).tolist() == [False, True, False]
    assert (model.bias == 0).tolist() == [True, False, True]
    cut(model, below=2.0)
    assert not model.weight.any()


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_computed_weight_has_a_penalty_but_no_proximal_step(wrap):
    model = made(lambda: nn.Sequential(wrap(nn.Linear(3, 2))))
    penalty(GroupLasso(rows=1.0), model).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "original" in n)
    with pytest.raises(ValueError, match=r"GroupLasso: layer '0' computes its weight.*Remove that"):
        proximal_step(model, GroupLasso(rows=1.0), 0.1)


# Speed.


class Count(TorchDispatchMode):
    """Counts the operators that run."""

    num = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num += 1
        return function(*args, **(kwargs or {}))


def test_the_number_of_operators_does_not_grow_with_the_number_of_groups():
    counts = []
    for size in (4, 64):
        with isolated(0, "model"):
            model = LSTMLanguageModel(vocabulary=10, hidden=size)
        lasso = GroupLasso(rows=1.0, columns=1.0, units=1.0, readers=(("lstm", "decoder"),))
        with Count() as count:
            penalty(lasso, model).backward()
            proximal_step(model, lasso, 0.1)
        counts.append(count.num)
    assert counts[0] == counts[1]


# Errors.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of filters, .* must be above 0; got 0 for all.*leave GroupLasso out"),
        ({"rows": -1.0}, "rows must be at least 0 and finite; got -1.0"),
        ({"rows": math.inf}, "rows must be at least 0 and finite; got inf"),
        ({"rows": 1.0, "adaptive": 0.0}, r"adaptive \(e\) must be above 0 .* got 0.0"),
        ({"depth": 1.0}, r"depth and branches go together; got depth=1.0 and \(\)"),
        ({"rows": 1.0, "branches": ("x",)}, "depth and branches go together; got depth=0.0"),
        ({"units": 1.0}, r"units and readers or tied go together; got units=1.0 and \(\), \(\)"),
        ({"rows": 1.0, "readers": (("a", "b"),)}, "units and readers or tied go together"),
        ({"rows": 1.0, "strengths": (("fc", -2.0),)}, r"strengths\['fc'\] must be .* got -2.0"),
    ],
)
def test_bad_hyperparameters_are_named(fields, message):
    with pytest.raises(ValueError, match=f"GroupLasso: {message}"):
        GroupLasso(**fields)


def tied(*parts):
    return {"units": 1.0, "tied": (parts,)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filters": 1.0}, "filters needs a convolution in the model; Tagger has none.*filters=0"),
        ({"rows": 1.0, "strengths": (("fc", 2.0),)}, "pattern in strengths .* got 'fc'.* decoder"),
        ({"rows": 1.0, "strengths": (("*", 0.0),)}, "strengths leaves no layer over"),
        ({"units": 1.0, "readers": (("lstm", "decoder"),)}, "readers names 'lstm'.*: rnn, decoder"),
        ({"units": 1.0, "readers": (("decoder", "rnn"),)}, "begin with an nn.LSTM.* got 'decoder'"),
        ({"units": 1.0, "readers": (("rnn", "norm"),)}, "end with a linear .* 'norm', a LayerNorm"),
        (
            {"units": 1.0, "readers": (("rnn", "wide"),)},
            "take its 4 outputs .* wide.weight takes 6",
        ),
        (tied(Part("nothing", 0)), "parameter='nothing'.* does not fit Tagger"),
        (tied(Part("decoder.weight", 2)), "does not fit Tagger: range object index out of range"),
        (tied(Part("decoder.weight", 0, gates=2)), "does not fit Tagger: shape"),
        (
            tied(Part("decoder.weight", 0), Part("rnn.weight_ih_l0", 0, gates=4)),
            "equally many groups; got {'decoder.weight': 5, 'rnn.weight_ih_l0': 4}.*gates",
        ),
    ],
)
def test_what_is_not_in_the_model_is_named(fields, message):
    model = made(Tagger)
    model.norm, model.wide = nn.LayerNorm(4), made(lambda: nn.Linear(6, 1))
    with pytest.raises(ValueError, match=f"GroupLasso: .*{message}"):
        penalty(GroupLasso(**fields), model)


def test_branches_that_fit_nothing_and_projections_are_refused():
    with pytest.raises(ValueError, match=r"pattern in branches must fit .* 'conv3'.* stem, conv1"):
        penalty(GroupLasso(depth=1.0, branches=("conv1", "conv3")), made(Branch))
    model = made(lambda: nn.ModuleDict({"lstm": nn.LSTM(3, 4, proj_size=2), "fc": nn.Linear(2, 1)}))
    with pytest.raises(ValueError, match="without proj_size; got 'lstm'"):
        penalty(GroupLasso(units=1.0, readers=(("lstm", "fc"),)), model)


@pytest.mark.parametrize("threshold", [-1.0, math.inf, math.nan])
def test_thresholds_are_checked(threshold):
    model = made(lambda: nn.Linear(2, 2))
    said = re.escape(f"at least 0 and finite; got {threshold}")
    with pytest.raises(ValueError, match=f"proximal_step: threshold must be {said}"):
        proximal_step(model, GroupLasso(rows=1.0), threshold)
    with pytest.raises(ValueError, match=f"land: threshold must be {said}"):
        land(model, GroupLasso(rows=1.0), threshold)
    with pytest.raises(ValueError, match=f"cut: below must be {said}"):
        cut(model, threshold)


# The language model.


def language_model(**fields):
    with isolated(0, "model"):
        return LSTMLanguageModel(**{"vocabulary": 11, "hidden": 6, **fields})


def words(*shape):
    return torch.randint(11, shape, generator=generator(0, "words"))


def test_the_language_model_goes_on_from_its_memory():
    model, text = language_model(), words(2, 8)
    whole = model(text)
    assert whole.shape == (2, 8, 11)
    first, memory = model.continued(text[:, :3])
    second, _ = model.continued(text[:, 3:], memory)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_the_language_model_is_trained_traced_and_starts_within_its_spread():
    model, text = language_model(layers=1, dropout=0.5, spread=0.01), words(2, 8)
    assert all(p.abs().max() <= 0.01 for p in model.parameters())
    assert model.decoder.weight.max() > 0.008
    with isolated(0, "dropout"):
        model(text).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval()
    assert torch.equal(torch.fx.symbolic_trace(model)(text), model(text))


def test_the_language_model_drops_between_layers_only_where_there_are_two():
    assert language_model(dropout=0.5).lstm.dropout == 0.5
    assert language_model(dropout=0.5, layers=1).lstm.dropout == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocabulary": 0}, "vocabulary must be at least 1; got 0"),
        ({"hidden": 0}, "hidden must be at least 1; got 0"),
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\); got 1.0"),
        ({"spread": 0.0}, "spread must be above 0, finite; got 0.0"),
    ],
)
def test_bad_sizes_are_named(fields, message):
    with pytest.raises(ValueError, match=f"LSTMLanguageModel: {message}"):
        language_model(**fields)


def test_hidden_units_of_the_language_model_come_to_zero_in_training():
    """A few steps of the whole thing: loss, proximal step, exact zeros, the same function after."""
    model, text = language_model(), words(16, 9)
    batch = Batch(text[:, :-1], text[:, 1:], torch.arange(16))
    lasso = GroupLasso(units=1.0, readers=(("lstm", "decoder"),))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(25):
        optimizer.zero_grad()
        CrossEntropy()(model, batch, generator(0)).total.backward()
        optimizer.step()
        proximal_step(model, lasso, 0.5 * 0.06)
    counts = zero_groups(model, lasso)
    assert set(counts) == {"lstm.l0.units", "lstm.l1.units"}
    assert sum(zero for zero, _ in counts.values()) > 0
