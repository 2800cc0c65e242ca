"""Small integers as digits of 64-bit words: log2(base) bits each, up to what is left of a word.

    word_j = sum_p digit_{jk+p} base^p,     k = the most digits with base^k <= 2^64

This takes 64/k bits a digit: 3.56 in base 11 (log2: 3.46), 4.27 in base 17 (4.09), 5.33 in base 33 (5.04).
The digits are coded on the host, by kernels that numba compiles.
"""
# mypy: disable-error-code="no-untyped-def, misc"

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Int, UInt8
from torch import Tensor

from sterna.compiled import compiled

Digits = Int[Tensor, "n"] | UInt8[Tensor, "n"]
Packed = UInt8[Tensor, "bytes"]
Factors = Float32[Tensor, "k"]
Values = Float32[Tensor, "m"]
Bounds = npt.NDArray[np.int64]

LARGEST_BASE = 2**16


def digits_per_word(base: int) -> int:
    """The most digits whose every combination fits 64 bits.

    Raises:
        ValueError: ``base`` is below 2 or above 2^16.

    Example:
        >>> digits_per_word(3), digits_per_word(11), digits_per_word(256)
        (40, 18, 8)
    """
    if not 2 <= base <= LARGEST_BASE:
        raise ValueError(
            f"radix: base must lie in [2, 65536]; got {base!r}. Sums of more workers or larger codes "
            "do not travel as digits: gather the messages."
        )
    k, reach = 0, base
    while reach <= 2**64:
        k, reach = k + 1, reach * base
    return k


def num_bytes(num_digits: int, base: int) -> int:
    """Bytes that ``num_digits`` digits take: whole words.

    Example:
        >>> num_bytes(36, 11), num_bytes(37, 11)
        (16, 24)
    """
    return 8 * -(-num_digits // digits_per_word(base))


@cache
def _table(base: int) -> npt.NDArray[np.integer]:
    """The digits of every number that has at most so many that there are 2^14 numbers, or one digit."""
    several = 1
    while base ** (several + 1) <= 2**14:
        several += 1
    digits = np.arange(base**several)[:, None] // base ** np.arange(several) % base
    return digits.astype(np.uint8 if base <= 256 else np.int32)


@compiled()
def _pack(digits, base, k, words):
    for j in range(words.shape[0]):
        piece, word = digits[j * k : (j + 1) * k], np.uint64(0)
        for p in range(piece.shape[0] - 1, -1, -1):
            word = word * base + np.uint64(piece[p])
        words[j] = word


@compiled(error_model="numpy")
def _unpack(words, group, k, table, digits):
    # A division takes the time of ten additions: one for several digits, which the table has.
    several = table.shape[1]
    for j in range(words.shape[0]):
        piece, word = digits[j * k : (j + 1) * k], words[j]
        for p in range(0, piece.shape[0], several):
            rest = word // group
            row = table[np.int64(word - rest * group)]
            word = rest
            for i in range(min(several, piece.shape[0] - p)):
                piece[p + i] = row[i]


@compiled()
def _scale(digits, offset, starts, stops, factor, out):
    first = 0
    for k in range(starts.shape[0]):
        into = out[starts[k] : stops[k]]
        piece, f = digits[first : first + into.shape[0]], factor[k]
        for i in range(into.shape[0]):
            into[i] = np.float32(piece[i] - offset) * f
        first += into.shape[0]


def pack(digits: Digits, base: int) -> Packed:
    """Pack digits from [0, base); the last word is filled with zeros.

    Example:
        >>> pack(torch.tensor([3, 1], dtype=torch.int32), 11).tolist()
        [14, 0, 0, 0, 0, 0, 0, 0]
    """
    words = np.empty(num_bytes(len(digits), base) // 8, np.uint64)
    _pack(digits.cpu().numpy(), np.uint64(base), digits_per_word(base), words)
    return torch.from_numpy(words.view(np.uint8)).to(digits.device)


def unpack(packed: Packed, num_digits: int, base: int) -> Digits:
    """The digits of `pack`; uint8 up to base 256, else int32.

    Raises:
        ValueError: ``packed`` is not the size of ``num_digits`` digits.

    Example:
        >>> unpack(pack(torch.tensor([3, 1], dtype=torch.int32), 11), 2, 11).tolist()
        [3, 1]
    """
    if packed.shape != (num_bytes(num_digits, base),):
        raise ValueError(
            f"unpack: {num_digits} digits in base {base} take {num_bytes(num_digits, base)} bytes; "
            f"got {tuple(packed.shape)}."
        )
    words = np.frombuffer(packed.cpu().numpy().tobytes(), np.uint64)
    table = _table(base)
    digits = np.empty(num_digits, np.uint8 if base <= 256 else np.int32)
    _unpack(words, np.uint64(len(table)), digits_per_word(base), table, digits)
    return torch.from_numpy(digits).to(packed.device)


def scale(
    digits: Digits, offset: int, starts: Bounds, stops: Bounds, factor: Factors, out: Values
) -> None:
    """Write (digit - offset) times its segment's factor into the segments of ``out``, one after another.

    Example:
        >>> out, digits = torch.zeros(3), torch.tensor([0, 1, 2], dtype=torch.int32)
        >>> scale(digits, 1, np.array([0, 2]), np.array([2, 3]), torch.tensor([1.0, 5.0]), out)
        >>> out.tolist()
        [-1.0, 0.0, 5.0]
    """
    values = out.cpu()
    host = digits.cpu().numpy(), factor.cpu().numpy()
    _scale(host[0], np.int32(offset), starts, stops, host[1], values.numpy())
    if values is not out:
        out.copy_(values)
