"""Run one collective many times and hold the ledger against the loopback interface's byte counter.

Run inside a network namespace of its own, where nobody else uses the loopback interface.
"""

import json
import sys
import time
from pathlib import Path

import torch

from sterna.comm.launch import launch
from sterna.seams import Comm, Message

COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")


def worker(comm: Comm, call: str, num_bytes: int, times: int) -> dict[str, float]:
    def once() -> None:
        if call == "gather":
            comm.gather(Message({"x": torch.zeros(num_bytes, dtype=torch.uint8)}))
        elif call == "ragged":
            comm.gather(Message({"x": torch.zeros(num_bytes, dtype=torch.uint8)}, ragged=True))
        else:
            comm.sum_(torch.zeros(num_bytes // 4))

    once()  # connections are made now
    settle(comm)
    before = int(COUNTER.read_text())
    spent_before = comm.ledger.spent()
    settle(comm)
    for _ in range(times):
        once()
    settle(comm)
    spent = comm.ledger.spent()
    return {
        "kernel_bytes": int(COUNTER.read_text()) - before,
        "ledger_bytes": comm.size * (spent.bits_sent - spent_before.bits_sent) / 8,
        "messages": comm.size * (spent.messages - spent_before.messages),
    }


def settle(comm: Comm) -> None:
    """All workers are here, and what was in flight has arrived."""
    with comm.ledger.paused():
        comm.sum_(torch.zeros(1))
    time.sleep(0.1)


if __name__ == "__main__":
    print(
        json.dumps([launch(worker, case[:3], workers=case[3]) for case in json.loads(sys.argv[1])])
    )
