"""How figures are written, the same in the terminal, in Markdown and on the page.

A figure that is not known is a dash. Seconds keep three digits; counts are grouped by thousands.
"""

from collections.abc import Callable

from sterna.data.merit import MERITS
from sterna.runs.estimate import Difference, Estimate

MISSING = "\u2013"
MINUS = "\u2212"


def seconds(value: float | None) -> str:
    """Three digits: ``0.123``, ``1.23``, ``12.3``, ``1,234``."""
    return _three_digits(value)


def megabits(bits: float | None) -> str:
    """Bits in units of 10^6."""
    return MISSING if bits is None else _three_digits(bits / 1e6)


def mebibytes(num_bytes: float | None) -> str:
    """Bytes in units of 2^20."""
    return MISSING if num_bytes is None else _three_digits(num_bytes / 2**20)


def count(value: float | None) -> str:
    """A whole number, grouped; a mean that is not whole keeps one decimal."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value == round(value) or value >= 1e4 else f"{value:,.1f}"


def plain(value: float | None) -> str:
    """A number without a unit, four digits."""
    return MISSING if value is None else _signed(f"{value:.4g}")


def ratio(value: float | None) -> str:
    """``16.0x``: so many times less than the baseline; below one, more."""
    if value is None:
        return MISSING
    if value >= 1000:
        return f"{value:,.0f}x"
    return f"{value:.1f}x" if value >= 9.95 else f"{value:.2f}x"


def compact(value: float) -> str:
    """For axes: ``250``, ``1.5 k``, ``20 M``, ``3 G``."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{_signed(f'{value / size:.4g}')} {prefix}"
    return _signed(f"{value:.4g}")


def estimated(estimate: Estimate | None, write: Callable[[float], str]) -> str:
    """Mean and half the width of the interval, where there is one."""
    return MISSING if estimate is None else f"{write(estimate.mean)}{spread(estimate, write)}"


def spread(estimate: Estimate | None, write: Callable[[float], str]) -> str:
    """Half the width of the interval, behind a space; empty where there is none."""
    half = None if estimate is None else estimate.half_width
    return "" if half is None else f" ± {write(half)}"


def score(estimate: Estimate | None, name: str | None) -> str:
    """A score with its interval; accuracy in percent."""
    return estimated(estimate, lambda value: points(value, name))


def difference(value: Difference | None, name: str | None) -> str:
    """Mean difference with its interval, where one can be told; of accuracy in percentage points."""
    if value is None:
        return MISSING
    mean = points(value.mean, name, sign=True)
    if value.low is None or value.high is None or value.low == value.high:
        return mean
    return f"{mean} [{points(value.low, name)}, {points(value.high, name)}]"


def points(value: float, name: str | None, *, sign: bool = False) -> str:
    """A score, or a difference of two, times the factor of its `Merit`."""
    if name in MERITS:
        value *= MERITS[name].factor
    text = f"{value:+,.2f}" if sign else f"{value:,.2f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return _signed(text)


def percent(share: float) -> str:
    """A share of one, in per cent with two decimals."""
    return f"{100 * share:.2f} %"


def p_value(value: float | None) -> str:
    """Two digits; below a thousandth only that."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.2g}"


def _three_digits(value: float | None) -> str:
    if value is None:
        return MISSING
    size = abs(value)
    if size >= 99.95:
        return _signed(f"{value:,.0f}")
    decimals = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3
    return "0" if value == 0 else _signed(f"{value:.{decimals}f}")


def _signed(text: str) -> str:
    return text.replace("-", MINUS) if text.startswith("-") else text
