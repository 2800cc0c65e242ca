"""Every experiment that comes with the library starts and makes three steps."""

import dataclasses
import importlib
import inspect
import itertools
import os
import pkgutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sterna.data
from sterna.comm.in_process import run_in_process
from sterna.comm.solo import Solo
from sterna.data.examples import Dataset, Examples
from sterna.data.files import DataError
from sterna.loop import fit
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.runs.experiment import all_experiments
from sterna.runs.run import Run
from sterna.samplers.shuffle import Shuffle
from sterna.seams import Comm
from sterna.server import Cluster, simulate

EXPERIMENTS = all_experiments()
NUM_EXAMPLES, BATCH, STEPS, WORKERS = 24, 8, 3, 2


def few(part: Examples) -> Examples:
    return Examples(part.inputs[:NUM_EXAMPLES].clone(), part.targets[:NUM_EXAMPLES].clone())


def remembered(load: Callable[..., Dataset]) -> Callable[..., Dataset]:
    """Reads the files once and keeps a few examples; every experiment of a data set reads the same."""
    known: dict[str, Dataset | DataError] = {}

    def call(*args: Any, **kwargs: Any) -> Dataset:
        key = repr((args, sorted(kwargs.items())))
        if key not in known:
            try:
                whole = load(*args, **kwargs)
                known[key] = dataclasses.replace(
                    whole, train=few(whole.train), test=few(whole.test)
                )
            except DataError as error:
                known[key] = error
        found = known[key]
        if isinstance(found, DataError):
            raise found
        return found

    return call


@pytest.fixture(scope="module", autouse=True)
def readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The library's readers, each remembering; no network, and nobody's own cache."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("the tests use no network")

    with pytest.MonkeyPatch.context() as patch:
        shared = Path(__file__).resolve().parents[3] / "shared" / "data"
        if "STERNA_DATA" not in os.environ and shared.is_dir():
            patch.setenv("STERNA_DATA", str(shared))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(urllib.request, "urlopen", refuse)
        for module in pkgutil.iter_modules(sterna.data.__path__):
            reader = importlib.import_module(f"sterna.data.{module.name}")
            if hasattr(reader, "load"):
                patch.setattr(reader, "load", remembered(reader.load))
        yield


def test_there_are_experiments() -> None:
    assert len(EXPERIMENTS) >= 8
    assert {"digits.sync", "digits.fp16", "digits.terngrad"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_three_steps(name: str) -> None:
    try:
        run = EXPERIMENTS[name](**smaller(EXPERIMENTS[name]))
    except DataError as error:
        pytest.skip(f"the data of {name} is not here: {error}")
    assert isinstance(run, Run)
    assert BATCH % WORKERS == 0 and len(run.data.train) == NUM_EXAMPLES
    if run.server is None:
        losses = run_in_process(lambda comm: steps(run, comm), WORKERS)
    else:
        losses = [steps(run, Solo())]
    for own in losses:
        assert len(own) == STEPS
        assert torch.tensor(own).isfinite().all()


def smaller(experiment: Callable[..., Run]) -> dict[str, int]:
    """Fewer units, where the experiment lets one choose."""
    return {"hidden": 8} if "hidden" in inspect.signature(experiment).parameters else {}


def steps(run: Run, comm: Comm) -> list[float]:
    with isolated(0, "model"):
        model = run.model()
    before = [p.detach().clone() for p in model.parameters()]
    replica = Replica(model, run.optimizer(model.parameters()), lambda k: run.schedule(k / STEPS))
    sampler = Shuffle(NUM_EXAMPLES, BATCH // WORKERS, rank=comm.rank, size=comm.size)
    records: Iterator[Any] = fit(
        replica, run.data.train, sampler, run.objective, exchange=run.exchange, comm=comm
    )
    if run.server is not None:
        machines = Cluster(workers=WORKERS)
        records = simulate(
            replica, run.data.train, sampler, run.objective, server=run.server, cluster=machines
        )
    losses = [float(record.loss) for record in itertools.islice(records, STEPS)]
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        model.eval()
        assert model(run.data.test.inputs[:2]).shape[-1] == run.data.classes
    return losses


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_described_in_one_line(name: str) -> None:
    text = EXPERIMENTS[name].__doc__ or ""
    first = text.strip().partition("\n")[0]
    assert first.endswith("."), "the first line is one sentence: `sterna list` shows it"
