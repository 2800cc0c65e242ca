"""What a decoder goes by: the layout it must produce, and the sizes a message must then have."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sterna.flat import Flat, Layout, Named
from sterna.seams import Averaging, Codec, Message


class Form(NamedTuple):
    """Layout, dtype and device of named tensors, learnt without packing them."""

    layout: Layout
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, like: Named) -> "Form":
        """The form of ``like``; of mixed dtypes the common one, as `Flat.of` has it."""
        if isinstance(like, Flat):
            return cls(like.layout, like.buffer.dtype, like.buffer.device)
        dtype, device = torch.get_default_dtype(), torch.device("cpu")
        for k, x in enumerate(like.values()):
            dtype = torch.promote_types(dtype, x.dtype) if k else x.dtype
            device = x.device
        return cls(Layout.of(like), dtype, device)


def empty(num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised vector for a result of the gradient's size.

    In host memory it comes from NumPy, which asks the kernel for huge pages: a fresh 40 MB tensor
    from torch's allocator costs 17 ms of page faults on first touch, several times what fills it.
    """
    if device.type != "cpu" or num_elements == 0:
        return torch.empty(num_elements, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(num_elements * dtype.itemsize, np.uint8)).view(dtype)


def expect(who: str, message: Message, name: str, dtype: torch.dtype, num_elements: int) -> None:
    """Check one buffer of a message before it is decoded.

    Raises:
        ValueError: the buffer is missing, or its dtype or size differs; says which.
    """
    buffer = message.buffers.get(name)
    if buffer is None:
        raise ValueError(
            f"{who}: the message has no buffer {name!r}; it holds {sorted(message.buffers)}. "
            "Decode with the codec that encoded."
        )
    if buffer.dtype != dtype or buffer.shape != (num_elements,):
        raise ValueError(
            f"{who}: buffer {name!r} must be {dtype} of shape ({num_elements},) to fit these "
            f"tensors; got {buffer.dtype} of shape {tuple(buffer.shape)}. The message is of other "
            "tensors, or of a codec with other hyperparameters."
        )


def decode_mean(codec: Codec, messages: Sequence[Message], like: Named) -> Flat:
    """Mean of what the messages say, in their order; in the codec's own faster way where it has one."""
    if isinstance(codec, Averaging):
        return Flat.of(codec.decode_mean(messages, like))
    return mean_of_decoded(Flat.of(codec.decode(message, like)) for message in messages)


def mean_of_decoded(decoded: Iterable[Flat]) -> Flat:
    """Mean of at least one, added in their order; one beside the mean is held at a time."""
    count, rest = 1, iter(decoded)
    mean = next(rest).clone()
    for count, other in enumerate(rest, start=2):  # noqa: B007 (the last count is wanted)
        mean.buffer.add_(other.buffer)
    mean.buffer.div_(count)
    return mean
