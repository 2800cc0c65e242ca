"""The one counter of multiply-adds: by hand, where torch's own leaves something out, and all who ask it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sterna.multiply_adds import counted
from sterna.randomness import isolated
from sterna.runs.kept import kept_by_layer
from sterna.runs.multiply_adds import multiply_adds
from sterna.surgery import Refused, couple
from sterna.surgery.low_rank import low_rank


class Does(nn.Module):
    """Any function of a weight and an input."""

    def __init__(self, function, *shape):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(shape))

    def forward(self, x):
        return self.function(x, self.weight)


def made(build):
    with isolated(0, "model"):
        return build()


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)


LSTM = 4 * (3 * 6 + 6 * 6)
PROJECTED = 4 * (3 * 6 + 2 * 6) + 2 * 6
CASES = {
    "linear": (lambda: nn.Linear(3, 5), (2, 3), 2 * 15),
    "one vector": (lambda: Does(lambda x, w: w @ x, 5, 3), (3,), 15),
    "two vectors": (lambda: Does(lambda x, w: x @ w, 3), (3,), 3),
    "a vector added": (lambda: Does(lambda x, w: torch.addmv(w[:, 0], w, x), 5, 3), (3,), 15),
    "batches added": (
        lambda: Does(lambda x, w: torch.addbmm(w[0, :2, :1], x, w), 4, 3, 5),
        (4, 2, 3),
        4 * 2 * 3 * 5,
    ),
    "bilinear": (lambda: Does(lambda x, w: F.bilinear(x, x, w), 5, 3, 3), (2, 3), 2 * 45),
    "einsum": (lambda: Does(lambda x, w: torch.einsum("bi,ij->bj", x, w), 3, 5), (2, 3), 2 * 15),
    "bmm": (lambda: Does(lambda x, w: torch.bmm(x, w), 2, 3, 5), (2, 4, 3), 2 * 4 * 15),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), 9 * 6 * 2 * 9),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (1, 4, 5), 5 * 4 * 6 * 3),
    "attention": (
        lambda: Does(lambda x, w: F.scaled_dot_product_attention(x, x, x), 1),
        (2, 7, 4),
        2 * 2 * 7 * 7 * 4,
    ),
    "transformer": (encoder, (1, 10, 8), 2 * 10 * (4 * 64 + 2 * 10 * 8 + 2 * 128)),
    "lstm": (lambda: nn.LSTM(3, 6, batch_first=True), (2, 5, 3), 10 * LSTM),
    "lstm of doubles": (lambda: nn.LSTM(3, 6).double(), (5, 2, 3), 10 * LSTM),
    "lstm with a projection": (lambda: nn.LSTM(3, 6, proj_size=2), (5, 2, 3), 10 * PROJECTED),
    "gru both ways": (
        lambda: nn.GRU(3, 6, bidirectional=True),
        (5, 2, 3),
        2 * 10 * 3 * (18 + 36),
    ),
    "cell": (lambda: nn.LSTMCell(3, 6), (2, 3), 2 * LSTM),
}


@pytest.mark.parametrize("case", CASES)
def test_a_count_is_the_one_by_hand(case):
    build, shape, expected = CASES[case]
    model = made(build).train()
    example = torch.ones(shape, dtype=next(model.parameters()).dtype)
    assert counted(model, (example,))[""] == expected
    assert all(module.training for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


class Mixed(nn.Module):
    """What the four who count once disagreed on, and a layer that low rank can cut."""

    def __init__(self):
        super().__init__()
        self.encoder = encoder()
        self.lstm = nn.LSTM(8, 6, proj_size=2, batch_first=True)
        self.weight = nn.Parameter(torch.ones(2, 32))
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        x, _ = self.lstm(self.encoder(x))
        return self.fc(torch.einsum("bti,ij->btj", x, self.weight))


def test_all_who_count_agree():
    model, x = made(Mixed), torch.ones(1, 10, 8)
    expected = CASES["transformer"][2] + 10 * (4 * (8 * 6 + 2 * 6) + 12 + 64 + 32 * 32)
    assert multiply_adds(model, x) == expected
    assert couple(model, x).multiply_adds == expected
    small, report = low_rank(model, x, ranks={"fc": 2})
    assert report.multiply_adds_before == expected
    assert (
        report.multiply_adds_after == expected - 10 * (32 * 32 - 2 * 64) == multiply_adds(small, x)
    )
    layers = {layer.name: layer for layer in kept_by_layer(model, small, x)}
    assert layers["lstm"].multiply_adds_before == 10 * (4 * (8 * 6 + 2 * 6) + 12)
    assert layers["encoder.layers.1.linear1"].multiply_adds_after == 10 * 128
    assert layers["fc"].multiply_adds_after == 10 * 2 * 64


def test_an_input_that_the_model_works_on_in_place_stays():
    x = -torch.ones(2, 3)
    counted(made(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 1))), (x,))
    assert torch.equal(x, -torch.ones(2, 3))


def test_a_model_that_does_not_run_on_these_values_is_refused():
    with pytest.raises(Refused, match=r"^Embedding does not run on the example: .*index.* Pass an"):
        couple(made(lambda: nn.Embedding(3, 4)), torch.tensor([7]))


def test_the_operator_of_graphics_cards_is_counted_on_shapes():
    """No card is needed: tensors without data know the operator."""

    def run(x, _):
        lstm = nn.LSTM(3, 6, num_layers=2, device="meta")
        zeros = torch.zeros(2, 2, 6, device="meta")
        some = (list(lstm.parameters()), 4, None, zeros, zeros, 2, 6, 0, 2)
        return torch.ops.aten._cudnn_rnn(x, *some, False, 0.0, False, False, [], None)[0]

    x = torch.ones(5, 2, 3, device="meta")
    assert counted(Does(run, 1).to("meta"), (x,))[""] == 10 * (LSTM + 4 * (36 + 36))
