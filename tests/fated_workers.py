"""Workers that die or stop when they come to a function of the library; for `faults/test_sync_faults.py`."""

import importlib
import os
import pickle
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sterna.codecs import ErrorFeedback, TernGrad
from sterna.comm.member import Member
from sterna.comm.supervisor import Joined, Lost
from sterna.data.examples import Dataset, Examples
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.randomness import generator
from sterna.runs.request import Request
from sterna.runs.run import Run
from sterna.runs.worker import work
from sterna.seams import Exchange, PeerLost

WORKERS = 3
STEPS = 24  # 2 epochs of 12

EXCHANGES: dict[str, Exchange] = {
    "identity": AllReduce(),
    "terngrad": AllReduce(codec=TernGrad()),
    "error_feedback": AllReduce(codec=ErrorFeedback(inner=TernGrad())),
    "model_average": ModelAverage(
        every=4, outer_momentum=0.5, codec=ErrorFeedback(inner=TernGrad())
    ),
    "slim_dp": SlimDP(every=3, core_ratio=0.3, explorer_ratio=0.3, refresh_every=2),
}

STEP = "sterna.objectives.cross_entropy.CrossEntropy.__call__"
EVALUATION = "sterna.runs.worker.evaluate"
SAVING = "sterna.runs.files.os.fsync"  # the file is written and not yet renamed
KEEPING = "sterna.comm.kept._write"
ROWS = "sterna.runs.recorder.append_rows"
START = "sterna.runs.worker.agree"
EXCHANGE = "sterna.comm.wire.pack"  # between the maximum of the scalers and the gathering


@dataclass(frozen=True)
class Fate:
    """The ``call``-th time that a worker of ``ranks`` calls ``function``, ``number`` hits its process.

    Each fate hits once a rank, and not before ``after`` others have hit anybody.
    """

    function: str
    call: int
    ranks: tuple[int, ...] = (1,)
    number: int = signal.SIGKILL
    after: int = 0


def _hit(fate: Fate, marks: Path, rank: int) -> None:
    if len(list(marks.iterdir())) < fate.after:
        return
    mark = marks / f"{fate.function}-{fate.call}-{fate.after}-{rank}"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), fate.number)


def _doomed(fate: Fate, marks: Path, rank: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fate.call:
            _hit(fate, marks, rank)
        return function(*args, **kwargs)

    return call


def _put(
    function: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Wrap what a dotted name says, in this process; what brings it back."""
    path, parts = function, []
    while True:
        path, _, part = path.rpartition(".")
        parts.insert(0, part)
        try:
            owner: Any = importlib.import_module(path)
        except ModuleNotFoundError:
            continue
        break
    for part in parts[:-1]:
        owner = getattr(owner, part)
    before = getattr(owner, parts[-1])
    setattr(owner, parts[-1], wrap(before))
    return lambda: setattr(owner, parts[-1], before)


def net() -> nn.Module:
    """With buffers, and with a layer that draws from torch's global generator."""
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    )


def points(num: int, seed: int) -> Examples:
    inputs = torch.randn(num, 6, generator=generator(seed, "points"))
    return Examples(inputs, inputs[:, :3].argmax(1))


def run_of(exchange: str, momentum: float = 0.9) -> Run:
    """A small run, quick enough to be killed often."""
    return Run(
        data=Dataset("points", points(144, 0), points(60, 1), classes=3),
        model=net,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=momentum),
        exchange=EXCHANGES[exchange],
        epochs=2,
        batch_size=12,
    )


def fated(comm: Member, request: Request, fates: Sequence[Fate]) -> dict[str, Any]:
    """`work`, with fates; notes the process of each attempt in the file ``attempts``."""
    marks = request.folder / "marks"
    marks.mkdir(parents=True, exist_ok=True)
    with (request.folder / "attempts").open("a") as file:
        file.write(f"{comm.rank} {os.getpid()}\n")
    back = [
        _put(fate.function, partial(_doomed, fate, marks, comm.rank))
        for fate in fates
        if comm.rank in fate.ranks
    ]
    try:
        return work(comm, request, run_of(**request.arguments))
    finally:
        for undo in reversed(back):
            undo()


def count(
    comm: Member, marks: Path, dies_at: Sequence[int], on_entry: int = 0
) -> tuple[int, float]:
    """A loop of one's own: 50 sums; rank 1 dies at some of them, and at the start of ``on_entry`` attempts.

    Gives where rank 0 last went on from, and the sum.
    """
    if comm.rank == 1 and len(list(marks.iterdir())) in range(1, 1 + on_entry):
        _hit(Fate("entry", len(list(marks.iterdir()))), marks, 1)
    kept = comm.recall()
    x, step = (torch.zeros(2), 0) if kept is None else (kept[0]["x"], int(kept[1]))
    begun = step
    while step < 50:
        if comm.rank == 1 and step in dies_at:
            _hit(Fate("count", step), marks, 1)
        x += comm.sum_(torch.ones(2))
        step += 1
        comm.keep({"x": x}, str(step))
    return begun, float(x.sum())


def dies_always(comm: Member) -> None:
    """Rank 1 dies whenever it is started."""
    if comm.rank == 1:
        os._exit(7)
    comm.sum_(torch.ones(1))


def loses_contact(rank: int, pipe: Connection) -> None:
    """What a launched process says when rank 0 dies and the others notice; those then wait."""
    pipe.send_bytes(pickle.dumps(Joined()))
    if rank == 0:
        os._exit(9)
    pipe.send_bytes(pickle.dumps(Lost("no contact")))
    time.sleep(60)


def meets_after_a_failure(rank: int, folder: Path) -> None:
    """Rank 0 waits in vain for somebody first, then both meet."""
    torch.set_num_threads(1)
    if rank == 0:
        try:
            Member.join(0, 2, folder / "first", timeout_s=1.0)
        except PeerLost:
            pass
        else:
            os._exit(2)
    comm = Member.join(rank, 2, folder / "second", timeout_s=15.0)
    total = float(comm.sum_(torch.ones(1)))
    comm.close()
    os._exit(0 if total == 2.0 else 3)
