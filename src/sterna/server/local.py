"""Workers that are processes of this machine: shared memory, one writer, no lock, no port.

    mailbox of a worker:   heartbeat | weights | gradient | encoded gradient, if any    (shared memory)
    its two pipes:         orders and index -> worker,   head and losses -> server      (a few bytes)

The worker's parameters are views of ``weights`` and its gradients of ``gradient``, so a push of plain
gradients copies nothing, and a read is one copy. A mailbox has one writer at any time: the server until the
order is sent, the worker until its head has arrived, whole; a worker that is killed before has not pushed.
A killed process can wedge nobody, for nobody shares a lock.

A worker that dies is seen by the end of its pipe; one that hangs, by a heart that stops. Either is
replaced while ``restarts`` are left, and the others go on. If the server dies, its workers end.
"""

import contextlib
import pickle
import selectors
import signal
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import NamedTuple

import torch
from torch import Tensor

from sterna.comm.launch import WorkerFailed, die_with_parent, explains_itself, warm_up
from sterna.comm.shared import SharedMemory
from sterna.flat import Flat, Layout
from sterna.seams import Message
from sterna.server.parcels import Form
from sterna.server.post import Event, Joined, Left, Order, Pushed
from sterna.server.server import Server
from sterna.server.worker import Computing, Task, bind

_BEAT_S = 0.5
_GRACE_S = 3.0
_ORDER = struct.Struct("<qqqq")  # session, clock, batch, read
_HEAD = struct.Struct("<qqqqdqq")  # kind, clock, parcel bytes, losses, seconds, activations, memory
_NOTHING = (0, 0, 0, 0.0, 0, 0)
_PUSHED, _REFUSED, _READY, _ERROR = range(4)


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that are wanted.

    Args:
        make: an importable function that makes a worker's `Task`; called in its process.
        count: how many; >= 1.
        stragglers: factors, by worker, by which it is slowed down, for trials; >= 1.
        restarts: how many lost workers to replace.
        lease_s: a worker whose heart has not beaten for so long is lost; > 1.
    """

    make: Callable[[], Task]
    count: int
    stragglers: Mapping[int, float]
    restarts: int = 0
    lease_s: float = 10.0


class _Box(NamedTuple):
    """A mailbox: views of one shared memory. ``body``: where a push lies; plain ones in the gradient."""

    memory: SharedMemory
    beat: Tensor
    weights: Flat
    gradient: Flat
    body: Tensor

    @classmethod
    def on(cls, memory: SharedMemory, layout: Layout, dtype: torch.dtype, form: Form) -> "_Box":
        n = layout.num_elements
        size = _aligned(n * dtype.itemsize)
        body = 64 + (size if form.plain else 2 * size)
        return cls(
            memory,
            memory.tensor(torch.int64, 0, 1),
            Flat(layout, memory.tensor(dtype, 64, n)),
            Flat(layout, memory.tensor(dtype, 64 + size, n)),
            memory.bytes[body : body + form.capacity],
        )

    @staticmethod
    def size(layout: Layout, dtype: torch.dtype, form: Form) -> int:
        """Bytes of the shared memory."""
        one = _aligned(layout.num_elements * dtype.itemsize)
        return 64 + 2 * one + (0 if form.plain else form.capacity)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 64) * 64


@dataclass
class _Place:
    """A worker's process, seen from the server."""

    process: ForkServerProcess
    pipe: Connection
    box: _Box
    joined: bool = False
    beat: int = -1
    beat_at: float = 0.0
    given_up: bool = False


class _Death(NamedTuple):
    """A worker is gone; its mailbox stays until what came before has been heeded."""

    worker: int
    reason: str


@dataclass(frozen=True)
class _Job:
    """What a worker process is told when it starts."""

    worker: int
    make: Callable[[], Task]
    rules: Server
    seed: int
    factor: float
    memory: SharedMemory
    layout: Layout
    dtype: torch.dtype


