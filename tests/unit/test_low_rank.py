"""Low rank: equal at full rank, the error that was promised, ranks three ways, counts, refusals."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from sterna.models import MLP, LeNet5, ResNet
from sterna.randomness import generator, isolated
from sterna.surgery import Description, Refused, load, save
from sterna.surgery.factorise import factorise
from sterna.surgery.low_rank import low_rank

FORMS = pytest.mark.parametrize("form", ["channel", "spatial"])


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test"))


def made(build):
    with isolated(0, "model"):
        return build()


def near(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def counted(model, example):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    return counter.get_total_flops() // 2 // len(example)


CONVOLUTIONS = {
    "plain": {},
    "padded": {"padding": (1, 2)},
    "strided": {"stride": (2, 1), "padding": 1},
    "strided the other way": {"stride": (1, 3)},
    "dilated": {"dilation": (2, 1), "padding": "same"},
    "valid": {"padding": "valid"},
    "grouped": {"groups": 2, "padding": 1},
    "reflecting": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicating": {"padding": (2, 1), "padding_mode": "replicate"},
    "circular": {"padding": (1, 1), "padding_mode": "circular"},
    "without bias": {"bias": False},
    "tall": {"kernel_size": (5, 1)},
    "flat": {"kernel_size": (1, 4)},
    "pointwise": {"kernel_size": 1},
}


@FORMS
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_at_full_rank_is_the_same_function(form, case):
    fields = {"kernel_size": (3, 5), **CONVOLUTIONS[case]}
    conv = made(lambda: nn.Conv2d(4, 6, **fields))
    before = {name: p.detach().clone() for name, p in conv.state_dict().items()}
    g, (kh, kw) = conv.groups, conv.kernel_size
    full = {"channel": min(6 // g, 4 // g * kh * kw), "spatial": min(4 // g * kh, 6 // g * kw)}[
        form
    ]
    pair = factorise(conv, full, form)
    x = draw(2, 4, 9, 11)
    near(pair(x), conv(x))
    for name, p in conv.state_dict().items():
        assert torch.equal(p, before[name])
    with pytest.raises(ValueError, match=rf"factorise: rank .* \[1, {full}\].* got {full + 1}"):
        factorise(conv, full + 1, form)


def test_a_linear_layer_at_full_rank_is_the_same_function():
    for sizes in ((5, 3), (3, 5)):
        layer = made(lambda sizes=sizes: nn.Linear(*sizes))
        x = draw(4, 7, sizes[0])
        near(factorise(layer, 3)(x), layer(x))


def composed(pair):
    """The weight of one convolution that does what the two do."""
    first, second = (layer.weight.detach().double() for layer in pair)
    if second.shape[2:] == (1, 1):
        return torch.einsum("rcij,nr->ncij", first, second[:, :, 0, 0])
    return torch.einsum("rci,nrj->ncij", first[..., 0], second[:, :, 0])


@FORMS
def test_the_error_is_the_smallest_there_is_and_as_reported(form):
    conv = made(lambda: nn.Conv2d(8, 16, 3, padding=1))
    example = draw(2, 8, 6, 6)
    weight = conv.weight.detach().double()
    matrix = weight.flatten(1)
    if form == "spatial":
        matrix = weight.permute(1, 2, 0, 3).reshape(24, 48)
    values = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 5):
        new, report = low_rank(conv, example, ranks={"": rank}, form=form)
        (cut,) = report.layers
        best = float(values[rank:].norm() / values.norm())
        assert cut.error == pytest.approx(best, rel=1e-6)
        found = float((composed(new) - weight).norm() / weight.norm())
        assert found == pytest.approx(best, rel=1e-4)
        assert (cut.rank, cut.full_rank, cut.left) == (rank, len(values), "")


@FORMS
@pytest.mark.parametrize("groups", [1, 2])
def test_a_weight_of_low_rank_is_cut_without_error(form, groups):
    conv = made(lambda: nn.Conv2d(8, 16, 3, padding=1, groups=groups))
    conv = made(lambda: factorise(conv, 2, form))  # two layers whose product has rank 2 per group
    weights = [composed(nn.ModuleList(half)) for half in halves(conv, groups)]
    whole = made(lambda: nn.Conv2d(8, 16, 3, padding=1, groups=groups))
    with torch.no_grad():
        whole.weight.copy_(torch.cat(weights))
    example = draw(2, 8, 7, 7)
    new, report = low_rank(whole, example, variance=1 - 1e-9, form=form)
    assert report.ranks == {"": 2}
    assert report.layers[0].error < 1e-4
    near(new(example), whole(example))


def halves(pair, groups):
    """The convolutions of each group."""
    for first, second in zip(*(layer.weight.chunk(groups) for layer in pair), strict=True):
        yield [made(lambda w=w: Weight(w)) for w in (first, second)]


class Weight(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())


@FORMS
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (LeNet5, (1, 28, 28)),
        (lambda: ResNet(depth=8, shortcut="B"), (3, 32, 32)),
        (lambda: MLP((64, 128, 64, 10)), (64,)),
    ],
)
def test_the_report_is_what_a_count_finds_and_the_model_is_left_alone(form, build, shape):
    model, example = made(build), draw(3, *shape)
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    new, report = low_rank(model, example, variance=0.5, form=form)
    assert model.training
    assert new.training
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in new.parameters()}
    assert not shared
    model.eval()
    new.eval()
    assert report.multiply_adds_before == counted(model, example)
    assert report.multiply_adds_after == counted(new, example)
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.parameters_after == sum(p.numel() for p in new.parameters())
    assert report.ranks, "something was cut"
    for what in ("parameters", "multiply_adds"):
        saved = sum(
            getattr(c, f"{what}_before") - getattr(c, f"{what}_after") for c in report.layers
        )
        whole = getattr(report, f"{what}_before") - getattr(report, f"{what}_after")
        assert saved == whole > 0
    for cut in report.layers:
        assert (cut.rank is None) == bool(cut.left)
        assert cut.multiply_adds_after <= cut.multiply_adds_before
    assert new(example).shape == model(example).shape
    traced = torch.fx.symbolic_trace(new)
    near(traced(example), new(example))


def test_variance_is_the_smallest_rank_that_keeps_it():
    layer = nn.Linear(32, 32, bias=False, device="meta").to_empty(device="cpu")
    values = torch.arange(32, 0, -1).double()
    q, _ = torch.linalg.qr(draw(32, 32).double())
    with torch.no_grad():
        layer.weight.copy_(q * values)
    share = values.square().cumsum(0) / values.square().sum()
    for rank in (1, 3, 9):
        for extra, expected in ((-1e-4, rank), (1e-4, rank + 1)):
            _, report = low_rank(layer, draw(1, 32), variance=float(share[rank - 1]) + extra)
            assert report.ranks == {"": expected}
            left = 1 - float(share[expected - 1])
            assert report.layers[0].error == pytest.approx(math.sqrt(left), rel=1e-4)


@FORMS
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_a_share_of_the_multiply_adds_is_met_and_used_up(form, share, multiple_of):
    model, example = made(lambda: ResNet(depth=8)), draw(1, 3, 32, 32)
    _, report = low_rank(model, example, multiply_adds=share, form=form, multiple_of=multiple_of)
    left = report.multiply_adds_after / report.multiply_adds_before
    assert share - 0.05 < left <= share
    assert all(rank % multiple_of == 0 for rank in report.ranks.values())


def test_within_a_number_of_multiply_adds_the_layer_that_loses_least_goes_first():
    """Two layers of one size, one of them nearly of rank 2."""
    model = made(lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)))
    with torch.no_grad():
        low = draw(32, 2) @ draw(2, 32, seed=1)
        model[2].weight.copy_(low + 1e-3 * draw(32, 32, seed=2))
    _, report = low_rank(model, draw(1, 32), multiply_adds=0.6)
    assert report.ranks["2"] < 8
    assert "0" not in report.ranks or report.ranks["0"] > report.ranks["2"]


def test_ranks_by_name_only_touch_those_layers():
    model = made(LeNet5)
    new, report = low_rank(model, draw(1, 1, 28, 28), ranks={"conv2": 10, "fc1": 50})
    assert report.ranks == {"conv2": 10, "fc1": 50}
    assert [cut.name for cut in report.layers] == ["conv2", "fc1"]
    assert isinstance(new.conv1, nn.Conv2d)
    assert isinstance(new.fc2, nn.Linear)
    assert [type(layer) for layer in new.conv2] == [nn.Conv2d, nn.Conv2d]
    assert new.conv2[0].bias is None
    assert torch.equal(new.conv2[1].bias, model.conv2.bias)


@pytest.mark.parametrize(("rank", "multiple_of", "expected"), [(5, 4, 8), (8, 8, 8), (1, 16, 16)])
def test_ranks_are_rounded_up(rank, multiple_of, expected):
    layer = made(lambda: nn.Linear(64, 64))
    _, report = low_rank(layer, draw(1, 64), ranks={"": rank}, multiple_of=multiple_of)
    assert report.ranks == {"": expected}


def test_patterns_choose_layers():
    model, example = made(LeNet5), draw(1, 1, 28, 28)
    _, report = low_rank(model, example, variance=0.5, layers=("conv*", "fc1"), exclude=("*1",))
    assert [cut.name for cut in report.layers] == ["conv2"]


# What is left as it is.


def test_nothing_cheaper_is_left_said_and_warned():
    model = made(lambda: MLP((8, 8, 8)))
    with pytest.warns(UserWarning, match="low_rank: no layer was replaced.*layers.1: rank 8 of 8"):
        new, report = low_rank(model, draw(1, 8), variance=1.0)
    assert [cut.left for cut in report.layers] == 2 * ["rank 8 of 8 would not be cheaper"]
    assert report.ranks == {}
    assert report.multiply_adds_after == report.multiply_adds_before
    x = draw(3, 8)
    assert torch.equal(new(x), model(x))
    assert all(cut.error == 0 for cut in report.layers)


def test_of_two_layers_one_is_left():
    model = made(lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)))
    _, report = low_rank(model, draw(1, 64), ranks={"0": 8, "1": 2})
    assert report.ranks == {"0": 8}
    assert [cut.left for cut in report.layers] == ["", "rank 2 of 2 would not be cheaper"]


class Odd(nn.Module):
    """Everything that is better left alone, and one layer that is not."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 32)
        self.tied = nn.Linear(32, 16, bias=False)
        self.tied.weight = self.embedding.weight
        self.normed = parametrizations.weight_norm(nn.Linear(32, 32))
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda module, args, out: 2 * out)
        self.unused = nn.Linear(32, 32)
        self.attention = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.plain = nn.Linear(32, 32)

    def forward(self, words):
        x = self.attention(self.embedding(words))
        return self.tied(self.plain(self.hooked(self.normed(x))))


