"""Error feedback: what the codec lost in this step is added to what it sends in the next.

    x_t     = g_t + beta r_t                                                           (1)
    m_t     = encode(x_t)                                                              (2)
    r_{t+1} = x_t - decode(m_t),    r_0 = 0                                            (3)

Symbols: g gradient of this worker, r residual, kept by this worker for each parameter, m the
message, beta the share of the residual that is kept (``decay``).
Reference: F. Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
    Distributed Training of Speech DNNs", Interspeech 2014; S. P. Karimireddy et al., "Error
    Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019, arXiv:1901.09847
    (beta = 1). The decay is from J. Wu et al., "Error Compensated Quantized SGD", ICML 2018,
    arXiv:1806.08054.
Differs from the paper: the residual is one of gradients, not of learning rate times gradient, so a
    change of the rate applies to what is left over as well. beta is 0.9 unless told, where the
    papers that need no decay have 1: with omega = E|x - decode(encode(x))|^2 / |x|^2, the residual
    stays bounded for certain only where beta^2 omega < 1. A codec that rounds or selects has omega
    < 1, and beta = 1 loses nothing. Ternary codes of most gradients have omega >= 1:
    with beta = 1 their residual grows without end (60 times the gradient after 200 steps of
    Gaussian gradients clipped at 2.5, against 2.5 times with beta = 0.9).
Cost per step: the inner codec's bits; one decode and two passes over the gradient; a second
    gradient in memory on every worker, and a third during the call. Hurts with very sparse updates
    (a row's residual is sent long after the row was seen, also for a parameter that this step did
    not use) and where workers come and go: a worker that leaves takes its residual with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sterna.codecs.form import decode_mean, empty
from sterna.codecs.slots import put, take
from sterna.flat import Flat, Named
from sterna.seams import Codec, Comm, Message, State

_INNER = "inner."


@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """A codec around another that remembers what the other lost.

    State: slot ``residual`` by parameter name, and the inner codec's slots under ``inner.``. What
    the inner codec sends exactly leaves no residual.

    Args:
        inner: any codec.
        decay: beta, share of the residual that is kept, in (0, 1]. 1 for a codec whose error is
            smaller than what it is given (`Fp16`); below 1 for ternary codes.

    Raises:
        TypeError: ``inner`` is not a codec.
        ValueError: ``decay`` is out of range.

    Example:
        >>> from sterna.codecs.fp16 import Fp16
        >>> from sterna.comm.solo import Solo
        >>> codec, g = ErrorFeedback(inner=Fp16(), decay=1.0), {"w": torch.tensor([1 + 2.0**-12])}
        >>> state, sent = codec.init(g), 0.0
        >>> for _ in range(4):
        ...     message, state = codec.encode(g, state, Solo(), torch.Generator())
        ...     sent += codec.decode(message, g)["w"].item()
        >>> sent - 4, 4 * 2.0**-12
        (0.0009765625, 0.0009765625)
    """

    inner: Codec = field(kw_only=False)
    decay: float = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.inner, type) or not isinstance(self.inner, Codec):
            raise TypeError(
                f"ErrorFeedback: inner must be a codec; got {self.inner!r}. "
                "Pass an instance, as in ErrorFeedback(inner=TernGrad())."
            )
        if not 0 < self.decay <= 1:
            raise ValueError(
                f"ErrorFeedback: decay must lie in (0, 1]; got {self.decay!r}. "
                "For no error feedback use the inner codec itself."
            )

    @property
    def summable(self) -> bool:
        """As the inner codec."""
        return self.inner.summable

    @property
    def unbiased(self) -> bool:
        """False: a message holds what earlier ones left out."""
        return False

    def init(self, like: Named) -> State:
        """A residual of zeros, and the inner codec's state."""
        return self._state(Flat.zeros_like(like), self.inner.init(like))

    @staticmethod
    def _state(residual: Named, inner: State) -> State:
        return {"residual": residual, **put(_INNER, inner)}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        """Eq. (1) to (3). Reuses the memory of ``state``, which stays as it was if this raises.

        Raises:
            NotFinite: as the inner codec.
            ValueError: ``named`` holds a parameter that ``init`` was not shown.
        """
        flat, residual = Flat.of(named), state["residual"]
        whole = len(residual) == len(flat)
        old = self._pack(residual, flat)
        # Memory of its own: the message may alias x, and must not change with the residual.
        x = Flat(flat.layout, empty(len(old), old.dtype, old.device))
        torch.add(flat.buffer, old, alpha=self.decay, out=x.buffer)
        message, inner_state = self.inner.encode(x, take(_INNER, state), comm, rng)
        sent = Flat.of(self.inner.decode(message, x)).buffer
        rest = Flat(x.layout, torch.sub(x.buffer, sent, out=old))
        if not whole:
            for name, left in rest.items():
                residual[name].copy_(left)
        return message, self._state(rest if whole else residual, inner_state)

    @staticmethod
    def _pack(residual: Named, flat: Flat) -> Tensor:
        """The residual of what is sent, in its order; without a copy if that is how it lies."""
        if isinstance(residual, Flat) and residual.layout == flat.layout:
            return residual.buffer
        for name in flat:
            if name not in residual:
                raise ValueError(
                    f"ErrorFeedback: there is no residual for {name!r}; call init with every "
                    "parameter that may be sent."
                )
        parts = [residual[name].reshape(-1) for name in flat]
        return torch.cat(parts) if parts else torch.zeros_like(flat.buffer)

    def decode(self, message: Message, like: Named) -> Named:
        """As the inner codec."""
        return self.inner.decode(message, like)

    def decode_mean(self, messages: Sequence[Message], like: Named) -> Named:
        """As the inner codec, message by message where it has no faster way."""
        return decode_mean(self.inner, messages, like)
