"""Mailboxes and their workers: what happens in an awkward order."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from session_workers import EXAMPLES, make, make_late
from sterna.comm.shared import SharedMemory
from sterna.replica import Replica
from sterna.samplers import Shuffle
from sterna.seams import Admission
from sterna.server import Account, Async, Bsp, Server, Synchronous
from sterna.server.local import Workers, mailboxes
from sterna.server.post import Joined, Left
from sterna.server.serving import Serving


def replica() -> Replica:
    model = make().model
    return Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))


def serving(own: Replica, post: object, rules: Server, epochs: int = 1) -> Serving:
    order = Shuffle(EXAMPLES, batch_size=4)
    account = Account.start(3)
    return Serving(own, order, post, rules=rules, account=account, epochs=epochs)  # type: ignore[arg-type]


@pytest.mark.parametrize("admission", [Bsp(), Synchronous()])
def test_a_waiting_worker_dies_just_after_anothers_push(admission: Admission) -> None:
    """The push is heeded first, and admits the dead one, who is still in the books."""
    own, rules, killed = replica(), Server(admission=admission), -1
    wanted = Workers(make=make, count=3, stragglers={2: 200.0})
    with mailboxes(own.weights, rules, wanted) as post:
        loop, batches = serving(own, post, rules), []
        for landing in loop.run():
            batches.append(landing.place.batch)
            if len(loop.state.members) < 3 and killed < 0:
                time.sleep(0.1)  # until all are there
            if killed < 0 and len(loop.state.members) == 3 and list(loop._orders) == [2]:
                killed = 1 - landing.worker if landing.worker < 2 else 0
                time.sleep(1.0)  # worker 2 pushes meanwhile
                os.kill(post.pids()[killed], signal.SIGKILL)
                time.sleep(0.3)
    assert loop.lost[killed] == 1
    assert sorted(batches) == list(range(EXAMPLES // 4))


def test_a_replacement_that_dies_before_it_is_ready_is_one_worker_less(tmp_path: Path) -> None:
    own, rules, killed = replica(), Server(admission=Async()), []
    late = partial(make_late, tmp_path, 3)
    wanted = Workers(make=late, count=3, stragglers=dict.fromkeys(range(3), 20.0), restarts=1)
    with mailboxes(own.weights, rules, wanted) as post:
        loop, batches = serving(own, post, rules, epochs=3), []
        for landing in loop.run():
            batches.append(landing.place.batch)
            if len(loop.state.members) < 3 and not killed:
                time.sleep(0.1)
            pid = post.pids().get(0)
            fresh = pid is not None and pid not in killed and len(killed) < 2
            ready = 0 in loop.state.members if killed else len(loop.state.members) < 3
            if fresh and not ready:
                os.kill(pid, signal.SIGKILL)  # type: ignore[arg-type]
                killed.append(pid)
    assert len(killed) == 2 and loop.lost[0] == 2
    assert "replaced" in loop.reasons[0] and "before it was ready" in loop.reasons[1]
    assert sorted(batches) == list(range(3 * EXAMPLES // 4))


def test_a_stopped_worker_is_found_where_nobody_else_speaks() -> None:
    """Whoever waits for long between two looks must not take a worker's silence for its own."""
    own, left = replica(), []
    with mailboxes(
        own.weights, Server(), Workers(make=make, count=1, stragglers={}, lease_s=1.5)
    ) as post:
        deadline = time.monotonic() + 40.0
        while not (event := post.receive(1.0)) and time.monotonic() < deadline:
            pass
        assert isinstance(event, Joined)
        os.kill(post.pids()[0], signal.SIGSTOP)
        deadline = time.monotonic() + 20.0
        while not left and time.monotonic() < deadline:
            left = [event for event in [post.receive(1.0)] if event is not None]
    assert [type(event) for event in left] == [Left] and "it has not answered for" in left[0].reason


@pytest.mark.parametrize(
    ("stragglers", "count", "message"),
    [
        ({}, 0, "Workers: count must be at least 1; got 0"),
        ({3: 2.0}, 3, "stragglers must be workers below 3 with factors of at least 1; got 3: 2.0"),
        ({0: 0.5}, 3, "stragglers must be workers below 3 with factors of at least 1; got 0: 0.5"),
    ],
)
def test_what_is_refused_is_named(stragglers: dict[int, float], count: int, message: str) -> None:
    wanted = Workers(make=make, count=count, stragglers=stragglers)
    with pytest.raises(ValueError, match=message), mailboxes(replica().weights, Server(), wanted):
        pass


def test_shared_memory_starts_at_zero_and_has_no_name() -> None:
    memory = SharedMemory(1 << 16)
    assert memory.bytes.count_nonzero() == 0
    x = memory.tensor(torch.float64, 64, 10)
    x.fill_(2.0)
    assert memory.bytes[64:144].view(torch.float64).sum() == 20.0
