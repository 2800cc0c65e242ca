"""Groups: what goes together, what stays, and in which words."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sterna.randomness import isolated
from sterna.surgery import Refused, couple, shrinkable
from sterna.surgery.labels import Book, blocks
from unit.surgery_zoo import (
    GRUClassifier,
    PadShortcutResNet,
    ResNeXt,
    Shared,
    SpareHead,
    TiedLSTM,
    TorchTransformer,
    images,
    series,
    tokens,
)


def built(make):
    with isolated(0, "model"):
        return make()


class Of(nn.Module):
    """A function of a layer's output, between two layers of width 8."""

    def __init__(self, function, first=None, last=None):
        super().__init__()
        self.first = first or nn.Linear(4, 8)
        self.last = last or nn.Linear(8, 3)
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def of(function, example=None, **layers):
    with isolated(0, "model"):
        model = Of(function, **{name: make() for name, make in layers.items()})
    return couple(model, torch.ones(2, 4) if example is None else example)


ONES = torch.ones(8)


def places(group):
    return {(s.parameter, s.dim): s.index for s in group.slices}


def test_a_convolution_its_norm_and_its_reader():
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)
    )
    coupling = couple(built(make), images())
    found = places(coupling.groups["0"])
    single = tuple((k,) for k in range(4))
    assert found[("0.weight", 0)] == found[("0.bias", 0)] == found[("1.running_mean", 0)] == single
    assert found[("3.weight", 1)][2] == tuple(range(72, 108))
    roles = {s.parameter: s.role for s in coupling.groups["0"].slices}
    assert roles == {
        "0.weight": "carries",
        "0.bias": "carries",
        "1.weight": "writes",
        "1.bias": "writes",
        "1.running_mean": "carries",
        "1.running_var": "carries",
        "3.weight": "reads",
    }
    assert coupling.fixed == {"3": "it is part of the model's output"}
    assert coupling.multiply_adds == 2 * (4 * 36 * 27 + 2 * 144)


def test_an_lstm_unit_has_the_rows_of_four_gates():
    coupling = couple(built(lambda: TiedLSTM(state=False)), tokens(30, (5, 3)))
    found = places(coupling.groups["lstm.l0"])
    assert found[("lstm.weight_ih_l0", 0)][5] == (5, 17, 29, 41)
    assert found[("lstm.weight_hh_l0", 1)][5] == found[("lstm.weight_ih_l1", 1)][5] == (5,)
    last = places(coupling.groups["embed"])
    assert last[("embed.weight", 1)][0] == (0,) and ("lstm.weight_hh_l1", 0) in last
    assert "decoder.weight" not in {s.parameter for g in coupling.groups.values() for s in g.slices}
    assert {s.role for s in coupling.groups["embed"].slices if s.parameter == "embed.weight"} == {
        "both"
    }


def test_both_directions_of_a_layer_are_one_group():
    coupling = couple(built(GRUClassifier), series(6))
    found = places(coupling.groups["gru.l1"])
    assert found[("fc.weight", 1)][3] == (3, 13)
    assert found[("gru.weight_ih_l1_reverse", 0)][3] == (3, 13, 23)


def test_a_group_of_a_grouped_convolution_is_one_unit():
    coupling = couple(built(ResNeXt), images())
    assert coupling.groups["reduce"].size == 4
    assert places(coupling.groups["reduce"])[("expand.weight", 1)][1] == (3, 4, 5)
    (groups,) = [w for w in coupling.widths if w.attribute == "groups"]
    assert groups.module == "grouped" and len(groups.units) == 4


