"""CoNNTrA: incremental evaluation, the guarantee, what is searched, and what is refused."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from sterna.data import Examples
from sterna.models import MLP, SmallCNN
from sterna.randomness import generator, isolated
from sterna.solvers import CoNNTrA
from sterna.solvers.conntra_chain import Chain
from sterna.solvers.conntra_kernels import Evaluation
from sterna.value_sets import ValueSet

NUM = 40


class Sign(nn.Module):
    def forward(self, x):
        return x.sign()


class Where(nn.Module):
    """Elementwise, in several operations that torch.fx would have to follow."""

    def forward(self, x):
        return torch.where(x > 0.1, 1.0, -0.5).to(x.dtype)


ACTIVATIONS = [nn.ReLU, nn.Tanh, Sign, Where, lambda: nn.ReLU(inplace=True), nn.Identity]


def network(sizes, activation=nn.ReLU, bias=True, scale=1.0):
    layers = []
    with isolated(0, "conntra"):
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, bias=bias), activation()]
    model = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    return model


def examples(num_features=5, classes=3, num=NUM, dtype=torch.float32):
    inputs = torch.randn(num, num_features, generator=generator(1), dtype=dtype)
    teacher = torch.randn(num_features, classes, generator=generator(2), dtype=dtype)
    return Examples(inputs, (inputs @ teacher).argmax(1))


def full(chain, data):
    """The loss of the chain's weights, by torch from the start."""
    x = data.inputs.double()
    for k, layer in enumerate(chain.layers):
        x = F.linear(x, layer.weight, layer.bias)
        x = layer.function(x) if k < len(chain.layers) - 1 else x
    return float(F.cross_entropy(x, data.targets))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(5, 3), (5, 7, 3), (5, 6, 4, 3), (5, 4, 4, 4, 3)])
@given(seed=st.integers(0, 2**20), scale=st.sampled_from([0.1, 1.0, 30.0]))
def test_incremental_equals_full_evaluation(activation, sizes, seed, scale):
    data, rng = examples(), generator(seed)
    chain = Chain.of(network(sizes, activation, scale=scale).double(), "test")
    evaluation = Evaluation.on(chain.layers, chain.rows(data.inputs), data.targets)
    for _ in range(6):
        layer = int(torch.randint(len(chain.layers), (), generator=rng))
        weight, bias = chain.layers[layer].weight, chain.layers[layer].bias
        unit = int(torch.randint(len(weight), (), generator=rng))
        source = int(torch.randint(-1, weight.shape[1], (), generator=rng))
        before = float(bias[unit] if source < 0 else weight[unit, source])
        changes = scale * torch.randn(3, generator=rng, dtype=torch.float64)
        predicted = evaluation.losses(layer, unit, source, changes).tolist()
        for change, loss in zip(changes.tolist(), predicted, strict=True):
            trial = copy.deepcopy(chain.layers)
            (trial[layer].bias if source < 0 else trial[layer].weight[unit])[
                unit if source < 0 else source
            ] += change
            exact = full(Chain(chain.features, trial, ""), data)
            if loss == float("inf"):  # it said that this cannot be lower
                assert exact >= evaluation.loss - 1e-12 * max(1.0, exact)
            else:
                assert loss == pytest.approx(exact, rel=1e-9, abs=1e-9)
        evaluation.change(layer, unit, source, before + changes[0].item())
        assert evaluation.loss == pytest.approx(full(chain, data), rel=1e-9, abs=1e-9)


