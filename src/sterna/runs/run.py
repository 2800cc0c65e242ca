"""What is run: the value that an experiment returns."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from sterna.comm.agreement import told
from sterna.data.examples import Dataset
from sterna.exchange.all_reduce import AllReduce
from sterna.objectives.cross_entropy import CrossEntropy
from sterna.replica import require_clip_norm
from sterna.schedules import Constant
from sterna.seams import Exchange, Objective
from sterna.server.admission import Synchronous
from sterna.server.server import Server


@dataclass(frozen=True, kw_only=True)
class Run:
    """One full configuration of training: data, model, what is minimised, and how replicas agree.

    Args:
        data: training and test examples.
        model: builds the model; called with the same random state on every worker.
        optimizer: makes the optimizer from the parameters, such as
            ``functools.partial(torch.optim.SGD, lr=0.1)``.
        objective: what is minimised.
        exchange: how replicas agree, in synchronous training.
        server: the rules of an asynchronous server; given, the run is asynchronous and has no exchange.
        schedule: learning-rate factor as a function of the fraction of training that is done.
        epochs: passes over the training examples.
        batch_size: examples per step over all workers, whose number must divide it; with a server,
            examples per push.
        clip_norm: largest Euclidean norm of the gradient that an optimizer's step is made with: the
            agreed one, and between two rounds of local steps each worker's own. Longer ones are shortened;
            None: as they are. A server's workers shorten theirs by ``Server(clip=...)`` instead.

    Raises:
        ValueError: a count is below 1, or ``clip_norm`` is out of range or beside a server that does not
            wait for all.
    """

    data: Dataset
    model: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    objective: Objective = field(default_factory=CrossEntropy)
    exchange: Exchange = field(default_factory=AllReduce)
    server: Server | None = None
    schedule: Callable[[float], float] = field(default_factory=Constant)
    epochs: int = 1
    batch_size: int = 64
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"Run: {name} must be at least 1; got {getattr(self, name)}.")
        require_clip_norm("Run", self.clip_norm)
        rules = self.server
        if rules and self.clip_norm is not None and not isinstance(rules.admission, Synchronous):
            raise ValueError(
                f"Run: clip_norm must be None beside a server; got {self.clip_norm}. No gradient is agreed "
                "on: Server(clip=...) lets its workers shorten theirs."
            )

    @property
    def method(self) -> str:
        """The repr of what makes the run what it is: exchange or server."""
        return repr(self.exchange if self.server is None else self.server)

    def methods(self) -> dict[str, str]:
        """The repr of every method object, for ``run.json`` and for the workers' agreement."""
        agreement = "exchange" if self.server is None else "server"
        parts = ["objective", agreement, "optimizer", "schedule", "epochs", "batch_size"]
        if self.clip_norm is not None:  # runs from before there was one may go on
            parts.append("clip_norm")
        return {part: told(getattr(self, part)) for part in parts}
