"""What users do that a loop of ours must bear, or refuse by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sterna.cli.flags import CompareFlags, RunFlags, parse
from sterna.comm.agreement import Disagreement
from sterna.comm.in_process import run_in_process
from sterna.comm.launch import WorkerFailed, explains_itself, launch
from sterna.comm.solo import Solo
from sterna.data.examples import Dataset, Examples
from sterna.evaluation import average_buffers
from sterna.loop import fit
from sterna.objectives import CrossEntropy
from sterna.randomness import generator, isolated
from sterna.replica import Replica
from sterna.runs import checkpoint
from sterna.runs.experiment import located, resolve, restored
from sterna.runs.files import StoreError
from sterna.runs.request import Request
from sterna.runs.run import Run
from sterna.runs.worker import work
from sterna.samplers import Shuffle
from sterna.seams import Batch, Comm, Loss, NotFinite


def linear() -> nn.Module:
    return nn.Linear(4, 3)


def made(make: Callable[[], nn.Module] = linear) -> nn.Module:
    with isolated(0, "model"):
        return make()


def points(num: int = 48, bad: bool = False) -> Examples:
    inputs = torch.randn(num, 4, generator=generator(0, "points"))
    if bad:
        inputs[:] = float("nan")
    return Examples(inputs, torch.arange(num) % 3)


def replica_of(model: nn.Module) -> Replica:
    return Replica(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


class TwoPasses:
    """Runs a backward pass of its own and clears with ``zero_grad``, as sharpness-aware methods do."""

    def __call__(self, model: nn.Module, batch: Batch, rng: torch.Generator) -> Loss:
        CrossEntropy()(model, batch, rng).total.backward()
        model.zero_grad()
        return CrossEntropy()(model, batch, rng)


def test_replicas_stay_equal_when_gradients_leave_the_buffer() -> None:
    def worker(comm: Comm) -> torch.Tensor:
        replica = replica_of(made())
        replica.optimizer.zero_grad()
        sampler = Shuffle(48, batch_size=6, rank=comm.rank, size=comm.size)
        for _ in fit(replica, points(), sampler, TwoPasses(), comm=comm):
            pass
        return replica.parameters["weight"].detach()

    first, second = run_in_process(worker, 2)
    assert torch.equal(first, second)


def test_parameters_that_are_not_the_models_are_refused() -> None:
    model, temperature = made(), nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"not the model's.*\(1,\)"):
        Replica(model, torch.optim.SGD([*model.parameters(), temperature], lr=0.1))


def test_a_model_converted_later_is_refused() -> None:
    replica = replica_of(made())
    replica.model.double()
    with pytest.raises(ValueError, match=r"'weight' has become torch\.float64"):
        _ = replica.gradients


def test_fit_goes_on_after_a_gradient_that_was_not_finite() -> None:
    replica = replica_of(made())
    before = replica.parameters["weight"].detach().clone()
    with pytest.raises(NotFinite, match="'weight'"):
        list(fit(replica, points(bad=True), Shuffle(48, batch_size=6), CrossEntropy()))
    assert torch.equal(replica.parameters["weight"], before)
    assert len(list(fit(replica, points(), Shuffle(48, batch_size=6), CrossEntropy()))) == 8


def test_fit_trains_on_in_training_mode_when_the_caller_evaluates() -> None:
    replica, modes = replica_of(made()), []
    replica.model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    for _ in fit(replica, points(), Shuffle(48, batch_size=24), CrossEntropy()):
        replica.model.eval()
    assert modes == [True, True]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


def tied_run(num: int = 48) -> Run:
    data = Dataset("points", points(num), points(), classes=4)
    return Run(data=data, model=Tied, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=12)


def request(folder: Path, **more: Any) -> Request:
    return Request(experiment="tied", arguments={}, folder=folder, quiet=True, **more)


def test_tied_weights_and_lambdas_go_through_a_whole_run(tmp_path: Path) -> None:
    work(Solo(), request(tmp_path), tied_run())
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "summary.json").exists()
    assert " at 0x" not in (tmp_path / "run.json").read_text()


def test_workers_with_other_data_are_named(tmp_path: Path) -> None:
    def worker(comm: Comm) -> object:
        return work(comm, request(tmp_path), tied_run(48 if comm.rank < 2 else 60))

    with pytest.raises(Disagreement, match="the data: rank 2"):
        run_in_process(worker, 3)


def test_another_number_of_workers_does_not_start_afresh(tmp_path: Path) -> None:
    run_in_process(lambda comm: work(comm, request(tmp_path), tied_run()), 2)
    with pytest.raises(StoreError, match="no step is held whole by every worker"):
        run_in_process(lambda comm: work(comm, request(tmp_path), tied_run()), 3)


def test_a_run_goes_on_only_with_the_methods_it_started_with(tmp_path: Path) -> None:
    work(Solo(), request(tmp_path), tied_run())
    about = json.loads((tmp_path / "run.json").read_text())
    about["methods"]["exchange"] = "AllReduce(codec=Fp16())"
    (tmp_path / "run.json").write_text(json.dumps(about))
    with pytest.raises(StoreError, match="started with"):
        work(Solo(), request(tmp_path), tied_run())


def test_checkpoints_of_a_run_that_is_no_more_are_forgotten(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        for rank in (0, 1):
            path = tmp_path / f"step-{step:08d}" / f"rank-{rank}.safetensors"
            path.parent.mkdir(exist_ok=True)
            path.touch()
    (tmp_path / "step-00000004.bak").mkdir()
    checkpoint.forget(tmp_path, rank=0, beyond=2)
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.safetensors"))
    assert left == [
        "step-00000002/rank-0.safetensors",
        "step-00000002/rank-1.safetensors",
        "step-00000004/rank-1.safetensors",
        "step-00000006/rank-1.safetensors",
    ]


def test_only_running_statistics_are_averaged() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.register_buffer("grid", torch.tensor([0.1, 0.7, 1 / 3]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x)

    def worker(comm: Comm) -> tuple[list[float], bool]:
        net = made(Net)
        net.norm.running_mean.fill_(float(comm.rank))
        average_buffers(net, comm)
        kept = torch.equal(net.grid, torch.tensor([0.1, 0.7, 1 / 3]))
        return net.norm.running_mean.tolist(), kept

    assert run_in_process(worker, 3) == [([1.0, 1.0], True)] * 3


def test_resumed_arguments_have_their_types_again() -> None:
    function = resolve("mnist.terngrad")
    plain = {"data_dir": "some/where", "clip": None, "share_scalers": False, "lr": 0.1}
    assert restored(function, plain) == {**plain, "data_dir": Path("some/where")}


def test_a_users_file_is_located_from_anywhere(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("mine.py:train") == f"{tmp_path.resolve()}/mine.py:train"
    assert located("digits.sync") == "digits.sync"


def test_compare_passes_on_what_was_typed_and_only_that() -> None:
    functions = [resolve("digits.sync"), resolve("digits.terngrad")]
    arguments = ["--clip", "None", "--epochs=2", "--no-share-scalers"]
    _, (sync, terngrad) = parse(CompareFlags, functions, arguments, "sterna compare")
    assert sync == {"epochs": 2}
    assert terngrad == {"epochs": 2, "clip": None, "share_scalers": False}
    _, (alone,) = parse(RunFlags, functions[1:], ["--clip", "None"], "sterna run")
    assert alone["clip"] is None and alone["share_scalers"] is True


def test_only_errors_raised_on_purpose_explain_themselves() -> None:
    def caught(act: Callable[[], object]) -> Exception:
        try:
            act()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert explains_itself(caught(lambda: Shuffle(0, batch_size=1)))
    assert not explains_itself(caught(lambda: list(fit(None, [], Shuffle(4, batch_size=1), None))))  # type: ignore[arg-type]
    assert not explains_itself(caught(lambda: torch.zeros(2) @ torch.zeros(3)))


def test_launch_refuses_to_start_nobody() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"):
        launch(work, workers=0)


def test_an_error_of_the_workers_own_is_not_tried_again(tmp_path: Path) -> None:
    said: list[str] = []
    bad = Request(
        experiment="digits.sync", arguments={"batch_size": 63}, folder=tmp_path, quiet=True
    )
    with pytest.raises(WorkerFailed, match="batch_size must be a multiple") as failure:
        launch(work, (bad,), workers=2, max_restarts=3, on_restart=said.append)
    assert not said and not failure.value.lost
