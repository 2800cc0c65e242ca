"""A compressed model among others, and what makes them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from torch import nn

from sterna.procedures.training import Training
from sterna.surgery.program import copied


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A compressed model.

    Args:
        label: which hyperparameter made it.
        model: plain torch.
        accuracy: on the validation part, in [0, 1].
        write: writes its weights, and what is needed to load them again, to a path.
        bits: what the weights take when they are stored.
        changed: whether anything was removed at all.
        notes: what the library warned of.
    """

    label: str
    model: nn.Module
    accuracy: float
    write: Callable[[Path], None]
    bits: int
    changed: bool
    notes: tuple[str, ...] = ()


Candidates: TypeAlias = Iterator[Candidate]
Say: TypeAlias = Callable[[str], object]


def nothing(text: str) -> None:
    """Tells nobody."""


class Compressor(Protocol):
    """A way to compress."""

    @property
    def by_size(self) -> bool:
        """Whether what is gained is storage; otherwise time."""
        ...

    def candidates(self, model: nn.Module, training: Training, say: Say = nothing) -> Candidates:
        """From the least compressed to the most; the model is not changed. ``say`` is told of progress."""
        ...


def stored_bits(model: nn.Module) -> int:
    """Bits of a model's parameters and buffers, shared ones counted once."""
    return sum(8 * x.nbytes for x in (*model.parameters(), *model.buffers()))


def control_of(model: nn.Module) -> nn.Module:
    """A copy of the dense model, to be timed and judged beside the candidates."""
    return copied(model).eval()
