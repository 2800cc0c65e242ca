"""Ternary codes as bytes: 2 bits a code, or five codes a byte in base 3.

A stream of n codes from {0, 1, 2} is cut into blocks of ``BLOCK`` codes. Within a block the codes
are
planar: with Q bytes to a block, byte j holds the codes j, j + Q, j + 2Q, ..., so that every loop
over a plane reads and writes contiguous memory. The last block has its own, smaller Q, which makes
the size of the stream exactly ceil(n / codes per byte) bytes.

    2 bits   byte j = c[j] + 4 c[j+Q] + 16 c[j+2Q] + 64 c[j+3Q]
    base 3   byte j = c[j] + 3 c[j+Q] +  9 c[j+2Q] + 27 c[j+3Q] + 81 c[j+4Q]

This module is the definition, in plain torch on any device; ``kernels`` does the same on a CPU at
memory speed, and the tests hold the two equal.
"""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

Values = Float32[Tensor, "n"]
PerSegment = Float32[Tensor, "k"]
Codes = UInt8[Tensor, "n"]
Packed = UInt8[Tensor, "bytes"]
PackedRows = UInt8[Tensor, "messages bytes"]
ScaleRows = Float32[Tensor, "messages k"]

PLANE = 1024
"""Bytes of a full block; codes of one of its planes."""

ZERO = 1
"""The code of the value zero (codes are value + 1); what is left of the last byte is filled with
it."""


def codes_per_byte(dense: bool) -> int:
    """5 where codes are packed in base 3, 4 where each takes 2 bits."""
    return 5 if dense else 4


def num_bytes(num_codes: int, dense: bool) -> int:
    """Bytes that ``num_codes`` codes take.

    Example:
        >>> num_bytes(10, dense=False), num_bytes(10, dense=True)
        (3, 2)
    """
    return -(-num_codes // codes_per_byte(dense))


def _weights(dense: bool, device: torch.device) -> Tensor:
    planes = codes_per_byte(dense)
    weights = [(3 if dense else 4) ** k for k in range(planes)]
    return torch.tensor(weights, dtype=torch.uint8, device=device)[:, None]


def pack(codes: Codes, dense: bool) -> Packed:
    """Pack codes from {0, 1, 2}.

    Example:
        >>> pack(torch.tensor([2, 0, 1, 1, 2], dtype=torch.uint8), dense=True).tolist()
        [200]
    """
    planes, weights = codes_per_byte(dense), _weights(dense, codes.device)
    full = len(codes) // (planes * PLANE) * planes * PLANE
    rest = len(codes) - full
    fill = codes.new_full((-rest % planes,), ZERO)
    blocks = codes[:full].view(-1, planes, PLANE)
    tail = torch.cat([codes[full:], fill]).view(planes, -1)
    # dtype: torch widens the sum of bytes to int64 unless told; a byte cannot overflow here.
    return torch.cat(
        [
            (blocks * weights).sum(1, dtype=torch.uint8).view(-1),
            (tail * weights).sum(0, dtype=torch.uint8),
        ]
    )


def unpack(packed: Packed, num_codes: int, dense: bool) -> Codes:
    """The codes of ``pack``.

    Raises:
        ValueError: ``packed`` is not the size of ``num_codes`` codes.

    Example:
        >>> unpack(torch.tensor([200], dtype=torch.uint8), 5, dense=True).tolist()
        [2, 0, 1, 1, 2]
    """
    if packed.shape != (num_bytes(num_codes, dense),):
        raise ValueError(
            f"unpack: {num_codes} codes take {num_bytes(num_codes, dense)} bytes; "
            f"got {tuple(packed.shape)}."
        )
    weights = _weights(dense, packed.device)
    base = 3 if dense else 4
    full = len(packed) // PLANE * PLANE
    blocks = packed[:full].view(-1, 1, PLANE) // weights % base
    tail = packed[full:].view(1, -1) // weights % base
    return torch.cat([blocks.view(-1), tail.reshape(-1)])[:num_codes]
