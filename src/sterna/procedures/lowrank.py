"""Low rank: train with a force that gathers the filters, decompose, train what is left.

    1. W <- dense weights
    2. for some epochs:  W_i <- W_i - a (dE/dW_i - lambda D_i)          (the force; may be left out)
    3. each layer M ~ B A by ranks, kept variance or multiply-adds
    4. for some more epochs:  (A, B) <- (A, B) - a grad E(A, B)

Symbols: W_i filter i, D_i the pull on it of all other filters (`sterna.objectives.Force`), lambda its
coefficient, a learning rate, M a layer's weight as a matrix (`sterna.surgery.low_rank`).

Reference: W. Wen, C. Xu, C. Wu, Y. Wang, Y. Chen, H. Li, "Coordinating Filters for Faster Deep Neural
    Networks", ICCV 2017, arXiv:1703.09746. With group lasso before it, as in W. Wen, "Efficient and
    Scalable Deep Learning", dissertation, Duke University 2019: pass the force to
    `sterna.procedures.sparsify.sparsify` as part of ``objective``, and its result on to `factorise`.
Differs from the paper: linear layers may be decomposed too; ranks may be chosen over the whole network.
Cost per step: that of the force; of the factors, their multiply-adds. Hurts where the force lowers the
    rank at equal error but not the error at equal rank: compare with the same cut without a force.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from sterna.objectives.algebra import Sum
from sterna.procedures.training import Quality, Training
from sterna.seams import Objective
from sterna.surgery.factorise import Form
from sterna.surgery.low_rank import LowRankReport, low_rank
from sterna.surgery.program import copied


@dataclass(frozen=True, kw_only=True)
class Factorised:
    """What `factorise` did.

    Args:
        cut: ranks, parameters and multiply-adds of each layer and of the model.
        form: of the factors of convolutions. The architecture is ``low_rank(original, example,
            ranks=cut.ranks, form=form)``, which the weights then fit.
        dense: quality of the model as it was given.
        forced: after the epochs with the force; the same as ``dense`` without one.
        decomposed: after the cut, batch-norm statistics taken anew.
        finetuned: of the model that is returned.
        epochs: passes over the training examples, both phases.
    """

    cut: LowRankReport
    form: Form
    dense: Quality
    forced: Quality
    decomposed: Quality
    finetuned: Quality
    epochs: int


def factorise(
    model: nn.Module,
    training: Training,
    *,
    force: Objective | None = None,
    epochs: int = 0,
    finetune_epochs: int,
    ranks: Mapping[str, int] | None = None,
    variance: float | None = None,
    multiply_adds: float | None = None,
    form: Form = "channel",
    layers: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    multiple_of: int = 1,
    rate: float = 1.0,
    finetune_rate: float = 1.0,
) -> tuple[nn.Module, Factorised]:
    """A copy of a trained model in layers of low rank; the model is not changed.

    Args:
        model: dense, trained.
        training: data, optimizer and seed of both phases.
        force: added to the training's objective for ``epochs``, with its coefficient: ``1e-4 *
            Force()``. None: those epochs are trained without, which is the control.
        epochs: before the cut.
        finetune_epochs: after it.
        ranks: by name of layer. Give exactly one of ranks, variance and multiply_adds.
        variance: share to keep in each layer, in (0, 1].
        multiply_adds: share of the model's multiply-adds that may be left over, in (0, 1).
        form: of the factors of convolutions.
        layers: `fnmatch` patterns of the layers that may be cut.
        exclude: patterns of layers that may not; the last layer is often best left alone.
        multiple_of: ranks are rounded up to multiples of it.
        rate: factor of the learning rate before the cut.
        finetune_rate: factor of the learning rate after it.

    Returns:
        The model in factors, and what was done. Warns if no layer was replaced.

    Raises:
        ValueError: an argument is out of range, a target cannot be met, or there is a force and no
            epoch for it to act in.
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
        >>> small, report = factorise(model, training, ranks={"0": 3}, finetune_epochs=5)
        >>> report.cut.ranks, report.finetuned.accuracy
        ({'0': 3}, 1.0)
    """
    decompose = partial(
        low_rank,
        example=training.example,
        ranks=ranks,
        variance=variance,
        multiply_adds=multiply_adds,
        form=form,
        layers=layers,
        exclude=exclude,
        multiple_of=multiple_of,
    )
    dense = training.judge(forced := copied(model).to(training.device))
    if epochs:  # what cannot be met is said before the training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decompose(forced)
    gathered = _gather(forced, training, force, epochs, rate)
    small, cut = decompose(forced)
    training.settle(small)
    decomposed = training.judge(small)
    training.fit(small, finetune_epochs, phase="finetune", rate=finetune_rate)
    return small.train(model.training), Factorised(
        cut=cut,
        form=form,
        dense=dense,
        forced=gathered,
        decomposed=decomposed,
        finetuned=training.judge(small),
        epochs=epochs + finetune_epochs,
    )


def front(
    model: nn.Module,
    training: Training,
    *,
    multiply_adds: Sequence[float],
    force: Objective | None = None,
    epochs: int = 0,
    rate: float = 1.0,
    **options: Any,
) -> Iterator[tuple[nn.Module, Factorised]]:
    """One model with the force, cut to each of several shares of multiply-adds, the largest first.

    Args:
        model: dense, trained; not changed.
        training: of every phase.
        multiply_adds: shares of the model's multiply-adds, each in (0, 1).
        force: as in `factorise`.
        epochs: before the cuts, once for all of them.
        rate: factor of the learning rate in those epochs.
        **options: the other arguments of `factorise`.

    Raises:
        ValueError: as `factorise`; before the training where the largest share cannot be met.
        NotFinite: training diverged.
    """
    dense = training.judge(forced := copied(model).to(training.device))
    if epochs and multiply_adds:
        cut = {k: options[k] for k in ("form", "layers", "exclude", "multiple_of") if k in options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            low_rank(forced, training.example, multiply_adds=max(multiply_adds), **cut)
    _gather(forced, training, force, epochs, rate)
    for share in sorted(multiply_adds, reverse=True):
        small, report = factorise(forced, training, multiply_adds=share, **options)
        yield small, replace(report, dense=dense, epochs=report.epochs + epochs)


def _gather(
    model: nn.Module, training: Training, force: Objective | None, epochs: int, rate: float
) -> Quality:
    """Phase 2, in place."""
    if force is not None and epochs < 1:
        raise ValueError(
            f"factorise: epochs must be at least 1 for the force to act in; got {epochs}. Or leave the "
            "force out."
        )
    objective = training.objective if force is None else Sum((training.objective, force))
    training.fit(model, epochs, objective, phase="force", rate=rate)
    return training.judge(model)
