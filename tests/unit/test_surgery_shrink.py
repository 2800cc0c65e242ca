"""Smaller modules: what is cut, what is refused, what is said."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sterna.randomness import isolated
from sterna.surgery import RecurrentStack, Refused, couple, nonzero, shrink, shrinkable
from sterna.surgery.shrink_lstm import renamed
from unit.surgery_zoo import (
    GRUClassifier,
    LiteralLeNet,
    LSTMLanguageModel,
    MobileNet,
    PlainCNN,
    ResNeXt,
    SpareHead,
    TiedLSTM,
    Transformer,
    UNet,
    images,
    series,
    tokens,
)


def built(make):
    with isolated(0, "model"):
        return make().eval()


def two_layers():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_the_slices_are_the_ones_that_were_asked_for():
    model = built(two_layers)
    small, _ = shrink(model, torch.ones(1, 4), {"0": [6, 1]})
    assert torch.equal(small[0].weight, model[0].weight[[1, 6]])
    assert torch.equal(small[0].bias, model[0].bias[[1, 6]])
    assert torch.equal(small[2].weight, model[2].weight[:, [1, 6]])
    assert torch.equal(small[2].bias, model[2].bias)


@pytest.mark.parametrize(
    "units",
    [torch.tensor([0, 3]), [True, False, False, True] + 4 * [False], torch.arange(8) % 3 == 0],
)
def test_units_are_numbers_or_a_mask(units):
    small, report = shrink(built(two_layers), torch.ones(1, 4), {"0": units})
    assert small[0].out_features == report.widths["0"][1] in (2, 3)


def test_stock_layers_remember_their_new_sizes():
    model, x = built(MobileNet), images()
    small, _ = shrink(model, x, {"expand.0": range(5), "project.0": [0, 5]})
    depthwise = small.depthwise[0]
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (5, 5, 5)
    assert small.expand[1].num_features == 5 and small.project[0].in_channels == 5
    assert small.head.in_features == 2
    small, _ = shrink(built(ResNeXt), x, {"reduce": [3]})
    assert small.grouped.groups == 1 and tuple(small.grouped.weight.shape) == (3, 3, 3, 3)
    small, _ = shrink(built(UNet), images(1), {"mid.3": [1], "up2": [0, 1, 2]})
    assert (small.mid[4].num_groups, small.mid[4].num_channels) == (1, 8)
    assert (small.up2.in_channels, small.up2.out_channels) == (8, 3)
    small, _ = shrink(built(Transformer), tokens(20, (2, 6)), {"blocks.1.qkv": [2]})
    assert small.blocks[1].num_heads == 1 and small.blocks[1].qkv.out_features == 6
    assert small.blocks[0].num_heads == 4


@pytest.mark.parametrize(("round_to", "left"), [(1, 3), (2, 4), (4, 4), (5, 5), (8, 8), (16, 8)])
def test_widths_are_rounded_up_with_the_strongest(round_to, left):
    model = built(two_layers)
    with torch.no_grad():
        model[0].weight[7] *= 100
    keep = {"0": [0, 1, 2]}
    if left == 8:
        with pytest.warns(UserWarning, match="nothing was removed"):
            small, report = shrink(model, torch.ones(1, 4), keep, round_to=round_to)
        assert report.widths == {}
    else:
        small, report = shrink(model, torch.ones(1, 4), keep, round_to=round_to)
        assert report.widths == {"0": (8, left)}
        assert left == 3 or torch.equal(small[0].weight[-1], model[0].weight[7])
    assert small[0].out_features == left


def test_rounding_counts_channels_where_a_unit_has_several():
    _, report = shrink(built(ResNeXt), images(), {"reduce": [0]}, round_to=4)
    assert report.widths["reduce"] == (4, 2)  # 3 channels each: 3 -> 6 is the first above 4


def test_a_layer_keeps_one_unit_and_that_is_said():
    model = built(two_layers)
    with torch.no_grad():
        model[0].weight[5] *= 100
    with pytest.warns(UserWarning, match=r"'0' was to lose all of its units; one is kept"):
        small, report = shrink(model, torch.ones(1, 4), {"0": []})
    assert report.widths == {"0": (8, 1)}
    assert torch.equal(small[0].weight, model[0].weight[5:6])


def test_nothing_to_remove_is_said():
    with pytest.warns(UserWarning, match="nothing was removed"):
        _, report = shrink(built(two_layers), torch.ones(1, 4), {})
    assert report.parameters_before == report.parameters_after


def test_layers_of_an_lstm_may_end_with_different_widths():
    model, x = built(LSTMLanguageModel), tokens(30, (3, 5))
    small, report = shrink(model, x, {"lstm.l0": range(7), "lstm.l1": range(4)})
    assert isinstance(small.lstm, RecurrentStack)
    assert [layer.hidden_size for layer in small.lstm.layers] == [7, 4]
    assert report.description.stacks == {"lstm": (7, 4)}
    equal, report = shrink(model, x, {"lstm.l0": range(4), "lstm.l1": range(4)})
    assert type(equal.lstm) is nn.LSTM and equal.lstm.hidden_size == 4
    assert equal.lstm.num_layers == 2 and not report.description.stacks


def test_states_that_are_handed_out_keep_one_width():
    model, x = built(TiedLSTM), tokens(30, (5, 3))
    with pytest.warns(UserWarning, match=r"'lstm.l0' keeps 7 units, as many as 'embed'"):
        small, report = shrink(model, x, {"lstm.l0": range(4), "embed": range(7)})
    assert {after for _, after in report.widths.values()} == {7}
    logits, state = small(x)
    again, _ = small(x, state)
    assert again.shape == logits.shape and state[0].shape == (2, 3, 7)


def test_last_states_of_a_stack_are_read_by_layer():
    model, x = built(GRUClassifier), series(6)
    small, _ = shrink(model, x, {"gru.l0": range(3), "gru.l1": range(8)})
    assert isinstance(small.gru, RecurrentStack) and small.fc.in_features == 16


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_recurrent_stack_is_the_layer_that_it_replaces(kind, bidirectional):
    with isolated(0, "layer"):
        layer = kind(5, 6, num_layers=3, batch_first=True, bidirectional=bidirectional)
    stack = RecurrentStack(layer, (6, 6, 6))
    names = {renamed(name): value for name, value in layer.named_parameters()}
    assert set(names) == set(dict(stack.named_parameters()))
    stack.load_state_dict(names)
    x = series(5)
    out, state = stack(x)
    expected, ends = layer(x)
    again, _ = stack(x, state)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(again, layer(x, ends)[0])
    for ours, theirs in zip(*(s if kind is nn.LSTM else (s,) for s in (state, ends)), strict=True):
        torch.testing.assert_close(torch.stack(ours), theirs)


def test_a_recurrent_stack_drops_between_layers_only():
    with isolated(0, "layer"):
        layer = nn.GRU(5, 6, num_layers=2, dropout=1.0)
        stack = RecurrentStack(layer, (6, 6)).train()
        for parameter in stack.parameters():
            nn.init.constant_(parameter, 0.3)
        first, last = stack(series(5)), stack.eval()(series(5))
    assert not torch.equal(first[0], last[0])
    assert torch.equal(first[1][0], last[1][0])


@pytest.mark.parametrize(("widths", "projection"), [((3,), 0), ((3, 0), 0), ((3, 3), 2)])
def test_a_recurrent_stack_needs_a_width_for_each_layer(widths, projection):
    layer = built(lambda: nn.LSTM(4, 6, num_layers=2, proj_size=projection))
    with pytest.raises(ValueError, match=r"^RecurrentStack: widths must be 2 whole numbers"):
        RecurrentStack(layer, widths)


def test_a_size_in_numbers_is_found_by_trial():
    model, x = built(LiteralLeNet), images(1, 28)
    assert "conv2" in couple(model, x).groups
    coupling = shrinkable(model, x)
    assert set(coupling.groups) == {"conv1", "fc1"}
    assert "x = x.view(-1, 400)" in coupling.fixed["conv2"]
    with pytest.raises(
        Refused,
        match=r"^LiteralLeNet: 'conv2' cannot shrink: .*the model \(LiteralLeNet\), `x = x.view\(-1, 400\)`",
    ):
        shrink(model, x, {"conv1": range(3), "conv2": range(8)})


def test_a_fixed_layer_is_refused_with_its_reason():
    model = built(two_layers)
    with pytest.raises(
        Refused, match=r"'2' cannot shrink: it is part of the model's output.*\['0'\]"
    ):
        shrink(model, torch.ones(1, 4), {"2": [0]})


def test_a_model_without_anything_to_shrink_is_refused():
    with pytest.raises(Refused, match=r"^Linear: nothing in it can shrink. 'weight'"):
        shrinkable(built(lambda: nn.Linear(4, 3)), torch.ones(1, 4))
    with pytest.raises(Refused, match="No layer has more than one unit"):
        shrinkable(nn.ReLU(), torch.ones(1, 4))


@pytest.mark.parametrize(("bias", "x"), [(True, torch.ones(1, 4)), (False, torch.zeros(1, 4))])
def test_a_width_that_sets_a_scale_is_refused(bias, x):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8, bias=bias), nn.Linear(8, 2, bias=bias)

        def forward(self, x):
            hidden = self.a(x)
            return self.b(hidden) / hidden.shape[1]

    with pytest.raises(Refused, match=r"is off by .* depends on the width"):
        shrink(built(Scaled), x, {"a": range(3)})


class Auxiliary(nn.Module):
    """A head that runs in training mode only, behind a batch norm that needs two examples there."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)
        self.c, self.head = nn.Linear(6, 2), nn.Linear(8, 2)

    def forward(self, x):
        hidden = self.norm(self.a(x)).relu()
        out = self.c(self.b(hidden).relu())
        return (out, self.head(hidden)) if self.training else out