class Mailboxes:
    """A `sterna.server.post.Post` of shared memory and pipes. Make it with `mailboxes`."""

    def __init__(self, like: Flat, rules: Server, workers: Workers, seed: int) -> None:
        self._like, self._rules, self._workers, self._seed = like, rules, workers, seed
        self._form = Form.of(rules.codec, like)
        self._context = get_context("forkserver")
        self._selector = selectors.DefaultSelector()
        self._places: dict[int, _Place] = {}
        self._events: deque[Event | _Death] = deque()
        self._restarts = workers.restarts
        self._looked_at = time.monotonic()

    def start(self) -> None:
        """Start all workers."""
        warm_up()
        for worker in range(self._workers.count):
            self._start(worker)

    def _start(self, worker: int) -> None:
        layout, dtype = self._like.layout, self._like.buffer.dtype
        memory = SharedMemory(_Box.size(layout, dtype, self._form))
        ours, theirs = self._context.Pipe()
        factor = self._workers.stragglers.get(worker, 1.0)
        job = _Job(
            worker, self._workers.make, self._rules, self._seed, factor, memory, layout, dtype
        )
        process = self._context.Process(
            target=_child, args=(job, theirs), name=f"sterna-worker-{worker}"
        )
        process.start()
        theirs.close()
        self._places[worker] = _Place(
            process, ours, _Box.on(memory, layout, dtype, self._form), beat_at=time.monotonic()
        )
        self._selector.register(ours, selectors.EVENT_READ, worker)

    def receive(self, timeout_s: float) -> Event | None:
        """What happens next."""
        if not self._events:
            # Often enough that silence is not taken for our own.
            for key, _ in self._selector.select(min(timeout_s, _BEAT_S)):
                event = self._read(key.data)
                if event is not None:
                    self._events.append(event)
            if time.monotonic() - self._looked_at > _BEAT_S:
                self._feel_pulses()
        while self._events:
            event = self._events.popleft()
            if not isinstance(event, _Death):
                return event
            if event.worker in self._places:
                return self._bury(event)
        return None

    def _read(self, worker: int) -> Event | _Death | None:
        place = self._places[worker]
        try:
            data = place.pipe.recv_bytes()
        except (EOFError, OSError):
            self._selector.unregister(place.pipe)
            return _Death(worker, self._cause(place.process))
        kind, clock, size, count, compute_s, activations, memory = _HEAD.unpack_from(data)
        rest = data[_HEAD.size :]
        if kind == _READY:
            place.joined = True
            return Joined(worker)
        if kind == _ERROR:
            text, details = pickle.loads(rest)  # noqa: S301, TID251  from our own child, by pipe
            raise WorkerFailed(f"worker {worker}: {text}", details)
        message, reason = None, ""
        losses = torch.frombuffer(bytearray(rest), dtype=torch.float32, count=count)
        if kind == _REFUSED:
            reason = rest[4 * count :].decode()
        else:
            message = self._form.take(place.box.body, size, f"worker {worker}")
        return Pushed(worker, clock, losses, message, reason, compute_s, activations, memory)

    def _cause(self, process: ForkServerProcess) -> str:
        process.join(_GRACE_S)
        code = process.exitcode
        if code is not None and code < 0:
            return f"the process was killed by {signal.Signals(-code).name}"
        return f"the process ended without a word (exit code {code})"

    def _feel_pulses(self) -> None:
        """Find those whose heart has stopped."""
        now, since = time.monotonic(), time.monotonic() - self._looked_at
        self._looked_at = now
        for worker, place in list(self._places.items()):
            beat = int(place.box.beat[0])
            if beat != place.beat:
                place.beat, place.beat_at = beat, now
            elif since > self._workers.lease_s / 2:
                place.beat_at += since  # it was we who did not look
            elif now - place.beat_at > self._workers.lease_s and not place.given_up:
                place.given_up = True
                self._selector.unregister(place.pipe)
                reason = f"it has not answered for {now - place.beat_at:.0f} s"
                self._events.append(_Death(worker, reason))

    def _bury(self, death: _Death) -> Left:
        """End a worker's process for good, and start another if there may be one."""
        worker, reason = death
        place = self._places.pop(worker)
        place.pipe.close()
        place.process.kill()  # a stopped process heeds nothing else
        place.process.join()
        place.process.close()
        if not place.joined:
            reason += ", before it was ready"
        if self._restarts:
            self._restarts -= 1
            self._start(worker)
            reason += "; replaced"
        return Left(worker, reason)

    def slot(self, worker: int) -> Flat:
        """The weights in the worker's mailbox."""
        return self._places[worker].box.weights

    def send(self, worker: int, order: Order, changes: Message | None) -> None:
        """The order; the weights are in the mailbox already."""
        head = _ORDER.pack(order.session, order.clock, order.batch, order.read)
        with contextlib.suppress(OSError):  # it has died; its pipe says so when it is read next
            self._places[worker].pipe.send_bytes(head + order.index.numpy().tobytes())

    def expected(self) -> int:
        """Workers that are starting."""
        return sum(not place.joined for place in self._places.values())

    def pids(self) -> dict[int, int]:
        """Process numbers of the workers."""
        return {rank: place.process.pid or 0 for rank, place in self._places.items()}

    def close(self) -> None:
        """Stop all workers."""
        for place in self._places.values():
            place.pipe.close()  # a worker that waits for an order ends by itself
        deadline = time.monotonic() + _GRACE_S
        for place in self._places.values():
            place.process.join(max(deadline - time.monotonic(), 0.0) if place.joined else 0.0)
            if place.process.is_alive():
                place.process.kill()
                place.process.join()
            place.process.close()
        self._places.clear()
        self._selector.close()