def test_what_cannot_be_replaced_is_left_and_said():
    model = made(Odd)
    words = torch.arange(12).view(2, 6)
    new, report = low_rank(model, words, variance=0.5)
    assert list(report.ranks) == ["plain"]
    left = {cut.name: cut.left for cut in report.layers}
    assert "shares a weight" in left["tied"]
    assert "ParametrizedLinear, not a plain" in left["normed"]
    assert "forward hooks" in left["hooked"]
    assert "does not reach it" in left["unused"]
    assert "TransformerEncoderLayer reads" in left["attention.linear1"]
    assert "NonDynamicallyQuantizableLinear" in left["attention.self_attn.out_proj"]
    assert new.tied.weight is new.embedding.weight
    new.plain = model.plain
    model.eval()
    new.eval()
    near(new(words), model(words))


def test_a_layer_under_two_names_is_replaced_under_both():
    shared = made(lambda: nn.Linear(32, 32))
    chain = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    new, report = low_rank(chain, draw(2, 32), ranks={"0": 4})
    assert new[0] is new[2][0]
    assert report.layers[0].multiply_adds_before == 2 * 32 * 32
    assert report.layers[0].multiply_adds_after == 2 * 4 * 64 == report.multiply_adds_after
    assert report.parameters_after == 4 * 64 + 32


