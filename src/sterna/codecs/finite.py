"""Refuse to send what is not finite, by one pass over the flat buffer."""

import math

import torch

from sterna.flat import Flat
from sterna.seams import NotFinite


def largest(flat: Flat, who: str) -> float:
    """Largest magnitude in ``flat``; 0 if it is empty.

    The smallest and the largest value come from one vectorised pass that propagates NaN; the
    tensors are looked at one by one only after it failed, to name the culprit.

    Args:
        flat: what is to travel.
        who: class name for the error.

    Raises:
        NotFinite: a tensor holds NaN or infinity; names the first.
    """
    if flat.buffer.numel() == 0:
        return 0.0
    low, high = torch.aminmax(flat.buffer)
    magnitude = max(-float(low), float(high))
    if not math.isfinite(magnitude) or math.isnan(float(low)):
        refuse(next(name for name, x in flat.items() if not bool(x.isfinite().all())), who)
    return magnitude


def refuse(name: str, who: str, where: str = "") -> None:
    """Raise the error that all codecs share.

    Args:
        name: the parameter.
        who: class name of the codec.
        where: which worker, if it is not this one.

    Raises:
        NotFinite: always.
    """
    raise NotFinite(
        f"{who}: gradient of {name!r} holds NaN or infinity{where}. Lower the learning rate, clip "
        "the gradient norm before the exchange, or skip the step; a codec cannot repair it."
    )
