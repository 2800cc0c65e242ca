"""Fp16: the gradient travels rounded to half precision.

    m = fp16(g)                                                                        (1)

Symbols: g the gradient, m the message; fp16 rounds to the nearest of 11 significant bits.
Reference: P. Micikevicius et al., "Mixed Precision Training", ICLR 2018, arXiv:1710.03740;
    PyTorch's ``fp16_compress_hook``.
Differs from the paper: what does not fit is refused instead of sent as infinity.
Cost per step: 16 bits an entry; a pass over the gradient to check and one to round. Hurts where
    entries are below 6e-8, which become 0 (biased; put `ErrorFeedback` around it), or above 65504.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sterna.codecs.finite import largest
from sterna.codecs.form import Form, empty, expect
from sterna.flat import Flat, Named
from sterna.seams import Comm, Message, NotFinite, State

_OVERFLOW = 65520.0
"""The smallest magnitude that rounds to infinity: halfway above the largest half, 65504."""


@dataclass(frozen=True, kw_only=True)
class Fp16:
    """Half the bits, no state, and the engine's all-reduce adds the messages.

    Example:
        >>> from sterna.comm.solo import Solo
        >>> g = {"w": torch.tensor([1.0, 1 / 3])}
        >>> message, _ = Fp16().encode(g, {}, Solo(), torch.Generator())
        >>> message.buffers["values"].dtype, Fp16().decode(message, g)["w"].dtype
        (torch.float16, torch.float32)
    """

    summable: ClassVar[bool] = True
    unbiased: ClassVar[bool] = False

    def init(self, like: Named) -> State:
        """No state."""
        return {}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        """The flat buffer in half precision; sums of N messages fit if they are divided by N first.

        Raises:
            NotFinite: a tensor holds NaN, infinity, or a value beyond half precision.
        """
        flat = Flat.of(named)
        if largest(flat, "Fp16") >= _OVERFLOW:
            name, peak = max(
                ((name, float(x.abs().max())) for name, x in flat.items() if x.numel()),
                key=lambda found: found[1],
            )
            raise NotFinite(
                f"Fp16: gradient of {name!r} reaches {peak:.4g}, and half precision ends at 65504. "
                "Clip the gradient norm before the exchange, or use Identity()."
            )
        return Message({"values": flat.buffer.half()}), state

    def decode(self, message: Message, like: Named) -> Flat:
        """The values in the dtype of ``like``.

        Raises:
            ValueError: the message is not of these tensors.
        """
        form = Form.of(like)
        expect("Fp16", message, "values", torch.float16, form.layout.num_elements)
        values = message.buffers["values"]
        return Flat(form.layout, empty(len(values), form.dtype, values.device).copy_(values))


EXAMPLES = (Fp16(),)