def test_type_mode_and_what_is_frozen_are_kept():
    model = made(lambda: nn.Sequential(nn.Linear(32, 32), nn.Dropout(), nn.Conv2d(8, 16, 3)))
    layer = model[0].double().requires_grad_(False).eval()
    new, _ = low_rank(layer, draw(1, 32).double(), ranks={"": 4})
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in new.parameters())
    assert not new.training
    assert not new[0].training
    half = made(lambda: nn.Linear(32, 32)).bfloat16()
    new, _ = low_rank(half, draw(1, 32).bfloat16(), ranks={"": 4})
    assert new[0].weight.dtype == torch.bfloat16


def test_batch_norm_keeps_its_statistics():
    model = made(lambda: ResNet(depth=8))
    new, _ = low_rank(model, draw(4, 3, 32, 32), variance=0.5)
    for name, x in new.named_buffers():
        assert torch.equal(x, model.get_buffer(name))


def test_a_weight_of_zeros_has_rank_one():
    layer = made(lambda: nn.Linear(16, 16))
    nn.init.zeros_(layer.weight)
    new, report = low_rank(layer, draw(1, 16), variance=0.9)
    assert report.ranks == {"": 1}
    assert report.layers[0].error == 0
    near(new(draw(2, 16)), layer.bias.expand(2, 16))


