"""Worker processes of a benchmark: four ranks over loopback, or in namespaces behind shaped links.

The parent starts its own script again, once per rank, with ``--worker --folder FOLDER`` (and
``--rank``, ``--store`` over loopback); each worker leaves ``result-RANK.json`` in the folder.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sterna.comm.distributed import Distributed

ROOT = Path(__file__).resolve().parent.parent

Process = subprocess.Popen[Any]
Poll = Callable[[Path], None]


# In a worker.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the parent hands to a worker."""
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one group")
    hidden = argparse.SUPPRESS
    parser.add_argument("--worker", action="store_true", help=hidden)
    parser.add_argument("--rank", type=int, help=hidden)
    parser.add_argument("--store", type=Path, help=hidden)
    parser.add_argument("--folder", type=Path, help=hidden)


def join(arguments: argparse.Namespace) -> tuple[Distributed, str | None]:
    """The worker's end of the default group, and its network interface where the link is shaped."""
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    timeout = arguments.timeout
    if arguments.store:
        comm = Distributed.connect(arguments.rank, arguments.workers, arguments.store, timeout)
        return comm, None
    return Distributed.connect(timeout_s=timeout), os.environ["GLOO_SOCKET_IFNAME"]


def leave(arguments: argparse.Namespace, comm: Distributed, result: object) -> None:
    """Hand the result to the parent and leave the group."""
    (arguments.folder / f"result-{comm.rank}.json").write_text(json.dumps(result))
    comm.close()


def counters(interface: str | None) -> tuple[int, int]:
    """Bytes sent and received by the interface, as the kernel counts them; 0 over loopback."""
    if interface is None:
        return 0, 0
    folder = Path("/sys/class/net") / interface / "statistics"
    return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# In the parent.


def run_shaped(
    mbit: float, arguments: argparse.Namespace, extra: Sequence[str], poll: Poll | None = None
) -> list[Any]:
    """The workers' results, by rank, each in a namespace behind a link of ``mbit`` Mbit/s."""
    hosts_of = netns()
    reason = hosts_of.available()
    if reason is not None:
        raise SystemExit(f"{_name()}: no network namespaces here: {reason}. Try --loopback.")
    with hosts_of.shaped_hosts(arguments.workers, mbit) as hosts:

        def start(rank: int, command: list[str]) -> Process:
            place = {"RANK": str(rank), "WORLD_SIZE": str(arguments.workers)}
            environment = {**_environment(), **hosts[rank].environment(hosts[0]), **place}
            process: Process = hosts[rank].popen(command, env=environment)
            return process

        def watch(folder: Path) -> None:
            if poll is not None:
                poll(folder)
            for rate in folder.glob("rate-*"):  # a worker asks for another rate
                hosts_of.reshape(hosts, float(rate.name.removeprefix("rate-")))
                rate.rename(folder / rate.name.replace("rate-", "shaped-"))

        return _run_group(start, arguments, extra, watch)


def ask_for_rate(folder: Path, mbit: float) -> None:
    """In one worker: have the parent change all links, and wait until it has."""
    (folder / f"rate-{mbit:g}").touch()
    while not (folder / f"shaped-{mbit:g}").exists():
        time.sleep(0.05)


def run_loopback(
    arguments: argparse.Namespace, extra: Sequence[str], poll: Poll | None = None
) -> list[Any]:
    """The same over the loopback interface."""
    with tempfile.TemporaryDirectory(prefix="sterna-benchmark-") as folder:

        def start(rank: int, command: list[str]) -> Process:
            place = ["--rank", str(rank), "--store", f"{folder}/store"]
            return subprocess.Popen([*command, *place], env=_environment())

        return _run_group(start, arguments, extra, poll)


def netns() -> Any:
    """``tests/netns.py``, which is no part of the library."""
    sys.path.insert(0, str(ROOT / "tests"))
    import netns

    return netns


def _run_group(
    start: Callable[[int, list[str]], Process],
    arguments: argparse.Namespace,
    extra: Sequence[str],
    poll: Poll | None,
) -> list[Any]:
    """Start the workers, wait, and return what they left; ends them whatever happens."""
    processes: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="sterna-benchmark-") as folder:
        command = [
            *(sys.executable, str(Path(sys.argv[0]).resolve()), "--worker", "--folder", folder),
            *("--workers", str(arguments.workers), "--timeout", str(arguments.timeout), *extra),
        ]
        try:
            for rank in range(arguments.workers):
                processes.append(start(rank, command))
            deadline = time.monotonic() + arguments.timeout
            while any(process.poll() is None for process in processes):
                codes = [process.poll() for process in processes]
                if any(codes):
                    raise SystemExit(f"{_name()}: a worker failed (exit codes {codes}).")
                if time.monotonic() > deadline:
                    raise SystemExit(f"{_name()}: not done after {arguments.timeout} s.")
                if poll is not None:
                    poll(Path(folder))
                time.sleep(0.1)
            if any(process.returncode for process in processes):
                raise SystemExit(f"{_name()}: a worker failed.")
            files = [Path(folder) / f"result-{rank}.json" for rank in range(arguments.workers)]
            return [json.loads(file.read_text()) for file in files]
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _name() -> str:
    return Path(sys.argv[0]).name


def _environment() -> dict[str, str]:
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
