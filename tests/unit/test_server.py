"""Facts of the server's parts, by hand, and their error messages."""

import pytest
import torch

from sterna.data import Examples
from sterna.flat import Flat
from sterna.objectives import CrossEntropy
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.samplers import Shuffle
from sterna.seams import Push
from sterna.server import (
    Account,
    AdaDelay,
    Bsp,
    Cluster,
    DelayCompensation,
    Server,
    Ssp,
    StalenessScaled,
    Trace,
    simulate,
)
from sterna.server.delays import Constant, Fifo, Gamma, LogNormal, Pareto, PerWorker

POINTS = Examples(torch.eye(4).repeat(4, 1), torch.arange(4).repeat(4))


def _replica():
    with isolated(0, "model"):
        model = torch.nn.Linear(4, 4)
    return Replica(model, torch.optim.SGD(model.parameters(), lr=0.5))


def _push(gradient, weights, backup, version=10, staleness=1):
    named = ({"w": torch.tensor(values)} for values in (gradient, weights, backup))
    return Push(0, *named, version=version, staleness=staleness)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ssp(slack=-1), "Ssp: slack must be a whole number of at least 0; got -1. Async"),
        (lambda: Ssp(slack=1.5), "Ssp: slack must be a whole number of at least 0; got 1.5"),
        (lambda: AdaDelay(smoothness=-1.0), "AdaDelay: smoothness must be at least 0; got -1.0"),
        (lambda: AdaDelay(scale=0.0), "AdaDelay: scale must be above 0; got 0.0"),
        (
            lambda: DelayCompensation(strength=-2.0),
            "DelayCompensation: strength must be at least 0",
        ),
        (
            lambda: DelayCompensation(decay=1.0),
            r"DelayCompensation: decay must be in \[0, 1\) or No",
        ),
        (
            lambda: DelayCompensation(epsilon=0.0),
            "DelayCompensation: epsilon must be above 0; got 0",
        ),
        (lambda: Server(clip=0.0), "Server: clip must be above 0 or None; got 0.0. None does not"),
        (
            lambda: Cluster(workers=0),
            "Cluster: workers must be a whole number of at least 1; got 0",
        ),
        (lambda: Cluster(bandwidth=0.0), "Cluster: bandwidth must be above 0 or None; got 0.0"),
        (lambda: Cluster(latency=-0.1), "Cluster: latency must be at least 0; got -0.1"),
        (lambda: Constant(mean=0.0), "Constant: mean must be above 0; got 0.0. It is in seconds"),
        (lambda: Gamma(shape=0), "Gamma: shape must be a whole number of at least 1; got 0"),
        (lambda: LogNormal(cv=-1.0), "LogNormal: cv must be at least 0; got -1.0"),
        (lambda: Pareto(tail=1.0), "Pareto: tail must be above 1; got 1.0. Else there is no mean"),
        (
            lambda: PerWorker(factors=(1.0, 0.0)),
            "PerWorker: factors must be numbers above 0; got 0",
        ),
        (lambda: Fifo(depth=0), "Fifo: depth must be a whole number of at least 1; got 0"),
        (
            lambda: Trace(seconds=((1.0,), 2.0)),
            "Trace: seconds must be a tuple of numbers; got 2.0",
        ),
        (lambda: Trace(seconds=[]), r"Trace: seconds must be a tuple; got \[\]. Write one tuple"),
    ],
)
def test_what_is_refused_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_trace_that_is_too_short_is_named():
    cluster = Cluster(workers=2, delay=Trace(seconds=((1.0, 1.0), (1.5,))))
    with pytest.raises(
        ValueError, match="Trace: seconds must hold clock 1 of worker 1; got 2 work"
    ):
        list(simulate(_replica(), POINTS, Shuffle(16, 2), CrossEntropy(), cluster=cluster))


def test_an_account_of_others_is_named():
    with pytest.raises(
        ValueError, match="account must have a ledger for each of the 8 workers; got 3"
    ):
        next(simulate(_replica(), POINTS, Shuffle(16, 2), CrossEntropy(), account=Account.start(3)))


def test_delay_compensation_by_hand():
    """lambda g g (w - backup): a move that the others have made already is made smaller."""
    rule = DelayCompensation(strength=0.5, decay=None)
    update, _ = rule.correct(_push([2.0, 2.0, -4.0], [1.0, 1.0, 1.0], [1.5, 0.5, 0.0]), {})
    assert update["w"].tolist() == [2 - 1.0, 2 + 1.0, -4 + 8.0]


