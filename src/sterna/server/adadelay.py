"""AdaDelay: a step size that falls with time and with the delay of the very gradient it scales.

    w_{t+1}       = w_t - alpha(t, tau) g(w_{t-tau})                                    (1)
    alpha(t, tau) = 1 / (L + c sqrt(t + tau))                                           (2)

Symbols: w_t the server's weights, g(w_{t-tau}) gradient at the weights that its worker read, tau
staleness: the updates that came between, L smoothness, c scale, t = 1, 2, ... number of the update.

(2) is a rate without delay, `AdaDelay.rate`, times what the delay takes off it:

    alpha(t, tau) = alpha(t, 0) * (L + c sqrt(t)) / (L + c sqrt(t + tau))               (3)

The rule multiplies the gradient by the last factor; the first is the optimizer's learning rate. So
``Replica(model, SGD(..., lr=1.0), schedule=rule.rate)`` is the paper's method, and any other schedule can
be made to heed delays the same way.
Reference: S. Sra, A. W. Yu, M. Li, A. J. Smola, "AdaDelay: Delay Adaptive Distributed Stochastic
    Optimization", AISTATS 2016, arXiv:1508.05003.
Differs from the paper: no projection onto a feasible set; one c for all coordinates (the paper's
    experiments also give each its own).
Cost per step: one pass over the gradient. For t much larger than tau the factor is 1: the rule matters
    at the start and for far stragglers. Its theory is for convex losses.
"""

import math
from dataclasses import dataclass

from sterna.flat import Flat, Named
from sterna.seams import Push, State
from sterna.server import require


@dataclass(frozen=True, kw_only=True)
class AdaDelay:
    """Shrink the step of late gradients, Eq. (3).

    Args:
        smoothness: L, Lipschitz constant of the gradient; >= 0.
        scale: c, how fast the step falls; > 0.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> import torch
        >>> g, w = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
        >>> push = Push(worker=0, gradient=g, weights=w, backup=w, version=3, staleness=12)
        >>> AdaDelay(smoothness=0.0).correct(push, {})[0]["w"]
        tensor([0.5000, 0.5000])
        >>> AdaDelay(smoothness=3.0, scale=0.5).rate(3)
        0.25
    """

    smoothness: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        way_out = "A larger one takes smaller steps."
        require.number(
            "AdaDelay", "smoothness", self.smoothness, lambda x: x >= 0, "at least 0", way_out
        )
        require.number("AdaDelay", "scale", self.scale, lambda x: x > 0, "above 0", way_out)

    def rate(self, version: int) -> float:
        """alpha(t, 0) of the update after ``version`` others: a schedule for `sterna.replica.Replica`."""
        return 1.0 / self._curvature(version + 1)

    def _curvature(self, time: int) -> float:
        return self.smoothness + self.scale * math.sqrt(time)

    def init(self, like: Named) -> State:
        """No state."""
        return {}

    def correct(self, push: Push, state: State) -> tuple[Named, State]:
        """Eq. (3); a fresh gradient stays as it is."""
        gradient = Flat.of(push.gradient)
        if push.staleness:
            t = push.version + 1
            gradient.buffer.mul_(self._curvature(t) / self._curvature(t + push.staleness))
        return gradient, state


EXAMPLES = (AdaDelay(), AdaDelay(smoothness=0.0, scale=0.1))
