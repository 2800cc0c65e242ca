"""Model averaging: workers take steps of their own and average their weights every so often.

Every worker i takes H optimizer steps from the agreed weights a_r, on its own examples, to w^i. Then

    d^i     = a_r - w^i                                                                (1)
    d       = 1/N sum_i  decode(encode(d^i))                                           (2)
    v_{r+1} = mu v_r + d,    v_0 = 0                                                   (3)
    a_{r+1} = a_r - eta v_{r+1}            (Nesterov:  a_r - eta (d + mu v_{r+1}))     (4)
    w^i     = a_{r+1}                                                                  (5)

Symbols: H steps between two averages (``every``), N workers, a agreed weights (``anchor``), d how far
the workers have come, v outer momentum with factor mu (``outer_momentum``), eta outer rate
(``outer_lr``). With eta = 1 and mu = 0, Eq. (1) to (5) say w = 1/N sum_i w^i: plain averaging.
Reference: S. U. Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019,
    arXiv:1805.09767 (eta = 1, mu = 0); J. Wang, V. Tantia, N. Ballas, M. Rabbat, "SlowMo: Improving
    Communication-Efficient Distributed SGD with Slow Momentum", ICLR 2020, arXiv:1910.00643 (mu > 0);
    A. Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models",
    arXiv:2311.08105, 2023 (Nesterov, over a local AdamW).
Differs from the paper: differences go through a codec, as none of the three has it. The local
    optimizer's own state (momentum, Adam's moments) stays on its worker, neither averaged nor reset, as
    in DiLoCo. SlowMo divides d by the local learning rate and multiplies by it again in (4); here the
    outer rate alone scales it, so a change of the local rate does not rescale v.
Cost per step: 1/H of what `AllReduce` sends with the same codec; one pass over the gradients to refuse
    NaN and infinity, and every H steps some passes over the weights; a copy of the weights on every
    worker, another for mu > 0. Hurts where workers see different kinds of data, with large H late in
    training, and between averages: the replicas differ, so evaluate and save after an average.
"""

from dataclasses import dataclass, field

import torch

from sterna.codecs.identity import Identity
from sterna.codecs.slots import put, take
from sterna.exchange.alone import step_alone
from sterna.exchange.two_phase import mean
from sterna.exchange.weights import assign, packed
from sterna.flat import Flat
from sterna.replica import Replica
from sterna.seams import Codec, Comm, State

_CODEC = "codec."


@dataclass(frozen=True, kw_only=True)
class ModelAverage:
    """Local optimizer steps; every ``every`` steps the mean of how far all have come.

    The replicas must start equal; they are equal to the bit after each step whose number ``every``
    divides. State, by parameter name: slot ``anchor``, with outer momentum ``outer_momentum``, and the
    codec's slots under ``codec.``.

    Args:
        every: H, optimizer steps from one average to the next; at least 1.
        codec: what travels instead of the differences; `Identity` sends them as they are.
        outer_lr: eta, rate of the outer step, above 0; 1 goes all the way to the average.
        outer_momentum: mu, share of the outer momentum that is kept, in [0, 1).
        nesterov: look ahead along the outer momentum; needs one above 0.

    Raises:
        ValueError: a hyperparameter is out of range.

    Example:
        >>> from sterna.comm.in_process import run_in_process
        >>> def worker(comm):
        ...     model = torch.nn.Linear(1, 1, bias=False)
        ...     torch.nn.init.zeros_(model.weight)
        ...     replica = Replica(model, torch.optim.SGD(model.parameters(), lr=1.0))
        ...     exchange, rng = ModelAverage(every=2), torch.Generator()
        ...     state = exchange.init(replica)
        ...     for _ in range(2):
        ...         model(torch.full((1, 1), float(comm.rank))).sum().backward()
        ...         state = exchange(replica, state, comm, rng)
        ...     return model.weight.item()
        >>> run_in_process(worker, 3)
        [-2.0, -2.0, -2.0]
    """

    every: int
    codec: Codec = field(default_factory=Identity)
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.every, int) and self.every >= 1):
            raise ValueError(
                f"ModelAverage: every must be a whole number of steps, at least 1; got "
                f"{self.every!r}. every=1 averages after every step."
            )
        if isinstance(self.codec, type) or not isinstance(self.codec, Codec):
            raise ValueError(
                f"ModelAverage: codec must be a codec; got {self.codec!r}. Pass an instance, as in "
                "ModelAverage(every=8, codec=TernGrad())."
            )
        if not 0 < self.outer_lr < float("inf"):
            raise ValueError(
                f"ModelAverage: outer_lr must be above 0 and finite; got {self.outer_lr!r}. 1 goes "
                "all the way to the average."
            )
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(
                f"ModelAverage: outer_momentum must lie in [0, 1); got {self.outer_momentum!r}. "
                "0 is plain averaging; DiLoCo takes 0.9."
            )
        if self.nesterov and not self.outer_momentum:
            raise ValueError(
                f"ModelAverage: nesterov needs outer_momentum above 0; got "
                f"{self.outer_momentum!r}. Set it, or leave nesterov out."
            )

    def init(self, replica: Replica) -> State:
        """The weights as they are now, which every worker must share, and the codec's state."""
        anchor = packed(replica)
        momentum = {"outer_momentum": Flat.zeros_like(anchor)} if self.outer_momentum else {}
        return {"anchor": anchor, **momentum, **put(_CODEC, self.codec.init(anchor))}

    def __call__(self, replica: Replica, state: State, comm: Comm, rng: torch.Generator) -> State:
        """One local step; at every H-th, Eq. (1) to (5).

        Raises:
            NotFinite: a gradient holds NaN or infinity, or a difference does (then from the codec).
                The replica is as it was before this step, or before the average.
            PeerLost: another worker failed.
        """
        step_alone(replica, "ModelAverage")
        if replica.step % self.every:
            return state
        anchor, weights = Flat.of(state["anchor"]), packed(replica)
        come = Flat(anchor.layout, torch.sub(anchor.buffer, weights.buffer, out=weights.buffer))
        average, inner = mean(come, self.codec, take(_CODEC, state), comm, rng)
        outer, step = {"anchor": anchor}, average.buffer
        if self.outer_momentum:
            velocity = outer["outer_momentum"] = Flat.of(state["outer_momentum"])
            velocity.buffer.mul_(self.outer_momentum).add_(step)
            ahead = torch.add(step, velocity.buffer, alpha=self.outer_momentum)
            step = ahead if self.nesterov else velocity.buffer
        anchor.buffer.sub_(step, alpha=self.outer_lr)
        assign(replica, anchor)
        return {**outer, **put(_CODEC, inner)}


EXAMPLES = (
    ModelAverage(every=1),
    ModelAverage(every=3),
    ModelAverage(every=2, outer_lr=0.7, outer_momentum=0.9, nesterov=True),
)
