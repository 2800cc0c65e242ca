"""What is judged and saved of runs whose workers differ between rounds."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from sterna.comm.in_process import run_in_process
from sterna.exchange.all_reduce import AllReduce
from sterna.exchange.model_average import ModelAverage
from sterna.exchange.weights import agreed, packed
from sterna.randomness import isolated
from sterna.replica import Replica
from sterna.runs.request import Request
from sterna.runs.worker import work


def a_replica() -> Replica:
    with isolated(0, "model"):
        model = torch.nn.Linear(3, 2)
    return Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_inside_the_model_is_the_agreed_one_and_after_it_its_own_even_if_judging_fails() -> None:
    replica, exchange = a_replica(), ModelAverage(every=2)
    state = exchange.init(replica)
    agreed_on = packed(replica).buffer
    with torch.no_grad():
        replica.model.weight.add_(1.0)
    own = packed(replica).buffer
    try:
        with agreed(replica, state):
            assert torch.equal(packed(replica).buffer, agreed_on)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(packed(replica).buffer, own)
    assert not torch.equal(own, agreed_on)


def test_nothing_moves_where_replicas_are_always_equal() -> None:
    replica = a_replica()
    before = packed(replica).buffer
    with agreed(replica, AllReduce().init(replica)):
        assert torch.equal(packed(replica).buffer, before)


def a_run(folder: Path, workers: int, epochs: int) -> dict[str, torch.Tensor]:
    request = Request(
        experiment="digits.local_sgd",
        source="digits.local_sgd",
        arguments={"epochs": epochs, "every": 50},
        folder=folder,
        quiet=True,
    )
    run_in_process(lambda comm: work(comm, request), workers)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    judged = [row["accuracy"] for row in rows if row["kind"] == "eval"]
    assert json.loads((folder / "summary.json").read_text())["accuracy"] == judged[-1]
    return {"judged": torch.tensor(judged), **load_file(folder / "model.safetensors")}


def test_a_run_is_judged_and_saved_by_what_the_workers_agreed_on(tmp_path: Path) -> None:
    # 22 steps an epoch, a round every 50: nothing is agreed on before step 50.
    found = a_run(tmp_path / "run", workers=2, epochs=3)
    assert found["judged"][0] == found["judged"][1] == found["judged"][2]  # steps 0, 22 and 44
    assert found["judged"][3] > found["judged"][0] + 0.2  # step 66, of the weights of step 50
