"""A language model small enough for tests, as a user would write it; importable by worker processes."""

from dataclasses import replace
from functools import partial

import torch

from sterna.codecs import TernGrad
from sterna.data import PERPLEXITY, Dataset
from sterna.data.ptb import windows
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.models import LSTMLanguageModel
from sterna.randomness import generator
from sterna.runs.run import Run
from sterna.seams import Exchange
from sterna.server import Server

WORDS, POSITIONS = 11, 6


def text(count: int, seed: int) -> torch.Tensor:
    """Words of which each is mostly the one before plus one, so that there is something to learn."""
    steps = (torch.rand(count, generator=generator(seed, "text")) < 0.1).long() * 3 + 1
    return steps.cumsum(0) % WORDS


def train(
    *,
    epochs: int = 2,
    lr: float = 2.0,
    clip_norm: float | None = 1.0,
    ternary: bool = False,
    every: int = 0,
) -> Run:
    """A text that nearly counts.

    Args:
        epochs: passes over the text.
        lr: learning rate.
        clip_norm: largest norm of a gradient.
        ternary: whether gradients travel as ternary codes.
        every: local steps between two averages; 0: gradients travel at every step.
    """
    exchange: Exchange = AllReduce(codec=TernGrad()) if ternary else AllReduce()
    if every:
        exchange = ModelAverage(every=every)
    return Run(
        data=Dataset(
            "counting",
            windows(text(1201, 0), POSITIONS),
            windows(text(301, 1), POSITIONS),
            classes=WORDS,
            merit=PERPLEXITY,
        ),
        model=partial(LSTMLanguageModel, WORDS, 8),
        optimizer=partial(torch.optim.SGD, lr=lr),
        exchange=exchange,
        epochs=epochs,
        batch_size=20,
        clip_norm=clip_norm,
    )


def served(*, epochs: int = 2, lr: float = 2.0, clip_norm: float | None = None) -> Run:
    """The same under an asynchronous server.

    Args:
        epochs: passes over the text.
        lr: learning rate.
        clip_norm: of the run, where it does not belong.
    """
    return replace(train(epochs=epochs, lr=lr, clip_norm=clip_norm), server=Server(clip=1.0))