@pytest.mark.parametrize("batch", [1, 3])
def test_what_runs_in_training_mode_only_holds_the_units_that_it_reads(batch):
    model, x = built(Auxiliary), torch.ones(batch, 4)
    coupling = shrinkable(model, x)
    assert set(coupling.groups) == {"b"}
    assert (
        "in training mode the smaller model does not run in 'head' (Linear)" in coupling.fixed["a"]
    )
    with pytest.warns(UserWarning, match="did not use head"):
        small, _ = shrink(model, x, {"b": range(3)})
    assert torch.equal(small.norm.running_mean, model.norm.running_mean)
    assert small.norm.num_batches_tracked == 0 and not small.training
    small.train()(torch.eye(4))
    with (
        pytest.warns(UserWarning, match="did not use head"),
        pytest.raises(Refused, match=r"'a' cannot shrink: in training mode .*'head' \(Linear\)"),
    ):
        shrink(model, x, {"a": range(3)})


def test_a_model_that_does_not_train_by_itself_is_no_reason():
    class Inference(nn.Sequential):
        def forward(self, x):
            assert not self.training
            return super().forward(x)

    model = Inference(*built(two_layers)).eval()
    assert shrink(model, torch.ones(1, 4), {"0": range(3)})[0][0].out_features == 3


