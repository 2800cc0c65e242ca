"""Ways to compress a trained model, each from the least compressed candidate to the most.

A way is a frozen dataclass of hyperparameters with ``candidates``: the procedures, the solver and the
surgery do the work; here they are tried over a range, and what comes out is brought into one form.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from sterna.objectives.force import Force
from sterna.procedures import lowrank
from sterna.procedures.sparsify import sparsify
from sterna.procedures.structures import Structures, branch_ends
from sterna.procedures.training import Training
from sterna.randomness import generator
from sterna.runs.candidate import Candidate, Candidates, Say, nothing, stored_bits
from sterna.runs.noted import in_flags, noted
from sterna.solvers.conntra import CoNNTrA
from sterna.surgery.description import Description, save
from sterna.surgery.factorise import Form
from sterna.surgery.shrink import shrink
from sterna.surgery.ternary import save_packed, ternarise
from sterna.value_sets import TERNARY, Grids, ValueSet

_NAMED = 3
"""Weights that a note names."""
_MILD = 0.25
"""Strength beside shares, over that at which units vanish: it says which go, and the share how many."""


def _labels(values: Sequence[float], write: Callable[[float, int], str]) -> list[str]:
    """A label for each value, with as many more digits as it takes to tell them apart."""
    found: list[str] = []
    for more in range(16):
        found = [write(value, more) for value in values]
        if len(set(found)) == len(found):
            break
    return found


def _unmet(error: ValueError, label: str, labels: Sequence[str], say: Say) -> None:
    """Say that a target, and so what is more compressed, cannot be met; raise if it is the first."""
    if label == labels[0] or "cannot be met" not in str(error):
        raise error
    say(f"{label} and less is not tried: {in_flags(str(error))}")


def _shares(who: str, shares: Sequence[float]) -> None:
    if not shares or not all(0 < share < 1 for share in shares):
        raise ValueError(
            f"{who}: shares must lie in (0, 1), at least one, such as 0.5; got {tuple(shares)!r}."
        )


@dataclass(frozen=True, kw_only=True)
class Ssl:
    """Group lasso, removal of what vanished, fine-tuning: `sterna.procedures.sparsify`.

    Args:
        strengths: of the penalty; empty: six around that which lets a unit of mean length vanish just at
            the end, if the loss does not hold it; with ``shares`` a quarter of that one alone.
        shares: of the multiply-adds that may be left, a candidate for each, with one strength for all.
        depth: strength for whole residual blocks over that for units; 0 keeps them.
        epochs: with the penalty, at least 1.
        finetune_epochs: after the cut.
        round_to: widths are multiples of it.
        rate: factor of the learning rate.

    Raises:
        ValueError: a value is out of range.
    """

    strengths: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    depth: float = 0.0
    epochs: int = 5
    finetune_epochs: int = 5
    round_to: int = 8
    rate: float = 1.0
    by_size: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not all(0 < s < math.inf for s in self.strengths):
            raise ValueError(f"Ssl: strengths must be above 0 and finite; got {self.strengths!r}.")
        if self.shares:
            _shares("Ssl", self.shares)
        if self.shares and len(self.strengths) > 1:
            raise ValueError(
                f"Ssl: strengths must be one or none beside shares; got {self.strengths!r}."
            )
        if self.epochs < 1:
            raise ValueError(f"Ssl: epochs must be at least 1; got {self.epochs}.")

    def candidates(self, model: nn.Module, training: Training, say: Say = nothing) -> Candidates:
        """One for each strength, or for each share."""
        if self.depth > 0 and not branch_ends(model, training.example):
            raise ValueError(
                f"Ssl: depth must be 0 for {type(model).__name__}: it has no residual block that passes "
                f"its input on; got {self.depth!r}."
            )
        strengths = sorted(set(self.strengths or self._usual(training)))
        shares = sorted(set(self.shares), reverse=True)
        tried: list[tuple[float, float | None]] = [(strength, None) for strength in strengths]
        labels = _labels(strengths, lambda s, more: f"strength {s:.{2 + more}g}")
        if shares:
            strength = strengths[0] if self.strengths else _MILD / self._way(training)
            tried = [(strength, share) for share in shares]
            labels = _labels(shares, lambda s, more: f"{s:.{more}%} of work")
        for (strength, share), label in zip(tried, labels, strict=True):
            with noted() as notes:
                try:
                    small, report = sparsify(
                        model,
                        training,
                        strength=strength,
                        multiply_adds=share,
                        depth=self.depth * strength,
                        epochs=self.epochs,
                        finetune_epochs=self.finetune_epochs,
                        round_to=self.round_to,
                        rate=self.rate,
                        finetune_rate=self.rate,
                    )
                except ValueError as error:
                    _unmet(error, label, labels, say)
                    return
            changed = report.parameters_after < report.parameters_before
            found = report.finetuned.accuracy
            yield _described(label, small, found, report.description, changed, notes)

    def _usual(self, training: Training) -> tuple[float, ...]:
        """0.5 to 4 over the sum of the learning rates of all steps."""
        return tuple(c / self._way(training) for c in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0))

    def _way(self, training: Training) -> float:
        return self.rate * _distance(training, self.epochs)


def _distance(training: Training, epochs: int) -> float:
    """Sum of the learning rates over the steps of some epochs, with what momentum makes of them."""
    (group, *_) = training.optimizer([nn.Parameter(torch.zeros(1))]).param_groups
    rate = float(group["lr"]) / (1.0 - float(group.get("momentum", 0.0)))
    steps = epochs * max(1, len(training.data.train) // training.batch_size)
    return rate * math.fsum(training.schedule(step / steps) for step in range(steps))


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """The units of least length go, without any penalty before; fine-tuning. A control.

    Args:
        shares: of each layer's units that stay, each in (0, 1).
        finetune_epochs: after the cut.
        round_to: widths are rounded up to multiples of it.
        rate: factor of the learning rate.

    Raises:
        ValueError: a share is out of range.
    """

    shares: tuple[float, ...] = (0.75, 0.5, 0.35, 0.25, 0.15)
    finetune_epochs: int = 5
    round_to: int = 8
    rate: float = 1.0
    by_size: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        _shares("Magnitude", self.shares)

    def candidates(self, model: nn.Module, training: Training, say: Say = nothing) -> Candidates:
        """One for each share."""
        lengths = Structures.of(model, training.example).norms(model)
        widths: Mapping[str, tuple[int, int]] = {}
        shares = sorted(set(self.shares), reverse=True)
        labels = _labels(shares, lambda s, more: f"{s:.{more}%} of units")
        for share, label in zip(shares, labels, strict=True):
            keep = {
                name: norms.argsort(descending=True)[: math.ceil(share * len(norms))].tolist()
                for name, norms in lengths.items()
            }
            with noted() as notes:
                small, report = shrink(model, training.example, keep, round_to=self.round_to)
                if report.widths and report.widths == widths:
                    say(
                        f"{label}: the same widths again, in multiples of {self.round_to}; not tried"
                    )
                    continue
                widths = report.widths
                training.settle(small)
                training.fit(small, self.finetune_epochs, phase="finetune", rate=self.rate)
            found = training.judge(small).accuracy
            yield _described(label, small, found, report.description, bool(report.widths), notes)


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Layers become two of lower rank, with a force before or without; fine-tuning.

    Args:
        shares: of the multiply-adds that are left over, each in (0, 1).
        force: lambda of `sterna.objectives.Force`, taken as a mean over the other filters; 0 is the
            control, trained as long without it.
        form: of the factors of convolutions.
        epochs: before the cut; at least 1 with a force.
        finetune_epochs: after it.
        round_to: ranks are rounded up to multiples of it.
        rate: factor of the learning rate.

    Raises:
        ValueError: a share is out of range, or the force not finite.
    """

    shares: tuple[float, ...] = (0.75, 0.5, 0.35, 0.25, 0.15)
    force: float = 0.0
    form: Form = "channel"
    epochs: int = 0
    finetune_epochs: int = 5
    round_to: int = 8
    rate: float = 1.0
    by_size: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        _shares("LowRank", self.shares)
        if not math.isfinite(self.force):
            raise ValueError(f"LowRank: force must be finite; got {self.force!r}.")

    def candidates(self, model: nn.Module, training: Training, say: Say = nothing) -> Candidates:
        """One for each share that can be met."""
        shares = sorted(set(self.shares), reverse=True)
        labels = _labels(shares, lambda s, more: f"{s:.{more}%} of work")
        found = lowrank.front(
            model,
            training,
            multiply_adds=shares,
            force=self.force * Force(linear=True, mean=True) if self.force else None,
            epochs=self.epochs,
            rate=self.rate,
            form=self.form,
            finetune_epochs=self.finetune_epochs,
            multiple_of=self.round_to,
            finetune_rate=self.rate,
        )
        for label in labels:
            with noted() as notes:
                try:
                    small, report = next(found)
                except ValueError as error:
                    _unmet(error, label, labels, say)
                    return
            factored = {name: (rank, self.form) for name, rank in report.cut.ranks.items()}
            yield _described(
                label,
                small,
                report.finetuned.accuracy,
                Description(factored=factored),
                bool(factored),
                notes,
            )


