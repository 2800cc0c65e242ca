"""Identity: the gradient travels as it is. What every other codec is measured against.

    m = g                                                                              (1)

Symbols: g the gradient, m the message.
Reference: none needed.
Differs from the paper: nothing.
Cost per step: 32 bits an entry in float32; no copy: the message is the flat buffer itself; one pass
    that reads it to refuse NaN and infinity. Hurts on slow links.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sterna.codecs.finite import largest
from sterna.codecs.form import Form, expect
from sterna.flat import Flat, Named
from sterna.seams import Comm, Message, State


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Tensors as they are.

    Example:
        >>> from sterna.comm.solo import Solo
        >>> g = Flat.of({"w": torch.ones(3)})
        >>> message, _ = Identity().encode(g, {}, Solo(), torch.Generator())
        >>> message.buffers["values"] is g.buffer
        True
    """

    summable: ClassVar[bool] = True
    unbiased: ClassVar[bool] = True

    def init(self, like: Named) -> State:
        """No state."""
        return {}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        """The flat buffer, without a copy if ``named`` is flat.

        Raises:
            NotFinite: a tensor holds NaN or infinity.
        """
        flat = Flat.of(named)
        largest(flat, "Identity")
        return Message({"values": flat.buffer}), state

    def decode(self, message: Message, like: Named) -> Flat:
        """The buffer, under the names of ``like``.

        Raises:
            ValueError: the message is not of these tensors.
        """
        form = Form.of(like)
        expect("Identity", message, "values", form.dtype, form.layout.num_elements)
        return Flat(form.layout, message.buffers["values"])


EXAMPLES = (Identity(),)
