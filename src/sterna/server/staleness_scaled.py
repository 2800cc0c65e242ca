"""Staleness-aware ASGD: divide the step by the staleness of the gradient.

    w_{t+1} = w_t - eta / max(1, tau) g(w_{t-tau})                                      (1)

Symbols: w_t the server's weights after t updates, g(w_{t-tau}) gradient at the weights that its worker
read, tau staleness: the updates that came between, eta step size.
Reference: W. Zhang, S. Gupta, X. Lian, J. Liu, "Staleness-aware Async-SGD for Distributed Deep
    Learning", IJCAI 2016, arXiv:1511.05950.
Differs from the paper: gradients are applied one by one; the paper's protocol may collect several.
Cost per step: one pass over the gradient. With N workers that never wait, steps are about N - 1 times
    smaller than eta says: give eta a range N times larger than for one worker, or nothing is learnt.
"""

from dataclasses import dataclass

from sterna.flat import Flat, Named
from sterna.seams import Push, State


@dataclass(frozen=True, kw_only=True)
class StalenessScaled:
    """Divide each gradient by its staleness, Eq. (1); a fresh one stays as it is.

    Example:
        >>> import torch
        >>> g, w = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
        >>> push = Push(worker=0, gradient=g, weights=w, backup=w, version=7, staleness=4)
        >>> StalenessScaled().correct(push, {})[0]["w"]
        tensor([0.2500, 0.2500])
    """

    def init(self, like: Named) -> State:
        """No state."""
        return {}

    def correct(self, push: Push, state: State) -> tuple[Named, State]:
        """Eq. (1)."""
        gradient = Flat.of(push.gradient)
        if push.staleness > 1:
            gradient.buffer.div_(push.staleness)
        return gradient, state


EXAMPLES = (StalenessScaled(),)
