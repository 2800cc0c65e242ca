"""A lost worker ends neither a synchronous run nor anybody's state: the bits are those of a quiet run."""

import json
import multiprocessing
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fated_workers
from fated_workers import (
    EVALUATION,
    EXCHANGE,
    KEEPING,
    ROWS,
    SAVING,
    START,
    STEP,
    STEPS,
    WORKERS,
    Fate,
    fated,
)
from sterna.comm.launch import WorkerFailed, launch
from sterna.runs.request import Request

_OF_THE_MACHINE = ("compute_s", "wait_s", "seconds", "peak_memory_bytes")


def run(folder: Path, exchange: str, *fates: Fate, **how: Any) -> list[str]:
    """Run it; who was lost."""
    said: list[str] = []
    request = Request(
        experiment="points",
        arguments={"exchange": exchange},
        folder=folder,
        checkpoint_every=5,
        quiet=True,
    )
    restarts = {"max_restarts": len(fates)} if fates else {}
    launch(fated, (request, fates), workers=WORKERS, on_restart=said.append, **{**restarts, **how})
    return said


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the run that nothing disturbs."""
    folders: dict[str, Path] = {}

    def of(exchange: str) -> Path:
        if exchange not in folders:
            folders[exchange] = tmp_path_factory.mktemp(exchange)
            assert run(folders[exchange], exchange) == []
        return folders[exchange]

    return of


def rows(path: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in _OF_THE_MACHINE} for row in read]


def attempts(folder: Path, rank: int) -> list[str]:
    """The processes that had a rank, one for each attempt."""
    lines = [line.split() for line in (folder / "attempts").read_text().splitlines()]
    return [pid for who, pid in lines if int(who) == rank]


def assert_equal(folder: Path, quiet: Path) -> None:
    """Same bits on every worker, same rows, nothing left behind."""
    assert (folder / "model.safetensors").read_bytes() == (quiet / "model.safetensors").read_bytes()
    for name in ("metrics.jsonl", "ledger.jsonl"):
        assert rows(folder / name) == rows(quiet / name)
    steps = [row["step"] for row in rows(folder / "metrics.jsonl") if row["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    for rank in range(WORKERS):
        last = f"checkpoint/step-{STEPS // 5 * 5:08d}/rank-{rank}.safetensors"
        mine, theirs = load_file(folder / last), load_file(quiet / last)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert not list(folder.rglob("*.partial"))


def test_killed_workers_change_no_bit(tmp_path: Path, quiet: Callable[[str], Path]) -> None:
    """At the very first step, in a later one, in an evaluation: rank 0 as well as others."""
    fates = Fate(STEP, 1, (2,)), Fate(STEP, 9, (0,), after=1), Fate(EVALUATION, 1, after=2)
    said = run(tmp_path, "identity", *fates)
    assert said == [f"rank {rank}: the process was killed by SIGKILL" for rank in (2, 0, 1)]
    assert_equal(tmp_path, quiet("identity"))
    for rank, lost in ((2, 0), (0, 1), (1, 2)):
        had = attempts(tmp_path, rank)
        changes = [before != after for before, after in pairwise(had)]
        assert changes == [k == lost for k in range(3)], "the others live on, in their processes"


@pytest.mark.slow
def test_a_kill_between_two_collectives_of_a_step_and_one_of_the_replacement(
    tmp_path: Path, quiet: Callable[[str], Path]
) -> None:
    fates = Fate(EXCHANGE, 20), Fate(START, 1, after=1), Fate(STEP, 2, (0,), after=2)
    said = run(tmp_path, "terngrad", *fates)
    assert [line.partition(":")[0] for line in said] == ["rank 1", "rank 1", "rank 0"]
    assert_equal(tmp_path, quiet("terngrad"))


@pytest.mark.slow
def test_kills_beside_the_steps_change_no_bit(tmp_path: Path, quiet: Callable[[str], Path]) -> None:
    """Before the start, while keeping, in a checkpoint, and while rows are written."""
    fates = (
        Fate(START, 2),
        Fate(KEEPING, 107, after=1),
        Fate(SAVING, 2, after=2),
        Fate(ROWS, 6, (0,), after=3),
    )
    assert len(run(tmp_path, "error_feedback", *fates)) == len(fates)
    assert_equal(tmp_path, quiet("error_feedback"))


@pytest.mark.slow
def test_killed_and_stopped_workers_change_no_bit_where_replicas_differ(
    tmp_path: Path, quiet: Callable[[str], Path]
) -> None:
    stop = Fate(STEP, 6, (0,), number=signal.SIGSTOP, after=1)
    said = run(tmp_path, "model_average", Fate(STEP, 11), stop, timeout_s=6.0, max_restarts=8)
    assert "rank 1: the process was killed by SIGKILL" in said
    assert "rank 0: the process did not answer" in said
    assert_equal(tmp_path, quiet("model_average"))


def test_all_may_be_killed_at_once(tmp_path: Path, quiet: Callable[[str], Path]) -> None:
    fates = Fate(STEP, 14, (0, 1, 2)), Fate(STEP, 4, (0,), after=3)
    said = run(tmp_path, "slim_dp", *fates, max_restarts=4)
    assert 2 <= len(said) <= 4
    assert_equal(tmp_path, quiet("slim_dp"))


def test_restarts_are_bounded() -> None:
    said: list[str] = []
    with pytest.raises(WorkerFailed, match=r"rank 1: .*exit code 7") as failure:
        launch(fated_workers.dies_always, workers=2, max_restarts=2, on_restart=said.append)
    assert failure.value.lost and len(said) == 2
    with pytest.raises(ValueError, match="max_restarts must be 0 or more; got -1"):
        launch(fated_workers.dies_always, workers=2, max_restarts=-1)


def test_who_could_not_meet_once_meets_those_who_are_new(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    workers = [
        context.Process(target=fated_workers.meets_after_a_failure, args=(rank, tmp_path))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_loop_of_ones_own_goes_on_from_what_it_kept(tmp_path: Path) -> None:
    said: list[str] = []
    begun, total = launch(
        fated_workers.count,
        (tmp_path, (20, 33), 1),
        workers=2,
        max_restarts=3,
        on_restart=said.append,
    )
    assert total == 200.0 and len(said) == 3
    assert 32 <= begun <= 33


def test_without_restarts_nothing_is_kept(tmp_path: Path) -> None:
    assert launch(fated_workers.count, (tmp_path, ()), workers=2) == (0, 200.0)
    (tmp_path / "mark").touch()
    with pytest.raises(WorkerFailed, match="rank 1: the process was killed by SIGKILL") as failure:
        launch(fated_workers.count, (tmp_path, (5,)), workers=2)
    assert failure.value.lost
