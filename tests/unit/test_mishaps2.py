"""More of what users do, and of what goes wrong under them: borne, or refused by name."""

import multiprocessing
from collections.abc import Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fated_workers
from sterna.analysis.weight_entropy import weight_entropy
from sterna.codecs import Entropy, ErrorFeedback, Fp16, TernGrad, WarmUp
from sterna.comm import kept as kept_module
from sterna.comm import launch as launch_module
from sterna.comm.kept import Kept
from sterna.comm.member import Member
from sterna.comm.solo import Solo
from sterna.comm.supervisor import Supervisor
from sterna.data.examples import Dataset, Examples
from sterna.evaluation import reestimate
from sterna.exchange.alone import all_finite
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.slim_dp import SlimDP
from sterna.ledger import Ledger
from sterna.objectives import Force
from sterna.procedures.lowrank import front
from sterna.procedures.training import Training
from sterna.randomness import generator, isolated
from sterna.runs import checkpoint, survivors
from sterna.runs.request import Request
from sterna.runs.run import Run
from sterna.runs.worker import work
from sterna.seams import Message
from sterna.server.admission import Synchronous
from sterna.server.server import Server


@pytest.fixture(autouse=True)
def _coins() -> Iterator[None]:
    with isolated(0, "test"):
        yield


def points(num: int) -> Examples:
    return Examples(torch.randn(num, 4, generator=generator(0, "points")), torch.arange(num) % 3)


def run_of(**options: Any) -> Run:
    return Run(
        data=Dataset("points", points(48), points(12), classes=3),
        model=partial(nn.Linear, 4, 3),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        batch_size=12,
        **options,
    )


def request(folder: Path, **more: Any) -> Request:
    return Request(experiment="points", arguments={}, folder=folder, quiet=True, **more)


def test_what_is_kept_is_never_older_than_a_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    """With weights so large that a copy is not due for long."""
    said: list[tuple[str, int]] = []
    save = checkpoint.save
    monkeypatch.setattr(survivors, "is_due", lambda comm, replica: replica.step == 3)
    monkeypatch.setattr(
        survivors, "keep", lambda comm, replica, *_: said.append(("keep", replica.step))
    )
    monkeypatch.setattr(
        checkpoint,
        "save",
        lambda folder, replica, *own: (
            said.append(("save", replica.step)),
            save(folder, replica, *own),
        ),
    )
    work(Solo(), request(tmp_path, checkpoint_every=2), run_of())
    steps = [("keep", 0), ("save", 2), ("keep", 2), ("keep", 3), ("save", 4), ("keep", 4)]
    assert said == steps


@pytest.mark.parametrize("exchange", [ModelAverage(every=5), SlimDP(every=5)])
def test_a_run_whose_workers_would_never_meet_is_refused(tmp_path: Path, exchange: Any) -> None:
    with pytest.raises(ValueError, match="every must be at most the 4 steps of the run; got 5"):
        work(Solo(), request(tmp_path), run_of(exchange=exchange))
    assert work(Solo(), request(tmp_path), run_of(exchange=exchange, epochs=2))["steps"] == 8


def test_clip_norm_is_refused_beside_a_server() -> None:
    with pytest.raises(ValueError, match=r"clip_norm must be None .* got 1\.0.*Server\(clip="):
        run_of(server=Server(), clip_norm=1.0)
    assert run_of(server=Server(admission=Synchronous()), clip_norm=1.0).clip_norm == 1.0


def test_reestimate_leaves_no_batch_of_one_example() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    examples = points(257)
    reestimate(model, examples)
    hidden = model[0](examples[torch.arange(257)].inputs).detach()
    assert torch.allclose(model[1].running_mean, hidden.mean(0), atol=1e-2)
    assert model.training and model[1].training and model[1].momentum == 0.1


def test_reestimate_brings_momentum_and_mode_back_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(5, 3)).eval()
    with pytest.raises(RuntimeError, match="shapes"):
        reestimate(model, points(10))
    assert model[0].momentum == 0.1 and not any(m.training for m in model.modules())


