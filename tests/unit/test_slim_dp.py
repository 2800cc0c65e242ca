"""Facts of Slim-DP: who is chosen, what travels, what stays behind."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sterna.comm import traffic
from sterna.comm.in_process import run_in_process
from sterna.comm.solo import Solo
from sterna.exchange import mask
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.explorers import BestResponse, Explorer, best_response
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP, significance
from sterna.ledger import Ledger
from sterna.randomness import generator, isolated
from sterna.replica import Replica
from sterna.seams import Comm, NotFinite

SIZE = 4 * 5 + 5 + 5 * 2 + 2


@pytest.fixture(autouse=True)
def own_random_state():
    """Module constructors draw from torch's global generator."""
    with isolated(0, "unit"):
        yield


def _train(comm, exchange, steps=6, momentum=0.0):
    """After each step: weights, state (cloned), bits sent."""
    with isolated(0, "model"):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=momentum))
    state, rng, found = exchange.init(replica), generator(0, comm.rank), []
    for step in range(steps):
        points = torch.randn(3, 4, generator=generator(1, step, comm.rank))
        model(points).square().mean().backward()
        state = exchange(replica, state, comm, rng)
        weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        kept = {slot: named.buffer.clone() for slot, named in state.items() if len(named)}
        found.append((weights, kept, comm.ledger.spent().bits_sent))
    return found


def test_significance_by_hand():
    weights, update = torch.tensor([1.0, -2.0, 0.0, 5.0]), torch.tensor([0.0, 1.0, -7.0, 0.0])
    expected = torch.tensor([0.5, 1 + 3 * 0.5, 3 * 3.5, 2.5])
    torch.testing.assert_close(significance(weights, update, 3.0), expected)
    assert torch.equal(significance(weights, torch.zeros(4), 3.0), weights.abs() / 2)
    assert torch.equal(significance(torch.zeros(4), torch.zeros(4), 3.0), torch.zeros(4))


def test_significance_knows_no_units():
    weights, update = (torch.randn(50, generator=generator(k)) for k in range(2))
    torch.testing.assert_close(
        significance(1000 * weights, 1e-3 * update, 0.7), significance(weights, update, 0.7)
    )


