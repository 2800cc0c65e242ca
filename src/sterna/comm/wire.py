"""Messages as bytes: what a transport hands to the network, and what the ledger counts.

    offset 0          4 bytes   check: CRC-32 of version, buffer names and dtypes
    offset 4          4 bytes   number of buffers
    offset 8          8 bytes   length of each buffer, in bytes
    then                        the buffers, each padded to a multiple of 8 bytes

Workers run the same method, so the receiver's own message says what the names and dtypes are; the check
word catches a peer that runs another method or another version.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sterna.seams import Message

_VERSION = 1
_ALIGNMENT = 8


class WireError(ValueError):
    """Received bytes are not a message of the expected form."""


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _check(message: Message) -> int:
    return _check_word(tuple((name, x.dtype) for name, x in message.buffers.items()))


@lru_cache(maxsize=256)
def _check_word(form: tuple[tuple[str, torch.dtype], ...]) -> int:
    text = repr((_VERSION, [(name, str(dtype)) for name, dtype in form]))
    return zlib.crc32(text.encode())


def num_bytes(message: Message) -> int:
    """Bytes of the message on the wire, header and padding included."""
    return 8 + sum(8 + _padded(x.nbytes) for x in message.buffers.values())


def pack(message: Message) -> Tensor:
    """The message as one uint8 tensor of `num_bytes` bytes, on the device of its buffers.

    Example:
        >>> bytes_ = pack(Message({"code": torch.arange(3, dtype=torch.uint8)}))
        >>> bytes_.dtype, len(bytes_)
        (torch.uint8, 24)
    """
    lengths = [x.nbytes for x in message.buffers.values()]
    header = np.empty(8 + 8 * len(lengths), np.uint8)
    header[:8].view(np.uint32)[:] = _check(message), len(lengths)
    header[8:].view(np.int64)[:] = lengths
    parts = [torch.from_numpy(header)]
    for x in message.buffers.values():
        parts.append(x.detach().contiguous().view(-1).view(torch.uint8))
        padding = _padded(x.nbytes) - x.nbytes
        if padding:
            parts.append(torch.zeros(padding, dtype=torch.uint8, device=x.device))
    device = next((x.device for x in message.buffers.values()), parts[0].device)
    return torch.cat([part.to(device) for part in parts])


def unpack(data: Tensor, like: Message, peer: str) -> Message:
    """The message in ``data``; buffers are views of it.

    Args:
        data: uint8 bytes, as `pack` made them; anything after the message is ignored.
        like: a message of the same method, for names and dtypes.
        peer: who sent it, for the error.

    Raises:
        WireError: the bytes are truncated or come from another method or version.
    """
    if len(data) < 8:
        raise WireError(f"The message from {peer} is truncated: {len(data)} bytes, need 8 or more.")
    names, num = list(like.buffers), len(like.buffers)
    head = data[: 8 + 8 * num].cpu().numpy()
    check, found = (int(word) for word in head[:8].view(np.uint32))
    if (check, found) != (_check(like), num):
        raise WireError(
            f"The message from {peer} is of another method or version of Sterna; "
            "run the same experiment and the same version on every worker."
        )
    if len(head) < 8 + 8 * num:
        raise WireError(f"The message from {peer} is truncated within its header.")
    lengths = [int(length) for length in head[8:].view(np.int64)]
    offset = 8 + 8 * num
    buffers = {}
    for name, length in zip(names, lengths, strict=True):
        dtype = like.buffers[name].dtype
        if length < 0 or length % dtype.itemsize or offset + length > len(data):
            raise WireError(
                f"The message from {peer} is truncated or corrupt: buffer {name!r} says {length} "
                f"bytes, {max(len(data) - offset, 0)} are left."
            )
        buffers[name] = data[offset : offset + length].view(dtype)
        offset += _padded(length)
    return Message(buffers, ragged=like.ragged)


def unpack_all(gathered: Sequence[Tensor], own: Message) -> list[Message]:
    """One message per rank from gathered bytes."""
    return [unpack(data, own, f"rank {rank}") for rank, data in enumerate(gathered)]
