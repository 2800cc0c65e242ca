"""Entropy-coded messages as the claims send them."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from claims.training import Trained
from sterna.codecs import Entropy, ErrorFeedback, Quantise
from sterna.flat import Named
from sterna.seams import Codec, Exchange, Message

WORKERS = 4


class DecodedOnce(Entropy):
    """`Entropy` for workers of one process: what one of them has decoded, the others need not."""

    def inner_message(self, message: Message, like: Named) -> Message:
        """As `Entropy` has it, from the last few messages where it is among them."""
        key = tuple(x.numpy().tobytes() for x in message.buffers.values())
        if key not in _DECODED:
            while len(_DECODED) >= 2 * WORKERS:
                _DECODED.pop(next(iter(_DECODED)))
            _DECODED[key] = super().inner_message(message, like)
        return _DECODED[key]


_DECODED: dict[tuple[bytes, ...], Message] = {}


def coded(step: float, relative: bool = True) -> Codec:
    """Rounded, coded, and what was lost made up for later."""
    inner = DecodedOnce(inner=Quantise(step=step, relative=relative))
    return ErrorFeedback(inner=inner, decay=1.0)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How the workers agree, and what that is compared with.

    Args:
        exchange: theirs.
        baseline: the arm in float32; empty for one of those.
        every: steps from one message to the next.
        decay: of the weights.
    """

    exchange: Exchange
    baseline: str = ""
    every: int = 1
    decay: float = 0.0


def bits_by_epoch(runs: Sequence[Trained], every: int, num_weights: int) -> list[float]:
    """Bits a weight of one message, which is gathered and so goes to all other workers, by epoch.

    The mean over the runs.
    """
    columns = zip(*(one.bits_by_epoch for one in runs), strict=True)
    messages = runs[0].steps // every // len(runs[0].bits_by_epoch)
    return [fmean(column) / messages / num_weights / (WORKERS - 1) for column in columns]
