"""The state of a part, kept in the state of the whole under a prefix."""

from sterna.flat import Named
from sterna.seams import State


def put(prefix: str, part: State) -> dict[str, Named]:
    """The slots of ``part``, each named with the prefix."""
    return {prefix + slot: named for slot, named in part.items()}


def take(prefix: str, whole: State) -> State:
    """The slots that were put under the prefix, by the part's own names."""
    return {
        slot.removeprefix(prefix): named for slot, named in whole.items() if slot.startswith(prefix)
    }
