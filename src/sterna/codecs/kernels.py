"""Ternary kernels for host memory, compiled by numba: one thread, no lock, vectorised by LLVM.

They walk segments ``starts[k]:stops[k]`` of a flat buffer as one compact stream, so that what a
codec leaves out costs no copy. ``portable`` computes the same codes in plain torch on any device;
``packing`` defines the byte format.

What keeps the loops fast: inner loops run from 0 over contiguous slices; integer results are cast
back to their narrow type, since numba widens to 64 bits and AVX2 neither multiplies nor converts
those; bytes are shifted by constants; and large results lie in memory from NumPy, which asks the
kernel for huge pages (a fresh 40 MB tensor costs 17 ms of page faults, twice the arithmetic).
"""
# mypy: disable-error-code="no-untyped-def"

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sterna.codecs import packing
from sterna.compiled import compiled

Bounds = npt.NDArray[np.int64]

_A, _B, _ONE = np.uint32(0x7FEB352D), np.uint32(0x846CA68B), np.uint32(1)
_PLANE = packing.PLANE


# Reassociation lets LLVM add in several lanes. The other kernels have no fast-math: coins are
# compared exactly, and every machine decodes to the same bits.
@compiled(fastmath={"reassoc", "contract", "nsz"})
def _statistics(x, bits, starts, stops, variance, top):
    for k in range(starts.shape[0]):
        segment, pattern = x[starts[k] : stops[k]], bits[starts[k] : stops[k]]
        n = segment.shape[0]
        total, square, largest = 0.0, 0.0, np.int32(0)
        if n > 0:
            # Around the first element: no cancellation where the mean dwarfs the spread, and a sum
            # of squares of exactly zero means a constant tensor.
            origin = np.float64(segment[0])
            for i in range(n):
                d = np.float64(segment[i]) - origin
                total += d
                square += d * d
                # Magnitudes order like their bit patterns; infinity and NaN come out on top.
                largest = max(largest, np.int32(pattern[i] & np.int32(0x7FFFFFFF)))
            mean = total / n
            variance[k] = max(square / n - mean * mean, 0.0)
        top[k] = largest


@compiled()
def _codes(x, bits, out, position, k0, k1, step, gain, limit):
    for i in range(x.shape[0]):
        h = np.uint32(np.uint32(position + np.uint32(i)) ^ k0)
        h = np.uint32(h ^ (h >> np.uint32(16)))
        h = np.uint32(np.uint32(h * _A) ^ k1)
        h = np.uint32(h ^ (h >> np.uint32(15)))
        h = np.uint32(h * _B)
        h = np.uint32(h ^ (h >> np.uint32(16)))
        threshold = np.float32(np.int32(np.uint32(h >> np.uint32(8)) | _ONE)) * step
        magnitude = np.abs(x[i]) * gain
        magnitude = magnitude if magnitude < limit else limit
        fires = np.uint8(threshold < magnitude)
        negative = np.uint8(bits[i] >> np.uint32(31))
        out[i] = np.uint8(1) + fires - np.uint8(np.uint8(2) * (fires & negative))


@compiled()
def _pack(codes, dense, out):
    q = out.shape[0]
    c0, c1, c2, c3 = codes[:q], codes[q : 2 * q], codes[2 * q : 3 * q], codes[3 * q : 4 * q]
    if dense:
        c4 = codes[4 * q : 5 * q]
        for j in range(q):
            low = np.uint8(c0[j] + np.uint8(c1[j] * np.uint8(3)))
            mid = np.uint8(np.uint8(c2[j] * np.uint8(9)) + np.uint8(c3[j] * np.uint8(27)))
            out[j] = np.uint8(np.uint8(low + mid) + np.uint8(c4[j] * np.uint8(81)))
    else:
        for j in range(q):
            low = np.uint8(c0[j] | np.uint8(c1[j] << np.uint8(2)))
            out[j] = low | np.uint8(np.uint8(c2[j] << np.uint8(4)) | np.uint8(c3[j] << np.uint8(6)))


@compiled()
def _ternarise(x, bits, starts, stops, step, gain, limit, k0, k1, dense, packed):
    planes = 5 if dense else 4
    codes = np.empty(5 * _PLANE, np.uint8)
    total = 0
    for k in range(starts.shape[0]):
        total += stops[k] - starts[k]
    k, used, byte = 0, 0, 0
    for first in range(0, total, planes * _PLANE):
        size = min(planes * _PLANE, total - first)
        q = (size + planes - 1) // planes
        for j in range(size, planes * q):
            codes[j] = 1
        filled = 0
        while filled < size:
            a = starts[k] + used
            n = min(stops[k] - a, size - filled)
            here, out = slice(a, a + n), codes[filled : filled + n]
            position = np.uint32(first + filled)
            _codes(x[here], bits[here], out, position, k0, k1, step[k], gain[k], limit[k])
            filled += n
            used += n
            if a + n == stops[k]:
                k, used = k + 1, 0
        _pack(codes, dense, packed[byte : byte + q])
        byte += q


