"""ASGD: apply each gradient when it arrives, as if it were fresh.

    w_{t+1} = w_t - eta g(w_{t-tau})                                                    (1)

Symbols: w_t the server's weights after t updates, g(w_{t-tau}) gradient at the weights that its worker
read, tau staleness: the updates that came between, eta step size.
Reference: J. Dean et al., "Large Scale Distributed Deep Networks", NIPS 2012 (Downpour SGD).
Differs from the paper: a worker pushes and reads at every step; the optimizer is the server's own and
    need not be Adagrad.
Cost per step: nothing beside the optimizer's step; one push and one read of the weights for each
    gradient. N workers that never wait have a mean staleness of N - 1, so eta N must stay bounded:
    twice the workers want about half the step.
"""

from dataclasses import dataclass

from sterna.flat import Named
from sterna.seams import Push, State


@dataclass(frozen=True, kw_only=True)
class Asgd:
    """Leave gradients as they are, Eq. (1).

    Example:
        >>> import torch
        >>> g, w = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
        >>> push = Push(worker=0, gradient=g, weights=w, backup=w, version=7, staleness=3)
        >>> Asgd().correct(push, Asgd().init(w))[0] is g
        True
    """

    def init(self, like: Named) -> State:
        """No state."""
        return {}

    def correct(self, push: Push, state: State) -> tuple[Named, State]:
        """The gradient."""
        return push.gradient, state


EXAMPLES = (Asgd(),)
