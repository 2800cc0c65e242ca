"""Scikit-learn's handwritten digits, which come with it: 8x8 pixels, 1,437 to train and 360 to test on.

A network of 64-128-64-10 units, momentum 0.9; the rate falls with the square root of what is left, as in
TernGrad's experiments. The batch is shared among the workers, so their number does not change the work.
With an asynchronous server, every push is a batch of its own, and the server has no momentum.

Args:
    epochs: passes over the training examples.
    lr: learning rate at the start.
    batch_size: examples per step over all workers; of an asynchronous server, per push.
    momentum: of the server's optimizer.
    clip_norm: shorten each worker's gradient to this norm; none: do not.
    slack: clocks by which the slowest worker may be behind.
    backups: workers that are not waited for.
    smoothness: L of AdaDelay.
    scale: c of AdaDelay.
    strength: lambda_0 of the compensation.
    decay: of the mean square of gradients; none: a constant lambda.
    clip: clip each tensor's gradient at this many standard deviations; none: no clipping.
    share_scalers: one scaler per tensor for all workers, or each its own.
    step: of the rounding, in root mean squares of each tensor.
    every: steps between two rounds of communication. What is judged and saved are the weights that the
        workers agreed on last.
    outer_lr: rate of the step from the last agreed weights towards the workers' average.
    outer_momentum: momentum of that step.
    nesterov: whether that momentum looks ahead.
    core_ratio: share of the weights that travel for their significance.
    explorer_ratio: share of the weights that travel by chance.
    refresh_every: rounds from one choice of the most significant weights to the next.
"""

from dataclasses import replace
from functools import partial

from torch.optim import SGD

from sterna.codecs import Entropy, ErrorFeedback, Fp16, Quantise, TernGrad
from sterna.data import digits
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.models import MLP
from sterna.runs.run import Run
from sterna.schedules import Polynomial
from sterna.seams import Admission, Correction, Exchange
from sterna.server import (
    AdaDelay,
    Asgd,
    Async,
    DelayCompensation,
    GapAware,
    Server,
    Ssp,
    StalenessScaled,
    Synchronous,
)


def _run(exchange: Exchange, epochs: int, lr: float, batch_size: int) -> Run:
    return Run(
        data=digits.load(),
        model=partial(MLP, (64, 128, 64, 10)),
        optimizer=partial(SGD, lr=lr, momentum=0.9),
        exchange=exchange,
        schedule=Polynomial(power=0.5),
        epochs=epochs,
        batch_size=batch_size,
    )


def sync(*, epochs: int = 30, lr: float = 0.05, batch_size: int = 64) -> Run:
    """Synchronous data parallelism: the mean of all gradients, in float32."""
    return _run(AllReduce(), epochs, lr, batch_size)


def fp16(*, epochs: int = 30, lr: float = 0.05, batch_size: int = 64) -> Run:
    """Gradients travel as 16-bit floats."""
    return _run(AllReduce(codec=Fp16()), epochs, lr, batch_size)


def terngrad(
    *,
    epochs: int = 30,
    lr: float = 0.05,
    batch_size: int = 64,
    clip: float | None = 2.5,
    share_scalers: bool = True,
) -> Run:
    """TernGrad: gradients travel as -1, 0 or 1 in 2 bits each, and one float per tensor."""
    codec = TernGrad(clip=clip, share_scalers=share_scalers)
    return _run(AllReduce(codec=codec), epochs, lr, batch_size)


def terngrad_dense(
    *, epochs: int = 30, lr: float = 0.05, batch_size: int = 64, clip: float | None = 2.5
) -> Run:
    """TernGrad with five codes to a byte: 1.6 bits each."""
    return _run(AllReduce(codec=TernGrad(clip=clip, dense=True)), epochs, lr, batch_size)


def entropy(*, epochs: int = 30, lr: float = 0.05, batch_size: int = 64, step: float = 2.0) -> Run:
    """Gradients are rounded, what was lost is sent later, and the codes travel at their entropy."""
    codec = ErrorFeedback(inner=Entropy(inner=Quantise(step=step)), decay=1.0)
    return _run(AllReduce(codec=codec), epochs, lr, batch_size)


def local_sgd(
    *,
    epochs: int = 30,
    lr: float = 0.05,
    batch_size: int = 64,
    every: int = 11,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    nesterov: bool = False,
) -> Run:
    """Local SGD: workers step alone and average their weights every so many steps."""
    exchange = ModelAverage(
        every=every, outer_lr=outer_lr, outer_momentum=outer_momentum, nesterov=nesterov
    )
    return _run(exchange, epochs, lr, batch_size)


