"""Run one collective, or an exchange, many times; hold the ledger against the loopback's byte counter.

Run inside a network namespace of its own, where nobody else uses the loopback interface.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sterna.codecs import Entropy, ErrorFeedback, TernGrad, WarmUp
from sterna.comm.launch import launch
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.exchange.two_phase import choose
from sterna.randomness import generator
from sterna.replica import Replica
from sterna.seams import Comm, Exchange, Message

COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")


EXCHANGES: dict[str, Exchange] = {
    "two phases": AllReduce(codec=TernGrad()),
    "Slim-DP": SlimDP(core_ratio=0.15, explorer_ratio=0.15, refresh_every=4),
    "composition": ModelAverage(every=2, codec=ErrorFeedback(inner=Entropy(inner=TernGrad()))),
    "warm-up": AllReduce(codec=WarmUp(inner=TernGrad(), steps=4)),
}


def training(comm: Comm, exchange: Exchange, num_weights: int) -> Callable[[], None]:
    """One step of a model with so many weights, of gradients drawn at random."""
    model = nn.Linear(num_weights, 1, bias=False, device="meta").to_empty(device="cpu")
    nn.init.zeros_(model.weight)
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
    rng, state = generator(1, comm.rank), [exchange.init(replica)]
    if isinstance(exchange, AllReduce) and isinstance(exchange.codec, TernGrad):
        assert choose(exchange.codec, replica.gradients, comm.size).two_phase

    def step() -> None:
        replica.gradients.buffer.normal_(generator=rng)
        state[0] = exchange(replica, state[0], comm, rng)

    return step


def worker(comm: Comm, call: str, num_bytes: int, times: int) -> dict[str, float]:
    step = training(comm, EXCHANGES[call], num_bytes // 4) if call in EXCHANGES else None

    def once() -> None:
        if step is not None:
            step()
        elif call == "all-to-all":
            comm.all_to_all(torch.zeros(comm.size, num_bytes // comm.size, dtype=torch.uint8))
        elif call == "broadcast":
            comm.broadcast_(torch.zeros(num_bytes, dtype=torch.uint8))
        elif call == "gather":
            comm.gather(Message({"x": torch.zeros(num_bytes, dtype=torch.uint8)}))
        elif call == "ragged":
            comm.gather(Message({"x": torch.zeros(num_bytes, dtype=torch.uint8)}, ragged=True))
        else:
            comm.sum_(torch.zeros(num_bytes // 4))

    once()  # connections are made now
    settle(comm)
    before, bytes_before, messages_before = (int(COUNTER.read_text()), *totals(comm))
    settle(comm)
    for _ in range(times):
        once()
    settle(comm)
    counted = int(COUNTER.read_text()) - before
    num_bytes, messages = totals(comm)
    return {
        "kernel_bytes": counted,
        "ledger_bytes": num_bytes - bytes_before,
        "messages": messages - messages_before,
    }


def totals(comm: Comm) -> tuple[float, float]:
    """Bytes and messages sent by all workers so far; a root sends more than the others."""
    spent = comm.ledger.spent()
    sent = torch.tensor([spent.bits_sent / 8, spent.messages], dtype=torch.float64)
    with comm.ledger.paused():
        comm.sum_(sent)
    found: list[float] = sent.tolist()
    return found[0], found[1]


def settle(comm: Comm) -> None:
    """All workers are here, and what was in flight has arrived."""
    with comm.ledger.paused():
        comm.sum_(torch.zeros(1))
    time.sleep(0.1)


def workers(comm: Comm, cases: list[tuple[str, int, int]]) -> list[dict[str, float]]:
    return [worker(comm, *case) for case in cases]


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    found = {}
    for size in sorted({case[3] for case in given}):  # one start for all cases of a size
        chosen = [number for number, case in enumerate(given) if case[3] == size]
        counts = launch(workers, ([given[number][:3] for number in chosen],), workers=size)
        found.update(zip(chosen, counts, strict=True))
    print(json.dumps([found[number] for number in range(len(given))]))