def test_several_inputs():
    model = made(lambda: nn.Bilinear(4, 4, 4))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.both = made(lambda: nn.Linear(32, 32)), model

        def forward(self, x, y):
            return self.fc(x).sum() + self.both(y, y).sum()

    _, report = low_rank(Two(), (draw(2, 32), draw(2, 4)), ranks={"fc": 2})
    assert report.ranks == {"fc": 2}


# Refusals.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of ranks, variance and multiply_adds; got ranks=None, variance=None"),
        ({"variance": 0.5, "multiply_adds": 0.5}, "exactly one .* variance=0.5, multiply_adds=0.5"),
        ({"variance": 0.0}, r"variance must be a share in \(0, 1\]; got 0.0"),
        ({"variance": 95}, r"variance must be a share in \(0, 1\]; got 95"),
        ({"variance": math.nan}, "variance must be a share .* got nan"),
        ({"multiply_adds": 1.0}, r"multiply_adds must be a share in \(0, 1\); got 1.0"),
        ({"multiply_adds": 5e6}, "multiply_adds must be a share .* For a number .* divide it"),
        ({"multiply_adds": 0.01}, r"multiply_adds=0.01 cannot be met: .* 0\.\d+ of the 2293000"),
        ({"variance": 0.5, "form": "tucker"}, "form must be 'channel' or 'spatial'; got 'tucker'"),
        ({"variance": 0.5, "multiple_of": 0}, "multiple_of must be .* at least 1; got 0"),
        ({"ranks": {"fc9": 2}}, "ranks must name .* layers; got 'fc9', .* conv1, conv2, fc1, fc2"),
        ({"ranks": {"fc1": 501}}, r"ranks\['fc1'\] must be a whole number in \[1, 500\].* got 501"),
        ({"ranks": {"fc1": 0}}, r"ranks\['fc1'\] .* got 0"),
        ({"ranks": {"fc1": 2.5}}, r"ranks\['fc1'\] .* got 2.5"),
        ({"variance": 0.5, "layers": ("fc*", "conv9")}, "pattern in layers .* got 'conv9'"),
        ({"variance": 0.5, "exclude": ("relu",)}, "pattern in exclude must fit .* got 'relu'"),
    ],
)
def test_bad_arguments_are_named(fields, message):
    with pytest.raises(ValueError, match=f"low_rank: .*{message}"):
        low_rank(made(LeNet5), draw(1, 1, 28, 28), **fields)


def test_bad_examples_are_named():
    model = made(LeNet5)
    with pytest.raises(
        ValueError, match=r"LeNet5 does not run on inputs of shape \(1, 3, 28, 28\)"
    ):
        low_rank(model, draw(1, 3, 28, 28), variance=0.5)
    with pytest.raises(
        ValueError, match=r"low_rank: example must hold .* at least one; got tensor"
    ):
        low_rank(model, draw(0, 1, 28, 28), variance=0.5)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_weights_that_are_not_finite_are_refused_by_name():
    model = made(LeNet5)
    with torch.no_grad():
        model.fc1.weight[3, 4] = math.inf
    with pytest.raises(ValueError, match=r"the weight of 'fc1' holds NaN or infinity"):
        low_rank(model, draw(1, 1, 28, 28), variance=0.5)


