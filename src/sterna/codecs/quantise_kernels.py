"""Quantising kernels for host memory, compiled by numba: one thread, no lock, one pass each."""
# mypy: disable-error-code="no-untyped-def, misc, assignment"

import numpy as np
import numpy.typing as npt

from sterna.compiled import compiled

Bounds = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8]

FAR = -128
"""The code of a value beyond 127 steps."""


@compiled(fastmath={"reassoc", "contract", "nsz"})
def _mean_square(x, bounds, out, largest):
    for k in range(out.shape[0]):
        segment, total, peak = x[bounds[k] : bounds[k + 1]], 0.0, np.float32(0)
        for i in range(segment.shape[0]):
            total += np.float64(segment[i]) * np.float64(segment[i])
            peak = max(peak, abs(segment[i]))
        out[k], largest[k] = total / max(segment.shape[0], 1), peak


@compiled()
def _quantise(x, bounds, step, codes):
    num_far = 0
    for k in range(step.shape[0]):
        segment, out, s = x[bounds[k] : bounds[k + 1]], codes[bounds[k] : bounds[k + 1]], step[k]
        if s == 0:
            for i in range(segment.shape[0]):
                out[i] = 0
            continue
        far = 0
        for i in range(segment.shape[0]):
            q = np.rint(segment[i] / s)
            near = np.abs(q) <= np.float32(127)
            out[i] = np.int8(q) if near else np.int8(-128)
            far += np.int32(not near)
        num_far += far
    return num_far


@compiled()
def _scale(codes, bounds, step, limit, out):
    for k in range(step.shape[0]):
        segment, into, s = codes[bounds[k] : bounds[k + 1]], out[bounds[k] : bounds[k + 1]], step[k]
        for i in range(segment.shape[0]):
            into[i] = min(max(np.float32(segment[i]) * s, -limit), limit)


def sizes(x: Floats, bounds: Bounds) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Root mean square and largest magnitude of each segment; 0 for an empty one."""
    out, largest = np.zeros(len(bounds) - 1), np.zeros(len(bounds) - 1)
    _mean_square(x, bounds, out, largest)
    return np.sqrt(out), largest


def quantise(x: Floats, bounds: Bounds, step: Floats) -> tuple[Codes, int]:
    """Codes rint(x / step) by segment, `FAR` beyond 127 in magnitude, and how many are `FAR`."""
    codes = np.empty(len(x), np.int8)
    return codes, int(_quantise(x, bounds, step, codes))


def scale(codes: Codes, bounds: Bounds, step: Floats, limit: float, out: Floats) -> None:
    """Write codes times step, by segment, within plus or minus ``limit``."""
    _scale(codes, bounds, step, np.float32(limit), out)
