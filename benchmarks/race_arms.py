"""The arms of the race: what one worker does in a step, with torch's means and with Sterna's.

All arms train the same model from the same weights with SGD and momentum 0.9. A worker calls ``step``
with its part of the batch; after a step whose number ``period`` divides, all replicas are equal.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from ddp_arms import DdpArm, plain, sterna, torch_fp16, torch_powersgd
from sterna.codecs.entropy import Entropy
from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.identity import Identity
from sterna.codecs.quantise import Quantise
from sterna.codecs.terngrad import TernGrad
from sterna.comm.distributed import Distributed
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.ledger import Ledger
from sterna.models import MLP, LeNet5
from sterna.randomness import generator, isolated
from sterna.replica import Replica
from sterna.seams import Codec, Exchange

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP((784, 1024, 1024, 10)),
    "mlp10": lambda: MLP((784, 2800, 2800, 10)),
    "cnn": LeNet5,
}
MOMENTUM = 0.9
LOOK = 32  # steps from one evaluation to the next
STRETCH = (1.0, 1.25, 1.5)  # of the horizon, until all seeds of an arm reach the target


@dataclass(frozen=True)
class Setting:
    """What all arms have in common.

    Args:
        model: a name in `MODELS`.
        target: accuracy on the test part at which the clock stops.
        validation_target: accuracy on the validation part, by which rates are chosen.
        horizon: steps after which the rate is 0: the longest run.
        batch: examples a step, over all workers.
        warm_up: steps in which the rate rises.
        first_look: step of the first evaluation.
        rate_factor: of the learning rates that an arm chooses from.
        tuning_seed: seed of the runs that choose the rate.
        seeds: seeds of the runs that count.
    """

    model: str
    target: float
    validation_target: float
    horizon: int
    batch: int = 128
    warm_up: int = 32
    first_look: int = 384
    rate_factor: float = 1.0
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)

    def stretched(self, factor: float) -> "Setting":
        """The same with a longer horizon: the rate falls more slowly."""
        return replace(self, horizon=round(factor * self.horizon))

    def factor(self, step: int) -> float:
        """Of the learning rate: up in ``warm_up`` steps, and down to 0 at ``horizon``."""
        return min((step + 1) / self.warm_up, 1.0) * (1.0 - step / self.horizon)

    def about(self) -> dict[str, Any]:
        """For the result files."""
        return {**asdict(self), "momentum": MOMENTUM, "look": LOOK}


SETTINGS = {
    "mlp": Setting("mlp", target=0.98, validation_target=0.978, horizon=1024),
    "mlp10": Setting("mlp10", target=0.98, validation_target=0.978, horizon=1024),
    "cnn": Setting(
        "cnn",
        target=0.985,
        validation_target=0.983,
        horizon=512,
        first_look=128,
        rate_factor=0.25,
    ),
}
cross_entropy = nn.functional.cross_entropy


def built(model: str, seed: int) -> nn.Module:
    """The model, with the weights that ``seed`` draws, the same on every rank and in every arm."""
    with isolated(seed, "model"):
        return MODELS[model]()


class Racer(Protocol):
    """One arm at work in one worker."""

    module: nn.Module
    ledger: Ledger | None

    def step(self, inputs: Tensor, targets: Tensor) -> None: ...
    def set_rate(self, lr: float) -> None: ...
    def close(self) -> None: ...


class InDdp:
    """Gradients averaged inside DDP, at every step."""

    def __init__(self, module: nn.Module, wrap: Callable[[nn.Module], DdpArm]) -> None:
        self.module = module
        self.arm = wrap(module)
        self.ledger = self.arm.hook.ledger if self.arm.hook else None
        self.optimizer = _sgd(module)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.arm.model(inputs), targets).backward()
        self.optimizer.step()

    def set_rate(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def close(self) -> None:
        if self.arm.hook:
            self.arm.hook.close()


class TorchLocal:
    """Local steps, and torch's own averager every ``period`` of them."""

    ledger = None

    def __init__(self, module: nn.Module, period: int) -> None:
        self.module = module
        self.optimizer = _sgd(module)
        # Its first average comes after its "warm-up" and one step more: after steps H, 2H, 3H ...
        self.averager = PeriodicModelAverager(
            period=period, warmup_steps=period - 1, process_group=dist.new_group()
        )

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.module(inputs), targets).backward()
        self.optimizer.step()
        self.averager.average_parameters(self.module.parameters())

    def set_rate(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def close(self) -> None:
        pass


class Diverged(Exception):
    """Some worker's gradient is not finite; raised on all of them."""


class InSterna:
    """One of Sterna's exchanges, as its training loop calls it.

    An exchange of local steps refuses what is not finite on the worker that has it, and the others would
    wait for that one. ``watch`` asks all workers before each step, which takes time: not where it is taken.
    """

    watch = False

    def __init__(self, module: nn.Module, exchange: Exchange, seed: int) -> None:
        self.module = module
        self.replica = Replica(module, _sgd(module))
        self.comm = Distributed(dist.new_group())
        self.ledger: Ledger | None = self.comm.ledger
        self.exchange = exchange
        self.state = exchange.init(self.replica)
        self.rng = generator(seed, "exchange", self.comm.rank)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        cross_entropy(self.module(inputs), targets).backward()
        if self.watch:
            fine = [
                bool(p.grad.isfinite().all())
                for p in self.module.parameters()
                if p.grad is not None
            ]
            everywhere = torch.tensor([float(all(fine))])
            dist.all_reduce(everywhere, dist.ReduceOp.MIN)
            if not everywhere:
                raise Diverged
        self.state = self.exchange(self.replica, self.state, self.comm, self.rng)

    def set_rate(self, lr: float) -> None:
        self.replica.optimizer.param_groups[0]["lr"] = lr

    def close(self) -> None:
        pass


def _sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.0, momentum=MOMENTUM)


