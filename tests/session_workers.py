"""Workers and servers of `tests/*/test_sessions*.py`, importable by the processes that run them."""

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sterna.comm.launch import warm_up
from sterna.comm.session import Meeting
from sterna.flat import Flat, Named
from sterna.objectives import CrossEntropy
from sterna.randomness import generator, isolated
from sterna.replica import Replica
from sterna.runs import tree
from sterna.runs.files import write_whole
from sterna.samplers import Shuffle
from sterna.seams import Batch, Comm, Loss, Message, Sampler, State
from sterna.server import Account, Server
from sterna.server.hosting import Service, Snapshots
from sterna.server.remote import Remote, work
from sterna.server.serving import Serving
from sterna.server.sessions import Sessions, sessions
from sterna.server.shards import Shelf, part_of
from sterna.server.worker import Task

EXAMPLES = 240


@dataclass(frozen=True)
class Sparse:
    """A codec whose messages vary in length: what is not 0."""

    summable = False
    unbiased = True

    def init(self, named: Named) -> State:
        return {}

    def encode(
        self, named: Named, state: State, comm: Comm, rng: torch.Generator
    ) -> tuple[Message, State]:
        x = Flat.of(named).buffer
        (index,) = x.nonzero(as_tuple=True)
        return Message({"index": index, "values": x[index]}, ragged=True), state

    def decode(self, message: Message, like: Named) -> Mapping[str, torch.Tensor]:
        flat = Flat.zeros_like(like)
        flat.buffer[message.buffers["index"]] = message.buffers["values"]
        return flat


class Blobs:
    """Two classes that a line divides."""

    def __init__(self) -> None:
        coins = generator(0, "blobs")
        self.targets = torch.arange(EXAMPLES) % 2
        self.inputs = torch.randn(EXAMPLES, 6, generator=coins) + 2.0 * self.targets[:, None]

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: Tensor) -> Batch:
        return Batch(self.inputs[index], self.targets[index], index)


def make() -> Task:
    with isolated(0, "model"):
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 2))
    return Task(model, Blobs(), CrossEntropy())


@dataclass(frozen=True)
class Slow:
    """An objective that takes its time."""

    seconds: float
    inner: CrossEntropy = field(default_factory=CrossEntropy)

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        time.sleep(self.seconds)
        return self.inner(model, batch, rng)


@dataclass(frozen=True)
class Broken:
    """An objective that raises."""

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        raise RuntimeError("a bug of mine")


def make_late(folder: Path, early: int) -> Task:
    """As `make`, at once for the first ``early`` workers to start; the others take a while."""
    started = len(list(folder.iterdir()))
    (folder / str(os.getpid())).touch()
    if started >= early:
        time.sleep(5.0)
    return make()


def make_slow() -> Task:
    task = make()
    return Task(task.model, task.data, Slow(0.02))


def make_broken() -> Task:
    task = make()
    return Task(task.model, task.data, Broken())


def make_other() -> Task:
    with isolated(0, "model"):
        return Task(nn.Linear(6, 2), Blobs(), CrossEntropy())


def replica() -> Replica:
    model = make().model
    return Replica(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def sampler(batch_size: int = 8) -> Shuffle:
    return Shuffle(EXAMPLES, batch_size=batch_size, seed=0)


def serving(
    post: Sessions,
    rules: Server,
    workers: int,
    *,
    own: Replica | None = None,
    batches: Sampler | None = None,
    epochs: int = 1,
) -> Serving:
    return Serving(
        own or replica(),
        batches or sampler(),
        post,
        rules=rules,
        account=Account.start(workers),
        epochs=epochs,
        patience_s=20.0,
    )


def _work(job: Remote) -> None:
    torch.set_num_threads(1)
    work(job)


def _shelve(meeting: Meeting, rules: Server, shards: int, shard: int, lease_s: float) -> None:
    torch.set_num_threads(1)
    part = part_of(replica(), shard, shards)
    with sessions(part.weights, rules, meeting, workers=8, shard=shard, lease_s=lease_s) as post:
        for _ in Shelf(part, post, rules=rules, seed=0, shard=shard, workers=8).run():
            pass


def _serve_and_die(meeting: Meeting, rules: Server, pushes: int) -> None:
    """A server that is killed after so many pushes."""
    torch.set_num_threads(1)
    own = replica()
    with sessions(own.weights, rules, meeting, workers=8) as post:
        for number, _ in enumerate(serving(post, rules, 8, own=own).run()):
            if number == pushes:
                os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def started(jobs: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
    """Processes that run ``job[0](*job[1:])``; those that are left are killed."""
    warm_up()
    context = get_context("forkserver")
    processes = [context.Process(target=job[0], args=job[1:]) for job in jobs]
    try:
        for process in processes:
            process.start()
        yield processes
        for process in processes:
            process.join(20.0)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def worker(meeting: Meeting, rules: Server, number: int, **more: Any) -> tuple[Any, ...]:
    """A worker process, as `started` takes it."""
    return _work, Remote(
        **{"make": make, "patience_s": 20.0} | more, meeting=meeting, rules=rules, worker=number
    )


def shelf(
    meeting: Meeting, rules: Server, shards: int, shard: int, lease_s: float = 10.0
) -> tuple[Any, ...]:
    """A shard's process, as `started` takes it."""
    return _shelve, meeting, rules, shards, shard, lease_s


def doomed_server(meeting: Meeting, rules: Server, pushes: int) -> tuple[Any, ...]:
    """A server's process, as `started` takes it."""
    return _serve_and_die, meeting, rules, pushes


def save(path: Path, values: Any) -> None:
    tensors, rest = tree.split(values)
    header = {"tree": json.dumps(rest)}
    write_whole(path, lambda beside: save_file(tensors, beside, metadata=header))


def load(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tree.join(tensors, json.loads(file.metadata()["tree"]))


def run(folder: Path | None = None, **more: Any) -> Service:
    """A run of two workers, with snapshots after every push where there is a folder."""
    snapshots = None
    if folder is not None:
        snapshots = Snapshots(folder=folder, save=save, load=load, every_s=0.0)
    return Service(
        **{
            "replica": replica,
            "task": make,
            "sampler": sampler,
            "rules": Server(),
            "workers": 2,
            "lease_s": 5.0,
            "patience_s": 30.0,
            "snapshots": snapshots,
        }
        | more
    )


def meet(folder: Path) -> Meeting:
    return Meeting(path=folder / "store")
