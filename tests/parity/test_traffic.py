"""The ledger's bits against the kernel's byte counter of an interface that only the workers use.

Gloo announces each message to its peer, and TCP acknowledges: at most 800 bytes a message, and packet
headers of at most 0.5 per cent.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import netns

PROGRAM = Path(__file__).with_name("traffic_program.py")
BYTES_PER_MESSAGE = 800
SHARE_OF_HEADERS = 0.005


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    if (reason := netns.available()) is not None:
        pytest.skip(reason)
    name = f"sterna-traffic-{os.getpid()}"
    netns.ip("netns", "add", name)
    try:
        netns.ip("-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        netns.ip("netns", "del", name)


@pytest.mark.netns
@pytest.mark.parametrize(
    ("call", "num_bytes", "times", "workers"),
    [
        ("gather", 500_000, 10, 4),
        ("gather", 1000, 50, 2),
        ("ragged", 50_000, 20, 3),
        ("sum", 1_000_000, 10, 4),
        ("sum", 4000, 50, 3),
    ],
)
def test_ledger_equals_the_kernels_count_but_for_framing(
    namespace: str, call: str, num_bytes: int, times: int, workers: int
) -> None:
    command = [sys.executable, str(PROGRAM), call, *map(str, (num_bytes, times, workers))]
    ran = subprocess.run(
        ["ip", "netns", "exec", namespace, *command],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    counted = json.loads(ran.stdout)
    excess = counted["kernel_bytes"] - counted["ledger_bytes"]
    allowed = BYTES_PER_MESSAGE * counted["messages"] + SHARE_OF_HEADERS * counted["ledger_bytes"]
    assert counted["ledger_bytes"] > 0
    assert 0 <= excess <= allowed