@contextmanager
def mailboxes(like: Flat, rules: Server, workers: Workers, seed: int = 0) -> Iterator[Mailboxes]:
    """Worker processes and the post to them; they are stopped at the end, whatever happens.

    Args:
        like: layout and dtype of the weights.
        rules: of the server.
        workers: the processes that are wanted.
        seed: of the run.

    Raises:
        ValueError: a figure in ``workers`` is out of range.
    """
    if workers.count < 1:
        raise ValueError(f"Workers: count must be at least 1; got {workers.count}.")
    for worker, factor in workers.stragglers.items():
        if not (0 <= worker < workers.count and factor >= 1):
            raise ValueError(
                f"Workers: stragglers must be workers below {workers.count} with factors of at least 1; "
                f"got {worker}: {factor}. Workers are numbered from 0."
            )
    post = Mailboxes(like, rules, workers, seed)
    try:
        post.start()
        yield post
    finally:
        post.close()


def _child(job: _Job, pipe: Connection) -> None:
    """A worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    n = job.layout.num_elements
    form = Form.of(job.rules.codec, Flat(job.layout, torch.zeros(n, dtype=job.dtype)))
    box = _Box.on(job.memory, job.layout, job.dtype, form)
    threading.Thread(target=_beat, args=(box.beat,), daemon=True).start()
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        task = job.make()
        bind(task, box.weights, box.gradient, job.layout)
        pipe.send_bytes(_HEAD.pack(_READY, *_NOTHING))
        _work(job, task, box, form, pipe)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the server has closed the pipe: it needs no more
    except Exception as error:
        own = explains_itself(error)
        text = str(error) if own else f"{type(error).__name__}: {error}"
        details = "" if own else traceback.format_exc()
        with contextlib.suppress(OSError):
            pipe.send_bytes(_HEAD.pack(_ERROR, *_NOTHING) + pickle.dumps((text, details)))


def _work(job: _Job, task: Task, box: _Box, form: Form, pipe: Connection) -> None:
    """Answer orders until the pipe closes."""
    computing = Computing(
        task,
        box.gradient,
        [box.gradient],
        rules=job.rules,
        seed=job.seed,
        worker=job.worker,
        factor=job.factor,
    )
    begun = False
    while True:
        data = pipe.recv_bytes()
        number, clock, _, _ = _ORDER.unpack_from(data)
        index = torch.frombuffer(bytearray(data[_ORDER.size :]), dtype=torch.int64)
        if not begun:
            computing.begin([number])
            begun = True
        answer = computing.answer(index)
        size = form.put(answer.messages[0], box.body) if answer.messages else 0
        kind = _PUSHED if answer.messages else _REFUSED
        spent = (answer.compute_s, answer.activation_bytes, answer.memory_bytes)
        head = _HEAD.pack(kind, clock, size, len(answer.losses), *spent)
        pipe.send_bytes(head + answer.losses.numpy().tobytes() + answer.reason.encode())


def _beat(beat: Tensor) -> None:
    while True:
        beat += 1
        time.sleep(_BEAT_S)
