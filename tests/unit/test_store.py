"""Files that are whole or absent, trees of tensors, checkpoints, experiments by name."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sterna.codecs import ErrorFeedback, TernGrad
from sterna.comm.in_process import run_in_process
from sterna.comm.solo import Solo
from sterna.exchange.all_reduce import AllReduce
from sterna.loop import Streams
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.runs import checkpoint, tree
from sterna.runs.experiment import UnknownExperiment, all_experiments, resolve
from sterna.runs.files import (
    StoreError,
    append_rows,
    keep_rows,
    read_json,
    read_rows,
    write_json,
    write_whole,
)
from sterna.samplers import Shuffle
from sterna.seams import Comm

TREE: dict[str, Any] = {
    "a": torch.arange(3),
    "state": {0: {"momentum": torch.ones(2), "step": 3}, 1: None},
    "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "name": "x"}],
    "$odd": {"nested": [torch.zeros(())]},
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_tree_survives_json_and_tensors() -> None:
    tensors, rest = tree.split(TREE)
    assert equal(tree.join(tensors, json.loads(json.dumps(rest))), TREE)
    tensors["a"].zero_()
    assert TREE["a"].tolist() == [0, 1, 2]


def test_tree_names_what_cannot_be_saved() -> None:
    with pytest.raises(TypeError, match=r"groups/0/f.*function"):
        tree.split({"groups": [{"f": lambda: 0}]})


def test_failed_write_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"v": 1})

    def half(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"x\.json.*No space left.*free"):
        write_whole(path, half)
    assert json.loads(path.read_text()) == {"v": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"loss": math.nan, "list": [math.inf, 1.0]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"loss": None, "list": [None, 1.0]}


def test_rows_survive_a_last_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_rows(path, [{"step": 0}, {"step": 1}])
    append_rows(path, [{"step": 2}, {"step": 3}])
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_rows(path)] == [0, 1, 2, 3]
    keep_rows(path, lambda row: row["step"] < 2)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_damaged_row_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(StoreError, match="line 2"):
        list(read_rows(path))


def test_json_that_is_missing_or_no_object_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a run folder"):
        read_json(tmp_path / "run.json", "a run folder")
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(StoreError, match="must hold a JSON object"):
        read_json(tmp_path / "run.json", "a run folder")


def parts(comm: Comm, exchange: AllReduce) -> tuple[Replica, Shuffle, Streams]:
    with isolated(0, "model"):
        model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(2, 3))
        model.bias.zero_()
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    sampler = Shuffle(96, batch_size=4, rank=comm.rank, size=comm.size)
    return replica, sampler, Streams.start(replica, exchange, 0, comm.rank)


def steps(comm: Comm, own: tuple[Replica, Shuffle, Streams], exchange: AllReduce, num: int) -> None:
    replica, sampler, streams = own
    for _ in range(num):
        index = next(iter(sampler))
        replica.model(index[:3].float()[None] + comm.rank).square().sum().backward()
        streams.state = exchange(replica, streams.state, comm, streams.exchange)


def test_checkpoint_restores_every_part_of_a_worker(tmp_path: Path) -> None:
    exchange = AllReduce(codec=ErrorFeedback(inner=TernGrad()))

    def worker(comm: Comm) -> bool:
        own = parts(comm, exchange)
        steps(comm, own, exchange, 2)
        checkpoint.save(tmp_path, *own, comm)
        steps(comm, own, exchange, 1)
        fresh = parts(comm, exchange)
        assert checkpoint.restore(tmp_path, *fresh, comm)
        assert fresh[0].step == 2
        steps(comm, fresh, exchange, 1)
        same = [
            equal(own[0].model.state_dict(), fresh[0].model.state_dict()),
            equal(own[0].optimizer.state_dict(), fresh[0].optimizer.state_dict()),
            equal(own[1].state_dict(), fresh[1].state_dict()),
            equal(own[2].exchange.get_state(), fresh[2].exchange.get_state()),
            equal(dict(own[2].state["residual"]), dict(fresh[2].state["residual"])),
        ]
        return all(same)

    assert run_in_process(worker, 2) == [True, True]


def test_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    comm, exchange = Solo(), AllReduce()
    own = parts(comm, exchange)
    for _ in range(4):
        steps(comm, own, exchange, 1)
        checkpoint.save(tmp_path, *own, comm)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_workers_go_on_from_the_newest_step_that_all_hold(tmp_path: Path) -> None:
    def worker(comm: Comm) -> int:
        exchange = AllReduce()
        own = parts(comm, exchange)
        for _ in range(3):
            steps(comm, own, exchange, 1)
            path = checkpoint.save(tmp_path, *own, comm)
        if comm.rank == 1:
            path.write_bytes(path.read_bytes()[:-10])  # rank 1's newest is truncated
        comm.max_(torch.zeros(1))
        fresh = parts(comm, exchange)
        assert checkpoint.restore(tmp_path, *fresh, comm)
        return fresh[0].step

    assert run_in_process(worker, 3) == [2, 2, 2]


def test_nothing_to_restore_is_said(tmp_path: Path) -> None:
    comm = Solo()
    assert not checkpoint.restore(tmp_path, *parts(comm, AllReduce()), comm)


def test_experiments_are_found_by_name() -> None:
    found = all_experiments()
    assert {"digits.sync", "mnist.terngrad_dense", "cifar10.terngrad", "mnist.lenet"} <= set(found)
    assert resolve("digits.sync") is found["digits.sync"]


def test_experiment_of_a_users_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from sterna import Run\n\ndef train(*, lr: float = 0.1) -> Run:\n    ...\n")
    assert resolve(f"{path}:train").__name__ == "train"
    with pytest.raises(UnknownExperiment, match=r"'other'.*it has train"):
        resolve(f"{path}:other")


@pytest.mark.parametrize(
    "name", ["", "digits", "digits.", "nothing.sync", "os.system", "../x.sync"]
)
def test_unknown_experiments_are_refused(name: str) -> None:
    with pytest.raises(UnknownExperiment, match="There is no experiment"):
        resolve(name)


def test_run_names_a_count_below_one() -> None:
    run = resolve("digits.sync")
    with pytest.raises(ValueError, match="Run: epochs must be at least 1; got 0"):
        run(epochs=0)
    assert isinstance(run(epochs=1).optimizer, partial)