def test_some_trials_are_evaluated_and_some_left_out():
    data = examples()
    chain = Chain.of(network((5, 7, 3)).double(), "test")
    evaluation = Evaluation.on(chain.layers, chain.rows(data.inputs), data.targets)
    changes = torch.tensor([-0.1, 0.1], dtype=torch.float64)
    found = [evaluation.losses(1, j, i, changes) for j in range(3) for i in range(7)]
    finite = int(torch.stack(found).isfinite().sum())
    assert finite == 21, "cross entropy is convex in a weight: one of two directions can go down"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_never_rises_and_is_that_of_the_network_handed_back(activation, dtype):
    model, data = network((5, 8, 3), activation).to(dtype), examples(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    solved, report = CoNNTrA(passes=30)(model, data, generator(0))
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]), "the model that was given is changed"
    assert all(b < a for a, b in pairwise(report.trace))
    assert list(report.losses) == sorted(report.losses, reverse=True)
    assert report.converged and report.changes[-1] == 0
    assert report.trials == 2 * (5 * 8 + 8 * 3) * len(report.changes)
    loss = F.cross_entropy(solved.double()(data.inputs.double()), data.targets)
    assert report.losses[-1] == pytest.approx(float(loss.detach()), abs=1e-9)
    for name, grid in report.grids.items():
        allowed = torch.tensor(grid, dtype=torch.float64)
        assert torch.isin(solved.state_dict()[name], allowed).all()
    assert torch.equal(solved[0].bias, model[0].bias.double()), "biases are not searched"


def test_it_learns_what_rounding_loses():
    model, data = network((5, 16, 3)), examples()
    _, report = CoNNTrA()(model, data, generator(0))
    assert report.losses[-1] < 0.6 * min(report.losses[0], report.float_loss)


def test_no_single_change_is_better_at_the_end():
    model, data = network((5, 4, 3)), examples()
    solved, report = CoNNTrA(passes=50)(model, data, generator(0))
    assert report.converged
    solved = solved.double()
    for name, grid in report.grids.items():
        flat = solved.get_parameter(name).data.view(-1)
        for k in range(len(flat)):
            kept = flat[k].item()
            for value in grid:
                flat[k] = value
                loss = F.cross_entropy(solved(data.inputs.double()), data.targets).item()
                assert loss >= report.losses[-1] - 2e-12
            flat[k] = kept


def test_going_on_from_a_result_changes_nothing():
    data = examples()
    solved, report = CoNNTrA(passes=50)(network((5, 6, 3)), data, generator(0))
    again, second = CoNNTrA(passes=50)(solved, data, generator(1), grids=report.grids)
    assert second.changes == (0,) and second.converged
    assert second.losses == (pytest.approx(report.losses[-1]),) * 2
    assert second.grids == report.grids
    for name, x in solved.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)


def test_mini_batches_give_a_network_on_its_grids():
    data = examples(num=200)
    solver = CoNNTrA(passes=3, batch_size=50, batch_every=10)
    solved, report = solver(network((5, 8, 3)), data, generator(0))
    assert len(solved[0].weight.unique()) <= 3
    loss = F.cross_entropy(solved.double()(data.inputs.double()), data.targets).detach()
    assert report.losses[-1] == pytest.approx(float(loss), abs=1e-9), "losses are on all examples"
    assert report.losses[-1] < report.losses[0]


def test_same_generator_same_result():
    results = [CoNNTrA(passes=2)(network((5, 8, 3)), examples(), generator(3))[1] for _ in "ab"]
    assert results[0] == results[1]


def test_mixed_sets_by_pattern():
    sets = (
        ("0.weight", ValueSet(values=(-2.0, -0.5, 0.0, 0.5, 2.0))),
        ("0.bias", ValueSet(values=(-0.25, 0.0, 0.25), scaled=False)),
        ("2.*", ValueSet(values=(-1.0, 1.0))),
    )
    model, data = network((5, 6, 4, 3)), examples()
    solved, report = CoNNTrA(sets=sets)(model, data, generator(0))
    assert set(report.grids) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert set(solved[0].bias.tolist()) <= {-0.25, 0.0, 0.25}
    assert len(solved[0].weight.unique()) > 3 and len(solved[2].weight.unique()) == 2
    assert torch.equal(solved[4].weight, model[4].weight), "what no pattern names stays float"
    assert list(report.losses) == sorted(report.losses, reverse=True)


def test_what_comes_before_the_searched_layers_is_run_as_it_is():
    with isolated(0, "conntra"):
        model = SmallCNN(classes=3, width=8)
    inputs = torch.randn(NUM, 1, 8, 8, generator=generator(1))
    data = Examples(inputs, torch.randint(3, (NUM,), generator=generator(2)))
    solved, report = CoNNTrA(sets=(("fc.weight", ValueSet()),))(model, data, generator(0))
    for name, x in solved.state_dict().items():
        same = torch.equal(x, model.state_dict()[name])
        assert same == (name != "fc.weight")
    loss = F.cross_entropy(solved.double()(inputs.double()), data.targets)
    assert report.losses[-1] == pytest.approx(float(loss.detach()), abs=1e-9)
    assert report.losses[-1] < report.losses[0]


