"""How the phases of a procedure train and judge: data, optimizer, objective, and the seed of everything."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from sterna.comm.solo import Solo
from sterna.data.examples import Dataset
from sterna.evaluation import Evaluation, evaluate, reestimate
from sterna.loop import fit
from sterna.objectives.cross_entropy import CrossEntropy
from sterna.randomness import derive, isolated
from sterna.replica import Replica, require_clip_norm
from sterna.samplers.shuffle import Shuffle
from sterna.schedules import Constant
from sterna.seams import Objective

Quality: TypeAlias = Evaluation
"""How good a model is on the test examples: loss, accuracy, perplexity."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a phase of a procedure trains a model, and how the result is judged.

    The same model, seed and phase give the same weights, bit for bit.

    Args:
        data: examples to train on and to judge by. To choose among results, give a
            ``validation_split``, and judge the chosen one by the whole data set's.
        optimizer: makes the optimizer from the parameters, such as
            ``functools.partial(torch.optim.SGD, lr=0.1)``.
        objective: what is minimised where a phase says nothing else.
        schedule: learning-rate factor as a function of the fraction of a phase that is done.
        batch_size: examples per step.
        clip_norm: largest Euclidean norm of a gradient, the penalty's included; None: as it is.
        seed: of everything.
        device: where the models are trained and judged.

    Raises:
        ValueError: ``batch_size`` is below 1 or above the number of training examples, or
            ``clip_norm`` is out of range.

    Example:
        >>> from functools import partial
        >>> from sterna.data import Examples
        >>> points = Examples(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8))
        >>> sgd = partial(torch.optim.SGD, lr=1.0)
        >>> training = Training(data=Dataset("toy", points, points, 4), optimizer=sgd, batch_size=8)
        >>> model = nn.Linear(4, 4)
        >>> training.fit(model, epochs=20)
        >>> training.judge(model).accuracy
        1.0
    """

    data: Dataset
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    objective: Objective = field(default_factory=CrossEntropy)
    schedule: Callable[[float], float] = field(default_factory=Constant)
    batch_size: int = 64
    clip_norm: float | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(self.data.train):
            raise ValueError(
                f"Training: batch_size must lie in [1, {len(self.data.train)}], the training examples; "
                f"got {self.batch_size}."
            )
        require_clip_norm("Training", self.clip_norm)

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        objective: Objective | None = None,
        *,
        phase: str = "fit",
        rate: float = 1.0,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        """Train a model in place; see `steps`."""
        for _ in self.steps(model, epochs, objective, phase=phase, rate=rate, span=span):
            pass

    def steps(
        self,
        model: nn.Module,
        epochs: int,
        objective: Objective | None = None,
        *,
        phase: str = "fit",
        rate: float = 1.0,
        span: tuple[float, float] = (0.0, 1.0),
    ) -> Iterator[float]:
        """Train a model in place, step by step, for who does something after each.

        Args:
            model: on any device; it is moved to ``device``.
            epochs: passes over the training examples; 0 trains nothing.
            objective: what is minimised; by default the training's own.
            phase: names the streams of random numbers, which are different in each phase.
            rate: factor of the learning rate throughout.
            span: from where to where in the schedule the phase goes, for phases that share one.

        Yields:
            After each update the learning rate that it took, as a proximal step needs it: with momentum
            m a gradient moves a weight by 1 / (1 - m) as much in the end, and so does the rate here.

        Raises:
            ValueError: ``epochs`` is negative, ``rate`` not above 0 and finite, or ``span`` not a part
                of [0, 1].
            NotFinite: a gradient holds NaN or infinity.
        """
        if epochs < 0:
            raise ValueError(f"Training: epochs must be at least 0; got {epochs}.")
        if not 0 < rate < math.inf:
            raise ValueError(f"Training: rate must be above 0 and finite; got {rate!r}.")
        first, last = span
        if not 0 <= first < last <= 1:
            raise ValueError(
                f"Training: span must be a part of [0, 1], such as (0, 0.5); got {span!r}."
            )
        if epochs == 0:
            return
        model.to(self.device)
        train, seed = self.data.train.to(self.device), derive(self.seed, "phase", phase)
        sampler = Shuffle(len(train), batch_size=self.batch_size, seed=seed)
        num_steps = epochs * len(sampler)
        replica = Replica(
            model,
            self.optimizer(p for p in model.parameters() if p.requires_grad),
            lambda step: rate * self.schedule(first + (last - first) * step / num_steps),
            self.clip_norm,
        )
        records = fit(
            replica, train, sampler, objective or self.objective, epochs=epochs, seed=seed
        )
        while True:
            with isolated(seed, "layers", replica.step):  # dropout reads torch's global state
                if next(records, None) is None:
                    break
            yield _effective_rate(replica.optimizer)
        # Gradients would otherwise keep the whole buffer alive.
        model.zero_grad(set_to_none=True)

    def judge(self, model: nn.Module) -> Quality:
        """What it reaches on the test examples; the model is moved to ``device``, and keeps its mode."""
        return evaluate(model.to(self.device), self.data.test, Solo())

    def settle(self, model: nn.Module) -> None:
        """Take batch-norm statistics anew after an edit, in place; a model without them stays as it is."""
        reestimate(model.to(self.device), self.data.train)

    @property
    def example(self) -> Tensor:
        """One training input, shape (1, ...), to trace a model on."""
        return self.data.train.inputs[:1].to(self.device)


def _effective_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the first group, with what momentum makes of it."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / (1.0 - float(group.get("momentum", 0.0)))
