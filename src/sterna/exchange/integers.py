"""Codecs whose messages are small integers times scalers that all workers share.

Such integers can be added up by whoever has them, before they are decoded, and the sum is a small
integer too. A codec offers that by a method ``integers``; ternary codes have it here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sterna.codecs import kernels, packing, portable, radix
from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.form import Form, empty
from sterna.codecs.terngrad import TernGrad
from sterna.codecs.warm_up import WarmUp
from sterna.flat import Flat, Named
from sterna.seams import Codec, Message


class Integers(Protocol):
    """How to take a codec's messages apart and decode their sum.

    The codes are a stream of blocks that are read one by one: any whole number of blocks, with what is
    left of the last, is a stream again.
    """

    @property
    def largest(self) -> int:
        """Codes lie in [-largest, largest]."""
        ...

    @property
    def block(self) -> tuple[int, int]:
        """Codes and bytes of a block."""
        ...

    def num_codes(self, like: Named) -> int:
        """Codes in a message of these tensors."""
        ...

    def form(self, like: Named) -> Message:
        """A message of these tensors without memory, for its sizes."""
        ...

    def packed(self, message: Message) -> Tensor:
        """The stream, uint8."""
        ...

    def rest(self, message: Message) -> dict[str, Tensor]:
        """Buffers that all workers need of all others, besides the codes."""
        ...

    def add_up(self, rows: Tensor, num_codes: int) -> Tensor:
        """int32, (num_codes,): the sum over the rows, each a stream of so many codes."""
        ...

    def mean_of_sums(
        self, sums: Tensor, own: Message, rests: Sequence[Message], like: Named
    ) -> Flat:
        """The mean.

        Args:
            sums: (codes,), uint8 or int32: the codes added up, plus ``largest`` times the number of workers.
            own: this worker's message.
            rests: every worker's `rest`, by rank.
            like: as for `Codec.decode`.
        """
        ...


@runtime_checkable
class Summing(Protocol):
    """A codec with integers of its own; None where its scalers are not shared."""

    def integers(self) -> Integers | None:
        """What its messages are made of."""
        ...


def integers_of(codec: Codec) -> Integers | None:
    """What the codec offers; None if it has no integers, or each worker scales its own.

    Example:
        >>> integers_of(ErrorFeedback(inner=TernGrad())).largest
        1
        >>> integers_of(TernGrad(share_scalers=False)) is None
        True
    """
    if isinstance(codec, Summing):
        return codec.integers()
    if isinstance(codec, ErrorFeedback | WarmUp):  # its messages are the inner codec's, in the end
        return integers_of(codec.inner)
    if isinstance(codec, TernGrad) and codec.share_scalers:
        return _Ternary(codec)
    return None


@dataclass(frozen=True)
class _Ternary:
    codec: TernGrad
    largest: int = 1

    @property
    def block(self) -> tuple[int, int]:
        return packing.codes_per_byte(self.codec.dense) * packing.PLANE, packing.PLANE

    def _segments(self, form: Form) -> tuple[kernels.Bounds, kernels.Bounds, list[slice]]:
        """Where the coded tensors begin and end, and where the others lie."""
        bounds, patterns = form.layout.bounds, self.codec.keep_float
        kept = [any(fnmatchcase(name, p) for p in patterns) for name in form.layout.names]
        coded = np.flatnonzero(~np.array(kept, dtype=bool))
        floats = [slice(*map(int, bounds[k : k + 2])) for k in np.flatnonzero(kept)]
        return bounds[:-1][coded], bounds[1:][coded], floats

    def num_codes(self, like: Named) -> int:
        starts, stops, _ = self._segments(Form.of(like))
        return int((stops - starts).sum())

    def form(self, like: Named) -> Message:
        form = Form.of(like)
        starts, stops, floats = self._segments(form)
        num_bytes = packing.num_bytes(int((stops - starts).sum()), self.codec.dense)
        buffers = {
            "scale": torch.empty(len(starts), device="meta"),
            "code": torch.empty(num_bytes, dtype=torch.uint8, device="meta"),
        }
        if self.codec.keep_float:
            num_floats = sum(piece.stop - piece.start for piece in floats)
            buffers["float"] = torch.empty(num_floats, device="meta")
        return Message(buffers)

    def packed(self, message: Message) -> Tensor:
        return message.buffers["code"]

    def rest(self, message: Message) -> dict[str, Tensor]:
        return {name: x for name, x in message.buffers.items() if name == "float"}

    def add_up(self, rows: Tensor, num_codes: int) -> Tensor:
        # The mean of as many messages, each with the scaler N, is the sum; it is exact in float32.
        total = torch.empty(num_codes, device=rows.device)
        scale = torch.full((len(rows), 1), float(len(rows)), device=rows.device)
        engine = kernels if rows.device.type == "cpu" else portable
        ends = np.array([0]), np.array([num_codes])
        engine.average(rows, scale, *ends, self.codec.dense, total)
        return total.to(torch.int32)

    def mean_of_sums(
        self, sums: Tensor, own: Message, rests: Sequence[Message], like: Named
    ) -> Flat:
        form, num = Form.of(like), len(rests)
        starts, stops, floats = self._segments(form)
        out = empty(form.layout.num_elements, torch.float32, form.device)
        radix.scale(sums, num, starts, stops, own.buffers["scale"] / num, out)
        if floats:
            mean = torch.stack([message.buffers["float"] for message in rests]).mean(0)
            sizes = [piece.stop - piece.start for piece in floats]
            for piece, values in zip(floats, torch.split(mean, sizes), strict=True):
                out[piece] = values
        return Flat(form.layout, out.to(form.dtype))
