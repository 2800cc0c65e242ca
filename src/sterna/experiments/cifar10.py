"""CIFAR-10, or a subset of it in an npz file: 32x32 colour pictures of ten classes.

ResNet-20 with shifts and mirror images, momentum 0.9, weight decay 1e-4, half a cosine of learning rates
after a short warm-up. Batch-norm statistics are each worker's own between evaluations, where they are
averaged.

Args:
    data_dir: folder with the files; default: the environment's STERNA_DATA, then the user's cache, then
        the network.
    epochs: passes over the training examples.
    lr: learning rate at the start.
    batch_size: examples per step over all workers; of an asynchronous server, per push.
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
    momentum: of the server's optimizer.
    clip_norm: shorten each worker's gradient to this norm; none: do not.
    slack: clocks by which the slowest worker may be behind.
    smoothness: L of AdaDelay.
    scale: c of AdaDelay.
    strength: lambda_0 of the compensation.
    decay: of the mean square of gradients; none: a constant lambda.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.optim import SGD

from sterna.codecs import Entropy, ErrorFeedback, Fp16, Quantise, TernGrad
from sterna.data import cifar10
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.models import ResNet
from sterna.objectives import Augment, CrossEntropy
from sterna.runs.run import Run
from sterna.schedules import Cosine
from sterna.seams import Exchange
from sterna.server import AdaDelay, DelayCompensation, Server, Ssp


def _run(exchange: Exchange, data_dir: Path | None, epochs: int, lr: float, batch_size: int) -> Run:
    return Run(
        data=cifar10.load(data_dir),
        model=partial(ResNet, depth=20),
        optimizer=partial(SGD, lr=lr, momentum=0.9, weight_decay=1e-4),
        objective=Augment(inner=CrossEntropy(), flip=True, pad=4),
        exchange=exchange,
        schedule=Cosine(warmup=0.05),
        epochs=epochs,
        batch_size=batch_size,
    )


def sync(
    *, data_dir: Path | None = None, epochs: int = 10, lr: float = 0.1, batch_size: int = 128
) -> Run:
    """Synchronous data parallelism: the mean of all gradients, in float32."""
    return _run(AllReduce(), data_dir, epochs, lr, batch_size)


def fp16(
    *, data_dir: Path | None = None, epochs: int = 10, lr: float = 0.1, batch_size: int = 128
) -> Run:
    """Gradients travel as 16-bit floats."""
    return _run(AllReduce(codec=Fp16()), data_dir, epochs, lr, batch_size)


def terngrad(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    clip: float | None = 2.5,
    share_scalers: bool = True,
) -> Run:
    """TernGrad: gradients travel as -1, 0 or 1 in 2 bits each, and one float per tensor."""
    codec = TernGrad(clip=clip, share_scalers=share_scalers)
    return _run(AllReduce(codec=codec), data_dir, epochs, lr, batch_size)


def terngrad_dense(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    clip: float | None = 2.5,
) -> Run:
    """TernGrad with five codes to a byte: 1.6 bits each."""
    codec = TernGrad(clip=clip, dense=True)
    return _run(AllReduce(codec=codec), data_dir, epochs, lr, batch_size)


def entropy(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    step: float = 2.0,
) -> Run:
    """Gradients are rounded, what was lost is sent later, and the codes travel at their entropy."""
    codec = ErrorFeedback(inner=Entropy(inner=Quantise(step=step)), decay=1.0)
    return _run(AllReduce(codec=codec), data_dir, epochs, lr, batch_size)


def local_sgd(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    every: int = 10,
    outer_lr: float = 1.0,
    outer_momentum: float = 0.0,
    nesterov: bool = False,
) -> Run:
    """Local SGD: workers step alone and average their weights every so many steps."""
    exchange = ModelAverage(
        every=every, outer_lr=outer_lr, outer_momentum=outer_momentum, nesterov=nesterov
    )
    return _run(exchange, data_dir, epochs, lr, batch_size)


def local_terngrad(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    every: int = 8,
) -> Run:
    """Local steps; what they came to travels as coded ternaries, and what was lost is sent later."""
    codec = ErrorFeedback(inner=Entropy(inner=TernGrad()))
    exchange = ModelAverage(every=every, codec=codec)
    return _run(exchange, data_dir, epochs, lr, batch_size)


def slim_dp(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
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
    return _run(exchange, data_dir, epochs, lr, batch_size)


def _server(
    data_dir: Path | None,
    epochs: int,
    lr: float,
    batch_size: int,
    momentum: float,
    server: Server,
) -> Run:
    run = _run(AllReduce(), data_dir, epochs, lr, batch_size)
    optimizer = partial(SGD, lr=lr, momentum=momentum, weight_decay=1e-4)
    return replace(run, server=server, optimizer=optimizer)


def asgd(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    momentum: float = 0.0,
    clip_norm: float | None = None,
) -> Run:
    """Asynchronous SGD: every gradient is applied when it arrives."""
    server = Server(clip=clip_norm)
    return _server(data_dir, epochs, lr, batch_size, momentum, server)


def ssp(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    momentum: float = 0.0,
    clip_norm: float | None = None,
    slack: int = 3,
) -> Run:
    """Stale synchronous parallel: the fast wait for those who are too far behind."""
    server = Server(admission=Ssp(slack=slack), clip=clip_norm)
    return _server(data_dir, epochs, lr, batch_size, momentum, server)


def adadelay(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    momentum: float = 0.0,
    clip_norm: float | None = None,
    smoothness: float = 1.0,
    scale: float = 1.0,
) -> Run:
    """AdaDelay: a late gradient makes a smaller step, most of all at the start."""
    server = Server(correction=AdaDelay(smoothness=smoothness, scale=scale), clip=clip_norm)
    return _server(data_dir, epochs, lr, batch_size, momentum, server)


def dc_asgd(
    *,
    data_dir: Path | None = None,
    epochs: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    momentum: float = 0.0,
    clip_norm: float | None = None,
    strength: float = 2.0,
    decay: float | None = 0.95,
) -> Run:
    """DC-ASGD: a late gradient is moved to where the weights have gone."""
    server = Server(correction=DelayCompensation(strength=strength, decay=decay), clip=clip_norm)
    return _server(data_dir, epochs, lr, batch_size, momentum, server)
