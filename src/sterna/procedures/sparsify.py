"""Sparsify: train with a group lasso, take out what vanished, train what is left.

    1. W <- dense weights
    2. for some epochs:  W <- W - a grad E(W),  then for each unit g of each layer l
       w_g <- max(0, 1 - a s m_l / ||w_g||) w_g                                          (1)
    3. units with ||w_g|| <= v m_l are cut out of all parameters, whole residual branches likewise; then
       the same share of each layer, the shortest, until no more than ``multiply_adds`` are left
    4. for some more epochs:  W' <- W' - a grad E(W')

Symbols: a learning rate (with momentum m: a / (1 - m)), s ``strength``, m_l mean length of the units of
layer l that are not zero, taken anew at each epoch. A unit is all that must leave
together (`sterna.procedures.structures`): a filter with its bias, batch norm and readers, a hidden unit of
an LSTM (ISS), a channel of a residual stream over all its branches.

Reference: W. Wen, C. Wu, Y. Wang, Y. Chen, H. Li, "Learning Structured Sparsity in Deep Neural
    Networks", NIPS 2016, arXiv:1608.03665 (SSL); W. Wen et al., "Learning Intrinsic Sparse Structures
    within Long Short-Term Memory", ICLR 2018, arXiv:1709.05027 (ISS).
Differs from the paper: filter and reading channels are one group, not two, biases included, so that what
    is cut changes nothing else; strengths are relative to m_l, which counts for no less than a tenth of
    what it was at first; the proximal step (1) by default, the papers' slope with ``proximal=False`` (m_l
    then from the start; units that the slope would carry past zero are set to zero, where the papers cut
    single small weights); a branch is penalised by its last layer; zeros are cut out, not left in place.
Cost per step: one pass over the penalised weights. Hurts where the shape that comes out would learn as
    well from scratch: train that shape as a control.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sterna.objectives.algebra import Sum
from sterna.objectives.group_lasso import GroupLasso
from sterna.objectives.proximal import land, proximal_step
from sterna.procedures.cut import Cut
from sterna.procedures.structures import Structures
from sterna.procedures.training import Quality, Training
from sterna.seams import Objective
from sterna.surgery.description import Description
from sterna.surgery.program import copied


@dataclass(frozen=True, kw_only=True)
class Sparsified:
    """What `sparsify` did.

    Args:
        widths: units before and after, for each group that was penalised and is still there.
        blocks: residual blocks that went.
        left: layers that were not penalised, with the reason.
        parameters_before: numbers in the model's parameters, shared ones counted once.
        parameters_after: the same in the smaller model.
        multiply_adds_before: of one example.
        multiply_adds_after: the same of the smaller model.
        dense: quality of the model as it was given.
        penalised: after the epochs with the penalty.
        shrunk: after the cut, with batch-norm statistics taken anew.
        finetuned: of the model that is returned.
        epochs: passes over the training examples, both phases.
        strength: of the penalty.
        description: how to rebuild the smaller model; see `sterna.surgery.save`.
    """

    widths: Mapping[str, tuple[int, int]]
    blocks: tuple[str, ...]
    left: Mapping[str, str]
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int
    dense: Quality
    penalised: Quality
    shrunk: Quality
    finetuned: Quality
    epochs: int
    strength: float
    description: Description


def sparsify(
    model: nn.Module,
    training: Training,
    *,
    strength: float,
    epochs: int,
    finetune_epochs: int,
    depth: float = 0.0,
    layers: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    factors: Sequence[tuple[str, float]] = (),
    adaptive: float | None = None,
    proximal: bool = True,
    vanished: float = 0.05,
    multiply_adds: float | None = None,
    round_to: int = 1,
    objective: Objective | None = None,
    rate: float = 1.0,
    finetune_rate: float = 1.0,
    span: tuple[float, float] | None = None,
) -> tuple[nn.Module, Sparsified]:
    """A smaller copy of a trained model; the model is not changed.

    Args:
        model: dense, trained, of any kind that `sterna.surgery.shrink` takes.
        training: data, optimizer and seed of both phases.
        strength: s, at least 0.
        epochs: with the penalty, at least 1.
        finetune_epochs: after the cut, at least 0.
        depth: the same as ``strength`` for whole residual branches, at least 0.
        layers: `fnmatch` patterns of the groups and blocks that are penalised.
        exclude: patterns of those that are not.
        factors: pairs (pattern, factor of the strength) by group or block; the first that fits counts.
        adaptive: let the penalty of a unit fall with its length: e in (4) of `GroupLasso`, in mean
            lengths. None: all units of a layer alike.
        proximal: the step (1); otherwise the penalty is added to the loss.
        vanished: v, in [0, 1).
        multiply_adds: share of the dense model's that may be left, in (0, 1). If more are left by what
            vanished, the shortest units go too, the same share of each layer (with ``depth``, of the
            blocks as well), the least that meets it. None: only what vanished goes.
        round_to: widths are rounded up to multiples of it; 8 or 16 are fast.
        objective: of the epochs with the penalty, to add to; by default the training's own.
        rate: factor of the learning rate while the penalty acts.
        finetune_rate: factor of the learning rate after the cut.
        span: from where to where in the learning rate's schedule both phases go together, each as far
            as it has epochs: (0, 1) takes them through it once, and (0.4, 1) goes on where a training
            with ``span=(0, 0.4)`` stopped. None: each goes through the whole schedule by itself.

    Returns:
        The smaller model, and what was done. Warns if nothing was removed, and if a layer would have
        lost all of its units, of which one is kept.

    Raises:
        Refused: the model cannot be traced, or nothing in it can shrink.
        ValueError: an argument is out of range, a pattern fits nothing, or ``multiply_adds`` cannot be
            met (found before training).
        NotFinite: training diverged.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from sterna.data import Dataset, Examples
        >>> points = Examples(torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8))
        >>> sgd = partial(torch.optim.SGD, lr=1.0)
        >>> training = Training(data=Dataset("toy", points, points, 4), optimizer=sgd, batch_size=8)
        >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> training.fit(model, 10)
        >>> small, report = sparsify(model, training, strength=0.02, epochs=20, finetune_epochs=5)
        >>> report.widths["0"][1] < 32, report.finetuned.accuracy
        (True, 1.0)
    """
    _check(strength, depth, epochs, finetune_epochs, vanished, multiply_adds)
    if not (isinstance(round_to, int) and round_to >= 1):
        raise ValueError(
            f"sparsify: round_to must be a whole number, at least 1; got {round_to!r}."
        )
    small, example = copied(model).to(training.device), training.example
    found = Structures.of(small, example, layers=layers, exclude=exclude, depth=depth > 0)
    if depth > 0 and not found.branches:
        raise ValueError(
            f"sparsify: depth must be 0 for {type(model).__name__}: no residual block that layers and "
            f"exclude leave in passes its input on when its last layer is zero; got {depth!r}."
        )
    target = None if multiply_adds is None else multiply_adds * found.multiply_adds
    cut = Cut(found, round_to, example)
    if target is not None:
        cut.require(small, target)
    dense = training.judge(small)

    def lassos() -> list[GroupLasso]:
        return found.penalties(small, strength, depth, factors, adaptive)

    inner = objective or training.objective
    penalised_span, finetune_span = _spans(span, epochs, finetune_epochs)
    penalties, an_epoch = lassos(), len(training.data.train) // training.batch_size
    steps = training.steps(
        small,
        epochs,
        inner if proximal else Sum((inner, *penalties)),
        phase="sparsify",
        rate=rate,
        span=penalised_span,
    )
    for k, moved in enumerate(steps, 1):
        for lasso in penalties:
            (proximal_step if proximal else land)(small, lasso, moved)
        if proximal and k % an_epoch == 0:
            penalties = lassos()
    penalised = training.judge(small)

    made = cut.make(small, vanished, cut.least(small, vanished, target) if target else 0.0)
    small = made.model
    if not made.removed:
        warnings.warn(
            f"sparsify: nothing was removed: nothing fell below vanished={vanished!r} of its layer's mean "
            f"length. {_way_out(strength, depth, epochs, round_to)}",
            stacklevel=2,
        )
    training.settle(small)
    shrunk = training.judge(small)
    training.fit(small, finetune_epochs, phase="finetune", rate=finetune_rate, span=finetune_span)

    return small.train(model.training), Sparsified(
        widths=made.widths,
        blocks=made.blocks,
        left=found.left,
        parameters_before=_count(model),
        parameters_after=_count(small),
        multiply_adds_before=found.multiply_adds,
        multiply_adds_after=made.multiply_adds,
        dense=dense,
        penalised=penalised,
        shrunk=shrunk,
        finetuned=training.judge(small),
        epochs=epochs + finetune_epochs,
        strength=strength,
        description=made.description,
    )


def front(
    model: nn.Module, training: Training, *, strengths: Sequence[float], **options: Any
) -> Iterator[tuple[nn.Module, Sparsified]]:
    """The results of `sparsify` from weak to strong, each from the same dense model.

    Args:
        model: dense, trained; not changed.
        training: of every phase.
        strengths: to try; they are sorted.
        **options: the other arguments of `sparsify`.
    """
    for strength in sorted(strengths):
        yield sparsify(model, training, strength=strength, **options)


def _spans(
    span: tuple[float, float] | None, epochs: int, finetune_epochs: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where in the schedule each phase goes; a phase without epochs goes nowhere."""
    if span is None or not finetune_epochs:
        return span or (0.0, 1.0), (0.0, 1.0)
    middle = span[0] + (span[1] - span[0]) * epochs / (epochs + finetune_epochs)
    return (span[0], middle), (middle, span[1])


