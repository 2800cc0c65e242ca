"""What is compiled before the clock starts."""

import torch

from sterna.codecs import Entropy, ErrorFeedback, Quantise, TernGrad, kernels, quantise_kernels
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.runs.rehearsal import rehearse


def test_every_exchange_is_rehearsed_and_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    for exchange in (
        AllReduce(),
        AllReduce(codec=TernGrad()),
        AllReduce(codec=ErrorFeedback(Entropy(Quantise(step=2.0)))),
        ModelAverage(every=3, codec=TernGrad()),
        SlimDP(every=5000),
    ):
        rehearse(exchange)
    assert torch.equal(before, torch.get_rng_state())


def test_kernels_are_compiled_by_it() -> None:
    rehearse(AllReduce(codec=TernGrad()))
    rehearse(AllReduce(codec=Quantise()))
    assert kernels._statistics.signatures
    assert quantise_kernels._quantise.signatures