def test_dropout_is_off_and_the_mode_is_kept():
    with isolated(0, "conntra"):
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    solved, report = CoNNTrA()(model, examples(), generator(0))
    assert solved.training and solved[2].training
    loss = F.cross_entropy(solved.eval().double()(examples().inputs.double()), examples().targets)
    assert report.losses[-1] == pytest.approx(float(loss.detach()), abs=1e-9)


def test_pictures_are_flattened_by_the_model():
    inputs = torch.randn(NUM, 1, 3, 3, generator=generator(1))
    data = Examples(inputs, torch.randint(3, (NUM,), generator=generator(2)))
    with isolated(0, "conntra"):
        model = MLP((9, 6, 3))
    _, report = CoNNTrA()(model, data, generator(0))
    assert report.losses[-1] < report.losses[0]


# Bad input.


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.b = nn.Linear(5, 3)
        self.c = nn.Linear(5, 5)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.b(self.c(self.a(x).relu()).relu())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.a(x) + x)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        return 2 * self.a(x) if x.sum() > 0 else -self.a(x)


class Tied(nn.Module):
    """Its last layer's weight works before it, too, where no module says so."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)

    def forward(self, x):
        assert len(list(x)) > 0  # nothing that torch.fx follows
        return self.a(x @ self.a.weight)


class Pair(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x


class Unpacked(nn.Module):
    """A recurrent network as they are written: sizes are unpacked, and its state is float32."""

    def __init__(self):
        super().__init__()
        self.lstm, self.last = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        num, _ = x.shape
        state = torch.zeros(1, num, 4)
        return self.last(self.lstm(x[:, :, None], (state, state))[0][:, -1])


def _twice():
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(5, 3))


def _batch_norm():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            Branching,
            "called once; Branching, which torch.fx cannot trace, gives a Tensor that is not",
        ),
        (Tied, "used there alone; that of 'a' is used before it, too"),
        (lambda: nn.Sequential(nn.Linear(5, 3), nn.Softmax(1)), r"ends in 1 \(Softmax\)\. Leave"),
        (
            lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 3, 1), nn.Flatten()),
            r"it ends in 2 \(Flatten\), and the last layer is 1 \(Conv1d\)",
        ),
        (Pair, "must end in an nn.Linear that gives the logits; it gives a tuple, not a tensor"),
        (lambda: nn.ReLU(), "must end in an nn.Linear"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(5, 3)),
            "no weight can be searched; the last, .* is a part of what the model makes its weight of",
        ),
        (
            lambda: nn.Sequential(prune.l1_unstructured(nn.Linear(5, 3), "weight", 0.5)),
            "every weight must be a parameter; '0.weight' is computed from others",
        ),
    ],
)
def test_models_that_cannot_be_searched_are_refused_by_name(build, words):
    with isolated(0, "conntra"):
        model = build()
    with pytest.raises(ValueError, match=f"^CoNNTrA: .*{words}"):
        CoNNTrA()(model, examples(), generator(0))


@pytest.mark.parametrize(
    ("build", "searched", "name", "words"),
    [
        (lambda: nn.Linear(5, 3), ["weight"], "", ""),
        (_batch_norm, ["3.weight"], "0.weight", r"does not lie above 1 (BatchNorm1d), 2 (ReLU)"),
        (Residual, ["b.weight"], "a.weight", "does not lie above add"),
        (Shared, ["b.weight"], "a.weight", "is shared"),
        (_twice, ["4.weight"], "0.weight", "is shared"),
        (
            lambda: nn.Sequential(
                nn.Unflatten(1, (1, 5)),
                nn.Conv1d(1, 4, 2),
                nn.Flatten(),
                nn.Linear(16, 6),
                nn.ReLU(),
                nn.Linear(6, 3),
            ),
            ["3.weight", "5.weight"],
            "1.weight",
            "is of Conv1d, and only nn.Linear is searched",
        ),
        (
            Unpacked,
            ["last.weight"],
            "lstm.weight_hh_l0",
            "is of LSTM, and only nn.Linear is searched",
        ),
        (
            lambda: nn.Sequential(
                parametrizations.weight_norm(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)
            ),
            ["2.weight"],
            "0.parametrizations.weight.original1",
            "is a part of what 0 makes its weight of; first remove that with "
            "torch.nn.utils.parametrize.remove_parametrizations",
        ),
    ],
)
def test_what_cannot_be_searched_stays_float_with_the_reason(build, searched, name, words):
    with isolated(0, "conntra"):
        model = build()
    solved, report = CoNNTrA(passes=3)(model, examples(), generator(0))
    assert list(report.grids) == searched and report.left.get(name, "") == words
    for key, x in solved.state_dict().items():
        assert torch.equal(x, model.state_dict()[key]) == (key not in searched)
    loss = F.cross_entropy(solved.eval()(examples().inputs), examples().targets)
    assert report.losses[-1] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert report.losses[-1] < report.losses[0]


@pytest.mark.parametrize(
    ("build", "name", "words"),
    [
        (_batch_norm, "0.weight", r"does not lie above 1 \(BatchNorm1d\), 2 \(ReLU\)"),
        (Residual, "a.weight", "does not lie above add"),
        (Shared, "a.weight", "is shared"),
        (Unpacked, "lstm.weight_ih_l0", "is of LSTM"),
    ],
)
def test_what_is_named_must_be_searched(build, name, words):
    with isolated(0, "conntra"):
        model = build()
    with pytest.raises(ValueError, match=f"every searched parameter must be.*'{name}' {words}"):
        CoNNTrA(sets=(("*weight*", ValueSet()),))(model, examples(), generator(0))


def test_the_rest_of_such_a_model_can_be_named():
    with isolated(0, "conntra"):
        model = _batch_norm()
    solver = CoNNTrA(sets=(("3.weight", ValueSet()),))
    solved, report = solver(model, examples(), generator(0))
    assert len(solved[3].weight.unique()) <= 3 and not report.left


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"passes": 0}, "CoNNTrA: passes must be a whole number, at least 1; got 0"),
        ({"passes": 1.5}, "passes must be a whole number"),
        ({"batch_size": 0}, "batch_size must be .* got 0. None takes all examples"),
        ({"batch_every": -1}, "batch_every must be .* got -1"),
        ({"min_gain": -1.0}, "min_gain must be above 0 and finite; got -1.0"),
        ({"min_gain": 0.0}, "min_gain must be .* got 0.0"),
        ({"min_gain": float("nan")}, "min_gain must be .* got nan"),
        ({"sets": "ternary"}, "CoNNTrA: sets must be a ValueSet, or a tuple of pairs"),
        ({"sets": ()}, "sets must be"),
    ],
)
def test_hyperparameters_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        CoNNTrA(**change)


def test_other_bad_input():
    model, data = network((5, 4, 3)), examples()
    with pytest.raises(ValueError, match=r"pattern 'fc\.\*' of sets must match a parameter"):
        CoNNTrA(sets=(("fc.*", ValueSet()),))(model, data, generator(0))
    with pytest.raises(ValueError, match=r"targets must be classes in \[0, 3\)"):
        CoNNTrA()(model, Examples(data.inputs, data.targets + 1), generator(0))
    with pytest.raises(ValueError, match=r"targets must be classes .* torch.float32"):
        CoNNTrA()(model, Examples(data.inputs, data.targets.float()), generator(0))
    with pytest.raises(ValueError, match="loss of the rounded network must be finite; got nan"):
        CoNNTrA()(model, Examples(data.inputs * float("nan"), data.targets), generator(0))
    with pytest.raises(ValueError, match=r"grids must name parameters .* got \['x'\]"):
        CoNNTrA()(model, data, generator(0), grids={"x": (0.0, 1.0)})
    with pytest.raises(
        ValueError, match=r"one row of logits .* got \(40, 2, 3\), .* language models, are not"
    ):
        wide = Examples(data.inputs[:, None].repeat(1, 2, 1), data.targets)
        CoNNTrA()(model, wide, generator(0))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight must be finite"):
        CoNNTrA()(model, data, generator(0))
