"""An asynchronous run outlives its workers: killed, stopped, spoilt; and nothing that was saved is lost."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cli_runner import (
    EXPERIMENT,
    Ended,
    assert_no_orphans,
    finish,
    session_processes,
    start,
    sterna,
    wait_for,
)
from sterna.randomness import generator

PER_EPOCH = 1437 // 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    return tmp_path


def run(folder: Path, *flags: str) -> tuple[Ended, dict[str, Any], list[dict[str, Any]]]:
    """A run of three workers to its end, its summary and its pushes."""
    process = start(["run", "mine.py:served", "--workers", "3", "--out", "run", *flags], folder)
    ended = finish(process, timeout_s=60)
    assert_no_orphans(process.pid)
    assert not [file for file in Path("/dev/shm").iterdir() if "sterna" in file.name]
    summary = folder / "run/summary.json"
    return ended, json.loads(summary.read_text()) if summary.exists() else {}, rows(folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "run/updates.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def each_batch_once(pushes: list[dict[str, Any]], epochs: int = 3) -> bool:
    return sorted(push["batch"] for push in pushes) == list(range(epochs * PER_EPOCH))


def assert_replays(folder: Path) -> None:
    ended = sterna("run", "--replay", "run", cwd=folder)
    assert ended.status == 0, ended.err
    assert "the weights are equal, bit for bit" in ended.out


def test_the_others_go_on_when_a_worker_is_killed(folder: Path) -> None:
    ended, summary, pushes = run(folder, "--what", "kill")
    assert ended.status == 0, ended.err
    assert "lost worker 1: the process was killed by SIGKILL; going on" in ended.err
    assert summary["lost"] == 1 and summary["accuracy"] > 0.7
    assert each_batch_once(pushes), "the batch in its hands was done by another"
    assert max(push["clock"] for push in pushes if push["worker"] == 1) < 10


def test_a_killed_worker_is_replaced(folder: Path) -> None:
    ended, summary, pushes = run(folder, "--what", "kill", "--max-restarts", "1")
    assert ended.status == 0, ended.err
    assert summary["lost"] == 1
    assert {push["session"] for push in pushes if push["worker"] == 1} == {0, 1}
    assert each_batch_once(pushes)
    assert_replays(folder)


def test_a_stopped_worker_is_found_by_its_heart(folder: Path) -> None:
    ended, summary, pushes = run(folder, "--what", "stop", "--lease", "2")
    assert ended.status == 0, ended.err
    assert "lost worker 1: it has not answered for" in ended.err
    assert summary["lost"] == 1 and each_batch_once(pushes)


def test_a_gradient_that_is_not_finite_is_refused_and_counted(folder: Path) -> None:
    ended, summary, pushes = run(folder, "--what", "nan")
    assert ended.status == 0, ended.err
    refused = [push for push in pushes if push["outcome"] == "refused"]
    assert summary["refused"] == len(refused) == 3, "once an epoch"
    assert f"refused a gradient of worker {refused[0]['worker']}: " in ended.err
    assert all(x.isfinite().all() for x in load_file(folder / "run/model.safetensors").values())
    assert_replays(folder)


def test_an_error_of_a_worker_ends_the_run(folder: Path) -> None:
    ended, _, _ = run(folder, "--what", "raise")
    assert ended.status == 1
    assert "worker 1: KeyError: 'a mistake of mine'" in ended.err


def test_without_workers_the_run_ends(folder: Path) -> None:
    process = start(
        ["run", "mine.py:served", "--what", "slow", "--workers", "2", "--out", "run"], folder
    )
    wait_for(lambda: (folder / f"run/checkpoint/step-{PER_EPOCH:08d}/rank-0.safetensors").exists())
    for pid in workers_of(process.pid):
        os.kill(pid, signal.SIGKILL)
    ended = finish(process)
    assert ended.status == 1
    assert "no worker is left; the last one's end: worker" in ended.err
    assert "sterna run --resume run" in ended.err
    assert_no_orphans(process.pid)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_server_goes_on_from_its_snapshot(folder: Path, how: signal.Signals) -> None:
    """What had gathered for a common update by then included."""
    flags = ["--what", "slow", "--workers", "3", "--checkpoint-every", "50", "--out", "run"]
    flags += ["--together"] if how == signal.SIGKILL else []
    process = start(["run", "mine.py:served", *flags], folder)
    wait_for(lambda: (folder / "run/checkpoint/step-00000050/rank-0.safetensors").exists())
    os.kill(process.pid, how)
    ended = finish(process)
    assert ended.status == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert_no_orphans(process.pid)
    ended = sterna("run", "--resume", "run", cwd=folder)
    assert ended.status == 0, ended.err
    pushes = rows(folder)
    assert [push["push"] for push in pushes] == list(range(1, 3 * PER_EPOCH + 1))
    summary = json.loads((folder / "run/summary.json").read_text())
    # A push and a read for each, but for the start weights of six sessions; up to three had read for nothing.
    assert 0 <= summary["messages"] - (2 * len(pushes) - 6) <= 3
    assert each_batch_once(pushes)
    assert {push["session"] for push in pushes} == {0, 1}
    assert_replays(folder)


def test_a_killed_simulation_ends_in_the_same_bits(folder: Path) -> None:
    flags = ["--workers", "3", "--engine", "virtual"]
    ended = sterna("run", "mine.py:served", *flags, "--out", "straight", cwd=folder)
    assert ended.status == 0, ended.err
    process = start(["run", "mine.py:served", "--what", "slow", *flags, "--out", "run"], folder)
    wait_for(lambda: (folder / f"run/checkpoint/step-{PER_EPOCH:08d}/rank-0.safetensors").exists())
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert sterna("run", "--resume", "run", cwd=folder).status == 0
    straight, resumed = (folder / f"{name}/model.safetensors" for name in ("straight", "run"))
    assert straight.read_bytes() == resumed.read_bytes()


def workers_of(pid: int) -> list[int]:
    """The worker processes of a run: children of its fork server."""
    found = []
    for own in session_processes(pid):
        try:
            name = Path(f"/proc/{own}/cmdline").read_bytes()
            parent = int(Path(f"/proc/{own}/stat").read_text().rsplit(")", 1)[1].split()[1])
            if (
                b"forkserver" in name
                and b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes()
            ):
                found.append(own)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.mark.slow
def test_twenty_kills(folder: Path) -> None:
    """Any worker at any time: the run ends as if nothing had been."""
    flags = ["--max-restarts", "20", "--epochs", "8", "--checkpoint-every", "50"]
    process = start(
        ["run", "mine.py:served", "--what", "slow", "--workers", "3", "--out", "run", *flags],
        folder,
    )
    wait_for(lambda: (folder / "run/checkpoint/step-00000050/rank-0.safetensors").exists())
    coins, killed = generator(0, "kills"), 0
    while killed < 20 and process.poll() is None:
        alive = workers_of(process.pid)
        if alive:
            chosen = int(torch.randint(len(alive), (), generator=coins))
            os.kill(alive[chosen], signal.SIGKILL)
            killed += 1
        time.sleep(0.05 + 0.25 * float(torch.rand((), generator=coins)))
    ended = finish(process, timeout_s=90)
    assert ended.status == 0, ended.err
    assert killed == 20
    summary = json.loads((folder / "run/summary.json").read_text())
    assert summary["accuracy"] > 0.9
    pushes = rows(folder)
    assert each_batch_once(pushes, epochs=8)
    assert_no_orphans(process.pid)
    assert_replays(folder)
