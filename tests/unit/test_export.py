"""Exporting to ONNX: what is checked, what stays untouched, and what is refused in which words."""

import builtins
import importlib.util
import os
import warnings

import onnx
import pytest
import torch
from torch import nn

from sterna.export import inputs
from sterna.export.onnx import to_onnx
from sterna.export.runtime import ExportError
from sterna.randomness import isolated


@pytest.fixture(autouse=True)
def same_start():
    with isolated(0, "export tests"):
        yield


def mlp():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


class Decomposition(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.linalg.qr(self.linear(x).reshape(-1, 2, 2))[0]


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(3, 4) * 2


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def test_the_file_runs_at_any_batch_and_leaves_the_model_alone(tmp_path, capfd, recwarn):
    model, seen = mlp(), []
    model.train()
    hook = model[0].register_forward_hook(lambda *_: seen.append(1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = to_onnx(model, torch.ones(1, 4), tmp_path / "deep" / "model.onnx")
    assert found.path == tmp_path / "deep" / "model.onnx"
    assert found.bytes == found.path.stat().st_size
    assert found.batches == (2, 1, 3) and found.largest_difference < 1e-5
    assert model.training and hook.id in model[0]._forward_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [p.name for p in found.path.parent.iterdir()] == ["model.onnx"]
    proto = onnx.load(found.path)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert str(tmp_path.root) + "work" not in found.path.read_bytes().decode("latin1")
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_whole_numbers_and_several_inputs(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)

        def forward(self, words, scale):
            return (self.embed(words) * scale).sum(1), words + 1

    example = (torch.arange(6).view(2, 3), torch.ones(2, 1, 1))
    found = to_onnx(Words(), example, tmp_path / "words.onnx")
    assert found.largest_difference < 1e-6 and len(found.inputs) == len(found.outputs) == 2


def test_a_batch_that_is_not_first(tmp_path):
    class Late(nn.Module):
        def forward(self, x):  # (time, batch, width)
            return torch.stack([x[t] for t in range(3)]).sum(0)

    with pytest.raises(ExportError, match=r"fixes its batch size.*batch_dim"):
        to_onnx(Late(), torch.ones(3, 2, 4), tmp_path / "late.onnx")
    assert not list(tmp_path.iterdir())
    assert to_onnx(Late(), torch.ones(3, 2, 4), tmp_path / "late.onnx", batch_dim=1).dynamic_batch


def test_a_fixed_batch_is_refused_or_asked_for(tmp_path):
    with pytest.raises(ExportError, match="makes 3, dimension 0 of the example, a constant"):
        to_onnx(Fixed(), torch.ones(3, 4), tmp_path / "x.onnx")
    found = to_onnx(Fixed(), torch.ones(3, 4), tmp_path / "x.onnx", dynamic_batch=False)
    assert found.batches == (3,) and not found.dynamic_batch


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            Holder(Decomposition()),
            r"aten\.linalg_qr in 'inner' \(Decomposition\) has no ONNX export",
        ),
        (Branch(), "cannot be traced on the example.*branch on shapes, not on values"),
        (Random(), "gives other outputs in ONNX Runtime: at a batch of 3.*random"),
        (nn.Linear(5, 2), r"does not run on the example \(inputs of shape \(3, 4\)\)"),
    ],
    ids=["operator", "branch", "random", "shape"],
)
def test_refusals_in_one_sentence(model, said, tmp_path, capfd):
    with pytest.raises(ExportError, match=said) as raised:
        to_onnx(model, torch.ones(3, 4), tmp_path / "x.onnx")
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(
        "sterna.export.onnx.find_spec", lambda n: None if n == "onnxscript" else there(n)
    )
    with pytest.raises(ModuleNotFoundError, match=r"onnxscript, which is not.*'sterna\[export\]'"):
        to_onnx(mlp(), torch.ones(2, 4), tmp_path / "x.onnx")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not be written.*No space left.*MiB free"):
        to_onnx(mlp(), torch.ones(2, 4), path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("tolerance", [0.0, 1.0, float("nan")])
def test_tolerance(tolerance, tmp_path):
    with pytest.raises(ValueError, match="tolerance must be a share"):
        to_onnx(mlp(), torch.ones(2, 4), tmp_path / "x.onnx", tolerance=tolerance)


def test_half_precision_may_round_more(tmp_path):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.Linear(64, 3)).half()
    x = torch.randn(2, 64).half()
    found = to_onnx(model, x, tmp_path / "x.onnx")
    assert found.tolerance == pytest.approx(5 * 2**-10)
    with pytest.raises(ExportError, match=r"gives other outputs .* and 1e-06 of the largest"):
        to_onnx(model, x, tmp_path / "x.onnx", tolerance=1e-6)


def test_a_file_that_the_checker_refuses_is_said(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).bfloat16()
    with pytest.raises(ExportError, match=r"not valid: .*bfloat16.* export model.float\(\)"):
        to_onnx(model, torch.ones(2, 3, 5, 5).bfloat16(), tmp_path / "x.onnx")


def test_importing_needs_no_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        assert name.partition(".")[0] not in ("onnx", "onnxruntime", "onnxscript"), name
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in ("sterna.export.onnx", "sterna.export.timing"):
        spec = importlib.util.find_spec(name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def test_examples_are_repeated_or_cut():
    pair = (torch.arange(6).view(2, 3), {"scale": torch.ones(2, 1), "flag": torch.ones(5)})
    more = inputs.at_batch(pair, 5)
    assert more[0][:, 0].tolist() == [0, 3, 0, 3, 0]
    assert more[1]["scale"].shape == (5, 1) and more[1]["flag"].shape == (5,)
    assert inputs.at_batch(torch.ones(3, 2), 1).shape == (1, 2)
    with pytest.raises(ValueError, match="dimension 1 that counts examples"):
        inputs.batch_size(torch.ones(3), 1)


def test_warnings_of_the_user_stay(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_onnx(mlp(), torch.ones(2, 4), tmp_path / "x.onnx")
        warnings.warn("mine", stacklevel=1)
    assert [str(w.message) for w in caught] == ["mine"]
