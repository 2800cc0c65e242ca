"""What every exchange promises, with every codec that it can be given."""

import copy
import dataclasses
import itertools
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from laws.discovery import examples
from laws.exchange_runs import (
    EPOCHS,
    NUM_EXAMPLES,
    STEPS,
    Moment,
    data,
    meetings,
    replica,
    sampler,
    train,
    train_all,
    watch,
    weights,
)
from sterna.codecs.identity import Identity
from sterna.comm.in_process import run_in_process
from sterna.comm.launch import launch
from sterna.comm.solo import Solo
from sterna.ledger import Spent
from sterna.loop import Streams, fit
from sterna.objectives.cross_entropy import CrossEntropy
from sterna.runs import checkpoint
from sterna.seams import Comm, Exchange, NotFinite, PeerLost


def _cases() -> list[Any]:
    """Every example, and with a hyperparameter ``codec`` every codec in it."""
    found = []
    for case in examples("exchange"):
        found.append(case)
        if takes_codec(case.values[0]):
            found += [
                pytest.param(
                    dataclasses.replace(case.values[0], codec=codec.values[0]),
                    id=f"{case.id}-{codec.id}",
                )
                for codec in examples("codecs")
            ]
    unique = {repr(case.values[0]): case for case in reversed(found)}
    return list(reversed(unique.values()))


def takes_codec(exchange: Any) -> bool:
    return any(field.name == "codec" for field in dataclasses.fields(exchange))


CASES = _cases()
exchanges = pytest.mark.parametrize("exchange", CASES)
NEUTRAL = {"codec": Identity(), "outer_lr": 1.0, "outer_momentum": 0.0, "nesterov": False}


def plain(exchange: Any) -> Any:
    """The exchange with every hyperparameter that has a neutral value at that value."""
    has = {field.name for field in dataclasses.fields(exchange)}
    return dataclasses.replace(exchange, **{k: v for k, v in NEUTRAL.items() if k in has})


with_identity = pytest.mark.parametrize(
    "exchange",
    list(dict.fromkeys(plain(case.values[0]) for case in examples("exchange"))),
    ids=lambda exchange: type(exchange).__name__,
)


@cache
def trained(exchange: Exchange, size: int) -> list[tuple[Tensor, Spent, list[float]]]:
    """Weights, ledger and losses of each of ``size`` workers; computed once."""
    return run_in_process(lambda comm: train(comm, exchange), size)


@cache
def watched(exchange: Exchange, size: int) -> list[tuple[list[Moment], list[Moment]]]:
    """Each worker's moments after its steps and before its collectives; computed once."""
    return run_in_process(lambda comm: watch(comm, exchange), size)


def agrees(exchange: Exchange) -> bool:
    """An exchange that sends anything does so to make the replicas agree."""
    return any(spent.bits_sent for _, spent, _ in trained(exchange, 2))


def has_anchor(exchange: Exchange) -> bool:
    """Whether workers go ways of their own from weights that they agreed on."""
    return "anchor" in exchange.init(replica())


def share(exchange: Any) -> float:
    """The share of the weights that all workers send; all, where the exchange takes no ratios."""
    names = [field.name for field in dataclasses.fields(exchange)]
    if not getattr(getattr(exchange, "explorer", None), "shared", True):
        names.remove("explorer_ratio")  # each worker sends others
    ratios = [getattr(exchange, name) for name in names if name.endswith("_ratio")]
    return sum(ratios) if ratios else 1.0


def is_synchronous(exchange: Exchange) -> bool:
    """Whether the replicas hold the same bits after every step."""
    return all(
        torch.equal(steps[k].weights, watched(exchange, 2)[0][0][k].weights)
        for steps, _ in watched(exchange, 2)
        for k in range(STEPS + 1)
    )


def test_there_are_exchanges_of_both_kinds() -> None:
    assert sum(agrees(case.values[0]) for case in CASES) >= 4
    assert sum(not agrees(case.values[0]) for case in CASES) >= 1
    assert all(agrees(case.values[0]) for case in CASES if takes_codec(case.values[0]))


