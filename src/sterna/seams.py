"""The seams: what each part of a training run is asked, and the few plain records that pass between.

A method is a frozen, keyword-only dataclass of hyperparameters. Its run state is a separate value: made
by ``init``, passed in, handed back. Every state has one form, ``State``: slot, then parameter name, then
tensor. So a checkpoint is the states, N simulated workers are N states, and a wrapper around DDP can
hand a codec any subset of the parameters. A callee may reuse the memory of the state it is given.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sterna.flat import Named
from sterna.ledger import Ledger
from sterna.replica import Replica

State = Mapping[str, Named]


@dataclass(frozen=True)
class Batch:
    """Examples of one step: ``inputs`` and ``targets`` share the first dimension; ``index`` says which."""

    inputs: Tensor
    targets: Tensor
    index: Tensor


class Loss(NamedTuple):
    """``per_example``: shape (batch,), differentiable. ``penalty``: scalar, does not depend on the batch."""

    per_example: Tensor
    penalty: Tensor

    @property
    def total(self) -> Tensor:
        """Scalar to differentiate: mean over the examples plus the penalty."""
        return self.per_example.mean() + self.penalty


@dataclass(frozen=True)
class Message:
    """What travels: packed buffers by name.

    Args:
        buffers: the same names and dtypes on every worker, in the same order.
        ragged: sizes may differ between workers. False promises that they are equal, which saves the
            exchange of sizes.
        summable: the elementwise sum of such messages decodes to the sum of what was encoded, whatever
            the codec's other messages do; so on every worker, or on none.
    """

    buffers: Named
    ragged: bool = False
    summable: bool = False


class Comm(Protocol):
    """A transport: collectives over ``size`` workers, counted in a ledger.

    Every worker must call the same collectives in the same order. A lost peer raises `PeerLost`.
    """

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def engine(self) -> str:
        """What carries it: ``solo``, ``in_process``, ``gloo``, ``nccl``."""
        ...

    def gather(self, message: Message) -> Sequence[Message]:
        """The messages of all workers, by rank, on every worker; read-only, their memory may be shared."""
        ...

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over workers, in place, by the engine's own all-reduce."""
        ...

    def max_(self, x: Tensor) -> Tensor:
        """Largest over workers, elementwise, in place."""
        ...

    def broadcast_(self, x: Tensor, root: int = 0) -> Tensor:
        """The root's values on every worker, in place."""
        ...

    def all_to_all(self, rows: Tensor) -> Tensor:
        """uint8, (size, bytes): row j goes to rank j; row i of the result came from rank i."""
        ...


class PeerLost(RuntimeError):
    """Another worker died, left, or did not answer in time."""


class NotFinite(ValueError):
    """A gradient or weight that was to travel holds NaN or infinity."""


class Sampler(Protocol):
    """Which examples? Iterating gives the index batches that are left of the current epoch."""

    @property
    def epoch(self) -> int: ...
    def __iter__(self) -> Iterator[Tensor]: ...
    def __len__(self) -> int: ...
    def observe(self, index: Tensor, loss: Tensor) -> None:
        """Hear the losses, shape (batch,), of the examples ``index``."""
        ...

    def state_dict(self) -> dict[str, int | Tensor]: ...
    def load_state_dict(self, state: Mapping[str, int | Tensor]) -> None: ...


class Source(Protocol):
    """Examples that can be fetched by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Batch: ...


class Objective(Protocol):
    """What is minimised? Objectives add, scale and wrap: ``CrossEntropy() + 1e-4 * GroupLasso()``."""

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss: ...


@runtime_checkable
class Codec(Protocol):
    """What travels? Turns named tensors into a message, and a message back into named tensors.

    ``summable``: the elementwise sum of messages decodes to the sum of what was encoded, so the engine's
    all-reduce may add them. ``unbiased``: decoding gives the input in expectation. Both are ``ClassVar``
    or properties of the method.
    """

    @property
    def summable(self) -> bool: ...
    @property
    def unbiased(self) -> bool: ...
    def init(self, like: Named) -> State: ...
    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        """Leaves ``named`` untouched. Its values may be aliased by the message.

        Raises:
            NotFinite: a tensor holds NaN or infinity; the message names it.
        """
        ...

    def decode(self, message: Message, like: Named) -> Named:
        """Names, shapes and dtype of ``like``; no sender state, so that any peer can decode."""
        ...


@runtime_checkable
class Averaging(Codec, Protocol):
    """A codec that decodes the mean of several messages faster than one by one."""

    def decode_mean(self, messages: Sequence[Message], like: Named) -> Named: ...


class Exchange(Protocol):
    """How do replicas agree? Called once per step, after backward; it also steps the optimizer."""

    def init(self, replica: Replica) -> State: ...
    def __call__(
        self, replica: Replica, state: State, comm: Comm, rng: torch.Generator
    ) -> State: ...


class Admission(Protocol):
    """May a worker of an asynchronous server go on? Asked when it has pushed, before it reads again."""

    def admits(self, clocks: Sequence[int], worker: int) -> bool:
        """Whether the worker at position ``worker`` may begin its next clock.

        ``clocks``: clocks that each living worker has ended. Which worker asks may matter through
        its clock only, and one that is furthest behind is always admitted, or all would wait.
        """
        ...

    def together(self, workers: int) -> int:
        """How many of ``workers`` living workers make one update, by the mean of their gradients.

        They have all read the same weights; whoever comes later with those has come too late. 0: every
        gradient makes an update of its own.
        """
        ...


@dataclass(frozen=True)
class Push:
    """A gradient on its arrival at an asynchronous server.

    Args:
        worker: who computed it.
        gradient: as the codec delivers it. Its memory may be reused.
        weights: the server's, which the update is about to change. Read only.
        backup: the weights that the gradient was computed at. Read only.
        version: updates that ``weights`` have had.
        staleness: those of them that ``backup`` has not had.
    """

    worker: int
    gradient: Named
    weights: Named
    backup: Named
    version: int
    staleness: int


class Correction(Protocol):
    """What does a stale gradient become? The optimizer of the server is given the result."""

    def init(self, like: Named) -> State: ...
    def correct(self, push: Push, state: State) -> tuple[Named, State]:
        """The update, under the names of the gradient, and the next state."""
        ...
