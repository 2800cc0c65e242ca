"""Value sets, packed storage, plain rounding and the straight-through estimator."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from sterna.data import Examples
from sterna.models import MLP, SmallCNN
from sterna.randomness import generator, isolated
from sterna.solvers import CoNNTrA
from sterna.surgery.program import Refused
from sterna.surgery.straight_through import settle, straight_through
from sterna.surgery.ternary import (
    codes_per_byte,
    load_packed,
    pack,
    save_packed,
    ternarise,
    unpack,
)
from sterna.value_sets import TWN, ValueSet, nearest


def mlp(*sizes, dtype=torch.float32):
    with isolated(0, "ternary"):
        return MLP(sizes).to(dtype)


# Value sets.


def test_nearest_by_hand_with_a_tie_to_the_lower():
    grid = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    weight = torch.tensor([[-9.0, -1.25], [-0.2, 1.5], [1.6, 99.0]])
    assert nearest(weight, grid).tolist() == [[0, 0], [2, 2], [3, 3]]


def test_scale_is_a_least_squares_fit():
    weight = torch.randn(60, 50, generator=generator(0), dtype=torch.float64)
    codes, grid = ValueSet().round(weight)
    kept = codes != 1
    assert grid[2].item() == pytest.approx(weight.abs()[kept].mean().item())
    error = (grid[codes.long()] - weight).square().sum()
    for factor in (0.97, 1.03):
        other = grid * factor
        assert (other[nearest(weight, other).long()] - weight).square().sum() > error


def test_twn_by_hand():
    weight = torch.tensor([0.1, -0.2, 1.0, -2.0, 0.55])  # mean magnitude 0.77, threshold 0.539
    codes, grid = TWN.round(weight)
    assert codes.tolist() == [1, 1, 2, 0, 2]
    assert grid.tolist() == pytest.approx([-3.55 / 3, 0.0, 3.55 / 3])


@pytest.mark.parametrize("values", [ValueSet(), TWN, ValueSet(values=(0.0, 1.0))])
def test_zeros_and_nothing_have_the_scale_1(values):
    for shape in ((3,), (0,)):
        codes, grid = values.round(torch.zeros(shape))
        assert grid.tolist() == list(values.values) and codes.shape == shape
        assert not grid[codes.long()].any()


def test_no_positive_scale_fits():
    codes, grid = ValueSet(values=(-1.0, 0.0)).round(torch.tensor([1.0, 2.0]))
    assert codes.tolist() == [1, 1] and grid[0] < 0


def test_values_without_a_scale_are_taken_as_they_are():
    values = ValueSet(values=(4.0, -0.5, 0.0), scaled=False)
    assert values.values == (-0.5, 0.0, 4.0)
    codes, grid = values.round(torch.tensor([1.0, 2.5, -9.0]))
    assert grid[codes.long()].tolist() == [0.0, 4.0, -0.5]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": (1.0,)}, "values must be a tuple of 2 to 256 different finite numbers"),
        ({"values": (1.0, 1.0)}, r"got \(1.0, 1.0\)"),
        ({"values": [0.0, 1.0]}, "values must be a tuple"),
        ({"values": (0.0, float("nan"))}, "values must be"),
        ({"values": tuple(map(float, range(257)))}, "values must be"),
        ({"threshold": -0.1}, "threshold must be at least 0 and finite, or None; got -0.1"),
        ({"threshold": float("nan")}, "threshold must be .* got nan"),
        ({"threshold": 0.7, "values": (0.0, 1.0)}, "threshold must be None unless the set is"),
        ({"threshold": 0.7, "scaled": False}, "threshold must be None unless the set is"),
    ],
)
def test_value_sets_are_refused(change, words):
    with pytest.raises(ValueError, match=f"ValueSet: .*{words}"):
        ValueSet(**change)


def test_weights_that_are_not_finite_are_refused_by_name():
    model = mlp(4, 3)
    with torch.no_grad():
        model.layers[1].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.weight must be finite"):
        ternarise(model)


# Packing.


@given(st.integers(2, 256), st.integers(0, 700), st.integers(0, 2**20))
def test_unpack_inverts_pack(base, num, seed):
    codes = torch.randint(0, base, (num,), generator=generator(seed), dtype=torch.uint8)
    packed = pack(codes, base)
    assert len(packed) == -(-num // codes_per_byte(base))
    assert torch.equal(unpack(packed, num, base), codes)


def test_bytes_by_hand():
    codes = torch.tensor([2, 0, 1, 2, 1], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [2 + 0 * 4 + 1 * 16 + 2 * 64, 1]
    assert pack(codes, 3).tolist() == [2 + 0 * 3 + 1 * 9 + 2 * 27 + 1 * 81]


def test_wrong_codes_and_sizes_are_refused():
    with pytest.raises(ValueError, match="codes must be below the base, 3; got 3"):
        pack(torch.tensor([3], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="11 codes in base 3 take 3 bytes; got 2"):
        unpack(torch.zeros(2, dtype=torch.uint8), 11, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "values",
    [ValueSet(), TWN, ValueSet(values=(-1.0, 1.0)), ValueSet(values=(-2.0, -0.5, 0, 1, 7))],
)
def test_a_model_comes_back_bit_for_bit(tmp_path, dtype, dense, values):
    model, path = mlp(13, 9, 7, dtype=dtype), tmp_path / "model.safetensors"
    rounded, report = ternarise(model, sets=values)
    sizes = save_packed(rounded, report.grids, path, dense=dense)
    with isolated(1, "other weights"):
        other = MLP((13, 9, 7)).to(dtype)
    before = {name: x.clone() for name, x in other.state_dict().items()}
    again, grids = load_packed(path, other)
    assert grids == report.grids
    for name, x in rounded.state_dict().items():
        assert torch.equal(again.state_dict()[name], x) and again.state_dict()[name].dtype == dtype
        assert torch.equal(other.state_dict()[name], before[name]), "the module given is changed"
    per = codes_per_byte(len(values.values) if dense else {2: 2, 3: 4, 5: 16}[len(values.values)])
    assert sizes.packed_bytes == -(-13 * 9 // per) + -(-9 * 7 // per)
    assert sizes.num_packed == 13 * 9 + 9 * 7
    tensors = load_file(path)
    assert sizes.model_bits == 8 * sum(x.nbytes for x in tensors.values())
    payload = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert payload == sizes.model_bits // 8


def test_sizes_are_shares_of_float32_and_float64(tmp_path):
    rounded, report = ternarise(mlp(64, 40, 20))
    two_bits = save_packed(rounded, report.grids, tmp_path / "a.safetensors")
    assert two_bits.of_float32 == 1 / 16 and two_bits.of_float64 == 1 / 32
    base_3 = save_packed(rounded, report.grids, tmp_path / "b.safetensors", dense=True)
    assert base_3.of_float32 == 1 / 20 and base_3.of_float64 == 1 / 40
    assert two_bits.other_bytes == 4 * 60 and two_bits.grid_bytes == 2 * 3 * 4


def test_a_solved_network_is_stored_by_its_report(tmp_path):
    inputs = torch.randn(30, 6, generator=generator(0))
    data = Examples(inputs, torch.randint(3, (30,), generator=generator(1)))
    solved, report = CoNNTrA()(mlp(6, 5, 3), data, generator(0))
    save_packed(solved, report.grids, tmp_path / "x.safetensors")
    again, _ = load_packed(tmp_path / "x.safetensors", mlp(6, 5, 3))
    assert torch.equal(again(inputs), solved(inputs))


def test_a_tied_weight_is_stored_once(tmp_path):
    with isolated(0, "ternary"):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    rounded, report = ternarise(model)
    assert set(report.grids) == {"0.weight"}
    sizes = save_packed(rounded, report.grids, tmp_path / "x.safetensors")
    assert sizes.num_packed == 16 and sizes.other_bytes == 2 * 4 * 4
    again, _ = load_packed(tmp_path / "x.safetensors", model)
    assert again[2].weight is again[0].weight
    assert torch.equal(again[0].weight, rounded[0].weight)


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    rounded, report = ternarise(mlp(6, 5, 3))
    save_packed(rounded, report.grids, path)
    with pytest.raises(ValueError, match="must fit the model and its own description"):
        load_packed(path, mlp(6, 4, 3))
    with pytest.raises(ValueError, match="the tensors of the model and no others; it lacks"):
        load_packed(path, mlp(6, 5, 3, 2))
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none.safetensors", mlp(6, 5, 3))

    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="must be a file of save_packed"):
        load_packed(tmp_path / "plain.safetensors", mlp(6, 5, 3))
    (tmp_path / "noise.safetensors").write_bytes(b"not a file of tensors at all")
    with pytest.raises(ValueError, match="must be a file of save_packed"):
        load_packed(tmp_path / "noise.safetensors", mlp(6, 5, 3))
    tensors["layers.1.weight"] = torch.full_like(tensors["layers.1.weight"], 255)  # codes of 3
    save_file(tensors, tmp_path / "damaged.safetensors", about)
    with pytest.raises(ValueError, match="must fit the model and its own description"):
        load_packed(tmp_path / "damaged.safetensors", mlp(6, 5, 3))
    odd_base = json.dumps({"layers.1.weight": {"base": 900, "shape": [5, 6]}})
    for described in ("7", "{", json.dumps({"layers.1.weight": {"base": 3}}), odd_base):
        save_file(tensors, tmp_path / "odd.safetensors", {**about, "packed": described})
        with pytest.raises(ValueError, match="load_packed"):
            load_packed(tmp_path / "odd.safetensors", mlp(6, 5, 3))


def test_weights_off_their_grid_are_not_stored(tmp_path):
    model = mlp(6, 5, 3)
    _, report = ternarise(model)
    with pytest.raises(ValueError, match=r"every weight of 'layers\.1\.weight' must be one of"):
        save_packed(model, report.grids, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"grids must name parameters .* got \['other'\]"):
        save_packed(model, {"other": (0.0, 1.0)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="at least one; got none"):
        save_packed(model, {}, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# Rounding.


def test_rounding_leaves_the_model_and_everything_else_alone():
    with isolated(0, "ternary"):
        model = SmallCNN(width=8)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rounded, report = ternarise(model)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])
        changed = not torch.equal(rounded.state_dict()[name], x)
        assert changed == (name in report.grids) == (x.dim() >= 2)
        if changed:
            after = rounded.state_dict()[name]
            assert after.unique().tolist() == pytest.approx(list(report.grids[name]))
            error = (x - after).square().sum() / x.square().sum()
            assert report.error[name] == pytest.approx(float(error), rel=1e-4)


def test_rounding_again_changes_nothing():
    once, first = ternarise(mlp(9, 8, 7, dtype=torch.float64))
    twice, second = ternarise(once)
    for name, x in once.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], x)
    assert max(second.error.values()) < 1e-20 < 0.1 < min(first.error.values())


def test_patterns_choose_and_must_match():
    sets = (("layers.1.*", ValueSet(values=(-1.0, 1.0))), ("*weight", ValueSet()))
    rounded, report = ternarise(mlp(9, 8, 7), sets=sets)
    assert list(map(len, report.grids.values())) == [2, 2, 3]
    assert len(rounded.layers[1].bias.unique()) == 2
    with pytest.raises(ValueError, match=r"ternarise: pattern 'fc\*' of sets must match"):
        ternarise(mlp(9, 7), sets=(("fc*", ValueSet()),))
    with pytest.raises(ValueError, match="ternarise: sets must be a ValueSet"):
        ternarise(mlp(9, 7), sets={"*": ValueSet()})
    with pytest.raises(ValueError, match="must have a parameter of at least two dimensions"):
        ternarise(nn.LayerNorm(4))


# Straight-through.


def test_forward_is_rounded_and_the_gradient_goes_to_the_float_weights():
    model, x = mlp(6, 3), torch.randn(5, 6, generator=generator(0))
    training, report = straight_through(model)
    rounded, _ = ternarise(model, sets=TWN)
    assert report.parameters == ("layers.1.weight",)
    assert torch.equal(training(x), rounded(x))
    training(x).square().sum().backward()
    rounded(x).square().sum().backward()
    steps = training.layers[1].parametrizations["weight"]
    torch.testing.assert_close(steps.original.grad, rounded.layers[1].weight.grad)
    assert torch.equal(steps.original, model.layers[1].weight)
    assert model.layers[1].weight.grad is None


def test_training_and_settling():
    inputs = torch.randn(60, 6, generator=generator(0))
    targets = (inputs @ torch.randn(6, 3, generator=generator(1))).argmax(1)
    training, _ = straight_through(mlp(6, 12, 3))
    optimizer = torch.optim.Adam(training.parameters(), lr=0.02)
    losses = []
    for _ in range(150):
        loss = F.cross_entropy(training(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    settled, grids = settle(training)
    assert type(settled.layers[1]) is nn.Linear
    assert set(settled.state_dict()) == set(mlp(6, 12, 3).state_dict())
    assert set(grids) == {"layers.1.weight", "layers.3.weight"}
    assert torch.equal(settled(inputs), training(inputs))
    for name, grid in grids.items():
        assert set(settled.get_parameter(name).flatten().tolist()) <= set(grid)


def test_straight_through_refuses():
    with isolated(0, "ternary"):
        tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="every parameter must belong to one module"):
        straight_through(tied)
    with pytest.raises(ValueError, match="settle: the model must come from straight_through"):
        settle(mlp(4, 3))
    with pytest.raises(ValueError, match=r"straight_through: pattern 'x' of sets"):
        straight_through(mlp(4, 3), sets=(("x", ValueSet()),))
    with pytest.raises(ValueError, match="must be one of a plain module; got 'layers"):
        straight_through(straight_through(mlp(4, 3))[0])


def test_weights_that_are_made_by_others_are_refused(tmp_path):
    with isolated(0, "ternary"):
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        old = prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5)
    with pytest.raises(
        ValueError, match=r"^ternarise: .* plain module; got 'parametrizations.weight"
    ):
        ternarise(normed)
    for edit in (ternarise, straight_through, settle):
        with pytest.raises(Refused, match=r"must be copied.*prune.remove"):
            edit(old)
    path = tmp_path / "model.safetensors"
    model, report = ternarise(mlp(4, 3))
    save_packed(model, report.grids, path)
    with pytest.raises(Refused, match=r"^Linear: the model must be copied"):
        load_packed(path, old)
