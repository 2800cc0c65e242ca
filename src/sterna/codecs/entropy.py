"""Entropy: another codec's message, coded losslessly at the entropy of what is in it.

For each buffer of the inner codec's message and each part j of it, a tensor or several small ones:

    p_j(v)  = n_j(v) / n_j                                                             (1)
    H_j     = - sum_v p_j(v) log2 p_j(v)                                               (2)
    bits    = sum_j (n_j H_j + table_j),   at most 8 n_j for each j                    (3)

Symbols: v value of a byte, n_j(v) how often it occurs among the n_j bytes of part j, H_j its empirical
entropy in bits, table_j what it costs to tell p_j. A buffer of wider numbers is split into planes of
bytes first. Codes of `Quantise` are one byte each; packed ternary codes are four or five to a byte,
and are coded four or five at a time.
Reference: A. Øland, B. Raj, "Reducing Communication Overhead in Distributed Learning by an Order of
    Magnitude (Almost)", ICASSP 2015; J. Duda, "Asymmetric Numeral Systems", arXiv:1311.2540, 2013; R.
    Bamler, "Understanding Entropy Coding With Asymmetric Numeral Systems (ANS): a Statistician's
    Perspective", arXiv:2201.01741, 2022 (the coder, `constriction`).
Differs from the paper: the paper's text was not to be had, only how others sum it up: quantise the
    weights, then code them, with more bits where they are larger. Here quantising is a codec of its own
    (`Quantise`), the coder is ANS, and both are ours.
Cost per step: (3), 20 bytes a part and 20 a buffer; two collectives, for the workers must first learn
    each other's sizes; on the host, about 7 ns a byte to encode and 6 to 25 to decode, and every worker
    decodes the messages of all. Hurts on fast links, on small models, and with many workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch

from sterna.codecs import byte_coder
from sterna.codecs.form import Form, decode_mean
from sterna.flat import Layout, Named
from sterna.seams import Codec, Comm, Message, State


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """A lossless coder around a codec.

    Every buffer becomes one of bytes with the checks, tables and payload of `byte_coder`. State: the
    inner codec's.

    Args:
        inner: any codec; one whose messages are small integers gains most.

    Raises:
        TypeError: ``inner`` is not a codec.

    Example:
        >>> from sterna.codecs.quantise import Quantise
        >>> from sterna.comm.solo import Solo
        >>> rng = torch.Generator()
        >>> codec, g = Entropy(inner=Quantise(step=1.0)), {"w": torch.randn(100_000, generator=rng)}
        >>> message, _ = codec.encode(g, codec.init(g), Solo(), rng)
        >>> round(8 * message.buffers["code"].nbytes / 100_000, 1)
        2.1
    """

    inner: Codec = field(kw_only=False)

    summable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.inner, type) or not isinstance(self.inner, Codec):
            raise TypeError(
                f"Entropy: inner must be a codec; got {self.inner!r}. "
                "Pass an instance, as in Entropy(inner=Quantise(step=1.0))."
            )

    @property
    def unbiased(self) -> bool:
        """As the inner codec."""
        return self.inner.unbiased

    def init(self, like: Named) -> State:
        """The inner codec's state."""
        return self.inner.init(like)

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        """Eq. (1) to (3) of the inner codec's message.

        Raises:
            NotFinite: as the inner codec.
        """
        message, state = self.inner.encode(named, state, comm, rng)
        layout = Form.of(named).layout
        buffers = {}
        for name, x in message.buffers.items():
            flat = x.detach().reshape(-1)
            coded = byte_coder.encode(flat.cpu(), _cuts(layout, len(flat)))
            buffers[name] = torch.from_numpy(coded).to(x.device)
        return Message(buffers, ragged=True), state

    def inner_message(self, message: Message, like: Named) -> Message:
        """What the inner codec had made.

        Raises:
            ValueError: a buffer is truncated or corrupt; names the tensors in the damaged part.
        """
        layout, buffers = Form.of(like).layout, {}
        for name, x in message.buffers.items():
            try:
                buffers[name] = byte_coder.decode(x.cpu().numpy()).to(x.device)
            except byte_coder.Damaged as damage:
                where = _names(layout, damage.begin, damage.end)
                raise ValueError(
                    f"Entropy: buffer {name!r} of {where} is truncated or corrupt: {damage}. Send it "
                    "again; run the same version and the same codec on every worker."
                ) from damage
        return Message(buffers)

    def decode(self, message: Message, like: Named) -> Named:
        """As the inner codec.

        Raises:
            ValueError: the message is truncated, corrupt, or not of these tensors.
        """
        return self.inner.decode(self.inner_message(message, like), like)

    def decode_mean(self, messages: Sequence[Message], like: Named) -> Named:
        """As the inner codec, message by message where it has no faster way.

        Raises:
            ValueError: a message is truncated, corrupt, or not of these tensors.
        """
        return decode_mean(self.inner, [self.inner_message(m, like) for m in messages], like)


def _cuts(layout: Layout, num_elements: int) -> list[int]:
    """Where each tensor begins in a buffer that holds all of them, in order, at one rate."""
    share = num_elements / max(layout.num_elements, 1)
    cuts: list[int] = np.rint(layout.bounds[1:-1] * share).astype(np.int64).tolist()
    return cuts


def _names(layout: Layout, begin: float, end: float) -> str:
    """The tensors that lie there, by shares of all elements."""
    if not layout.names:
        return "no tensors"
    ends, last = layout.bounds[1:], len(layout.names) - 1
    total = layout.num_elements
    first = min(int(np.searchsorted(ends, round(begin * total), side="right")), last)
    final = min(int(np.searchsorted(ends, round(end * total), side="left")), last)
    names = layout.names[first], layout.names[max(first, final)]
    return repr(names[0]) if names[0] == names[1] else f"{names[0]!r} to {names[1]!r}"