def test_a_model_need_not_run_on_other_numbers():
    class Picky(nn.Sequential):
        def forward(self, x):
            return super().forward(x) / (x > 0).all(1, keepdim=True)

    model = Picky(*built(two_layers))
    assert shrink(model, torch.ones(1, 4), {"0": range(3)})[0][0].out_features == 3


def test_a_model_that_is_random_in_evaluation_is_refused():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(F.dropout(self.a(x), 0.5))

    with pytest.raises(Refused, match="random in evaluation mode"):
        shrink(built(Random), torch.ones(5, 4), {"a": [1, 3, 5, 7]})


def test_infinities_are_refused():
    with pytest.raises(Refused, match="infinity or NaN"):
        shrink(built(two_layers), torch.full((1, 4), float("nan")), {"0": [1]})


def test_what_the_example_did_not_use_is_said():
    class Unasked(SpareHead):
        def forward(self, x, spare=False):
            hidden = self.a(x)
            return self.spare(hidden) if spare else self.b(hidden)

    with pytest.warns(UserWarning, match="did not use spare.weight, spare.bias"):
        shrink(built(Unasked), torch.ones(1, 4), {"a": [1]})


@pytest.mark.parametrize(
    ("keep", "round_to", "words"),
    [
        ({"zero": [1]}, 1, r"keep names the group 'zero', which Sequential does not have.*\['0'\]"),
        ({"0": [8]}, 1, r"keep\['0'\] must hold different unit numbers from 0 to 7.*got \[8\]"),
        ({"0": [-1]}, 1, r"got \[-1\]"),
        ({"0": [1, 1]}, 1, r"got \[1, 1\]"),
        ({"0": [True, False]}, 1, "or 8 truth values"),
        ({"0": [1.5]}, 1, r"got \[1\.5\]"),
        ({"0": [1]}, 0, "round_to must be a whole number, at least 1; got 0"),
        ({"0": [1]}, 1.5, r"round_to must be .* got 1\.5"),
    ],
)
def test_errors(keep, round_to, words):
    with pytest.raises(ValueError, match=f"^shrink: .*{words}"):
        shrink(built(two_layers), torch.ones(1, 4), keep, round_to=round_to)