class Shuffled(nn.Module):
    """Two grouped convolutions whose channels are shuffled in between: all of them are one unit."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.one, self.two = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1, groups=2)

    def forward(self, x):
        y = self.one(self.stem(x))
        b, c, h, w = y.shape
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.last(self.two(y) + y)


def test_channels_that_became_one_unit_say_what_tied_them():
    coupling = couple(built(Shuffled), images())
    assert not coupling.groups
    assert coupling.fixed["stem"] == (
        "its units are tied to each other by one (Conv2d) and two (Conv2d)"
    )
    with pytest.raises(
        Refused, match=r"nothing in it can shrink.*'stem': its units are tied to each"
    ):
        shrinkable(built(Shuffled), images())
    lone = built(lambda: nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 3)))
    assert couple(lone, torch.ones(1, 4)).groups["0"].size == 1


def test_a_layer_that_is_used_twice_couples_its_rows_and_columns():
    found = places(couple(built(Shared), series(6)[0]).groups["first"])
    assert {("again.weight", 0), ("again.weight", 1), ("first.weight", 0)} <= set(found)


def test_padded_channels_stay_and_the_rest_may_go():
    coupling = couple(built(PadShortcutResNet), images())
    assert places(coupling.groups["conv0"])[("conv2.weight", 0)][0] == (4,)
    assert "pad adds it" in coupling.fixed["conv2"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.reshape(2, 8, 1).squeeze(2),
        lambda x: x.view(2, 8).contiguous().clone(),
        lambda x: torch.where(x > 0, x, -x) * 2 + 1,
        lambda x: torch.stack([x, x], 1).select(1, 0),
        lambda x: torch.cat(torch.chunk(x, 1, 1), 1),
        lambda x: x.t().transpose(0, 1).mT.T,
        lambda x: x.unsqueeze(1).expand(-1, 3, -1).sum(1),
        lambda x: torch.movedim(x[None], 0, 2).squeeze(-1),
        lambda x: x.unbind(0)[0].unsqueeze(0) + torch.zeros_like(x),
        lambda x: F.dropout(x, 0.5, False).clamp(min=0).pow(2),
        lambda x: x.unsqueeze(-1).repeat(1, 1, 3).amax(-1),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x.flip(0).roll(1, 0).softmax(0),
        lambda x: torch.maximum(x, x.mean(0, keepdim=True)),
        lambda x: x.addcmul(x, x),
        lambda x: x.mT.mT,
    ],
)
def test_operators_that_carry_units(function):
    assert of(function).groups["first"].size == 8


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x.softmax(-1), "softmax mixes its entries"),
        (lambda x: x / x.norm(dim=1, keepdim=True), "takes one number of it"),
        (lambda x: x - x.mean(1, keepdim=True), "mean takes one number of it"),
        (lambda x: F.layer_norm(x, (8,)), "layer_norm takes a mean over the width"),
        (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), "slice cuts it at a fixed place"),
        (lambda x: x.flip(1), "flip moves its entries"),
        (lambda x: x.cumsum(1), "cumsum mixes its entries"),
        (lambda x: x @ x.t() @ x, "sums over it without a weight"),
        (lambda x: x[:, torch.arange(7, -1, -1)], "picks its entries by number"),
        (lambda x: torch.cat(x.split([3, 5], 1), 1), "into pieces of fixed sizes"),
        (lambda x: torch.einsum("bc,bc->bc", x, x), "no rule for the operator einsum"),
        (lambda x: x + ONES, "meets a dimension there whose size is fixed"),
    ],
)
def test_operators_that_hold_units_say_so(function, words):
    coupling = of(function)
    assert "first" not in coupling.groups
    assert words in coupling.fixed["first"]
    assert "the model (Of)" in coupling.fixed["first"]


def test_images_are_carried_through_what_changes_their_size():
    function = lambda x: F.interpolate(F.pad(F.max_pool2d(x, 2), (1, 1, 1, 1)), scale_factor=2)  # noqa: E731
    layers = {"first": lambda: nn.Conv2d(3, 8, 1), "last": lambda: nn.Conv2d(8, 2, 1)}
    assert of(function, images(), **layers).groups["first"].size == 8


def test_pixel_shuffle_makes_one_unit_of_four_channels():
    layers = {"first": lambda: nn.Conv2d(3, 8, 1), "last": lambda: nn.Conv2d(2, 2, 1)}
    group = of(nn.PixelShuffle(2), images(), **layers).groups["first"]
    assert group.size == 2 and places(group)[("first.weight", 0)][1] == (4, 5, 6, 7)


def test_a_width_that_is_split_makes_one_unit_of_each_row():
    group = of(lambda x: x.view(2, -1, 2).flatten(1)).groups["first"]
    assert group.size == 4
    group = of(lambda x: x.view(2, -1, 2).transpose(1, 2).flatten(1)).groups["first"]
    assert group.size == 4 and places(group)[("first.weight", 0)][1] == (2, 3)
    assert places(group)[("last.weight", 1)][1] == (1, 5)


def test_multihead_attention_is_refused_in_words():
    fixed = couple(built(TorchTransformer), series(8)).fixed
    words = fixed["encoder.layers.0.self_attn.in_proj_weight"]
    assert "encoder.layers.0.self_attn (MultiheadAttention)" in words
    assert "write the attention out to remove heads" in words


def test_a_state_from_the_caller_holds_the_units():
    model = built(lambda: TiedLSTM(state=False))
    state = (torch.zeros(2, 3, 12), torch.zeros(2, 3, 12))
    assert "given by the caller" in couple(model, (tokens(30, (5, 3)), state)).fixed["lstm.l0"]


def test_an_lstm_with_a_projection_stays():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 8, proj_size=4, batch_first=True)
            self.fc = nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.lstm(x)[0])

    coupling = couple(built(Projected), series(6))
    assert not coupling.groups and "proj_size" in coupling.fixed["lstm.l0"]


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind):
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.fc = kind(6, 8), nn.Linear(8, 2)

        def forward(self, x):
            state = None
            for t in range(x.size(1)):
                state = self.cell(x[:, t], state)
            return self.fc(state[0] if isinstance(state, tuple) else state)

    (group,) = couple(built(Cells), series(6)).groups.values()
    assert group.size == 8 and ("fc.weight", 1) in places(group)


def test_a_branch_on_values_is_refused():
    class Branch(nn.Linear):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(
        Refused, match=r"^Branch cannot be traced on the example: .*branch on values"
    ):
        couple(built(lambda: Branch(4, 4)), torch.ones(1, 4))


def test_an_example_that_does_not_run_is_refused():
    with pytest.raises(Refused, match="cannot be traced on the example"):
        couple(built(lambda: nn.Linear(4, 4)), torch.ones(1, 5))


def test_a_scripted_model_is_refused():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.jit.ScriptModule()

        def forward(self, x):
            return x

    with pytest.raises(Refused, match=r"^inner \(ScriptModule\) is quantised or scripted"):
        couple(built(Holder), torch.ones(1, 4))


def test_a_model_that_cannot_be_copied_is_refused():
    model = built(lambda: nn.Linear(4, 4))
    model.kept = model.weight * 2
    with pytest.raises(Refused, match=r"^Linear: the model must be copied"):
        couple(model, torch.ones(1, 4))


def test_unreached_parameters_are_named():
    coupling = couple(built(SpareHead), torch.ones(1, 4))
    assert coupling.unreached == ("spare.weight", "spare.bias")


def test_labels_are_merged_and_the_first_reason_is_kept():
    book = Book()
    a, b, c = book.fresh(2), book.fresh(2), book.fresh(2)
    book.pin(b[:1], "first")
    book.merge(a, b)
    book.pin(a, "second")
    book.merge(b, c)
    assert book.reasons[book.root(int(c[0]))] == "first"
    assert book.reasons[book.root(int(c[1]))] == "second"
    assert book.root(int(a[0])) == book.root(int(c[0])) != book.root(int(c[1]))


def test_blocks():
    assert blocks((6, 4), (2, 12)) == [((0, 1), (0, 1))]
    assert blocks((1, 4), (4,)) == [((1,), (0,))]
    assert blocks((), (1,)) == []


def test_layers_whose_states_leave_in_one_tensor_stay_together():
    coupling = couple(built(lambda: nn.LSTM(4, 6, num_layers=2)), series(4))
    assert not coupling.groups
    assert coupling.fixed["l1"] == "it is part of the model's output"
    assert "in one tensor with a layer that stays" in coupling.fixed["l0"]