@given(st.lists(st.booleans(), max_size=70))
def test_masks_as_bits(bits):
    x = torch.tensor(bits, dtype=torch.bool)
    packed = mask.to_bits(x)
    assert packed.nbytes == -(-len(bits) // 8)
    assert torch.equal(mask.from_bits(packed, len(bits)), x)


@pytest.mark.parametrize("ratios", [(1.0, 0.0), (0.0, 1.0), (0.4, 0.6)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_all_of_it_is_all_reduce(ratios, momentum):
    slim = SlimDP(core_ratio=ratios[0], explorer_ratio=ratios[1])
    ours = run_in_process(partial(_train, exchange=slim, momentum=momentum), 3)
    theirs = run_in_process(partial(_train, exchange=AllReduce(), momentum=momentum), 3)
    for own, other in zip(ours, theirs, strict=True):
        for (weights, *_), (expected, *_) in zip(own, other, strict=True):
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_all_of_it_is_model_averaging():
    slim = SlimDP(every=3, core_ratio=0.25, explorer_ratio=0.75)
    ours = run_in_process(partial(_train, exchange=slim), 3)
    theirs = run_in_process(partial(_train, exchange=ModelAverage(every=3)), 3)
    for own, other in zip(ours, theirs, strict=True):
        for (weights, *_), (expected, *_) in zip(own, other, strict=True):
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("exchange", "seeds", "masks"),
    [
        (SlimDP(core_ratio=0.2, explorer_ratio=0.3, refresh_every=4), 6, 2),
        (SlimDP(core_ratio=0.2, explorer_ratio=0.0, refresh_every=5), 0, 2),
        (SlimDP(core_ratio=0.0, explorer_ratio=0.3), 6, 0),
        (SlimDP(core_ratio=0.0, explorer_ratio=1.0), 0, 0),
        (SlimDP(every=2, core_ratio=0.2, explorer_ratio=0.3, refresh_every=2), 3, 2),
    ],
)
def test_bits_are_values_seeds_and_masks(exchange, seeds, masks, size):
    core, explorer = exchange.counts(SIZE)
    found = run_in_process(partial(_train, exchange=exchange), size)
    ledger = Ledger()
    for _ in range(6 // exchange.every):
        traffic.all_reduce(ledger, size, 4 * (core + explorer))
    values = ledger.spent().bits_sent
    others = (size - 1) * (64 * seeds + 8 * -(-SIZE // 8) * masks)
    assert [history[-1][2] for history in found] == [values + others] + (size - 1) * [values]


def test_counts():
    assert SlimDP(core_ratio=0.2, explorer_ratio=0.3).counts(100) == (20, 30)
    assert SlimDP(core_ratio=0.2, explorer_ratio=0.8).counts(7) == (1, 6)
    assert SlimDP(core_ratio=0.001, explorer_ratio=0.001).counts(7) == (1, 1)
    assert SlimDP(core_ratio=0.001, explorer_ratio=0.001).counts(1) == (1, 0)
    assert SlimDP(core_ratio=1.0, explorer_ratio=0.0).counts(7) == (7, 0)
    assert SlimDP(core_ratio=0.0, explorer_ratio=0.01).counts(7) == (0, 1)


def test_core_is_the_most_significant_and_stays_until_it_is_refreshed():
    exchange = SlimDP(core_ratio=0.25, explorer_ratio=0.25, refresh_every=3)
    start = _start()
    num_core, _ = exchange.counts(SIZE)
    for history in run_in_process(partial(_train, exchange=exchange, steps=7), 3):
        states = [kept for _, kept, _ in history]
        for first in (0, 3, 6):
            anchor = states[first - 1]["anchor"] if first else start
            update = states[first - 1]["update"] if first else torch.zeros(SIZE)
            score = significance(anchor, update, 1.0)
            best = torch.zeros(SIZE, dtype=torch.bool)
            best[score.topk(num_core).indices] = True
            for kept in states[first : first + 3]:
                assert torch.equal(kept["core"], best)
        torch.testing.assert_close(states[2]["update"], states[2]["anchor"] - start)
        since = states[5]["anchor"] - states[2]["anchor"]
        torch.testing.assert_close(states[5]["update"], since, rtol=0, atol=1e-6)
        assert not torch.equal(states[2]["core"], states[3]["core"])


def _start():
    with isolated(0, "model"):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_explorer_is_outside_the_core_shared_and_new_every_round():
    exchange = SlimDP(core_ratio=0.25, explorer_ratio=0.25, refresh_every=100)
    histories = run_in_process(partial(_train, exchange=exchange, steps=8), 3)
    num_core, num_explorer = exchange.counts(SIZE)
    anchor, drawn = _start(), []
    for step in range(8):
        changed = {tuple((h[step][1]["anchor"] != anchor).tolist()) for h in histories}
        assert len(changed) == 1, "all workers merge the same weights"
        moved = torch.tensor(changed.pop())
        core = histories[0][step][1]["core"]
        assert moved.sum() <= num_core + num_explorer
        # A core weight may end where it was, but not half of them.
        assert (moved & core).sum() > num_core / 2
        assert (moved & ~core).sum() > num_explorer / 2
        drawn.append(moved & ~core)
        anchor = histories[0][step][1]["anchor"]
    assert len({tuple(x.tolist()) for x in drawn}) == 8
    assert (torch.stack(drawn).any(0) | core).sum() > 0.8 * SIZE


def test_what_is_not_sent_is_sent_later():
    """Core only, with a core that moves on: what a weight had gathered outside arrives whole."""

    def worker(comm):
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[4.0, 1.0]]))
        replica = Replica(model, torch.optim.SGD(model.parameters(), lr=1.0))
        exchange = SlimDP(core_ratio=0.5, explorer_ratio=0.0, refresh_every=2, gradient_weight=0.0)
        state, rng, seen = exchange.init(replica), generator(0), []
        for gradient in ([2.0, -1.0], [1.75, -2.0 - comm.rank], [0.0, 0.0]):
            replica.gradients.buffer.copy_(torch.tensor(gradient))
            state = exchange(replica, state, comm, rng)
            seen.append((state["anchor"]["weight"].tolist()[0], model.weight.tolist()[0]))
        return seen

    first, second = run_in_process(worker, 2)
    assert first == [
        ([2.0, 1.0], [2.0, 2.0]),
        ([0.25, 1.0], [0.25, 4.0]),
        ([0.25, 4.5], [0.25, 4.5]),
    ]
    assert second[1:] == [([0.25, 1.0], [0.25, 5.0]), ([0.25, 4.5], [0.25, 4.5])]


def test_alone_it_changes_nothing():
    plain = _train(Solo(), AllReduce())
    for exchange in (SlimDP(), SlimDP(every=4, core_ratio=0.5, explorer_ratio=0.0)):
        for (weights, *_), (expected, *_) in zip(_train(Solo(), exchange), plain, strict=True):
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-6)


def test_frozen_parameters_are_not_touched():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    replica = Replica(model, torch.optim.SGD(model[1].parameters(), lr=0.1))
    exchange = SlimDP(core_ratio=0.5, explorer_ratio=0.5)
    state = exchange.init(replica)
    model(torch.ones(1, 2)).sum().backward()
    state = exchange(replica, state, Solo(), generator(0))
    assert torch.equal(model[0].weight, before)
    assert {tuple(named) for named in state.values()} == {("1.weight", "1.bias")}


@pytest.mark.parametrize(("gradient", "lr"), [(float("nan"), 1.0), (100.0, 1e38)])
def test_what_is_not_finite_is_refused_wherever_it_is(gradient, lr):
    """Also in a weight that does not travel."""
    model = nn.Linear(4, 1, bias=False)
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=lr))
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[9.0, 1.0, 1.0, 1.0]]))
    exchange = SlimDP(core_ratio=0.25, explorer_ratio=0.0)
    state = exchange.init(replica)
    replica.gradients.buffer[3] = gradient
    with pytest.raises(NotFinite, match="SlimDP: gradient of 'weight'"):
        exchange(replica, state, Solo(), generator(0))
    assert torch.equal(state["anchor"]["weight"], torch.tensor([[9.0, 1.0, 1.0, 1.0]]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 0}, "every must be a whole number of steps, at least 1; got 0"),
        ({"refresh_every": 1.5}, r"refresh_every must be .* got 1\.5"),
        ({"core_ratio": -0.1}, r"core_ratio must lie in \[0, 1\]; got -0\.1"),
        ({"explorer_ratio": 1.1}, r"explorer_ratio must lie in \[0, 1\]; got 1\.1"),
        ({"core_ratio": 0.6, "explorer_ratio": 0.5}, r"core_ratio and .* got 0\.6 and 0\.5"),
        ({"core_ratio": 0.0, "explorer_ratio": 0.0}, r"core_ratio and .* got 0\.0 and 0\.0"),
        ({"gradient_weight": -1.0}, "gradient_weight must be at least 0"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=f"^SlimDP: {words}"):
        SlimDP(**options)


