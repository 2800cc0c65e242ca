"""What the library says while candidates are made, in words of the command line."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def noted() -> Iterator[list[str]]:
    """Collect the library's warnings as notes, which name flags in the place of parameters."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    said = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning))
    notes.extend(in_flags(text) for text in said)


def in_flags(text: str) -> str:
    """A warning or an error of the library's functions in words of ``sterna compress``.

    Example:
        >>> in_flags("Raise strength (0.1) or epochs (5), or lower round_to (8).")
        'Raise --strength (0.1) or --epochs (5), or lower --multiple-of (8).'
        >>> in_flags("low_rank: multiply_adds=0.01 cannot be met: 0.2 of them are left.")
        '--shares 0.01 cannot be met: 0.2 of them are left.'
    """
    text = text.replace(", or raise vanished", "")
    text = re.sub(r"\b(round_to|multiple_of)\b", "--multiple-of", text)
    text = re.sub(r"\b(?<!-)(strength|depth|epochs)(?= \()", r"--\1", text)
    text = re.sub(r"^(?:Ssl|compress): (depth|validation) must", r"--\1 must", text)
    text = re.sub(r"^(?:low_rank|sparsify): multiply_adds=", "--shares ", text).replace(
        ", cut more layers", ""
    )
    return re.sub(r"^CoNNTrA:", "--method ternary:", text)