def local_terngrad(
    *, epochs: int = 30, lr: float = 0.05, batch_size: int = 64, every: int = 11
) -> Run:
    """Local steps; what they came to travels as coded ternaries, and what was lost is sent later."""
    codec = ErrorFeedback(inner=Entropy(inner=TernGrad()))
    exchange = ModelAverage(every=every, codec=codec)
    return _run(exchange, epochs, lr, batch_size)


def slim_dp(
    *,
    epochs: int = 30,
    lr: float = 0.05,
    batch_size: int = 64,
    every: int = 1,
    core_ratio: float = 0.15,
    explorer_ratio: float = 0.15,
    refresh_every: int = 50,
) -> Run:
    """Slim-DP: of the weights only the most significant and some at random travel."""
    exchange = SlimDP(
        every=every,
        core_ratio=core_ratio,
        explorer_ratio=explorer_ratio,
        refresh_every=refresh_every,
    )
    return _run(exchange, epochs, lr, batch_size)


def _server(
    epochs: int,
    lr: float,
    batch_size: int,
    momentum: float,
    clip_norm: float | None,
    correction: Correction | None = None,
    admission: Admission | None = None,
) -> Run:
    server = Server(admission=admission or Async(), correction=correction or Asgd(), clip=clip_norm)
    optimizer = partial(SGD, lr=lr, momentum=momentum)
    run = _run(AllReduce(), epochs, lr, batch_size)
    return replace(run, server=server, optimizer=optimizer)


def asgd(
    *,
    epochs: int = 30,
    lr: float = 0.1,
    batch_size: int = 16,
    momentum: float = 0.0,
    clip_norm: float | None = None,
) -> Run:
    """Asynchronous SGD: every gradient is applied when it arrives."""
    return _server(epochs, lr, batch_size, momentum, clip_norm)


def ssp(
    *,
    epochs: int = 30,
    lr: float = 0.1,
    batch_size: int = 16,
    momentum: float = 0.0,
    clip_norm: float | None = None,
    slack: int = 3,
) -> Run:
    """Stale synchronous parallel: the fast wait for those who are too far behind."""
    return _server(epochs, lr, batch_size, momentum, clip_norm, admission=Ssp(slack=slack))


def backup(
    *,
    epochs: int = 30,
    lr: float = 0.05,
    batch_size: int = 16,
    momentum: float = 0.9,
    clip_norm: float | None = None,
    backups: int = 1,
) -> Run:
    """Synchronous SGD that does not wait for the slowest; its gradients are dropped."""
    admission = Synchronous(backups=backups)
    return _server(epochs, lr, batch_size, momentum, clip_norm, admission=admission)


def adadelay(
    *,
    epochs: int = 30,
    lr: float = 0.1,
    batch_size: int = 16,
    momentum: float = 0.0,
    clip_norm: float | None = None,
    smoothness: float = 1.0,
    scale: float = 1.0,
) -> Run:
    """AdaDelay: a late gradient makes a smaller step, most of all at the start."""
    rule = AdaDelay(smoothness=smoothness, scale=scale)
    return _server(epochs, lr, batch_size, momentum, clip_norm, rule)


def staleness_scaled(
    *,
    epochs: int = 30,
    lr: float = 0.8,
    batch_size: int = 16,
    momentum: float = 0.0,
    clip_norm: float | None = None,
) -> Run:
    """Staleness-aware ASGD: the step is divided by the staleness."""
    return _server(epochs, lr, batch_size, momentum, clip_norm, StalenessScaled())


def gap_aware(
    *,
    epochs: int = 30,
    lr: float = 0.1,
    batch_size: int = 16,
    momentum: float = 0.0,
    clip_norm: float | None = None,
) -> Run:
    """Gap-Aware: a late gradient is divided by how far the weights have moved meanwhile."""
    rule = GapAware(step_size=lr, momentum=momentum)
    return _server(epochs, lr, batch_size, momentum, clip_norm, rule)


def dc_asgd(
    *,
    epochs: int = 30,
    lr: float = 0.1,
    batch_size: int = 16,
    momentum: float = 0.0,
    clip_norm: float | None = None,
    strength: float = 4.0,
    decay: float | None = 0.95,
) -> Run:
    """DC-ASGD: a late gradient is moved to where the weights have gone."""
    rule = DelayCompensation(strength=strength, decay=decay)
    return _server(epochs, lr, batch_size, momentum, clip_norm, rule)
