"""Sterna trains deep networks with less, and proves every saving in one ledger.

The names below are loaded when they are first used, so that ``import sterna`` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sterna.codecs import Entropy, ErrorFeedback, Fp16, Identity, Quantise, TernGrad, WarmUp
    from sterna.comm.distributed import Distributed
    from sterna.comm.in_process import run_in_process
    from sterna.comm.launch import launch
    from sterna.comm.solo import Solo
    from sterna.data.examples import Dataset, Examples
    from sterna.exchange.all_reduce import AllReduce
    from sterna.exchange.ddp_hook import register
    from sterna.exchange.explorers import AtRandom, BestResponse
    from sterna.exchange.local import Local
    from sterna.exchange.model_average import ModelAverage
    from sterna.exchange.slim_dp import SlimDP
    from sterna.ledger import Ledger, Spent
    from sterna.loop import Record, fit
    from sterna.objectives import CrossEntropy
    from sterna.replica import Replica
    from sterna.runs.run import Run
    from sterna.samplers import Shuffle
    from sterna.server.server import Server
    from sterna.server.virtual import simulate

__version__ = "0.1.0"

_HOMES = {
    "AllReduce": "exchange.all_reduce",
    "AtRandom": "exchange.explorers",
    "BestResponse": "exchange.explorers",
    "CrossEntropy": "objectives",
    "Dataset": "data.examples",
    "Distributed": "comm.distributed",
    "Entropy": "codecs",
    "ErrorFeedback": "codecs",
    "Examples": "data.examples",
    "Fp16": "codecs",
    "Identity": "codecs",
    "Ledger": "ledger",
    "Local": "exchange.local",
    "ModelAverage": "exchange.model_average",
    "Quantise": "codecs",
    "Record": "loop",
    "Replica": "replica",
    "Run": "runs.run",
    "Server": "server.server",
    "Shuffle": "samplers",
    "SlimDP": "exchange.slim_dp",
    "Solo": "comm.solo",
    "Spent": "ledger",
    "TernGrad": "codecs",
    "WarmUp": "codecs",
    "fit": "loop",
    "launch": "comm.launch",
    "register": "exchange.ddp_hook",
    "run_in_process": "comm.in_process",
    "simulate": "server.virtual",
}

__all__ = [
    "AllReduce",
    "AtRandom",
    "BestResponse",
    "CrossEntropy",
    "Dataset",
    "Distributed",
    "Entropy",
    "ErrorFeedback",
    "Examples",
    "Fp16",
    "Identity",
    "Ledger",
    "Local",
    "ModelAverage",
    "Quantise",
    "Record",
    "Replica",
    "Run",
    "Server",
    "Shuffle",
    "SlimDP",
    "Solo",
    "Spent",
    "TernGrad",
    "WarmUp",
    "fit",
    "launch",
    "register",
    "run_in_process",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"sterna.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sterna' has no attribute {name!r}")
