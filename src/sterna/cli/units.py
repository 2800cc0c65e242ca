"""Quantities as they are typed: ``100Mbps``, ``50us``, ``0:4.0``."""

import math
import re

MOST_SECONDS = 10_000_000
"""No flag takes more: timers and clocks below overflow at some billions."""
# Powers of ten.
_BITS = {"bps": 0, "kbps": 3, "Mbps": 6, "Gbps": 9}
_SECONDS = {"s": 0, "ms": -3, "us": -6}


def bandwidth(text: str) -> float | None:
    """Bits per second, or None.

    Raises:
        ValueError: it is not a bandwidth.

    Example:
        >>> bandwidth("100Mbps"), bandwidth("none")
        (100000000.0, None)
    """
    if text == "none":
        return None
    return _quantity(
        text, _BITS, True, math.inf, "a bandwidth above 0, such as 100Mbps or 1Gbps, or none"
    )


def seconds(text: str) -> float:
    """Seconds.

    Raises:
        ValueError: it is not a time.

    Example:
        >>> seconds("50us"), seconds("0s")
        (5e-05, 0.0)
    """
    must = f"a time up to {MOST_SECONDS:,}s, such as 50us, 2ms or 0s"
    return _quantity(text, _SECONDS, False, MOST_SECONDS, must)


def straggler(text: str) -> tuple[int, float]:
    """A worker and its factor.

    Raises:
        ValueError: it is not a pair.

    Example:
        >>> straggler("0:4.0")
        (0, 4.0)
    """
    worker, _, factor = text.partition(":")
    try:
        return int(worker), float(factor)
    except ValueError:
        raise ValueError(
            f"a straggler must be WORKER:FACTOR, such as 0:4.0; got {text!r}."
        ) from None


def _quantity(text: str, units: dict[str, int], positive: bool, most: float, must: str) -> float:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]+)", text)
    power = units.get(match[2]) if match else None
    value = math.inf if match is None or power is None else float(f"{match[1]}e{power}")
    if math.isinf(value) or value > most or (positive and not value):
        raise ValueError(f"it must be {must}; got {text!r}.")
    return value
