"""A codec's state by parameter name, handed out and taken back in groups that may change.

DDP exchanges gradients in buckets and builds the buckets anew after the first step, so what belongs to a
bucket would be lost. Here each tensor of the state belongs to a parameter; a group's tensors are packed
together for as long as the same group is asked for.
"""

from collections.abc import Mapping

from torch import Tensor

from sterna.flat import Flat, Named
from sterna.seams import State

Names = tuple[str, ...]


class StateByName:
    """Slots of tensors by parameter name; each tensor is either loose or in the group last asked for.

    Example:
        >>> import torch
        >>> state = StateByName()
        >>> state.merge({"residual": {"a": torch.zeros(2), "b": torch.ones(1)}})
        >>> {slot: list(named) for slot, named in state.of(("b",)).items()}
        {'residual': ['b']}
        >>> sorted(state.collected())
        ['residual.a', 'residual.b']
    """

    def __init__(self) -> None:
        self._loose: dict[str, dict[str, Tensor]] = {}
        self._groups: dict[Names, State] = {}

    def merge(self, state: State) -> None:
        """Take tensors in, whatever group they come from."""
        for slot, tensors in state.items():
            self._loose.setdefault(slot, {}).update(tensors)

    def of(self, names: Names) -> State:
        """The state of these parameters, packed in their order."""
        if names not in self._groups:
            for old in list(self._groups):
                if not set(old).isdisjoint(names):  # the groups have been built anew
                    self.merge(self._groups.pop(old))
            self._groups[names] = {
                slot: _packed({name: tensors.pop(name) for name in names if name in tensors})
                for slot, tensors in self._loose.items()
            }
        return self._groups[names]

    def put(self, names: Names, state: State) -> None:
        """Take back the state of a group."""
        self._groups[names] = state

    def collected(self) -> dict[str, Tensor]:
        """All tensors under flat keys, ``slot.name``."""
        while self._groups:
            self.merge(self._groups.popitem()[1])
        return {
            f"{slot}.{name}": x
            for slot, tensors in self._loose.items()
            for name, x in tensors.items()
        }

    def load(self, flat: Mapping[str, Tensor]) -> None:
        """Replace every tensor by a copy of the one under its flat key."""
        self.collected()
        for slot, tensors in self._loose.items():
            self._loose[slot] = {
                name: flat[f"{slot}.{name}"].detach().to(x.device, copy=True)
                for name, x in tensors.items()
            }


def _packed(tensors: Named) -> Named:
    return Flat.of(tensors) if len({x.dtype for x in tensors.values()}) == 1 else tensors