def test_a_module_that_reads_the_weight_of_a_layer_is_found_out():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.other = nn.Linear(32, 32)

        def forward(self, x):
            return F.linear(self.fc(x), self.fc.weight) + self.other(x)

    model = made(Reads)
    with pytest.raises(ValueError, match=r"Reads does not run .* no attribute 'weight'.*exclude"):
        low_rank(model, draw(1, 32), variance=0.3)
    _, report = low_rank(model, draw(1, 32), variance=0.3, exclude=("fc",))
    assert list(report.ranks) == ["other"]


def test_factorise_names_a_bad_form():
    with pytest.raises(
        ValueError, match=r"factorise: form must be 'channel' or 'spatial'; got 'cp'"
    ):
        factorise(made(lambda: nn.Linear(4, 4)), 2, "cp")


class Ordered(nn.Module):
    """A layer that is registered, and runs from a plain dict."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(32, 32), nn.Linear(32, 3)
        self.order = {"first": self.fc}

    def forward(self, x):
        return self.out(torch.relu(self.order["first"](x)))


def test_a_layer_in_a_plain_dict_is_replaced_there_too():
    model, x = made(Ordered), draw(2, 32)
    new, report = low_rank(model, x, ranks={"fc": 2})
    assert new.order["first"] is new.fc and model.order["first"] is model.fc
    assert report.multiply_adds_after == 2 * 64 + 96
    near(new(x), new.out(torch.relu(new.fc(x))))


def test_a_layer_that_still_runs_is_refused_and_the_model_stays():
    class Uncopied(Ordered):
        def __deepcopy__(self, memo):
            return self

    model = nn.Sequential(made(Uncopied))
    with pytest.raises(
        Refused, match=r"^Sequential: '0.fc' \(Linear\) cannot be replaced: .* still"
    ):
        low_rank(model, draw(2, 32), ranks={"0.fc": 2})
    assert isinstance(model[0].fc, nn.Linear) and not model[0].fc._forward_pre_hooks


def test_a_layer_twice_in_one_parent_comes_back_from_a_file(tmp_path):
    def twice(seed):
        with isolated(seed, "model"):
            fc = nn.Linear(32, 32)
            return nn.Sequential(fc, nn.ReLU(), fc, nn.Linear(32, 3))

    new, _ = low_rank(twice(0), draw(2, 32), ranks={"0": 4})
    save(new, Description(factored={"0": (4, "channel")}), tmp_path / "m.safetensors")
    again = load(twice(1), tmp_path / "m.safetensors")
    assert again[0] is again[2]
    assert torch.equal(again(draw(2, 32)), new(draw(2, 32)))


@pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused():
    model = nn.Sequential(torch.jit.script(made(lambda: nn.Linear(32, 32))))
    with pytest.raises(
        Refused, match=r"^0 .* is quantised or scripted, and its weights cannot be cut"
    ):
        low_rank(model, draw(2, 32), variance=0.5)


def test_a_model_that_cannot_be_copied_is_refused():
    model = made(lambda: nn.Linear(32, 32))
    model.kept = 2 * model.weight
    with pytest.raises(Refused, match=r"^Linear: the model must be copied.*copy.deepcopy failed"):
        low_rank(model, draw(2, 32), variance=0.5)


def test_a_dict_of_inputs():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, inputs):
            return self.fc(inputs["x"])

    for example in ({"x": draw(2, 32)}, ({"x": draw(2, 32)},)):
        _, report = low_rank(made(Named), example, ranks={"fc": 2})
        assert report.multiply_adds_after == 2 * 64
    with pytest.raises(ValueError, match=r"Named does not run on inputs of shape \(2, 32\): 'x'"):
        low_rank(made(Named), {"y": draw(2, 32)}, ranks={"fc": 2})
    with pytest.raises(ValueError, match=r"example must hold inputs of shape .* got \{'x': None\}"):
        low_rank(made(Named), {"x": None}, ranks={"fc": 2})


def test_a_target_that_cannot_be_met_names_what_was_left_alone() -> None:
    with isolated(0, "normed"):
        model = nn.Sequential(
            parametrizations.weight_norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 8)
        )
    with pytest.raises(ValueError, match=r"cannot be met: .* Left alone: 0: it is a Parametrized"):
        low_rank(model, torch.ones(1, 64), multiply_adds=0.5)
