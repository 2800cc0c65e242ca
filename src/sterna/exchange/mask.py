"""A mask over the elements of a flat buffer as bits that can travel."""

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

Mask = Bool[Tensor, "n"]
Bits = UInt8[Tensor, "bytes"]


def to_bits(mask: Mask) -> Bits:
    """Eight elements to a byte, the first in the lowest bit; what is left of the last byte is 0.

    Example:
        >>> to_bits(torch.tensor([True, False, True] + 6 * [False])).tolist()
        [5, 0]
    """
    rows = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    # dtype: torch widens the sum of bytes to int64 unless told; a byte cannot overflow here.
    return (rows << _places(mask)).sum(1, dtype=torch.uint8)


def from_bits(bits: Bits, num_elements: int) -> Mask:
    """The mask of `to_bits`.

    Example:
        >>> from_bits(torch.tensor([5], dtype=torch.uint8), 3).tolist()
        [True, False, True]
    """
    return ((bits[:, None] >> _places(bits)) & 1).view(-1)[:num_elements].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