@exchanges
@pytest.mark.parametrize("size", [2, 3, 4])
def test_replicas_hold_the_same_bits(exchange: Exchange, size: int) -> None:
    """In every step in which anything is sent: all weights, or as many as the ratios say."""
    histories = [steps for steps, _ in watched(exchange, size)]
    first, *others = histories
    assert not torch.equal(first[-1].weights, first[0].weights), "nothing was learnt"
    met = meetings(first)
    assert bool(met) == agrees(exchange)
    for history in histories:
        assert meetings(history) == met, "all meet in the same steps"
        assert history[-1].weights.isfinite().all()
    for step in met:
        same = torch.ones_like(first[step].weights, dtype=torch.bool)
        for other in others:
            assert torch.equal(other[step].agreed, first[step].agreed)
            same &= other[step].weights == first[step].weights
        for history in histories:
            assert torch.equal(history[step].weights[same], first[step].agreed[same])
        assert same.sum() >= int(share(exchange) * len(same))
    if not met:
        assert not any(torch.equal(other[-1].weights, first[-1].weights) for other in others)


@exchanges
def test_what_is_agreed_changes_in_meetings_only(exchange: Exchange) -> None:
    if not has_anchor(exchange):
        return
    for steps, _ in watched(exchange, 3):
        met = meetings(steps)
        for before, after in itertools.pairwise(steps):
            assert torch.equal(before.agreed, after.agreed) == (after.step not in met)
            assert not torch.equal(before.weights, after.weights)


@exchanges
def test_a_second_run_gives_the_same_bits(exchange: Exchange) -> None:
    for (own, _, losses), (again, _, second) in zip(
        trained(exchange, 3), run_in_process(lambda comm: train(comm, exchange), 3), strict=True
    ):
        assert torch.equal(own, again)
        assert losses == second


@exchanges
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_what_is_sent_is_received(exchange: Exchange, size: int) -> None:
    ledgers = [spent for _, spent, _ in trained(exchange, size)]
    sent = sum(spent.bits_sent for spent in ledgers)
    assert sent == sum(spent.bits_received for spent in ledgers)
    assert (sent > 0) == (sum(spent.messages for spent in ledgers) > 0)
    assert (sent > 0) == (size > 1 and agrees(exchange))
    assert sum(spent.examples for spent in ledgers) == EPOCHS * NUM_EXAMPLES
    assert {spent.steps for spent in ledgers} == {STEPS}
    for spent in ledgers:
        assert spent.compute_s > 0 and spent.wait_s >= 0
        assert spent.peak_activation_bytes > 0


@with_identity
@pytest.mark.parametrize("size", [2, 3, 4])
def test_plain_gradients_are_one_large_batch(exchange: Exchange, size: int) -> None:
    if not is_synchronous(exchange):
        return
    (alone, _, _), *_ = trained(exchange, 1)
    for own, _, _ in trained(exchange, size):
        assert torch.allclose(own, alone, rtol=0, atol=1e-6)


def test_several_exchanges_are_synchronous() -> None:
    found = {type(c.values[0]) for c in CASES if is_synchronous(plain(c.values[0]))}
    assert len(found) >= 3


@with_identity
def test_one_worker_is_plain_sgd(exchange: Exchange) -> None:
    ours, _, losses = train(Solo(), exchange)
    own, order = replica(), sampler(Solo())
    model = copy.deepcopy(own.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    expected = []
    for _ in range(EPOCHS):
        for index in order:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                model(data().inputs[index]), data().targets[index], reduction="none"
            ).mean()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    theirs = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    if has_anchor(exchange):  # the way there and back, w = a + (w - a), rounds
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert losses == pytest.approx(expected, abs=1e-6)
    else:
        assert torch.equal(ours, theirs)
        assert losses == expected


@with_identity
def test_in_process_with_one_worker_is_solo(exchange: Exchange) -> None:
    (own, spent, losses), *_ = trained(exchange, 1)
    alone, solo, expected = train(Solo(), exchange)
    assert torch.equal(own, alone)
    assert losses == expected
    assert (spent.bits_sent, spent.messages) == (solo.bits_sent, solo.messages) == (0, 0)


