"""What is wrong with a command line, and what was probably meant."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """The command line cannot be carried out as typed."""


def require(holds: bool, flag: str, what: str, got: object) -> None:
    """Raise unless a flag is in its range.

    Raises:
        UsageError: it is not.
    """
    if not holds:
        raise UsageError(f"{flag} must be {what}; got {got}.")


def dashed(name: str) -> str:
    """A parameter's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def meant(word: str, words: Iterable[str]) -> str:
    """A question with the nearest of some words, and a space before it; empty if none is near.

    Example:
        >>> meant("digits.snyc", ["digits.sync", "mnist.sync"])
        ' Did you mean digits.sync?'
        >>> meant("xyz", ["digits.sync"])
        ''
    """
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" Did you mean {near[0]}?" if near else ""
