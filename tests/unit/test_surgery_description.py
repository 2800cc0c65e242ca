"""A shrunk model on disk."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sterna.randomness import isolated
from sterna.surgery import Description, load, resize, save, shrink
from unit.surgery_zoo import LSTMLanguageModel, MobileNet, Shared, images, series, tokens


def built(make):
    with isolated(0, "model"):
        return make().eval()


def shrunk(path):
    small, report = shrink(built(MobileNet), images(), {"expand.0": range(5)})
    save(small, report.description, path)
    return small, report


def test_the_file_is_plain(tmp_path):
    _, report = shrunk(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        (header,) = file.metadata().values()
    plain = json.loads(header)
    assert plain["version"] == 1
    assert plain["attributes"]["depthwise.0"] == {"groups": 5}
    assert plain["shapes"]["project.0.weight"] == [6, 5, 1, 1]
    assert set(plain) == {"version", "shapes", "attributes", "stacks", "replaced"}
    assert report.description.shapes["project.0.weight"] == (6, 5, 1, 1)


def test_the_original_is_untouched_and_the_mode_is_its_own(tmp_path):
    shrunk(tmp_path / "m.safetensors")
    original = built(MobileNet).train()
    again = load(original, tmp_path / "m.safetensors")
    assert again.training and original.depthwise[0].groups == 12
    assert original.depthwise[0].weight.shape[0] == 12


def test_shared_weights_are_stored_once_and_shared_again(tmp_path):
    model = built(Shared)
    small, report = shrink(model, series(6)[0], {"left": [0, 1]})
    save(small, report.description, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert len([name for name in file.keys() if "weight" in name]) == 4  # noqa: SIM118
    again = load(built(Shared), tmp_path / "m.safetensors")
    assert again.left.weight is again.right.weight


def test_stacks_come_back(tmp_path):
    x = tokens(30, (3, 5))
    small, report = shrink(built(LSTMLanguageModel), x, {"lstm.l0": [1, 2], "lstm.l1": [0, 5, 7]})
    save(small, report.description, tmp_path / "m.safetensors")
    again = load(built(LSTMLanguageModel), tmp_path / "m.safetensors")
    assert torch.equal(again(x), small(x))
    assert [layer.hidden_size for layer in again.lstm.layers] == [2, 3]


def test_a_file_of_plain_weights_is_refused(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"^load: .* holds no description of a shrunk model"):
        load(built(lambda: nn.Linear(1, 1)), tmp_path / "m.safetensors")


def test_another_version_is_refused(tmp_path):
    save_file({}, tmp_path / "m.safetensors", metadata={"sterna.shrunk": '{"version": 2}'})
    with pytest.raises(ValueError, match="written by another version; expected 1"):
        load(built(lambda: nn.Linear(1, 1)), tmp_path / "m.safetensors")


def test_another_original_is_refused(tmp_path):
    shrunk(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not fit Linear: it has no module"):
        load(built(lambda: nn.Linear(1, 1)), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"the model lacks|the file has nothing"):
        load(built(lambda: MobileNet(squeeze=True)), tmp_path / "m.safetensors")
    wider = built(MobileNet)
    wider.head = built(lambda: nn.Linear(6, 7))
    with pytest.raises(
        ValueError, match=r"head.weight has shape \(7, 6\), the file has shape \(5, 6\)"
    ):
        load(wider, tmp_path / "m.safetensors")
    smaller = built(MobileNet)
    smaller.head = built(lambda: nn.Linear(6, 5, bias=False))
    with pytest.raises(ValueError, match=r"the file also holds head.bias, which the model lacks"):
        load(smaller, tmp_path / "m.safetensors")


def test_an_lstm_under_two_names_is_one_stack(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.there = self.back = nn.LSTM(6, 12, 2, batch_first=True)
            self.out = nn.Linear(12, 3)

        def forward(self, x):
            return self.out(self.back(x.flip(1))[0] + self.there(x)[0])

    x = series(6)
    small, report = shrink(built(Both), x, {"there.l0": [1, 2], "there.l1": [0, 5, 7]})
    assert small.there is small.back
    save(small, report.description, tmp_path / "m.safetensors")
    again = load(built(Both), tmp_path / "m.safetensors")
    assert again.there is again.back
    assert torch.equal(again(x), small(x))


def test_a_damaged_file_is_one_error_that_names_it(tmp_path):
    shrunk(tmp_path / "m.safetensors")
    raw = (tmp_path / "m.safetensors").read_bytes()
    for num, content in enumerate((b"nonsense", b"", raw[:-20], raw[:40])):
        path = tmp_path / f"{num}.safetensors"
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^load: .*{num}.safetensors is not a .* whole one: "
        ):
            load(built(MobileNet), path)


WHOLE = {"version": 1, "shapes": {}, "attributes": {}, "stacks": {}, "replaced": {}}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"shapes": None}, "must be one of save; reading it gave"),
        ({"shapes": {"weight": "12"}}, "'1' is not a whole number"),
        ({"shapes": {"weight": [1, -2]}}, "-2 is not a whole number"),
        ({"shapes": {"weight": [4]}}, r"weight has 2 dimensions, and \(4,\) 1"),
        ({"shapes": {"weight": [10**9, 10**9]}}, "load: .*m.safetensors: "),
        ({"attributes": {"": {"forward": 3}}}, r"\(Linear\) has no whole number 'forward'"),
        ({"attributes": {"": {"training": 3}}}, "has no whole number 'training' that could be 3"),
        ({"attributes": {"": {"in_features": "x"}}}, "'x' is not a whole number"),
        ({"stacks": {"": 3}}, "must be one of save; reading it gave"),
        ({"replaced": {"": ["relu"]}}, "replaced must be one of"),
        ({"factored": {"": ["x", "channel"]}}, "'x' is not a whole number"),
        ({"factored": {"": [1, "tucker"]}}, "must be 'channel' or 'spatial'; got 'tucker'"),
    ],
)
def test_a_description_with_something_else_in_it_is_one_error(changed, words, tmp_path):
    metadata = {"sterna.shrunk": json.dumps(WHOLE | changed)}
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "m.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=f"^load: .*m.safetensors.*{words}|^{words}"):
        load(built(lambda: nn.Linear(2, 2, bias=False)), tmp_path / "m.safetensors")


def test_numbers_of_another_type_are_refused(tmp_path):
    model = built(lambda: nn.Linear(4, 2)).double()
    save(model, Description(), tmp_path / "m.safetensors")
    with pytest.raises(
        ValueError, match=r"^load: weight is torch.float64 in .* original.to\(torch.f"
    ):
        load(built(lambda: nn.Linear(4, 2)), tmp_path / "m.safetensors")
    again = load(built(lambda: nn.Linear(4, 2)).double(), tmp_path / "m.safetensors")
    assert torch.equal(again.weight, model.weight)


@pytest.mark.parametrize(
    ("description", "words"),
    [
        (Description(shapes={"0.gain": (1,)}), "it has no parameter or buffer '0.gain'"),
        (Description(shapes={"5.weight": (1,)}), "it has no module '5'"),
        (Description(attributes={"7": {"groups": 1}}), "it has no module '7'"),
        (Description(stacks={"0": (1, 2)}), "0 is Linear, and an LSTM, GRU or RNN is needed"),
        (Description(replaced={"0": "exec"}), r"replaced must be one of \['identity', 'relu'\]"),
    ],
)
def test_errors(description, words):
    with pytest.raises(ValueError, match=f"^resize: .*{words}"):
        resize(built(lambda: nn.Sequential(nn.Linear(2, 2))), description)


def test_resize_makes_zeros_of_the_right_kind():
    model = built(lambda: nn.Sequential(nn.Linear(2, 2).double(), nn.Embedding(3, 2)))
    model[0].requires_grad_(False)
    small = resize(model, Description(shapes={"0.weight": (1, 2), "1.weight": (3, 1)}))
    assert not small[0].weight.any() and small[0].weight.dtype == torch.float64
    assert not small[0].weight.requires_grad and small[1].embedding_dim == 1
    assert model[0].weight.shape == (2, 2)
