"""Several workers on this machine: processes forked from a server that has torch loaded already.

The fork server is Python's own (``multiprocessing``, start method ``forkserver``). Forking from a process
that never ran a kernel takes a few hundredths of a second; starting an interpreter and importing torch
takes seconds. Workers meet through a file and talk over the loopback interface.

When a worker is lost, and one may be replaced:

    lost worker     dies: its pipe ends. Or hangs: the collectives of the others run out of time.
    the others      get `PeerLost` in their next collective, leave the broken group (which ends the
                    collectives of those who wait for them), say so by pipe, and wait.
    launcher        has heard of all, or waits no longer: who has said nothing is killed, and lost too.
                    It starts a replacement for each lost worker, and sends the others the file through
                    which all meet next.
    all             form a new group of the same size, and call the worker function again. `Member.recall`
                    gives each what it kept itself, or its predecessor did, in memory that outlives it
                    (`sterna.comm.member` says why these states fit together).

So nothing of the state is lost with a worker, nor when all are lost at once, nor when one that hangs in
a rendezvous is killed for it. The processes of the others live on, with what they have loaded and compiled.
"""

import dis
import gc
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sterna.comm.supervisor import Joined, Lost, Outcome, Supervisor, WorkerFailed

if TYPE_CHECKING:
    from sterna.comm.kept import Kept

__all__ = ["WorkerFailed", "die_with_parent", "explains_itself", "launch", "warm_up"]

_PRELOAD = ["sterna.comm.preload"]


def warm_up() -> None:
    """Start the fork server in the background; safe to call before torch is imported, and again."""
    multiprocessing.set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()


@dataclass(frozen=True)
class _Task:
    """What the worker processes do."""

    worker: Callable[..., Any]
    args: tuple[Any, ...]
    size: int
    timeout_s: float


def launch(
    worker: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    workers: int,
    max_restarts: int = 0,
    timeout_s: float = 300.0,
    on_restart: Callable[[str], None] | None = None,
) -> Any:
    """Run ``worker(comm, *args)`` in ``workers`` processes of this machine; rank 0's result.

    ``comm`` is a `sterna.comm.member.Member`. A worker that dies or stops answering is replaced, at most
    ``max_restarts`` times; those that are lost together count once. The others live on, and ``worker`` is
    called again on all of them in a new group. It goes on from what it kept, if it did
    (`sterna.runs.survivors` for the state of a training loop, `Member.keep` for any), or from its files.
    An error that a worker raises itself ends the launch: it would only come again.

    With ``max_restarts=0`` nothing is kept, and a lost worker ends the launch within seconds.

    Args:
        worker: an importable function; its arguments and rank 0's result must pickle. It must let
            `PeerLost` pass.
        args: further arguments, the same for all.
        workers: number of processes.
        max_restarts: how often lost workers are replaced.
        timeout_s: seconds after which a collective without an answer fails.
        on_restart: told who was lost and why, each time before they are replaced.

    Raises:
        ValueError: ``workers`` is below 1, or ``max_restarts`` below 0.
        WorkerFailed: a worker failed and no restart is left.
        KeyboardInterrupt: Ctrl-C; the workers have been stopped.
    """
    if workers < 1:
        raise ValueError(f"launch: workers must be at least 1; got {workers}.")
    if max_restarts < 0:
        raise ValueError(f"launch: max_restarts must be 0 or more; got {max_restarts}.")
    warm_up()
    from sterna.comm.kept import Kept

    task = _Task(worker, tuple(args), workers, timeout_s)
    kept = [Kept() for _ in range(workers)] if max_restarts else [None] * workers
    context = multiprocessing.get_context("forkserver")

    def start(rank: int, store: Path) -> tuple[ForkServerProcess, Connection]:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_child,
            args=(rank, task, store, theirs, kept[rank]),
            name=f"sterna-worker-{rank}",
        )
        process.start()
        theirs.close()
        return process, ours

    with tempfile.TemporaryDirectory(prefix="sterna-") as folder:
        supervisor = Supervisor(start, workers, Path(folder), timeout_s)
        try:
            return supervisor.run(max_restarts, on_restart)
        finally:
            supervisor.stop()


def _child(rank: int, task: _Task, store: Path, pipe: Connection, kept: "Kept | None") -> None:
    """A worker process: join the group and work, anew after every loss; report how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides
    signal.signal(signal.SIGTERM, _terminated)
    threading.Thread(target=die_with_parent, daemon=True).start()

    import torch

    torch.set_num_threads(1)
    while isinstance(said := _attempt(rank, task, store, pipe, kept), Lost):
        _leave()  # first, so that whoever waits for this worker in a collective hears of it
        _say(pipe, said)
        try:
            store = Path(pipe.recv_bytes().decode())
        except (EOFError, OSError):  # nobody is replaced any more
            os._exit(1)
    said = _end(pipe, said)
    pipe.close()
    if said.error is not None:
        # A broken group can hang in its destructor; everything worth keeping is on disk.
        os._exit(1)
    _leave()


def _attempt(
    rank: int, task: _Task, store: Path, pipe: Connection, kept: "Kept | None"
) -> Lost | Outcome:
    """Work in one group until the end, or until it breaks."""
    from sterna.comm.member import Member

    try:
        comm = Member.join(rank, task.size, store, task.timeout_s, kept)
        _say(pipe, Joined())
        result = task.worker(comm, *task.args)
        return Outcome(result=result if rank == 0 else None)
    except Exception as error:
        if _lost_contact(error):
            return Lost(str(error))
        return Outcome(
            error=str(error) if explains_itself(error) else f"{type(error).__name__}: {error}",
            details="" if explains_itself(error) else traceback.format_exc(),
        )


def _lost_contact(error: Exception) -> bool:
    """Whether another worker is to blame; of collectives that are not ours, Gloo's text says so."""
    import torch.distributed as dist

    from sterna.seams import PeerLost

    of_gloo = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return of_gloo or isinstance(error, PeerLost | dist.DistNetworkError | dist.DistBackendError)


def _leave() -> None:
    """Drop the process group, and what the failed attempt left that may hold its sockets open."""
    import torch.distributed as dist

    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _say(pipe: Connection, said: Joined | Lost) -> None:
    pipe.send_bytes(pickle.dumps(said))


def _end(pipe: Connection, said: Outcome) -> Outcome:
    """Send how it ended, or that the result does not pickle; returns what was sent."""
    try:
        # Plain pickle: torch's own would pass tensors as handles into a process that is about to end.
        whole = pickle.dumps(said)
    except Exception as error:
        kind = type(said.result).__name__
        said = Outcome(
            error=f"launch: the result of the worker must pickle; got {kind} ({error}). "
            "Return numbers, texts, tensors, or what an importable module defines."
        )
        whole = pickle.dumps(said)
    pipe.send_bytes(whole)
    return said


def explains_itself(error: BaseException) -> bool:
    """Whether the library raised it, with a message for users; a traceback would add nothing."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    ours = str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == "sterna"
    # Raised by a raise statement, not by an operation that went wrong.
    return ours and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _terminated(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


def die_with_parent() -> None:
    """For a thread of a child process: end the process at once when its parent has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
