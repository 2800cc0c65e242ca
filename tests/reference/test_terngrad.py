"""Ours against the literal transcription, given the same coins, over ten steps of three workers."""

import importlib.util
from pathlib import Path

import pytest
import torch

from sterna.codecs import packing, portable
from sterna.codecs.terngrad import TernGrad
from sterna.comm.solo import Solo
from sterna.flat import Flat
from sterna.randomness import generator

_spec = importlib.util.spec_from_file_location(
    "reference_terngrad", Path(__file__).with_name("terngrad.py")
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

SHAPES = {"conv": (5, 3, 3, 3), "bias": (5,), "one": (1,), "none": (0,), "dead": (4,), "flat": (3,)}


class Worker(Solo):
    """One of several workers whose scalers are known: ``max_`` answers with their largest."""

    size = 3

    def __init__(self, rank, scalers):
        super().__init__()
        self.rank, self.scalers = rank, scalers

    def max_(self, x):
        self.scalers[self.rank] = x.clone()
        return x.copy_(torch.stack(list(self.scalers.values())).max(0).values)


def _gradients(step, worker):
    rng = generator(step, "gradient", worker)
    named = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    named["conv"] *= 10.0 ** (worker - 3)
    named["dead"].zero_()
    named["flat"].fill_(-0.25)
    return named


@pytest.mark.parametrize("clip", [2.5, 0.5, None])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_ten_steps_of_three_workers_equal_the_reference(clip, share, dense):
    codec = TernGrad(clip=clip, share_scalers=share, dense=dense)
    for step in range(10):
        gradients = [_gradients(step, worker) for worker in range(3)]
        flat = [Flat.of(named) for named in gradients]
        scalers = {}
        for _ in range(2):  # the first round tells the workers each other's scalers
            messages = [
                codec.encode(flat[w], {}, Worker(w, scalers), generator(step, "coins", w))[0]
                for w in range(3)
            ]
        layout = flat[0].layout
        uniforms = []
        for worker in range(3):
            key = portable.draw_key(generator(step, "coins", worker), worker, 3)
            stream = portable.uniforms(layout.num_elements, key)
            pieces = stream.split((layout.bounds[1:] - layout.bounds[:-1]).tolist())
            uniforms.append({n: u.tolist() for n, u in zip(layout.names, pieces, strict=True)})
        arrays = [{name: x.numpy() for name, x in named.items()} for named in gradients]
        expected_scalers, expected_codes, expected = reference.step(arrays, uniforms, clip, share)

        for worker, message in enumerate(messages):
            scale = torch.tensor(list(expected_scalers[worker].values()))
            torch.testing.assert_close(message.buffers["scale"], scale)
            codes = [code for name in layout.names for code in expected_codes[worker][name]]
            found = packing.unpack(message.buffers["code"], layout.num_elements, dense).int() - 1
            assert found.tolist() == codes
        mean = codec.decode_mean(messages, gradients[0])
        for name in layout.names:
            torch.testing.assert_close(mean[name].double(), torch.from_numpy(expected[name]))