@pytest.fixture(scope="module")
def processes() -> list[Any]:
    """Weights and bits of two real processes, by rank, for every case."""
    said = launch(train_all, ([case.values[0] for case in CASES],), workers=2, timeout_s=120.0)
    return [pickle.loads(own) for own in said]  # noqa: S301, TID251  our own bytes


@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.id for case in CASES])
def test_processes_train_as_threads_do(processes: list[Any], number: int) -> None:
    """Equal bits sent; equal weights to the bit: with two workers a sum has one order only."""
    for real, (own, spent, _) in zip(processes, trained(CASES[number].values[0], 2), strict=True):
        found, bits = real[number]
        assert bits == spent.bits_sent
        assert torch.equal(torch.tensor(found), own)


@exchanges
@pytest.mark.parametrize("stop", [1, 5])
def test_state_survives_save_and_load(exchange: Exchange, stop: int, tmp_path: Path) -> None:
    """Interrupted after ``stop`` steps, of which four make an epoch; new objects go on."""

    def half(comm: Comm, steps: int, resume: bool) -> Tensor:
        own, order = replica(), sampler(comm)
        streams = Streams.start(own, exchange, 0 if not resume else 99, comm.rank)
        if resume:
            assert checkpoint.restore(tmp_path, own, order, streams, comm)
        records = fit(
            own,
            data(),
            order,
            CrossEntropy(),
            exchange=exchange,
            comm=comm,
            epochs=EPOCHS,
            streams=streams,
        )
        for _ in range(steps):
            next(records)
        if not resume:
            checkpoint.save(tmp_path, own, order, streams, comm)
        else:
            assert next(records, None) is None
            assert comm.ledger.spent().bits_sent == trained(exchange, 2)[comm.rank][1].bits_sent
        records.close()  # type: ignore[attr-defined]
        return weights(own)

    run_in_process(lambda comm: half(comm, stop, resume=False), 2)
    resumed = run_in_process(lambda comm: half(comm, STEPS - stop, resume=True), 2)
    for own, (straight, _, _) in zip(resumed, trained(exchange, 2), strict=True):
        assert torch.equal(own, straight)


class _Poisoned:
    """Examples of which one worker's batch of one step holds NaN."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __len__(self) -> int:
        return NUM_EXAMPLES

    def __getitem__(self, index: Tensor) -> Any:
        batch = data()[index]
        self.calls += 1
        if self.calls == self.at:
            batch = dataclasses.replace(batch, inputs=batch.inputs * torch.nan)
        return batch


@exchanges
@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 3])
def test_nan_on_one_worker_ends_all_before_any_update(
    exchange: Exchange, culprit: int, step: int
) -> None:
    if not agrees(exchange):
        return
    replicas = [replica() for _ in range(3)]
    ended: dict[int, BaseException] = {}

    def worker(comm: Comm) -> None:
        source = _Poisoned(step) if comm.rank == culprit else data()
        try:
            for _ in fit(
                replicas[comm.rank],
                source,
                sampler(comm),
                CrossEntropy(),
                exchange=exchange,
                comm=comm,
                epochs=EPOCHS,
            ):
                pass
        except Exception as error:
            ended[comm.rank] = error
            raise

    with pytest.raises(NotFinite) as caught:
        run_in_process(worker, 3)
    assert any(repr(name) in str(caught.value) for name in replicas[0].parameters)
    met = meetings(watched(exchange, 3)[0][0])
    last = max([m for m in met if m < step], default=0)
    following = min(m for m in met if m >= step)
    # Who had not begun when the first one failed has no part in it.
    assert len(ended) == 3 or last == 0
    assert all(isinstance(error, NotFinite | PeerLost) for error in ended.values())
    assert replicas[culprit].step < step
    for own, (steps, calls) in zip(replicas, watched(exchange, 3), strict=True):
        # A result that had arrived is not always applied any more by those who see a peer fail.
        assert max(last - 1, 0) <= own.step <= following
        clean = [m.weights for m in (*steps, *calls) if m.step < following]
        clean += [m.weights for m in calls if m.step == following]
        assert any(torch.equal(weights(own), w) for w in clean), "no update knows of the NaN"
