"""Methods put together train alike on every engine, with the right ledger, also after an interruption."""

from pathlib import Path

import pytest

from parity.composition_program import (
    EXCHANGES,
    STEPS,
    Said,
    disagree,
    net,
    other_version,
    own_loops,
    train,
    train_all,
)
from sterna.codecs.error_feedback import ErrorFeedback
from sterna.codecs.terngrad import TernGrad
from sterna.comm.in_process import run_in_process
from sterna.comm.launch import launch
from sterna.comm.traffic import all_gather
from sterna.exchange.model_average import ModelAverage
from sterna.ledger import Ledger

NUM_WEIGHTS = sum(p.numel() for p in net().parameters())


@pytest.fixture(scope="module")
def threads() -> dict[str, list[Said]]:
    return {
        name: run_in_process(lambda comm, e=exchange: train(comm, e), 2)  # type: ignore[misc]
        for name, exchange in EXCHANGES.items()
    }


@pytest.fixture(scope="module")
def processes() -> dict[str, Said]:
    return launch(train_all, workers=2, timeout_s=60.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", EXCHANGES)
def test_processes_train_as_threads_do(
    threads: dict[str, list[Said]], processes: dict[str, Said], name: str
) -> None:
    """Weights to the bit (with two workers a sum has one order only), bits and messages."""
    assert processes[name] == threads[name][0]
    assert threads[name][0] == threads[name][1], "the replicas are equal after the last step"


@pytest.mark.parametrize("name", EXCHANGES)
def test_an_interrupted_run_ends_where_it_would_have(
    threads: dict[str, list[Said]], name: str, tmp_path: Path
) -> None:
    """Between two rounds, and in the middle of a warm-up."""
    folder, exchange, stop = str(tmp_path), EXCHANGES[name], 5 if "warm" in name else 11
    run_in_process(lambda comm: train(comm, exchange, folder, last=stop), 2)
    resumed = run_in_process(lambda comm: train(comm, exchange, folder, first=stop), 2)
    assert resumed == threads[name]


def test_the_coder_saves_bits_and_changes_nothing_else(threads: dict[str, list[Said]]) -> None:
    plain = ModelAverage(every=8, codec=ErrorFeedback(inner=TernGrad()))
    weights, bits, _ = run_in_process(lambda comm: train(comm, plain), 2)[0]
    coded, fewer, _ = threads["the composition"][0]
    assert coded == weights
    assert fewer < 0.8 * bits
    assert fewer < 32 * NUM_WEIGHTS * STEPS / 8 / 15, (
        "32 bits a weight every 8 steps is 20 times more"
    )


def test_a_warm_up_costs_what_an_all_reduce_costs(threads: dict[str, list[Said]]) -> None:
    """2 (N-1)/N of 32 bits a weight for each of its ten steps, not N-1."""
    after = 14 * threads["at every step"][0][1] // STEPS
    _, bits, messages = threads["after a warm-up"][0]
    assert 10 * 32 * NUM_WEIGHTS + 0.8 * after < bits < 10 * 32 * NUM_WEIGHTS + 1.2 * after
    assert messages == 10 * 2 + threads["at every step"][0][2] * 14 // STEPS


def test_the_ledger_of_the_composition_by_hand(threads: dict[str, list[Said]]) -> None:
    """Three rounds: a maximum of four scalers, two sizes, and a message padded to the longer one."""
    _, bits, messages = threads["the composition"][0]
    ledger = Ledger()
    all_gather(ledger, 2, 8)
    each = ledger.spent()
    payload = bits - 3 * (4 * 32 + each.bits_sent)
    assert 1.0 < payload / 3 / NUM_WEIGHTS < 1.7, "bits a weight, with tables and heads"
    assert messages == 3 * (2 + 1 + 1)


def test_in_a_loop_of_the_users_own() -> None:
    """In DDP the coder changes the bits alone; where there are no coins, the exchange takes DDP's steps."""
    found = launch(own_loops, workers=2, timeout_s=60.0)
    for after in ("", " after a warm-up"):
        coded, plain = found[f"coded{after}"], found[f"plain{after}"]
        assert coded[0] == plain[0]
        assert coded[1] < plain[1]
    assert found["coded after a warm-up"][0] != found["coded"][0]
    assert found["coded"][1] < 0.9 * found["plain"][1]
    hooked, exchanged = found["rounded"], found["rounded, by the exchange"]
    assert hooked[0] == pytest.approx(exchanged[0], abs=1e-6)
    assert hooked[1] == pytest.approx(exchanged[1], rel=0.05), "heads and sizes by bucket"


def test_workers_with_other_methods_are_told_at_the_start() -> None:
    for told in (*run_in_process(disagree, 2), launch(disagree, workers=2, timeout_s=20.0)):
        assert told.startswith("Disagreement: The workers disagree about the exchange or the model")
        assert "rank 1 differs from rank 0" in told
        assert "ErrorFeedback(inner=TernGrad(" in told

    def worker(comm: object) -> str:
        every = {0: 4, 1: 4, 2: 5}[comm.rank]  # type: ignore[attr-defined]
        return train(comm, ModelAverage(every=every))[0]  # type: ignore[arg-type, return-value]

    with pytest.raises(ValueError, match="rank 2 differs from rank 0"):
        run_in_process(worker, 3)


def test_peers_of_another_version_are_told_at_the_start() -> None:
    told = launch(other_version, workers=2, timeout_s=20.0)
    assert told.startswith("WireError: The message from rank 1 is of another method or version")
