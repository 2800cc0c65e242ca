"""What a test must leave as it found it, as values that can be compared."""

import multiprocessing
import os
import random  # noqa: TID251  looks, does not draw
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

PATIENCE_S = 3.0
"""How long a thread or process that was told to end may take."""

HELPERS = ("pytest_timeout", "ThreadPoolExecutor-torch", "numba")
"""Threads that pytest and dependencies start once and keep, by the start of their names."""


@dataclass
class Snapshot:
    """The state of this process that outlives a test."""

    environment: Mapping[str, str]
    folder: str
    threads: frozenset[threading.Thread]
    processes: frozenset[int]
    group: bool
    random: Mapping[str, bytes]
    modes: Mapping[str, Any]

    @classmethod
    def take(cls) -> "Snapshot":
        """As it is now."""
        return cls(
            environment=environment(),
            folder=os.getcwd(),  # noqa: PTH109  a string, also where the folder is gone
            threads=frozenset(threading.enumerate()),
            processes=processes(),
            group=dist.is_initialized(),
            random=random_states(),
            modes=modes(),
        )


def environment() -> dict[str, str]:
    """Environment variables, but for pytest's own, and OpenMP's that scikit-learn sets on import."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "PYTEST_CURRENT_TEST" and not name.startswith("KMP_")
    }


def random_states() -> dict[str, bytes]:
    """The global generators of Python, NumPy and torch."""
    return {
        "random": repr(random.getstate()).encode(),
        "numpy": repr(np.random.get_state(legacy=True)[1].tolist()).encode(),  # noqa: TID251
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def modes() -> dict[str, Any]:
    """Switches of torch that change what later tests compute."""
    return {
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def processes() -> frozenset[int]:
    """Ids of the descendants of this process, without Python's own fork server and tracker."""
    own = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
    if Path("/proc/self/task").is_dir():
        found, open_ = set(), [os.getpid()]
        while open_:
            for child in _children(open_.pop()):
                found.add(child)
                open_.append(child)
    else:
        found = {child.pid for child in multiprocessing.active_children()}
    return frozenset(pid for pid in found if pid not in own)


def _children(pid: int) -> list[int]:
    found = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in listed.read_text().split()]
        except OSError:  # it has just ended
            continue
    return found


def _describe(pid: int) -> str:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        command = "ended meanwhile"
    return f"{pid} ({command[:120]})"


def _left(find: Callable[[], list[str]]) -> list[str]:
    """What is still there after a moment's patience."""
    deadline = time.monotonic() + PATIENCE_S
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return left


def left_behind(before: Snapshot) -> list[str]:
    """A sentence for each thing that has changed since ``before``."""
    said = []
    now = environment()
    for name in sorted(set(before.environment) | set(now)):
        if before.environment.get(name) != now.get(name):
            said.append(
                f"environment variable {name}: {before.environment.get(name)!r} -> "
                f"{now.get(name)!r}; use monkeypatch.setenv"
            )
    if os.getcwd() != before.folder:  # noqa: PTH109
        said.append(f"current directory: {before.folder} -> {os.getcwd()}; use monkeypatch.chdir")  # noqa: PTH109
    if dist.is_initialized() != before.group:
        said.append("the default process group is left initialised")
    threads = _left(
        lambda: [
            f"{thread.name}{' (daemon)' if thread.daemon else ''}"
            for thread in threading.enumerate()
            if thread not in before.threads and not thread.name.startswith(HELPERS)
        ]
    )
    said += [f"thread {name}" for name in threads]
    said += [
        f"process {described}"
        for described in _left(
            lambda: [_describe(pid) for pid in sorted(processes() - before.processes)]
        )
    ]
    drawn = random_states()
    said += [
        f"global random state of {name}; use sterna.randomness.generator or isolated"
        for name in drawn
        if drawn[name] != before.random[name]
    ]
    switched = modes()
    said += [
        f"torch's {name}: {before.modes[name]} -> {switched[name]}"
        for name in switched
        if switched[name] != before.modes[name]
    ]
    return said
