"""What every exchange promises, with every codec that it can be given."""

import copy
import dataclasses
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
    data,
    replica,
    sampler,
    train,
    train_all,
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
with_identity = pytest.mark.parametrize(
    "exchange",
    list(
        dict.fromkeys(
            dataclasses.replace(case.values[0], codec=Identity())
            if takes_codec(case.values[0])
            else case.values[0]
            for case in examples("exchange")
        )
    ),
    ids=lambda exchange: type(exchange).__name__,
)


@cache
def trained(exchange: Exchange, size: int) -> list[tuple[Tensor, Spent, list[float]]]:
    """Weights, ledger and losses of each of ``size`` workers; computed once."""
    return run_in_process(lambda comm: train(comm, exchange), size)


def agrees(exchange: Exchange) -> bool:
    """An exchange that sends anything does so to make the replicas agree."""
    return any(spent.bits_sent for _, spent, _ in trained(exchange, 2))


def test_there_are_exchanges_of_both_kinds() -> None:
    assert sum(agrees(case.values[0]) for case in CASES) >= 4
    assert sum(not agrees(case.values[0]) for case in CASES) >= 1
    assert all(agrees(case.values[0]) for case in CASES if takes_codec(case.values[0]))


@exchanges
@pytest.mark.parametrize("size", [2, 3, 4])
def test_replicas_hold_the_same_bits(exchange: Exchange, size: int) -> None:
    first, *others = (own for own, _, _ in trained(exchange, size))
    assert first.isfinite().all()
    assert not torch.equal(first, weights(replica())), "nothing was learnt"
    for other in others:
        assert torch.equal(other, first) == agrees(exchange)


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
    if not agrees(exchange):
        return
    (alone, _, _), *_ = trained(exchange, 1)
    for own, _, _ in trained(exchange, size):
        assert torch.allclose(own, alone, rtol=0, atol=1e-6)


@with_identity
def test_one_worker_is_plain_sgd(exchange: Exchange) -> None:
    ours, _, losses = train(Solo(), exchange)
    own, order = replica(), sampler(Solo())
    plain = copy.deepcopy(own.model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    expected = []
    for _ in range(EPOCHS):
        for index in order:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(
                plain(data().inputs[index]), data().targets[index], reduction="none"
            ).mean()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    assert torch.equal(ours, torch.cat([p.detach().reshape(-1) for p in plain.parameters()]))
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
    # Who had not begun when the first one failed has no part in it.
    assert len(ended) == 3 or step == 1
    assert all(isinstance(error, NotFinite | PeerLost) for error in ended.values())
    clean = path(exchange)
    for own in replicas:
        # A result that had arrived is not always applied any more by those who see a peer fail.
        assert own.step in (step - 1, step - 2)
        assert torch.equal(weights(own), clean[own.step]), "no update knows of the NaN"


@cache
def path(exchange: Exchange) -> list[Tensor]:
    """The weights of three undisturbed workers before each step."""

    def worker(comm: Comm) -> list[Tensor]:
        own = replica()
        records = fit(
            own, data(), sampler(comm), CrossEntropy(), exchange=exchange, comm=comm, epochs=EPOCHS
        )
        return [weights(own), *(weights(own) for _ in records)]

    return run_in_process(worker, 3)[0]