def test_the_best_response_leaves_the_least_behind() -> None:
    rng = torch.Generator().manual_seed(3)
    residual = torch.randn(8, generator=rng)
    core = torch.tensor([True, False, False, True, False, False, False, False])
    found = best_response(residual, core, 3)

    def cost(sent: tuple[int, ...]) -> float:
        kept = [k for k in range(8) if k not in sent and not core[k]]
        return float(residual[kept].square().sum())

    outside = (~core).nonzero().squeeze(1).tolist()
    cheapest = min(itertools.combinations(outside, 3), key=cost)
    assert tuple(found.tolist()) == cheapest


def test_a_best_response_never_asks_for_more_than_there_is() -> None:
    core = torch.tensor([True, True, False])
    assert best_response(torch.ones(3), core, 5).tolist() == [2]
    assert best_response(torch.ones(1), torch.tensor([True]), 1).tolist() == []
    assert best_response(torch.zeros(3), core, 1).tolist() == [2]  # also where nothing has changed


def test_best_responses_pay_for_their_indices() -> None:
    def bits(explorer: Explorer) -> int:
        slim = SlimDP(core_ratio=0.0, explorer_ratio=0.5, explorer=explorer)

        def train(comm: Comm) -> int:
            model = torch.nn.Linear(40, 1, bias=False)
            replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
            model(torch.ones(1, 40)).sum().backward()
            slim(replica, slim.init(replica), comm, generator(0, comm.rank))
            return comm.ledger.spent().bits_sent

        return run_in_process(train, 3)[0]

    # 20 of 40 weights, to two others: a value and an index each, behind a head of 24 bytes.
    assert bits(BestResponse()) == 2 * (20 * 64 + 24 * 8)