@dataclass(frozen=True, kw_only=True)
class Ternary:
    """Weights of few values, by coordinate descent: `sterna.solvers.CoNNTrA`. Saves storage, not time.

    Only the linear layers at the end are searched; the notes name the weights that stay float.

    Args:
        passes: most passes over all weights.
        batch_size: examples that a change is judged by; None takes all.

    Raises:
        ValueError: a value is out of range.
    """

    passes: int = 10
    batch_size: int | None = None
    by_size: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        CoNNTrA(passes=self.passes, batch_size=self.batch_size)

    def candidates(self, model: nn.Module, training: Training, say: Say = nothing) -> Candidates:
        """Five values, three values, and three by rounding alone."""
        five = ValueSet(values=(-2.0, -1.0, 0.0, 1.0, 2.0))
        for label, values in (("five values", five), ("ternary", TERNARY)):
            solver = CoNNTrA(sets=values, passes=self.passes, batch_size=self.batch_size)

            def tell(text: str, label: str = label) -> None:
                say(f"{label}, {text}")

            tell(f"at most {self.passes} passes over the weights")

            with noted() as notes:
                small, report = solver(
                    model,
                    training.data.train,
                    generator(training.seed, "ternary"),
                    say=tell,
                )
            left = _stay_float(report.left)
            yield _packed(label, small, report.grids, training, [*notes, *left])
        with noted() as notes:
            same = tuple((name, TERNARY) for name in report.grids)
            rounded, rounding = ternarise(model, sets=same)
        yield _packed("ternary, rounded only", rounded, rounding.grids, training, [*notes, *left])