@compiled()
def _add_codes(packed, dense, digits, codes):
    q = packed.shape[0]
    if dense:
        for j in range(q):
            digits[j] = packed[j]
        for plane in range(4):
            c = codes[plane * q : (plane + 1) * q]
            for j in range(q):
                value = np.uint16(digits[j])
                third = np.uint16(np.uint16(value * np.uint16(171)) >> np.uint16(9))  # value // 3
                c[j] = np.uint8(c[j] + np.uint8(value - np.uint16(np.uint16(3) * third)))
                digits[j] = np.uint8(third)
        c = codes[4 * q : 5 * q]
        for j in range(q):
            c[j] = np.uint8(c[j] + digits[j])
    else:
        c0, c1, c2, c3 = codes[:q], codes[q : 2 * q], codes[2 * q : 3 * q], codes[3 * q : 4 * q]
        for j in range(q):
            c0[j] = np.uint8(c0[j] + (packed[j] & np.uint8(3)))
        for j in range(q):
            c1[j] = np.uint8(c1[j] + ((packed[j] >> np.uint8(2)) & np.uint8(3)))
        for j in range(q):
            c2[j] = np.uint8(c2[j] + ((packed[j] >> np.uint8(4)) & np.uint8(3)))
        for j in range(q):
            c3[j] = np.uint8(c3[j] + (packed[j] >> np.uint8(6)))


@compiled()
def _write(codes, offset, scale, add, out):
    if add:
        for j in range(codes.shape[0]):
            out[j] += (np.float32(codes[j]) - offset) * scale
    else:
        for j in range(codes.shape[0]):
            out[j] = (np.float32(codes[j]) - offset) * scale


@compiled()
def _average(packed, scale, starts, stops, together, dense, out):
    # ``together``: the scalers are equal, so add the codes as integers and multiply once.
    planes = 5 if dense else 4
    num = packed.shape[0]
    codes, digits = np.empty(5 * _PLANE, np.uint8), np.empty(_PLANE, np.uint8)
    total = 0
    for k in range(starts.shape[0]):
        total += stops[k] - starts[k]
    k, used, byte = 0, 0, 0
    for first in range(0, total, planes * _PLANE):
        size = min(planes * _PLANE, total - first)
        q = (size + planes - 1) // planes
        block_k, block_used = k, used
        for w in range(num):
            if w == 0 or not together:
                for j in range(planes * q):
                    codes[j] = 0
            _add_codes(packed[w, byte : byte + q], dense, digits, codes)
            if together and w < num - 1:
                continue
            offset = np.float32(num if together else 1)
            filled, k, used = 0, block_k, block_used
            while filled < size:
                a = starts[k] + used
                n = min(stops[k] - a, size - filled)
                add = w > 0 and not together
                _write(codes[filled : filled + n], offset, scale[w, k], add, out[a : a + n])
                filled += n
                used += n
                if a + n == stops[k]:
                    k, used = k + 1, 0
        byte += q


def statistics(x: packing.Values, starts: Bounds, stops: Bounds) -> tuple[Tensor, Tensor]:
    """Population standard deviation (float64) and largest magnitude (float32) of each segment.

    Both are 0 for an empty segment; the deviation is exactly 0 for a constant one. The magnitude is
    NaN or infinite exactly where the segment holds NaN or infinity.
    """
    values, variance = x.detach().numpy(), np.zeros(len(starts))
    top = np.zeros(len(starts), np.int32)
    _statistics(values, values.view(np.int32), starts, stops, variance, top)
    return torch.from_numpy(np.sqrt(variance)), torch.from_numpy(top.view(np.float32))


def ternarise(
    x: packing.Values,
    starts: Bounds,
    stops: Bounds,
    limit: packing.PerSegment,
    scale: packing.PerSegment,
    key: tuple[int, int],
    dense: bool,
) -> packing.Packed:
    """Packed codes sign(x) [u < min(|x|, limit) / scale], where u is ``portable.uniforms``."""
    values, s = x.detach().numpy(), scale.numpy()
    # An exact power of two, so that the smallest gradients are not compared among denormal numbers.
    gain = np.where(s < 2.0**-60, np.float32(2.0**64), np.float32(1.0))
    step = s * gain * np.float32(2.0**-24)
    packed = np.empty(packing.num_bytes(int((stops - starts).sum()), dense), np.uint8)
    first, second = np.uint32(key[0]), np.uint32(key[1])
    bits, most = values.view(np.uint32), limit.numpy() * gain
    _ternarise(values, bits, starts, stops, step, gain, most, first, second, dense, packed)
    return torch.from_numpy(packed)


def average(
    packed: packing.PackedRows,
    scale: packing.ScaleRows,
    starts: Bounds,
    stops: Bounds,
    dense: bool,
    out: packing.Values,
) -> None:
    """Write the mean of the messages' values into the segments of ``out``."""
    num = len(packed)
    together = num <= 127 and bool((scale == scale[0]).all())  # the sum of codes fits a byte
    share = scale.numpy() / np.float32(num)
    _average(packed.numpy(), share, starts, stops, together, dense, out.numpy())
