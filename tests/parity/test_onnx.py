"""ONNX Runtime against torch: every architecture of the zoo, dense and shrunk, at several batch sizes."""

import pytest
import torch
from torch import nn

from sterna.export.inputs import at_batch, feeds, tensors
from sterna.export.onnx import to_onnx
from sterna.export.runtime import session
from sterna.randomness import isolated
from sterna.surgery import couple, shrink
from unit.surgery_zoo import ZOO

TIME_FIRST = ("tied_lstm", "tied_lstm_without_state")
IN_THE_GATE = ("pad_shortcut_resnet", "tied_lstm_without_state", "transformer")
NAMES = [pytest.param(name, marks=() if name in IN_THE_GATE else pytest.mark.slow) for name in ZOO]


def halved(model, example):
    coupling = couple(model, example)
    keep = {g.name: range(0, g.size, 2) for g in coupling.groups.values()}
    return shrink(model, example, keep)[0]


@pytest.mark.parametrize("which", ["dense", "shrunk"])
@pytest.mark.parametrize("name", NAMES)
def test_equal_outputs(name, which, tmp_path):
    make, example = ZOO[name]
    with isolated(0, name):
        model = make()
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.running_mean, -0.3, 0.3)
        model.eval()
    x, dim = example(), 1 if name in TIME_FIRST else 0
    if which == "shrunk":
        model = halved(model, x)
    found = to_onnx(model, x, tmp_path / "model.onnx", batch_dim=dim)
    assert found.dynamic_batch and {1, x.shape[dim], x.shape[dim] + 1} == set(found.batches)
    runner = session(found.path.read_bytes())
    for num in (1, 7):
        some = (at_batch(x, num, dim),)
        with torch.no_grad():
            expected = tensors(model(*some))
        ours = runner.run(None, feeds(runner, some))
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-5)
