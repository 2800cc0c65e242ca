"""CoNNTrA: train a network whose weights come from a finite set, one weight at a time.

The weights start from a trained float network, each at the nearest value of its grid s V. Then, for one
weight after another, every value of its grid is tried and the best is kept:

    v*  = argmin_{v in s V} L(w with w_i = v)                                          (1)
    w_i = v*   if L(v*) < L(w) - epsilon max(1, L(w)), else as it was                  (2)

until a pass over all weights, in a random order, changes nothing, or ``passes`` are over. On the full
batch L never rises, and as there are finitely many networks the search ends.

Symbols: L mean cross entropy, V value set, s scale of a tensor, epsilon smallest gain. Nothing is
differentiated, so activations may be steps.
Reference: P. Date, C. D. Carothers, J. E. Mitchell, J. A. Hendler, M. Magdon-Ismail: Training deep
    neural networks with constrained learning parameters. ICRC 2020, arXiv:2009.00540.
Differs from the paper: only its abstract was at hand: coordinate descent, finite sets, ternary experiments.
    The start, scales, order of the weights, (2), mini-batches and incremental evaluation of (1) are ours.
Cost per step: a step is one weight. With B examples, C classes and |V| values: at the logits and one
    layer below about |V| B (C + |V|) multiply-adds and |V| |V| B exponentials, and C B of them where the
    weight is changed; further below |V| B times the weights of the layers between. Every value of
    every layer is held in float64. It hurts with depth, with millions of weights, and with few examples
    for many weights, which it overfits. Only the linear layers at the end are searched.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import nn

from sterna.seams import Source
from sterna.solvers.conntra_chain import Chain
from sterna.solvers.conntra_kernels import Evaluation, Searched, check_targets
from sterna.value_sets import TERNARY, Grids, Sets, ValueSet, check_sets


@dataclass(frozen=True)
class CoNNTrAReport:
    """What the search did; all losses are means over the training examples.

    Args:
        float_loss: of the network that was given.
        losses: of its rounding, then after each pass.
        trace: the loss on the batch at hand, at the start and after each change.
        changes: weights changed, by pass.
        trials: values tried, the current ones left out.
        converged: a pass changed nothing.
        grids: the values that each searched parameter may take, scale included.
        left: weights that stayed float though one set was for all; the reason goes on from the name.
    """

    float_loss: float
    losses: tuple[float, ...]
    trace: tuple[float, ...]
    changes: tuple[int, ...]
    trials: int
    converged: bool
    grids: Grids
    left: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CoNNTrA:
    """Coordinate descent over finite value sets, from a trained float network.

    Args:
        sets: the values that weights may take: one set for all that can be searched, or pairs of a
            pattern of parameter names and a set; the first that matches counts, the others stay float.
        passes: most passes over all searched weights; at least 1.
        batch_size: examples that a change is judged by; None takes all, and the loss never rises.
        batch_every: weights from one mini-batch to the next; at least 1.
        min_gain: epsilon, what a change must gain, in shares of the loss where that is above 1; above 0.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> from sterna.data import Examples
        >>> inputs = torch.eye(4).repeat(4, 1)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> data = Examples(inputs, torch.arange(4).repeat(4))
        >>> solved, report = CoNNTrA(passes=20)(model, data, torch.Generator())
        >>> len(solved[0].weight.unique()) <= 3, report.losses[-1] <= report.losses[0]
        (True, True)
    """

    sets: Sets = TERNARY
    passes: int = 10
    batch_size: int | None = None
    batch_every: int = 200
    min_gain: float = 1e-12

    def __post_init__(self) -> None:
        check_sets(self.sets, "CoNNTrA")
        for name in ("passes", "batch_size", "batch_every"):
            value = getattr(self, name)
            if value is None and name == "batch_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                way = " None takes all examples." if name == "batch_size" else ""
                raise ValueError(
                    f"CoNNTrA: {name} must be a whole number, at least 1; got {value!r}.{way}"
                )
        if not 0 < self.min_gain < float("inf"):
            raise ValueError(
                f"CoNNTrA: min_gain must be above 0 and finite; got {self.min_gain!r}. The "
                "default, 1e-12, is above the rounding of float64."
            )

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        data: Source,
        rng: torch.Generator,
        grids: Grids | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> tuple[nn.Module, CoNNTrAReport]:
        """A copy of ``model`` with its searched weights on their grids, and what was done.

        Args:
            model: classifier that in evaluation mode ends in a linear layer. It is searched, and if
                torch.fx can trace the model, so are those before with elementwise functions between.
            data: inputs (examples, ...) and classes (examples,), int64.
            rng: order of the weights, and mini-batches.
            grids: values by parameter, from an earlier report, in place of ``sets``: the search goes on
                from weights that lie on them, and their scales stay.
            say: told a line at the end of each pass.

        Raises:
            ValueError: the model is not of that form; a pattern matches nothing, or what cannot be
                searched; the loss of the rounded network is not finite.
        """
        batch = data[torch.arange(len(data))]
        chain = Chain.copied(model, batch.inputs, "CoNNTrA")
        searched, left = Searched.all_of(chain, model, self.sets, grids, "CoNNTrA")
        features = chain.rows(batch.inputs)
        targets = batch.targets.to(features.device)
        check_targets(targets, len(features), len(chain.layers[-1].weight))
        whole = Evaluation.on(chain.layers, features, targets)
        float_loss = whole.loss
        for p in searched:
            p.write_layer(chain.layers)
        whole.refresh()
        if not whole.loss < float("inf"):
            raise ValueError(
                f"CoNNTrA: the loss of the rounded network must be finite; got {whole.loss}. Look "
                "for NaN or infinity in the inputs and in the weights that are not searched."
            )
        losses, trace, changes, trials = [whole.loss], [whole.loss], list[int](), 0
        size = min(self.batch_size or len(features), len(features))
        while len(changes) < self.passes and (not changes or changes[-1]):
            changed, at_hand = 0, whole
            for turn, (p, position) in enumerate(_order(searched, rng)):
                if size < len(features) and turn % self.batch_every == 0:
                    drawn = torch.randperm(len(features), generator=rng)[:size].to(targets.device)
                    at_hand = Evaluation.on(chain.layers, features[drawn], targets[drawn])
                code, place = p.codes[position], p.place(position, chain.layers)
                tried = at_hand.losses(*place, p.moves[code])
                trials += len(tried)
                best = int(tried.argmin())
                if self._gains(float(tried[best]), at_hand.loss):
                    p.codes[position] = p.others[code][best]
                    at_hand.change(*place, p.values[p.codes[position]])
                    trace.append(at_hand.loss)
                    changed += 1
            whole.refresh()
            changes.append(changed)
            losses.append(whole.loss)
            say(f"pass {len(changes)}: {changed:,} weights changed, loss {whole.loss:.4g}")
        solved = deepcopy(model)
        for p in searched:
            p.write(solved.get_parameter(p.name))
        return solved, CoNNTrAReport(
            float_loss=float_loss,
            losses=tuple(losses),
            trace=tuple(trace),
            changes=tuple(changes),
            trials=trials,
            converged=not changes[-1],
            grids={p.name: tuple(p.values) for p in searched},
            left=left,
        )

    def _gains(self, new: float, old: float) -> bool:
        """(2)."""
        return new < old - self.min_gain * max(1.0, old)


def _order(searched: list[Searched], rng: torch.Generator) -> Iterator[tuple[Searched, int]]:
    """Every weight of every searched parameter once, in a random order."""
    places = [(p, k) for p in searched for k in range(len(p.codes))]
    return (places[k] for k in torch.randperm(len(places), generator=rng).tolist())


EXAMPLES = (
    CoNNTrA(),
    CoNNTrA(sets=(("*weight", ValueSet(values=(-2.0, -0.5, 0.0, 0.5, 2.0))),), batch_size=64),
)
