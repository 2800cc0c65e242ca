"""What is made of an asynchronous configuration: the same on every machine, from the same request."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from sterna.exchange.all_reduce import AllReduce
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.runs.request import Request, build
from sterna.runs.run import Run
from sterna.runs.setting import Setting
from sterna.samplers.shuffle import Shuffle
from sterna.server.admission import Synchronous
from sterna.server.server import Server
from sterna.server.state import ByPushes
from sterna.server.worker import Task


def asynchronous(run: Run, request: Request) -> Run:
    """The run with a server: synchronous gradients become a server that waits for all.

    Raises:
        ValueError: its exchange has no such counterpart.
    """
    setting = request.setting or Setting()
    if run.server is not None:
        admission = run.server.admission
        if isinstance(admission, Synchronous) and admission.backups >= setting.workers:
            raise ValueError(
                f"{request.experiment}: backups must be less than the {setting.workers} workers; got "
                f"{admission.backups}. Somebody has to be waited for."
            )
        return run
    if not isinstance(run.exchange, AllReduce):
        raise ValueError(
            f"{request.experiment}: engine {setting.engine} is for asynchronous experiments and plain "
            f"synchronous ones; got {run.exchange!r}. Use --engine processes or in-process."
        )
    if run.batch_size % setting.workers:
        raise ValueError(
            f"{request.experiment}: batch_size must be a multiple of the {setting.workers} workers; got "
            f"{run.batch_size}."
        )
    rules = Server(admission=Synchronous(), codec=run.exchange.codec)
    return replace(run, server=rules, batch_size=run.batch_size // setting.workers)


@dataclass(frozen=True)
class Parts:
    """Server, sampler and work of a run."""

    replica: Replica
    sampler: Shuffle
    rules: Server
    task: Task


def parts(request: Request, run: Run) -> Parts:
    """Model, optimizer, sampler and work of a run with a server."""
    data = run.data.to(request.device)
    with isolated(request.seed, "model"):
        model = run.model().to(request.device)
    sampler = Shuffle(len(data.train), batch_size=run.batch_size, seed=request.seed)
    rules = run.server or Server()
    pushes = run.epochs * len(sampler)
    schedule: Callable[[int], float] = partial(_factor, run, pushes)
    if rules.admission.together((request.setting or Setting()).workers):
        schedule = ByPushes(run.schedule, pushes)
    optimizer = run.optimizer(p for p in model.parameters() if p.requires_grad)
    replica = Replica(model, optimizer, schedule, run.clip_norm)
    return Parts(replica, sampler, rules, Task(model, data.train, run.objective))


def _factor(run: Run, updates: int, version: int) -> float:
    return run.schedule(min(version / updates, 1.0))


def make_parts(request: Request) -> Parts:
    """All of it, in a process of its own."""
    return parts(request, asynchronous(build(request), request))


def make_replica(request: Request) -> Replica:
    """The server's model and optimizer, in a process of its own."""
    return make_parts(request).replica


def make_sampler(request: Request) -> Shuffle:
    """The sampler, in a process of its own."""
    return make_parts(request).sampler


def make_task(request: Request) -> Task:
    """A worker's work, made in its own process."""
    return make_parts(request).task