def _way_out(strength: float, depth: float, epochs: int, round_to: int) -> str:
    knobs = [f"{name} ({x:.3g})" for name, x in (("strength", strength), ("depth", depth)) if x]
    rounded = f", or lower round_to ({round_to})" if round_to > 1 else ""
    return f"Raise {' or '.join(knobs)} or epochs ({epochs}), or raise vanished{rounded}."


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _check(
    strength: float,
    depth: float,
    epochs: int,
    finetune_epochs: int,
    vanished: float,
    multiply_adds: float | None,
) -> None:
    for name, value in (("strength", strength), ("depth", depth)):
        if not 0 <= value < math.inf:
            raise ValueError(f"sparsify: {name} must be at least 0 and finite; got {value!r}.")
    if not strength + depth > 0:
        raise ValueError(
            "sparsify: strength or depth must be above 0, or nothing would be penalised; got 0 for both."
        )
    for name, count, least in (("epochs", epochs, 1), ("finetune_epochs", finetune_epochs, 0)):
        if count < least:
            raise ValueError(f"sparsify: {name} must be at least {least}; got {count}.")
    if not 0 <= vanished < 1:
        raise ValueError(f"sparsify: vanished must lie in [0, 1); got {vanished!r}.")
    if multiply_adds is not None and not 0 < multiply_adds < 1:
        raise ValueError(
            "sparsify: multiply_adds must be a share in (0, 1) of the dense model's, or None; got "
            f"{multiply_adds!r}."
        )