def test_the_adaptive_rule_takes_the_mean_square_after_its_update():
    rule = DelayCompensation(strength=2.0, decay=0.75, epsilon=1e-30)
    state = rule.init({"w": torch.zeros(2)})
    update, state = rule.correct(_push([4.0, -4.0], [1.0, 1.0], [0.0, 0.0]), state)
    # v = 0.25 * 16 = 4, lambda = 2 / 2 = 1
    assert state["mean_square"]["w"].tolist() == [4.0, 4.0]
    assert update["w"].tolist() == [4.0 + 16.0, -4.0 + 16.0]


def test_a_fresh_push_still_enters_the_mean_square():
    rule = DelayCompensation(decay=0.5)
    weights = {"w": torch.ones(1)}
    push = Push(0, {"w": torch.tensor([2.0])}, weights, weights, version=0, staleness=0)
    update, state = rule.correct(push, rule.init(weights))
    assert state["mean_square"]["w"].item() == 2.0 and update["w"].item() == 2.0


def test_scaled_steps_by_hand():
    rule = StalenessScaled()
    for staleness, expected in ((0, 6.0), (1, 6.0), (3, 2.0)):
        update, _ = rule.correct(_push([6.0], [0.0], [0.0], staleness=staleness), {})
        assert update["w"].item() == expected


def test_adadelay_for_late_steps_is_plain():
    rule = AdaDelay(smoothness=0.0)
    update, _ = rule.correct(_push([1.0], [0.0], [0.0], version=10**8, staleness=100), {})
    assert update["w"].item() == pytest.approx(1.0, abs=1e-6)


def test_two_workers_by_hand():
    """Times 2, 2, 4, 4 ... of worker 0 and 3, 6 ... of worker 1; who read what follows."""
    cluster = Cluster(workers=2, delay=Trace(seconds=((2.0,) * 9, (3.0,) * 9)))
    updates = list(simulate(_replica(), POINTS, Shuffle(16, 2), CrossEntropy(), cluster=cluster))
    assert [(u.time_s, u.worker, u.staleness) for u in updates] == [
        (2.0, 0, 0),
        (3.0, 1, 1),
        (4.0, 0, 1),
        (6.0, 1, 1),  # planned at 3, before worker 0's of 4
        (6.0, 0, 1),
        (8.0, 0, 0),
        (9.0, 1, 2),
        (10.0, 0, 1),
    ]


def test_a_barrier_makes_the_quick_one_wait():
    cluster = Cluster(workers=2, delay=Trace(seconds=((2.0,) * 4, (3.0,) * 4)))
    account = Account.start(2)
    updates = list(
        simulate(
            _replica(),
            POINTS,
            Shuffle(16, 2),
            CrossEntropy(),
            server=Server(admission=Bsp()),
            cluster=cluster,
            account=account,
        )
    )
    assert [u.time_s for u in updates] == [2.0, 3.0, 5.0, 6.0, 8.0, 9.0, 11.0, 12.0]
    assert [ledger.spent().wait_s for ledger in account.workers] == [3.0, 0.0]


def test_between_updates_the_replica_holds_the_servers_weights():
    """Those that the last update left, whoever computes next."""
    own = _replica()
    cluster = Cluster(workers=3, delay=Gamma(shape=1))
    before = Flat.of(own.parameters).buffer.clone()
    lr = 0.5
    for update in simulate(own, POINTS, Shuffle(16, 2), CrossEntropy(), cluster=cluster):
        after = Flat.of(own.parameters).buffer.clone()
        assert own.step == update.step
        assert not torch.equal(after, before)
        assert float((after - before).norm()) < lr * 2
        before = after


def test_evaluation_between_updates_and_gradients_from_before_change_nothing():
    found = []
    for disturb in (False, True):
        with isolated(1, "model"):
            model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
        own = Replica(model, torch.optim.SGD(model.parameters(), lr=0.5))
        if disturb:
            own.gradients.buffer.fill_(3.0)
        for _ in simulate(own, POINTS, Shuffle(16, 4), CrossEntropy(), epochs=3):
            if disturb:
                own.model.eval()
        found.append({name: x.clone() for name, x in model.state_dict().items()})
    straight, disturbed = found
    assert all(torch.equal(straight[name], disturbed[name]) for name in straight)


def test_the_caller_may_stop_and_go_on():
    """What was in flight is given up; a second call counts on from the replica's step."""
    own, order = _replica(), Shuffle(16, 2)
    updates = simulate(own, POINTS, order, CrossEntropy(), epochs=3)
    for _ in range(4):
        next(updates)
    updates.close()
    assert own.step == 4
    more = list(simulate(own, POINTS, order, CrossEntropy(), epochs=3))
    assert more[0].step == 5 and more[0].staleness == 0
    assert order.epoch == 3