def _stay_float(left: Mapping[str, str]) -> list[str]:
    """A sentence for each reason for which weights are not searched."""
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    found = []
    for why, names in reasons.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        found.append(f"Stays float, as it {why}: {', '.join(names[:_NAMED])}{more}.")
    return found


def _described(
    label: str,
    model: nn.Module,
    accuracy: float,
    description: Description,
    changed: bool,
    notes: Sequence[str],
) -> Candidate:
    return Candidate(
        label=label,
        model=model.eval(),
        accuracy=accuracy,
        write=lambda path: save(model, description, path),
        bits=stored_bits(model),
        changed=changed,
        notes=tuple(notes),
    )


def _packed(
    label: str, model: nn.Module, grids: Grids, training: Training, notes: Sequence[str]
) -> Candidate:
    names = dict(model.named_parameters())
    per_code = {n: max(1, math.ceil(math.log2(len(v)))) for n, v in grids.items()}
    per_code = {n: next(b for b in (1, 2, 4, 8) if b >= bits) for n, bits in per_code.items()}
    packed = sum(8 * -(-names[n].numel() * b // 8) for n, b in per_code.items())
    grid = sum(len(v) * 8 * names[n].element_size() for n, v in grids.items())
    others = stored_bits(model) - sum(8 * names[n].nbytes for n in grids)

    def write(path: Path) -> None:
        save_packed(model, grids, path)

    return Candidate(
        label=label,
        model=model.eval(),
        accuracy=training.judge(model).accuracy,
        write=write,
        bits=packed + grid + others,
        changed=True,
        notes=tuple(notes),
    )