def test_a_unit_that_nobody_reads_or_writes_is_found():
    model, x = built(PlainCNN), images()
    coupling = couple(model, x)
    assert nonzero(model, coupling) == {}
    with torch.no_grad():
        model.features[1].weight[2] = model.features[1].bias[2] = 0
        model.features[4].weight[:, 5] = 0
        model.features[0].weight[7] = 0  # not enough: the batch norm adds its bias
    assert nonzero(model, coupling) == {"features.0": (0, 1, 3, 4, 6, 7)}
    _, report = shrink(model, x, nonzero(model, coupling))
    assert report.difference < 1e-6


def test_what_was_not_zero_changes_the_output_and_the_report_says_by_how_much():
    model, x = built(two_layers), torch.ones(3, 4)
    small, report = shrink(model, x, {"0": [0]})
    expected = (small(x) - model(x)).abs().max().item()
    assert report.difference == pytest.approx(expected) and expected > 0.01


def test_frozen_parameters_and_types_stay():
    model = built(two_layers).double()
    model[0].requires_grad_(False)
    small, _ = shrink(model, torch.ones(1, 4, dtype=torch.float64), {"0": [0, 1]})
    assert [p.requires_grad for p in small.parameters()] == [False, False, True, True]
    assert {p.dtype for p in small.parameters()} == {torch.float64}


def test_an_example_may_be_several_arguments():
    with isolated(0, "model"):
        model = nn.Bilinear(3, 4, 2)
    with pytest.raises(
        Refused, match=r"nothing in it can shrink. 'weight': the model \(Bilinear\)"
    ):
        shrinkable(model, (torch.ones(1, 3), torch.ones(1, 4)))


class Split(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.a, self.b, self.shape = nn.Linear(4, 12), nn.Conv2d(3, 2, 1), shape

    def forward(self, x):
        return self.b(self.a(x).view(*self.shape))


def test_a_width_that_is_split_may_shrink_where_the_code_follows():
    _, report = shrink(built(lambda: Split((2, -1, 2, 2))), torch.ones(2, 4), {"a": [0, 2]})
    assert report.widths == {"a": (3, 2)}
    with pytest.raises(
        Refused, match=r"its units pass the model \(Split\), `return self.b\(self.a"
    ):
        shrink(built(lambda: Split((2, 3, 2, 2))), torch.ones(2, 4), {"a": [0, 2]})


def test_a_view_that_would_shrink_the_wrong_dimension_is_refused():
    """It runs, with four narrow heads in place of two wide ones; the comparison sees it."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            q, k, v = (
                f(x).view(*x.shape[:2], 4, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
            )
            y = (q @ k.mT).softmax(-1) @ v
            return self.out(y.transpose(1, 2).flatten(2))

    model, x = built(Heads), series(8)
    with pytest.raises(Refused, match=r"'q' cannot shrink: the smaller model's output is off by"):
        shrink(model, x, {"q": [0, 2]})
    with pytest.raises(Refused, match="nothing in it can shrink"):
        shrinkable(model, x)
