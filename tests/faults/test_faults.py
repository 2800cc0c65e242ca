"""What goes wrong ends with one clear sentence, no orphan process, and nothing saved lost."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from cli_runner import (
    EXPERIMENT,
    assert_no_orphans,
    environment,
    finish,
    session_processes,
    start,
    sterna,
    wait_for,
)
from sterna.cli.commands import dispatch

WORKERS = "3"
OF_MINE = ["--weights", "mine.py", "--data", "digits"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights at which the run ends that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "mine.py").write_text(EXPERIMENT)
    ended = sterna("run", "mine.py:train", "--workers", WORKERS, "--out", "run", cwd=folder)
    assert ended.status == 0, ended.err
    return (folder / "run/model.safetensors").read_bytes()


def one_sentence(err: str) -> str:
    """The last line of what was complained; there is no traceback."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    return lines[0]


def test_in_process_run_ends_at_the_same_weights(folder: Path, undisturbed: bytes) -> None:
    ended = sterna(
        *("run", "mine.py:train", "--workers", WORKERS, "--engine", "in-process", "--out", "run"),
        cwd=folder,
    )
    assert ended.status == 0, ended.err
    assert (folder / "run/model.safetensors").read_bytes() == undisturbed


def test_killed_worker_is_named_and_resume_ends_at_the_same_weights(
    folder: Path, undisturbed: bytes
) -> None:
    process = start(
        ["run", "mine.py:train", "--what", "kill", "--workers", WORKERS, "--out", "run"], folder
    )
    ended = finish(process)
    assert ended.status == 1
    assert "rank 1" in one_sentence(ended.err) and "SIGKILL" in one_sentence(ended.err)
    assert "sterna run --resume run" in ended.err
    assert_no_orphans(process.pid)
    ended = sterna("run", "--resume", "run", cwd=folder)
    assert ended.status == 0, ended.err
    assert (folder / "run/model.safetensors").read_bytes() == undisturbed
    rows = (folder / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps == sorted(steps)


def test_max_restarts_survives_a_killed_worker(folder: Path, undisturbed: bytes) -> None:
    ended = sterna(
        *("run", "mine.py:train", "--what", "kill", "--workers", WORKERS, "--out", "run"),
        *("--max-restarts", "1", "--checkpoint-every", "7"),
        cwd=folder,
    )
    assert ended.status == 0, ended.err
    assert "rank 1" in ended.err and "SIGKILL; replaced" in ended.err
    assert (folder / "run/model.safetensors").read_bytes() == undisturbed


def test_stopped_worker_is_given_up_after_the_timeout(folder: Path) -> None:
    process = start(
        [
            *("run", "mine.py:train", "--what", "stop", "--workers", WORKERS, "--out", "run"),
            *("--timeout", "4"),
        ],
        folder,
    )
    ended = finish(process, timeout_s=40)
    assert ended.status == 1
    assert "lost contact" in one_sentence(ended.err)
    assert_no_orphans(process.pid)


def test_ctrl_c_stops_all_and_resume_ends_at_the_same_weights(
    folder: Path, undisturbed: bytes
) -> None:
    process = start(
        ["run", "mine.py:train", "--what", "slow", "--workers", WORKERS, "--out", "run"], folder
    )
    wait_for(lambda: (folder / "run/checkpoint/step-00000023/rank-0.safetensors").exists())
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    ended = finish(process)
    assert ended.status == 130
    assert "Interrupted" in ended.err and "sterna run --resume run" in ended.err
    assert "Traceback" not in ended.err
    assert_no_orphans(process.pid)
    assert sterna("run", "--resume", "run", cwd=folder).status == 0
    assert (folder / "run/model.safetensors").read_bytes() == undisturbed


def test_interrupted_comparison_goes_on_where_it_was(folder: Path) -> None:
    compare = ["compare", "mine.py:train", "mine.py:train_other", "--workers", "2"]
    compare += ["--seeds", "1", "--epochs", "2", "--engine", "in-process", "--out", "both"]
    process = start(compare, folder)
    first = folder / "both/mine.train/seed-0"
    wait_for((first / "summary.json").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process).status == 130
    written = (first / "summary.json").stat().st_mtime_ns
    ended = sterna(*compare, cwd=folder)
    assert ended.status == 0, ended.err
    assert (first / "summary.json").stat().st_mtime_ns == written
    assert len(json.loads((folder / "both/compare.json").read_text())["runs"]) == 2
    assert (folder / "both/report.html").exists()
    ended = sterna(*compare, cwd=folder)
    assert ended.status == 1 and "choose another --out" in one_sentence(ended.err)


def test_workers_end_when_the_launcher_is_killed(folder: Path) -> None:
    process = start(
        ["run", "mine.py:train", "--what", "slow", "--workers", WORKERS, "--out", "run"], folder
    )
    wait_for(lambda: (folder / "run/run.json").exists())
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert_no_orphans(process.pid)


def test_workers_listen_on_loopback_only(folder: Path) -> None:
    process = start(
        ["run", "mine.py:train", "--what", "slow", "--workers", WORKERS, "--out", "run"], folder
    )
    wait_for(lambda: (folder / "run/run.json").exists())
    listening = _listening_addresses(session_processes(process.pid))
    os.killpg(process.pid, signal.SIGTERM)
    finish(process)
    assert_no_orphans(process.pid)
    assert listening, "Gloo listens on some port, so the test saw nothing"
    assert listening <= {"0100007F", "00000000000000000000000001000000"}


def _listening_addresses(pids: list[int]) -> set[str]:
    """Hexadecimal local addresses of the TCP sockets on which these processes listen."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def test_nan_gradient_on_one_rank_names_parameter_and_rank(folder: Path) -> None:
    process = start(
        ["run", "mine.py:train", "--what", "nan", "--workers", WORKERS, "--out", "run"], folder
    )
    ended = finish(process)
    assert ended.status == 1
    sentence = one_sentence(ended.err)
    assert "NaN or infinity" in sentence and "'0.weight'" in sentence and "rank" in sentence
    assert_no_orphans(process.pid)


def test_full_disk_keeps_what_was_saved(folder: Path, undisturbed: bytes) -> None:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs the right to mount a small file system")
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system was refused")
    try:
        ended = sterna(
            "run", "mine.py:train", "--workers", WORKERS, "--out", "disk/run", cwd=folder
        )
        assert ended.status == 1
        sentence = one_sentence(ended.err)
        assert "could not be written" in sentence and "disk/run" in sentence
        assert not list(disk.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        ended = sterna("run", "--resume", "disk/run", cwd=folder)
        assert ended.status == 0, ended.err
        assert (disk / "run/model.safetensors").read_bytes() == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of one worker."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "mine.py").write_text(EXPERIMENT)
    ended = sterna("run", "mine.py:train", "--out", "run", cwd=folder)
    assert ended.status == 0, ended.err
    return folder


def copy_of(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished / "run", folder / "run")
    return folder / "run"


def test_resuming_a_finished_run_changes_nothing(finished: Path, folder: Path) -> None:
    run = copy_of(finished, folder)
    before = json.loads((run / "summary.json").read_text())
    ended = sterna("run", "--resume", "run", cwd=folder)
    assert ended.status == 0, ended.err
    assert (run / "model.safetensors").read_bytes() == (
        finished / "run/model.safetensors"
    ).read_bytes()
    after = json.loads((run / "summary.json").read_text())
    assert {k: after[k] for k in before if not k.startswith("peak")} == {
        k: before[k] for k in before if not k.startswith("peak")
    }


def test_truncated_checkpoint_falls_back_to_the_one_before(finished: Path, folder: Path) -> None:
    run = copy_of(finished, folder)
    newest = sorted(run.glob("checkpoint/step-*/rank-0.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    (run / "model.safetensors").unlink()
    ended = sterna("run", "--resume", "run", cwd=folder)
    assert ended.status == 0, ended.err
    assert (run / "model.safetensors").read_bytes() == (
        finished / "run/model.safetensors"
    ).read_bytes()


def test_run_folder_of_another_version_is_refused(finished: Path, folder: Path) -> None:
    run = copy_of(finished, folder)
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"format": 99}))
    ended = sterna("run", "--resume", "run", cwd=folder)
    assert ended.status == 1
    assert "format 99" in one_sentence(ended.err) and "run.json" in one_sentence(ended.err)


def test_checkpoint_of_another_model_is_refused(finished: Path, folder: Path) -> None:
    run = copy_of(finished, folder)
    about = json.loads((run / "run.json").read_text())
    other = "mine.py:train_other"
    about |= {"experiment": other, "source": other, "arguments": {"epochs": 3}}
    (run / "run.json").write_text(json.dumps(about))
    ended = sterna("run", "--resume", "run", cwd=folder)
    assert ended.status == 1
    assert "does not fit the model" in one_sentence(ended.err)


def test_new_run_does_not_write_into_an_old_one(finished: Path, folder: Path) -> None:
    copy_of(finished, folder)
    ended = sterna("run", "mine.py:train", "--out", "run", cwd=folder)
    assert ended.status == 1
    assert "--resume run" in one_sentence(ended.err)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["run", "digits.terngrad", "--clip", "-1"], 2, ["--clip", "-1"]),
        (["run", "digits.nothing"], 2, ["digits.nothing"]),
        (["run", "digits.snyc"], 2, ["digits.snyc", "Did you mean digits.sync?"]),
        (["run", "digits.sync", "--lr", "-1"], 2, ["--lr must be", "-1"]),
        (["run", "digits.sync", "--lr", "nan"], 2, ["--lr must be", "nan"]),
        (["run", "digits.asgd", "--momentum", "nan"], 2, ["--momentum must be", "nan"]),
        (["run", "digits.gap_aware", "--lr", "-1"], 2, ["--lr must be", "-1"]),
        (["run", "digits.asgd", "--clip-norm", "-1"], 2, ["--clip-norm must be", "-1"]),
        (["run", "digits.sync", "--device", "foo"], 2, ["--device", "foo"]),
        (["run", "digits.sync", "--epoch", "3"], 2, ["--epoch.", "Did you mean --epochs?"]),
        (["run", "digits.sync", "--engine", "ry"], 2, ["--engine", "Did you mean ray?"]),
        (["compare", "digits.sync", "digits.ssp", "--slack", "-1"], 2, ["--slack must be", "-1"]),
        (["run", "nothing.py:train"], 2, ["nothing.py"]),
        (["run", "mine.py:nothing"], 2, ["nothing", "train"]),
        (["run", "digits.sync", "--workers", "0"], 2, ["--workers", "0"]),
        (["run", "digits.sync", "--workers", "3"], 2, ["--workers", "3", "64"]),
        (["run", "digits.sync", "--epochs", "0"], 2, ["--epochs", "0"]),
        (["run", "mnist.sync", "--data-dir", "nowhere"], 1, ["--data-dir", "nowhere"]),
        (["run", "mnist.sync", "--data-dir", "."], 1, ["train-images", "STERNA_DATA"]),
        (["run", "mine.py:misfit"], 1, ["Linear", "(1, 64)"]),
        (["run", "--resume", "nowhere"], 2, ["nowhere"]),
        (["run", "--resume", ".", "--timeout", "inf"], 2, ["--timeout must be", "inf"]),
        (["run", "--replay", "nowhere"], 2, ["nowhere"]),
        (["run", "--resume", "."], 1, ["run.json"]),
        (["compare", "digits.sync"], 2, ["two"]),
        (["report", "nowhere"], 2, ["nowhere"]),
        (["list", "method"], 2, ["method", "Did you mean methods?"]),
        (["compress", "nowhere", "--method", "sll"], 2, ["sll", "Did you mean ssl?"]),
        (["compress", "nowhere", "--lr", "-1"], 2, ["--lr must be", "-1"]),
        (["compress", "nowhere", "--strength", "nan"], 2, ["--strength must be", "nan"]),
        (["compress", "nowhere", "--shares", "2", "--method", "magnitude"], 2, ["--shares", "2"]),
        (["compress", "mine.py:typo", *OF_MINE], 2, ["mine.py:typo", "returns a Module"]),
        (["compress", "mine.py:train", *OF_MINE[:2]], 2, ["needs --data"]),
        (["compress", "mine.py:train", *OF_MINE[2:]], 2, ["needs --weights"]),
        (["compress", "mine.py:train", "--weights", "no", *OF_MINE[2:]], 2, ["no does not exist"]),
        (["comprae"], 2, ["comprae", "Did you mean compare?"]),
        (["frobnicate"], 2, ["frobnicate", "compare"]),
    ],
)
def test_what_is_typed_wrongly_is_named(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    words: list[str],
) -> None:
    monkeypatch.chdir(folder)
    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    assert dispatch(arguments) == status
    sentence = one_sentence(capsys.readouterr().err)
    for word in words:
        assert word in sentence
