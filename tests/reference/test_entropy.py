"""Quantise and Entropy against the literal transcription, over ten steps with error feedback."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sterna.analysis.weight_entropy import entropy
from sterna.codecs import byte_coder
from sterna.codecs.entropy import Entropy
from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.quantise import Quantise
from sterna.codecs.terngrad import TernGrad
from sterna.comm.solo import Solo
from sterna.randomness import generator

_spec = importlib.util.spec_from_file_location(
    "reference_entropy", Path(__file__).with_name("entropy.py")
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

SHAPES = {"w": (40, 30), "b": (17,), "none": (0,), "one": ()}


def _draw(step, seed=0):
    rng = generator(seed, "reference entropy", step)
    drawn = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    drawn["b"][3] = 400.0  # beyond 127 of the smaller steps
    return drawn


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("step", [0.003, 0.3, 1.0, 2.0])
def test_ten_steps_with_error_feedback(step, relative):
    codec = ErrorFeedback(inner=Entropy(inner=Quantise(step=step, relative=relative)), decay=1.0)
    state = codec.init(_draw(0))
    left = {name: np.zeros(shape, np.float32).reshape(-1) for name, shape in SHAPES.items()}
    for t in range(10):
        named = _draw(t)
        message, state = codec.encode(named, state, Solo(), generator(t))
        decoded = codec.decode(message, named)
        for name, g in named.items():
            x = g.numpy().reshape(-1) + left[name]
            width = reference.relative_step(x, step) if relative else step
            _, arrived = reference.quantise(x, np.float32(width))
            found = decoded[name].numpy().reshape(-1)
            # A root mean square that rounds to the neighbouring float moves everything by 2^-23.
            np.testing.assert_allclose(found, arrived, rtol=3e-7, atol=0)
            left[name] = x - found
            np.testing.assert_array_equal(state["residual"][name].numpy().reshape(-1), left[name])


@pytest.mark.parametrize("step", [4.0, 1.0, 0.25])
def test_coded_size_is_that_of_the_textbook_coder(step):
    """Within the table, the checks and a part in a hundred: frequencies are rounded."""
    named = {"w": torch.randn(6000, generator=generator(1))}
    codec = Quantise(step=step)
    message, _ = codec.encode(named, {}, Solo(), generator(0))
    codes = message.buffers["code"].tolist()
    expected, _ = reference.quantise(named["w"].numpy(), message.buffers["step"].item())
    assert codes == expected
    coder = reference.Coder(codes)
    number = coder.encode(codes)
    assert coder.decode(number, 200) == codes[:200]
    coded = byte_coder.encode(message.buffers["code"])
    assert 40 + number.bit_length() / 8 < len(coded) < 1.01 * number.bit_length() / 8 + 40 + 60
    assert torch.equal(byte_coder.decode(coded), message.buffers["code"])


def test_entropy_is_shannons():
    codes = torch.randint(-4, 5, (3000,), generator=generator(2)).clamp(-4, 2)
    expected = reference.entropy_bits(codes.tolist())
    assert 3000 * entropy(codes) == pytest.approx(expected, rel=1e-12)
    data = codes.to(torch.int8).view(torch.uint8).numpy()
    assert byte_coder.entropy_bits(data) == pytest.approx(expected, rel=1e-12)
    pieces = [codes[:1000].tolist(), codes[1000:].tolist()]
    apart = sum(map(reference.entropy_bits, pieces))
    assert byte_coder.entropy_bits(data, [1000]) == pytest.approx(apart, rel=1e-12)


def test_ternary_codes_take_what_their_chances_say():
    """The entropy of sign times coin, by the integral over the clipped Gaussian."""
    named = {"w": torch.randn(300_000, generator=generator(3))}
    codec = Entropy(inner=TernGrad(clip=2.5))
    message, _ = codec.encode(named, {}, Solo(), generator(0))
    grid = np.linspace(0.0, 8.0, 80_001)
    density = 2 * np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    chance = float((np.minimum(grid, 2.5) / 2.5 * density).sum() * (grid[1] - grid[0]))
    bits = -chance * math.log2(chance / 2) - (1 - chance) * math.log2(1 - chance)
    assert 8 * message.buffers["code"].nbytes / 300_000 == pytest.approx(bits, rel=0.01)