@pytest.mark.parametrize("offset", [1e5, 1e6, -1e7])
def test_entropy_of_weights_far_from_zero(offset: float) -> None:
    model = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        model.weight.copy_(offset + torch.rand(64, 64, generator=generator(0)) * 0.5)
    counts = torch.unique((model.weight.double() / 0.02).round(), return_counts=True)[1]
    share = counts.double() / counts.sum()
    expected = -float((share * share.log2()).sum())
    assert weight_entropy(model).fixed_bits == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: ErrorFeedback(inner=Entropy(inner=c))])
@pytest.mark.parametrize("name", ["codec", "pull"])
def test_a_server_refuses_messages_that_change_their_form(wrap: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"Server: {name} must make messages of one form; got"):
        Server(**{name: wrap(WarmUp(inner=TernGrad(), steps=2))})
    assert Server(codec=ErrorFeedback(inner=TernGrad()), pull=Fp16()).pull == Fp16()


def test_all_workers_end_where_no_replacement_can_be_started(tmp_path: Path) -> None:
    context, begun = multiprocessing.get_context("forkserver"), list[BaseProcess]()

    def start(rank: int, store: Path) -> Any:
        if len(begun) == 2:
            raise OSError("cannot start")
        ours, theirs = context.Pipe()
        process = context.Process(target=fated_workers.loses_contact, args=(rank, theirs))
        process.start()
        theirs.close()
        begun.append(process)
        return process, ours

    launch_module.warm_up()
    supervisor = Supervisor(start, 2, tmp_path, 5.0)
    with pytest.raises(OSError, match="cannot start"):
        try:
            supervisor.run(2, None)
        finally:
            supervisor.stop()
    for process in begun:
        with pytest.raises(ValueError, match="closed"):  # only what has ended can be closed
            process.is_alive()


class _Two(Member):
    """A worker whose peer holds other clocks."""

    def __init__(self, kept: Kept, peer: list[int]) -> None:
        self.kept, self.peer, self.ledger = kept, peer, Ledger()  # without a process group

    def gather(self, message: Message) -> list[Message]:
        return [message, Message({"clocks": torch.tensor([-1, -1, *self.peer][-2:])})]


def test_after_a_recall_only_what_all_hold_is_left(monkeypatch: Any) -> None:
    """Else a worker killed while it keeps anew under that clock would leave nothing common."""
    kept, x = Kept(), {"x": torch.ones(2)}
    kept.write(4, x)
    kept.write(5, x, "five")
    recalled = _Two(kept, [5]).recall()
    assert recalled is not None and recalled[1] == "five"
    assert kept.clocks() == [5]

    write, calls = kept_module._write, 0

    def dying(slot: int, data: Any, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return write(slot, data, offset)

    monkeypatch.setattr(kept_module, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        kept.write(5, x, "again")
    assert kept.clocks() == [5] and kept.read(5)[1] == "five"


def test_a_result_that_does_not_pickle_is_told_as_an_error() -> None:
    ours, theirs = multiprocessing.Pipe()
    said = launch_module._end(theirs, launch_module.Outcome(result=lambda: 1))
    assert said.error is not None and "result of the worker must pickle; got function" in said.error
    assert ours.recv() == said
    launch_module._end(theirs, launch_module.Outcome(result=[1.0]))
    assert ours.recv().result == [1.0]


def test_finite_or_not_in_one_reading() -> None:
    fine = [torch.ones(3), torch.zeros(0), torch.full((2, 2), 1e38)]
    assert all_finite(fine) and all_finite([])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite([*fine, torch.tensor([0.0, bad])])


def test_a_front_that_cannot_be_met_is_refused_before_training(monkeypatch: Any) -> None:
    data = Dataset("points", points(48), points(12), classes=3)
    training = Training(data=data, optimizer=partial(torch.optim.SGD, lr=0.1), batch_size=12)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    trained: list[object] = []
    monkeypatch.setattr(Training, "fit", lambda *args, **options: trained.append(args))
    cuts = front(
        model,
        training,
        multiply_adds=[0.1, 0.01],
        force=1e-3 * Force(linear=True),
        epochs=1,
        finetune_epochs=1,
        exclude=["2"],
    )
    with pytest.raises(ValueError, match="multiply_adds"):
        next(cuts)
    assert not trained