@dataclass(frozen=True)
class Arm:
    """How an arm is made.

    Args:
        make: from the module and a seed.
        rates: learning rates to choose from, the likeliest first.
        period: steps from one exchange to the next.
        torch: whether PyTorch ships it.
        rate_of: the arm whose chosen rate this one takes, instead of choosing itself.
        steps_of: the arm that takes the very same steps, so that they are not counted again.
    """

    make: Callable[[nn.Module, int], Racer]
    rates: tuple[float, ...] = ()
    period: int = 1
    torch: bool = False
    rate_of: str | None = None
    steps_of: str | None = None


def _ddp(wrap: Callable[[nn.Module], DdpArm], **about: Any) -> Arm:
    return Arm(lambda module, seed: InDdp(module, wrap), **about)


def _torch_local(period: int, **about: Any) -> Arm:
    return Arm(lambda module, seed: TorchLocal(module, period), period=period, torch=True, **about)


def _sterna(exchange: Exchange, period: int = 1, **about: Any) -> Arm:
    return Arm(lambda module, seed: InSterna(module, exchange, seed), period=period, **about)


def _average(every: int, codec: Codec, momentum: float = 0.0, **about: Any) -> Arm:
    exchange = ModelAverage(every=every, codec=codec, outer_momentum=momentum)
    return _sterna(exchange, every, **about)


RATES = (0.1, 0.05, 0.2)
TERNARY = ErrorFeedback(inner=TernGrad(dense=True))
CODED = ErrorFeedback(inner=Entropy(inner=Quantise(step=2.0)), decay=1.0)

REFERENCE = "DDP fp32"
LOCAL_TERNARY = "Sterna ModelAverage, every 16, EF(TernGrad)"
ARMS: dict[str, Arm] = {
    REFERENCE: _ddp(plain, rates=RATES, torch=True),
    "DDP fp16 hook": _ddp(torch_fp16, steps_of=REFERENCE, torch=True),
    "DDP PowerSGD hook, rank 1": _ddp(
        torch_powersgd(1), rate_of="DDP PowerSGD hook, rank 2", torch=True
    ),
    "DDP PowerSGD hook, rank 2": _ddp(torch_powersgd(2), rates=RATES, torch=True),
    "DDP PowerSGD hook, rank 4": _ddp(
        torch_powersgd(4), rate_of="DDP PowerSGD hook, rank 2", torch=True
    ),
    "torch averager, every 8": _torch_local(8, rate_of="torch averager, every 16"),
    "torch averager, every 16": _torch_local(16, rates=RATES),
    "torch averager, every 32": _torch_local(32, rates=RATES),
    "torch averager, every 64": _torch_local(64, rates=RATES),
    "Sterna TernGrad": _ddp(sterna(TernGrad()), rates=RATES),
    "Sterna TernGrad dense": _ddp(sterna(TernGrad(dense=True)), steps_of="Sterna TernGrad"),
    "Sterna EF(Entropy(TernGrad))": _ddp(
        sterna(ErrorFeedback(inner=Entropy(inner=TernGrad()))), rates=RATES
    ),
    "Sterna EF(Entropy(Quantise))": _ddp(sterna(CODED), rates=RATES),
    "Sterna Slim-DP": _sterna(SlimDP(), rates=RATES),
    "Sterna Slim-DP, every 8": _sterna(SlimDP(every=8), 8, rates=RATES),
    "Sterna ModelAverage, every 16": _average(16, Identity(), steps_of="torch averager, every 16"),
    "Sterna ModelAverage, every 8, EF(TernGrad)": _average(8, TERNARY, rate_of=LOCAL_TERNARY),
    LOCAL_TERNARY: _average(16, TERNARY, rates=RATES),
    "Sterna ModelAverage, every 32, EF(TernGrad)": _average(32, TERNARY, rate_of=LOCAL_TERNARY),
    "Sterna ModelAverage, every 64, EF(TernGrad)": _average(64, TERNARY, rate_of=LOCAL_TERNARY),
    "Sterna ModelAverage, every 32, EF(Entropy(Quantise))": _average(
        32, CODED, rate_of=LOCAL_TERNARY
    ),
}
