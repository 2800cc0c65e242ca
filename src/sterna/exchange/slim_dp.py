"""Slim-DP: only the weights that matter travel, and some others in case they come to matter.

Every worker i takes H optimizer steps of its own on w^i. Of n weights, a set S then travels:

    s_k = |a_k| / mean|a| + c |u_k| / mean|u|                                          (1)
    C   = the beta n largest of s, chosen anew every q rounds; u = 0 after that        (2)
    E^i = gamma n of the others, chosen anew every round;  S^i = C + E^i               (3)
    d_k = 1/N sum over i with k in S^i of (w^i_k - a_k)                                (4)
    a_k = a_k + d_k,  u_k = u_k + d_k;   w^i_k = a_k   for k in S^i                    (5)

Symbols: a merged weights (``anchor``), equal on all N workers; u how far the merged weights have come
since the core was chosen: the learning rate times the gradients, for plain SGD; c ``gradient_weight``;
s significance; C core (beta: ``core_ratio``), E explorer (gamma: ``explorer_ratio``), q
``refresh_every``, H ``every``. What is not in S^i stays as it is on worker i: w^i - a is the residual,
all of which is sent when k comes into S^i. By default all workers draw one explorer at random; with
``explorer=BestResponse()`` each answers with its own (``explorers.py``).
Reference: S. Sun, W. Chen, J. Bian, X. Liu, T.-Y. Liu, "Slim-DP: A Light Communication Data Parallelism
    for DNN", arXiv:1709.09393, 2017; "Slim-DP: A Multi-Agent System for Communication-Efficient
    Distributed Deep Learning", AAMAS 2018.
Differs from the paper: core by magnitude and gradient, explorer at random, and both pushed and pulled
    are the paper's; each term of (1) in units of its mean, the residual in (4), the division by N and
    the defaults are our reading, and so is what the game's players pay (``explorers.py``). There is no
    server: all workers hold a. A random explorer is shared, drawn from a seed that rank 0 sends, so no
    indices travel and an all-reduce adds the values. Rank 0 chooses the core and sends it as n bits.
Cost per step: every H steps 64 (N-1)/N (beta + gamma) n bits sent per worker, with best responses
    64 (N-1)/N beta n + 64 (N-1) gamma n; from rank 0 to each other worker 64 bits for the seed, and n
    bits every q rounds for the core; a permutation and some passes over n; 2 copies of the weights and
    n bytes. Hurts without an explorer (what is outside the core is never merged), and with small
    ratios: the replicas differ wherever nothing travelled.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sterna.codecs.finite import largest
from sterna.exchange import mask
from sterna.exchange.alone import step_alone
from sterna.exchange.explorers import AtRandom, BestResponse, Explorer
from sterna.exchange.weights import assign, packed
from sterna.flat import Flat
from sterna.replica import Replica
from sterna.seams import Comm, Message, State


def significance(weights: Tensor, update: Tensor, gradient_weight: float) -> Tensor:
    """Eq. (1), elementwise. A term that is 0 throughout is left out.

    Args:
        weights: a, merged weights.
        update: u, of the same shape.
        gradient_weight: c, weight of the second term.

    Example:
        >>> significance(torch.tensor([1.0, -3.0]), torch.tensor([0.0, 2.0]), 0.5)
        tensor([0.5000, 2.5000])
    """
    return _relative(weights) + gradient_weight * _relative(update)


def _relative(x: Tensor) -> Tensor:
    size = x.abs()
    unit = size.mean()
    return size / torch.where(unit > 0, unit, torch.ones_like(unit))


@dataclass(frozen=True, kw_only=True)
class SlimDP:
    """Local optimizer steps; every ``every`` steps a part of the weights is merged.

    Core only: ``explorer_ratio=0``; at random only: ``core_ratio=0``; all: ratios that add up to 1,
    which is model averaging. The replicas must start equal. State, by parameter name: slot ``anchor``,
    equal on all workers, and with a core ``core`` (a mask) and ``update`` (u).

    Args:
        every: H, optimizer steps from one round to the next; at least 1.
        core_ratio: beta, share of the weights in the core, in [0, 1].
        explorer_ratio: gamma, share of the weights that the explorer chooses, in [0, 1].
        refresh_every: q, rounds from one choice of the core to the next; at least 1.
        gradient_weight: c, what the gradient counts beside the magnitude; at least 0.
        explorer: chooses the weights outside the core: `AtRandom` or `BestResponse`.

    Raises:
        ValueError: a hyperparameter is out of range, or the ratios add up to 0 or to more than 1.

    Example:
        >>> from sterna.comm.solo import Solo
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> exchange, rng = SlimDP(core_ratio=0.25, explorer_ratio=0.25), torch.Generator()
        >>> state = exchange.init(replica)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> state = exchange(replica, state, Solo(), rng)
        >>> int(state["core"]["weight"].sum()), int((state["anchor"]["weight"] == model.weight).sum())
        (1, 2)
    """

    every: int = 1
    core_ratio: float = 0.15
    explorer_ratio: float = 0.15
    refresh_every: int = 50
    gradient_weight: float = 1.0
    explorer: Explorer = field(default_factory=AtRandom)

    def __post_init__(self) -> None:
        for name, unit in (("every", "steps"), ("refresh_every", "rounds")):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(
                    f"SlimDP: {name} must be a whole number of {unit}, at least 1; got {value!r}."
                )
        for name in ("core_ratio", "explorer_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"SlimDP: {name} must lie in [0, 1]; got {getattr(self, name)!r}. It is a share "
                    "of the weights; 0 leaves that set out."
                )
        if not 0 < self.core_ratio + self.explorer_ratio <= 1 + 1e-9:
            raise ValueError(
                f"SlimDP: core_ratio and explorer_ratio must add up to more than 0 and at most 1; got "
                f"{self.core_ratio!r} and {self.explorer_ratio!r}. They are shares of the same weights."
            )
        if not 0 <= self.gradient_weight < float("inf"):
            raise ValueError(
                f"SlimDP: gradient_weight must be at least 0 and finite; got "
                f"{self.gradient_weight!r}. 0 chooses the core by magnitude alone."
            )

    def counts(self, num_elements: int) -> tuple[int, int]:
        """Sizes of core and explorer; each holds at least one weight if its ratio is above 0."""
        core = max(1, round(self.core_ratio * num_elements)) if self.core_ratio else 0
        rest = num_elements - core
        explorer = max(1, round(self.explorer_ratio * num_elements)) if self.explorer_ratio else 0
        everything = self.core_ratio + self.explorer_ratio >= 1 - 1e-9
        return core, rest if everything else min(explorer, rest)

    def init(self, replica: Replica) -> State:
        """The weights as they are now, which every worker must share; an empty core."""
        anchor = packed(replica)
        if not self.core_ratio:
            return {"anchor": anchor}
        core = Flat(anchor.layout, torch.zeros_like(anchor.buffer, dtype=torch.bool))
        return {"anchor": anchor, "core": core, "update": Flat.zeros_like(anchor)}

    def __call__(self, replica: Replica, state: State, comm: Comm, rng: torch.Generator) -> State:
        """One local step; at every H-th, Eq. (1) to (5).

        Raises:
            NotFinite: a gradient holds NaN or infinity, or a weight does after the local step.
            PeerLost: another worker failed.
        """
        step_alone(replica, "SlimDP")
        if replica.step % self.every:
            return state
        slots = {slot: Flat.of(named) for slot, named in state.items()}
        anchor, weights = slots["anchor"].buffer, packed(replica)
        come = Flat(weights.layout, weights.buffer - anchor)
        largest(come, "SlimDP")
        if self.core_ratio and (replica.step // self.every - 1) % self.refresh_every == 0:
            self._choose_core(slots, comm)
        core = slots["core"].buffer if self.core_ratio else torch.zeros_like(anchor).bool()
        num = self.counts(len(core))[1]
        chosen = self.explorer.choose(come.buffer, core, num, comm, rng)
        travels = core.index_fill(0, chosen, True).nonzero().squeeze(1)
        together = travels if self.explorer.shared else core.nonzero().squeeze(1)
        values = come.buffer[together].div_(comm.size)
        _merge(slots, together, comm.sum_(values))
        if not self.explorer.shared:
            width = torch.int32 if len(core) < 2**31 else torch.int64
            own = Message({"index": chosen.to(width), "value": come.buffer[chosen].div_(comm.size)})
            for message in comm.gather(own):
                _merge(slots, message.buffers["index"].long(), message.buffers["value"])
        weights.buffer.index_copy_(0, travels, anchor[travels])
        assign(replica, weights)
        return slots

    def _choose_core(self, slots: dict[str, Flat], comm: Comm) -> None:
        """Eq. (2): rank 0 chooses, so that machines that round differently hold the same core."""
        core, anchor, update = (slots[slot].buffer for slot in ("core", "anchor", "update"))
        core.zero_()
        if comm.rank == 0:
            score = significance(anchor, update, self.gradient_weight)
            core[score.topk(self.counts(len(core))[0], sorted=False).indices] = True
        core.copy_(mask.from_bits(comm.broadcast_(mask.to_bits(core)), len(core)))
        update.zero_()


def _merge(slots: dict[str, Flat], index: Tensor, values: Tensor) -> None:
    """Eq. (5) of the merged weights."""
    for slot in {"anchor", "update"} & set(slots):
        slots[slot].buffer.index_add_(0, index, values)


EXAMPLES = (
    SlimDP(core_ratio=0.2, explorer_ratio=0.3, refresh_every=2),
    SlimDP(core_ratio=0.0, explorer_ratio=1.0),
    SlimDP(every=2, core_ratio=0.5, explorer_ratio=0.0),
    SlimDP(core_ratio=0.2, explorer_ratio=0.3, refresh_every=2, explorer=BestResponse()),
)
