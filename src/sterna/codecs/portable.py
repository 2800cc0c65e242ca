"""The ternary kernels in plain torch, for tensors that are not in host memory; the same codes.

The coins are a hash of a stream position under a 64-bit key, not a generator's sequence: any device
and any block order gives the same ones, and nothing has to be stored. The hash is Chris Wellons'
lowbias32 (two multiplications, full avalanche), with the second half of the key entering between
the rounds. Keys must be drawn at random: streams whose keys differ in the second half only, and
there in a single bit, are correlated.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sterna.codecs import packing

Bounds = npt.NDArray[np.int64]


def draw_key(rng: torch.Generator, rank: int, size: int) -> tuple[int, int]:
    """A 64-bit key for one encode: row ``rank`` of as many rows as there are workers.

    So workers that were given equal generators by mistake still have independent coins.
    """
    rows = torch.randint(0, 2**32, (size, 2), generator=rng, device=rng.device, dtype=torch.int64)
    first, second = rows[rank].tolist()
    return first, second


def hashes(position: Tensor, key: tuple[int, int]) -> Tensor:
    """32 hashed bits, in int64, of stream positions; they repeat after 2^32 positions."""
    low = 0xFFFFFFFF
    h = (position & low) ^ key[0]
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D & low) ^ key[1]
    h = h ^ (h >> 15)
    h = h * 0x846CA68B & low
    return h ^ (h >> 16)


def uniforms(num: int, key: tuple[int, int], device: torch.device | None = None) -> packing.Values:
    """Coins in (0, 1): the odd multiples of 2^-24, so never 0, never 1, and 1/2 on average exactly.

    Example:
        >>> u = uniforms(1000, (1, 2))
        >>> bool((u > 0).all() and (u < 1).all()), round(u.mean().item(), 1)
        (True, 0.5)
    """
    position = torch.arange(num, device=device)
    return ((hashes(position, key) >> 8) | 1).float() * 2.0**-24


def _sizes(starts: Bounds, stops: Bounds, device: torch.device) -> Tensor:
    return torch.from_numpy(stops - starts).to(device)


def _stream(x: Tensor, starts: Bounds, stops: Bounds) -> Tensor:
    pieces = [x[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    return torch.cat([x[:0], *pieces])


def statistics(x: packing.Values, starts: Bounds, stops: Bounds) -> tuple[Tensor, Tensor]:
    """As ``kernels.statistics``, on the device of ``x``."""
    deviation = torch.zeros(len(starts), dtype=torch.float64, device=x.device)
    top = torch.zeros(len(starts), device=x.device)
    used = np.flatnonzero(stops > starts)
    if len(used) == 0:
        return deviation, top
    starts, stops = starts[used], stops[used]
    sizes = _sizes(starts, stops, x.device)
    values = _stream(x, starts, stops)
    origin = x[torch.from_numpy(starts).to(x.device)].double()
    d = values.double() - origin.repeat_interleave(sizes, output_size=len(values))
    mean = torch.segment_reduce(d, "sum", lengths=sizes) / sizes
    square = torch.segment_reduce(d * d, "sum", lengths=sizes) / sizes
    index = torch.from_numpy(used).to(x.device)
    deviation[index] = (square - mean * mean).clamp(min=0).sqrt()
    largest = torch.segment_reduce(values.abs(), "max", lengths=sizes)
    # A sum of squares tells NaN and infinity on every device; what a maximum does with NaN varies.
    top[index] = torch.where(square.isfinite(), largest, torch.inf)
    return deviation, top


def ternarise(
    x: packing.Values,
    starts: Bounds,
    stops: Bounds,
    limit: packing.PerSegment,
    scale: packing.PerSegment,
    key: tuple[int, int],
    dense: bool,
) -> packing.Packed:
    """As ``kernels.ternarise``, on the device of ``x``."""
    values = _stream(x, starts, stops)
    sizes = _sizes(starts, stops, x.device)
    gain = torch.where(scale < 2.0**-60, 2.0**64, 1.0).to(scale)

    def spread(per_segment: Tensor) -> Tensor:
        return per_segment.repeat_interleave(sizes, output_size=len(values))

    threshold = uniforms(len(values), key, x.device) * spread(scale * gain)
    magnitude = torch.minimum(values.abs() * spread(gain), spread(limit * gain))
    fires = (threshold < magnitude).to(torch.int8)
    value = torch.where(values.signbit(), -fires, fires)
    return packing.pack((value + packing.ZERO).to(torch.uint8), dense)


def average(
    packed: packing.PackedRows,
    scale: packing.ScaleRows,
    starts: Bounds,
    stops: Bounds,
    dense: bool,
    out: packing.Values,
) -> None:
    """As ``kernels.average``, on the device of ``out``."""
    sizes = _sizes(starts, stops, out.device)
    total = int((stops - starts).sum())
    mean = torch.zeros(total, device=out.device)
    together = len(packed) <= 127 and bool((scale == scale[0]).all())
    if together:
        for row in packed:
            mean += packing.unpack(row, total, dense)
        step = (scale[0] / len(packed)).repeat_interleave(sizes, output_size=total)
        mean = (mean - len(packed)) * step
    else:
        for row, s in zip(packed, scale / len(packed), strict=True):
            value = packing.unpack(row, total, dense).float() - 1
            mean += value * s.repeat_interleave(sizes, output_size=total)
    offset = 0
    for a, b in zip(starts.tolist(), stops.tolist(), strict=True):
        out[a:b] = mean[offset : offset + b - a]
        offset += b - a
