"""Warm-up: the first messages travel as they are, or less compressed, and all later ones through the codec.

    m_t = g_t  or  first(g_t)   for t <= K                                             (1)
    m_t = inner(g_t)            for t > K                                              (2)

Symbols: g what is to travel, m the message, t its number, counted for each parameter, K ``steps``. A
message says by the names of its buffers which of the two it is, so that a peer that has counted otherwise,
or not at all, decodes it. For a codec that grows coarser in several stages, put one warm-up in another.
Reference: Y. Lin, S. Han, H. Mao, Y. Wang, W. J. Dally, "Deep Gradient Compression", ICLR 2018,
    arXiv:1712.01887, section 3.3 (less compression in the first epochs); T. Vogels, S. P. Karimireddy, M.
    Jaggi, "PowerSGD", NeurIPS 2019, arXiv:1905.13727, whose hook in PyTorch begins with plain gradients.
Differs from the paper: a switch instead of a ratio that grows; the rate of learning is left alone.
Cost per step: 32 bits an entry for K steps in float32, by the engine's all-reduce; then the inner codec's.
    8 bytes of state a parameter. Hurts where K is a good part of training: with two workers
    50 plain steps cost as many bits as 800 with 2 bits an entry.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sterna.codecs.finite import largest
from sterna.codecs.form import Form, decode_mean, expect, mean_of_decoded
from sterna.codecs.slots import put, take
from sterna.flat import Flat, Named
from sterna.seams import Codec, Comm, Message, State

_INNER, _FIRST, _OTHER = "inner.", "first.", "+"


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Plain messages first, then those of a codec.

    State: slot ``sent``, messages so far by parameter, and the codecs' slots under ``inner.`` and ``first.``.
    A message of several parameters is one of the first kind as long as it is for any of them.

    Args:
        inner: any codec, used from message ``steps`` + 1 on.
        steps: K, messages before that; at least 1. In `AllReduce` and in DDP a message is a step, in
            `ModelAverage` a round.
        first: the codec until then; None sends tensors as they are.

    Raises:
        TypeError: ``inner`` or ``first`` is not a codec.
        ValueError: ``steps`` is out of range.

    Example:
        >>> from sterna.codecs.terngrad import TernGrad
        >>> from sterna.comm.solo import Solo
        >>> codec, g, rng = WarmUp(inner=TernGrad(), steps=1), {"w": torch.ones(100)}, torch.Generator()
        >>> state = codec.init(g)
        >>> for _ in range(2):
        ...     message, state = codec.encode(g, state, Solo(), rng)
        ...     print({name: x.nbytes for name, x in message.buffers.items()})
        {'first.values': 400}
        {'scale': 4, 'code': 25}
    """

    inner: Codec = field(kw_only=False)
    steps: int
    first: Codec | None = None

    changes_form: ClassVar[bool] = True
    """Later messages have other buffers, so memory laid out for the first will not do."""

    def __post_init__(self) -> None:
        for name, codec in (("inner", self.inner), ("first", self.first)):
            plain = codec is None and name == "first"
            if not plain and (isinstance(codec, type) or not isinstance(codec, Codec)):
                raise TypeError(
                    f"WarmUp: {name} must be a codec; got {codec!r}. Pass an instance, as in "
                    "WarmUp(inner=TernGrad(), steps=100)."
                )
        if not (isinstance(self.steps, int) and self.steps >= 1):
            raise ValueError(
                f"WarmUp: steps must be a whole number of messages, at least 1; got {self.steps!r}. "
                "Without a warm-up use the inner codec itself."
            )

    @property
    def summable(self) -> bool:
        """Whether all messages are; those that are without it say so."""
        return self.inner.summable and (self.first is None or self.first.summable)

    @property
    def unbiased(self) -> bool:
        """Whether all messages are."""
        return self.inner.unbiased and (self.first is None or self.first.unbiased)

    def init(self, like: Named) -> State:
        """Nothing sent, and the codecs' states."""
        sent = Flat.of({name: torch.zeros((), dtype=torch.int64) for name in like})
        first = {} if self.first is None else self.first.init(like)
        return {"sent": sent, **put(_INNER, self.inner.init(like)), **put(_FIRST, first)}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        """Eq. (1) or (2). Reuses the memory of ``state``, which stays as it was if this raises.

        Raises:
            NotFinite: a tensor holds NaN or infinity.
            ValueError: ``named`` holds a parameter that ``init`` was not shown.
        """
        counts = self._counts(state["sent"], named)
        begins = bool(named) and int(min(count.min() for count in counts)) < self.steps
        slots, message = dict(state), Message({})
        if begins and self.first is None:
            flat = Flat.of(named)
            largest(flat, "WarmUp")
            message = Message({_FIRST + "values": flat.buffer}, summable=True)
        else:
            codec, slot = (self.first, _FIRST) if begins and self.first else (self.inner, _INNER)
            message, kept = codec.encode(named, take(slot, state), comm, rng)
            slots.update(put(slot, kept))
            buffers = {_named(name, begins): x for name, x in message.buffers.items()}
            summable = codec.summable or message.summable
            message = Message(buffers, ragged=message.ragged, summable=summable)
        if begins:
            for count in counts:
                count.add_(1)
        return message, slots

    @staticmethod
    def _counts(sent: Named, named: Named) -> list[Tensor]:
        """Views of what is counted for these parameters; one where they are all of them."""
        if isinstance(sent, Flat) and sent.layout.names == tuple(named):
            return [sent.buffer]
        for name in named:
            if name not in sent:
                raise ValueError(
                    f"WarmUp: nothing is counted for {name!r}; call init with every parameter that may "
                    "be sent."
                )
        return [sent[name] for name in named]

    def _parts(self, messages: Sequence[Message]) -> tuple[Codec | None, list[Message]]:
        """Whose the messages are, None for plain ones, and what that codec had made."""
        first = {name.startswith(_FIRST) for message in messages for name in message.buffers}
        if len(first) > 1:
            raise ValueError(
                "WarmUp: one buffer is of the warm-up and another is not: a corrupt message, or workers "
                "that have not taken the same steps."
            )
        begins = first == {True}
        prefix = _FIRST if begins else _OTHER
        bare = [
            Message(
                {name.removeprefix(prefix): x for name, x in message.buffers.items()},
                message.ragged,
            )
            for message in messages
        ]
        return (self.first if begins else self.inner), bare

    def decode(self, message: Message, like: Named) -> Named:
        """As the message says.

        Raises:
            ValueError: the message is not of these tensors.
        """
        codec, (bare,) = self._parts([message])
        return _plain(bare, like) if codec is None else codec.decode(bare, like)

    def decode_mean(self, messages: Sequence[Message], like: Named) -> Named:
        """As the codec that made the messages, one by one where it has no faster way.

        Raises:
            ValueError: a message is not of these tensors, or they are of both kinds.
        """
        codec, bare = self._parts(messages)
        if codec is not None:
            return decode_mean(codec, bare, like)
        return mean_of_decoded(_plain(message, like) for message in bare)


def _named(name: str, begins: bool) -> str:
    """The inner codec's buffers keep their names, unless they look like those of a warm-up."""
    if begins:
        return _FIRST + name
    return _OTHER + name if name.startswith((_FIRST, _OTHER)) else name


def _plain(message: Message, like: Named) -> Flat:
    form = Form.of(like)
    expect("WarmUp", message, "values", form.dtype, form.layout.num_elements)
    return Flat(form.layout, message.buffers["values"])
