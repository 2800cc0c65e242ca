"""A lost worker: seconds from its SIGKILL to the next new step of all workers.

    python benchmarks/recovery.py --out benchmarks/results/recovery

Four processes on loopback train a network; in the middle of a step one of them is killed. Counted is the
time to the first end of a step that nobody had ended before: the others notice, a replacement is
started, all meet anew, go back to the newest state that fits together, and do again what was lost.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from results import write
from sterna.codecs import ErrorFeedback, TernGrad
from sterna.comm.launch import launch, warm_up
from sterna.comm.member import Member
from sterna.data import Dataset, Examples
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.models import MLP
from sterna.randomness import generator
from sterna.replica import Replica
from sterna.runs.request import Request
from sterna.runs.run import Run
from sterna.runs.worker import work
from sterna.seams import Comm, Exchange, State

WORKERS, STEPS, DIES_AT = 4, 100, 60
NETWORKS = {"0.1 M": (64, 256, 256, 10), "1.9 M": (784, 1024, 1024, 10)}
EXCHANGES: dict[str, Exchange] = {
    "AllReduce": AllReduce(),
    "ModelAverage, every 8, EF(TernGrad)": ModelAverage(
        every=8, codec=ErrorFeedback(inner=TernGrad())
    ),
}


@dataclass(frozen=True, kw_only=True)
class Clocked:
    """An exchange that notes when it has ended a step, and kills its process in one."""

    exchange: Exchange
    folder: Path
    victim: int

    def init(self, replica: Replica) -> State:
        return self.exchange.init(replica)

    def __call__(self, replica: Replica, state: State, comm: Comm, rng: torch.Generator) -> State:
        if comm.rank == self.victim and replica.step == DIES_AT:
            mark = self.folder / "killed"
            if not mark.exists():
                mark.write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
        state = self.exchange(replica, state, comm, rng)
        with (self.folder / f"ends-{comm.rank}").open("a") as file:
            file.write(f"{replica.step} {time.time()}\n")
        return state


def run_of(name: str, exchange: str, folder: Path, victim: int) -> Run:
    sizes = NETWORKS[name]
    rng = generator(0, "points")
    inputs = torch.randn(64 * STEPS, sizes[0], generator=rng)
    examples = Examples(inputs, inputs[:, :10].argmax(1))
    return Run(
        data=Dataset("points", examples, Examples(inputs[:64], examples.targets[:64]), classes=10),
        model=partial(MLP, sizes),
        optimizer=partial(torch.optim.SGD, lr=0.01),
        exchange=Clocked(exchange=EXCHANGES[exchange], folder=folder, victim=victim),
        epochs=1,
        batch_size=64,
    )


def worker(comm: Member, request: Request) -> Any:
    return work(comm, request, run_of(**request.arguments))


def once(name: str, exchange: str, victim: int) -> dict[str, float]:
    """One run with one loss."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        arguments = {"name": name, "exchange": exchange, "folder": folder, "victim": victim}
        request = Request(
            experiment="points", arguments=arguments, folder=folder / "run", quiet=True
        )
        request.folder.mkdir()
        launch(worker, (request,), workers=WORKERS, max_restarts=1)
        killed = float((folder / "killed").read_text())
        ends = [
            [(int(step), float(at)) for step, at in map(str.split, path.read_text().splitlines())]
            for path in sorted(folder.glob("ends-*"))
        ]
    before = max(step for rank in ends for step, at in rank if at <= killed)
    first_new = max(
        next(at for step, at in rank if step == before + 1 and at > killed) for rank in ends
    )
    # The last rank, since rank 0 also warms up on a toy model when a group has met.
    again = sum(at > killed and step <= before for step, at in ends[-1])
    quiet = [b - a for (_, a), (_, b) in pairwise(end for end in ends[0] if end[1] <= killed)]
    return {"seconds": first_new - killed, "again": again, "step_s": statistics.median(quiet)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    warm_up()
    found: dict[str, list[dict[str, float]]] = {}
    for repeat in range(arguments.repeats + 1):
        for name in NETWORKS:
            for exchange in EXCHANGES:
                for victim in (0, 1):
                    one = once(name, exchange, victim)
                    if repeat:  # the first loads and compiles
                        found.setdefault(f"{name}, {exchange}, rank {victim}", []).append(one)
    rows = []
    for key, runs in found.items():
        seconds = [one["seconds"] for one in runs]
        rows.append(
            [
                key,
                f"{statistics.median(seconds):.2f}",
                f"{min(seconds):.2f} to {max(seconds):.2f}",
                f"{statistics.median(one['again'] for one in runs):.0f}",
                f"{1000 * statistics.median(one['step_s'] for one in runs):.1f}",
            ]
        )
    write(
        arguments.out,
        "From the SIGKILL of a worker to the next new step",
        [
            "parameters, exchange, who dies",
            "seconds",
            "range",
            "steps done again",
            "ms a step before",
        ],
        rows,
        found,
        f"{WORKERS} processes on loopback, batch 64 over the workers, killed in step {DIES_AT + 1} of "
        f"{STEPS}; medians of {arguments.repeats} runs, all kinds in turn.",
    )


if __name__ == "__main__":
    main()
