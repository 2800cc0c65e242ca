"""The ledger's bits against the kernel's byte counter of an interface that only the workers use.

Gloo announces each message to its peer, and TCP acknowledges: at most 800 bytes a message, and packet
headers of at most 2 per cent (0.2 on a quiet machine).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import netns

PROGRAM = Path(__file__).with_name("traffic_program.py")
BYTES_PER_MESSAGE = 800
SHARE_OF_HEADERS = 0.02


CASES = {
    "gather of 0.5 MB, 4 workers": ("gather", 500_000, 10, 4),
    "gather of 1 kB, 2 workers": ("gather", 1000, 50, 2),
    "ragged gather of 50 kB, 3 workers": ("ragged", 50_000, 20, 3),
    "sum of 1 MB, 4 workers": ("sum", 1_000_000, 10, 4),
    "sum of 4 kB, 3 workers": ("sum", 4000, 50, 3),
    "all-to-all of 1 MB, 4 workers": ("all-to-all", 1_000_000, 10, 4),
    "broadcast of 0.5 MB, 3 workers": ("broadcast", 500_000, 10, 3),
    "two phases of TernGrad for 4 MB, 4 workers": ("two phases", 4_000_000, 8, 4),
    "Slim-DP for 4 MB, 3 workers": ("Slim-DP", 4_000_000, 8, 3),
    "averaged, fed back, coded ternaries for 4 MB, 3 workers": ("composition", 4_000_000, 8, 3),
    "warm-up, then ternaries, for 4 MB, 2 workers": ("warm-up", 4_000_000, 8, 2),
}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, float]]:
    """What ledger and kernel counted in each case, in a network namespace of its own."""
    if (reason := netns.available()) is not None:
        pytest.skip(reason)
    name = f"sterna-traffic-{os.getpid()}"
    netns.ip("netns", "add", name)
    try:
        netns.ip("-n", name, "link", "set", "lo", "up")
        command = [sys.executable, str(PROGRAM), json.dumps(list(CASES.values()))]
        ran = subprocess.run(
            ["ip", "netns", "exec", name, *command],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    finally:
        netns.ip("netns", "del", name)
    assert ran.returncode == 0, ran.stderr
    return dict(zip(CASES, json.loads(ran.stdout), strict=True))


@pytest.mark.netns
@pytest.mark.parametrize("case", CASES)
def test_ledger_equals_the_kernels_count_but_for_framing(
    counted: dict[str, dict[str, float]], case: str
) -> None:
    found = counted[case]
    excess = found["kernel_bytes"] - found["ledger_bytes"]
    allowed = BYTES_PER_MESSAGE * found["messages"] + SHARE_OF_HEADERS * found["ledger_bytes"]
    assert found["ledger_bytes"] > 0
    assert 0 <= excess <= allowed
