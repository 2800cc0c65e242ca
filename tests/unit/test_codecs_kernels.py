"""The compiled kernels against plain torch, and the quality of the coins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sterna.compiled
from sterna.codecs import kernels, portable
from sterna.randomness import generator

KEY = (0x1234ABCD, 0x9E3779B9)


def _segments(sizes, gaps):
    """Segments of the given sizes with gaps between them, as in a buffer partly left out."""
    starts, offset = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        starts.append(offset + gap)
        offset += gap + size
    starts = np.array(starts, dtype=np.int64)
    return starts, starts + np.array(sizes, dtype=np.int64), offset


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 3)), max_size=6),
    st.booleans(),
    st.integers(0, 2**40),
)
def test_compiled_and_plain_kernels_agree(pieces, dense, seed):
    starts, stops, total = _segments([size for size, _ in pieces], [gap for _, gap in pieces])
    rng = generator(seed)
    x = torch.randn(total, generator=rng)
    exponent = torch.randint(-140, 30, (len(starts),), generator=rng).tolist()
    for a, b, e in zip(starts.tolist(), stops.tolist(), exponent, strict=True):
        x[a:b] *= 2.0**e  # down to denormal numbers
    deviation, top = kernels.statistics(x, starts, stops)
    plain_deviation, plain_top = portable.statistics(x, starts, stops)
    assert torch.equal(top, plain_top)
    torch.testing.assert_close(deviation, plain_deviation, rtol=1e-12, atol=0)

    limit = torch.minimum(top, (2.5 * deviation).float())
    scale = top * 1.5
    code = kernels.ternarise(x, starts, stops, limit, scale, KEY, dense)
    assert torch.equal(code, portable.ternarise(x, starts, stops, limit, scale, KEY, dense))

    other = kernels.ternarise(x, starts, stops, limit, scale, (1, 2), dense)
    rows = torch.stack([code, other, code])
    for scales in (scale.expand(3, -1), torch.stack([scale, scale * 2, scale * 3])):
        out, plain = torch.full((total,), 7.0), torch.full((total,), 7.0)
        kernels.average(rows, scales.contiguous(), starts, stops, dense, out)
        portable.average(rows, scales, starts, stops, dense, plain)
        assert torch.equal(out, plain)  # also the gaps: nobody wrote there


def test_statistics_by_hand():
    x = torch.tensor([3.0, -5.0, 2.0, 2.0, 2.0, 1.0])
    deviation, top = kernels.statistics(x, np.array([0, 2, 5, 6]), np.array([2, 5, 6, 6]))
    assert deviation.tolist() == [4.0, 0.0, 0.0, 0.0]
    assert top.tolist() == [5.0, 2.0, 1.0, 0.0]


def test_deviation_survives_a_mean_that_dwarfs_it():
    x = 1e4 + torch.randn(100_000, generator=generator(0)) * 0.01
    deviation, _ = kernels.statistics(x, np.array([0]), np.array([len(x)]))
    exact = x.double().std(correction=0)
    torch.testing.assert_close(deviation[0], exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 500, 999])
def test_top_tells_what_is_not_finite(bad, where):
    x = torch.randn(2000, generator=generator(0))
    x[1000 + where] = bad
    starts, stops = np.array([0, 1000]), np.array([1000, 2000])
    for engine in (kernels, portable):
        _, top = engine.statistics(x, starts, stops)
        assert top.isfinite().tolist() == [True, False]


def test_largest_always_fires_and_zero_never():
    x = torch.tensor([1.0, 0.0, -1.0, -0.0]).repeat(250_000)
    one = torch.ones(1)
    code = kernels.ternarise(x, np.array([0]), np.array([len(x)]), one, one, KEY, False)
    out = torch.empty(len(x))
    kernels.average(code[None], one[None], np.array([0]), np.array([len(x)]), False, out)
    assert torch.equal(out, x.abs() * x.sign())


def _z(u, probability=0.5):
    """Standardised mean of a vector of events."""
    return (
        (u.double().mean() - probability) / math.sqrt(probability * (1 - probability) / len(u))
    ).item()


def test_coins_are_uniform():
    u = portable.uniforms(1 << 20, KEY)
    assert 0 < u.min().item() < 1e-5
    assert 1 - 1e-5 < u.max().item() < 1
    counts = torch.histc(u, bins=1024, min=0, max=1).double()
    chi_square = ((counts - 1024) ** 2 / 1024).sum().item()
    assert abs(chi_square - 1023) < 5 * math.sqrt(2 * 1023)
    for probability in (1e-3, 0.01, 0.3):
        assert abs(_z(u < probability, probability)) < 5


def test_every_bit_is_fair():
    h = portable.hashes(torch.arange(1 << 20), KEY)
    for bit in range(32):
        assert abs(_z((h >> bit) & 1)) < 5, bit


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 64, 1000, 1024, 4096, 5120, 65536])
def test_neighbours_are_independent(lag):
    h = portable.hashes(torch.arange(1 << 20), KEY)
    for bit in (31, 30, 24, 8):  # the leading bits decide most comparisons
        assert abs(_z(((h[lag:] ^ h[:-lag]) >> bit) & 1)) < 5, bit
    u = portable.uniforms(1 << 20, KEY).double() - 0.5
    correlation = (u[lag:] * u[:-lag]).mean().item() * 12
    assert abs(correlation) < 5 / math.sqrt(len(u) - lag)


def test_streams_of_different_keys_are_independent():
    keys = [portable.draw_key(generator(0, "codec", worker), 0, 1) for worker in range(8)]
    keys += [KEY, (KEY[0] ^ 1, KEY[1]), (KEY[0] ^ 2**31, KEY[1])]
    u = torch.stack([portable.uniforms(1 << 18, key) for key in keys]).double() - 0.5
    correlation = 12 * u @ u.T / u.shape[1] - torch.eye(len(keys))
    off_diagonal = correlation - torch.diag(correlation.diagonal())
    assert off_diagonal.abs().max().item() < 5 / math.sqrt(u.shape[1])


def test_equal_generators_still_give_workers_their_own_keys():
    keys = {portable.draw_key(generator(0), rank, 4) for rank in range(4)}
    assert len(keys) == 4
    assert portable.draw_key(generator(0), 2, 4) in keys


def test_kernels_work_where_no_cache_can_be_written(monkeypatch):
    def refuse(cache=False, **_):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(sterna.compiled.numba, "njit", refuse)
    assert sterna.compiled.compiled()(len)([1, 2]) == 2
