"""Hosts on one machine: network namespaces joined by a bridge, each behind a link of a given rate.

    host 0 (namespace) -- veth -- |
    host 1 (namespace) -- veth -- | bridge, in a namespace of its own
    ...

Both ends of every veth are shaped (token bucket, ``tc tbf``), so a host sends and receives at the
rate. The main namespace gets no interface, and everything disappears when the context ends. Needs
root and the ``ip`` and ``tc`` programs (Debian: iproute2). There is no delay: that needs netem.

    with shaped_hosts(2, mbit=100) as hosts:
        process = hosts[0].popen([sys.executable, "worker.py"])
        ...
        before = hosts[0].counters()
"""

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_runs = itertools.count()


@dataclass(frozen=True)
class Counters:
    """Totals of a host's interface since it was made, Ethernet headers included."""

    bytes_sent: int
    bytes_received: int
    packets_sent: int
    packets_received: int

    def __sub__(self, other: "Counters") -> "Counters":
        return Counters(
            self.bytes_sent - other.bytes_sent,
            self.bytes_received - other.bytes_received,
            self.packets_sent - other.packets_sent,
            self.packets_received - other.packets_received,
        )


@dataclass(frozen=True)
class Host:
    """One namespace: its name, its interface and its address."""

    namespace: str
    interface: str
    address: str

    def command(self, command: Sequence[str]) -> list[str]:
        """``command`` as it has to be started to run in this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def popen(self, command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
        """Start a program here; ``ip`` replaces itself by it, so the pid is the program's."""
        return subprocess.Popen(self.command(command), **options)

    def run(self, command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a program in this host to its end; raises if it fails."""
        options = {"check": True, "capture_output": True, "text": True, **options}
        return subprocess.run(self.command(command), **options)

    def counters(self) -> Counters:
        """The interface's counters now, from the kernel."""
        names = ("tx_bytes", "rx_bytes", "tx_packets", "rx_packets")
        folder = f"/sys/class/net/{self.interface}/statistics"
        # `ip netns exec` mounts the namespace's own /sys.
        read = self.run(["cat", *(f"{folder}/{name}" for name in names)])
        return Counters(*map(int, read.stdout.split()))

    def environment(self, master: "Host", port: int = 29500) -> Mapping[str, str]:
        """What ``torch.distributed`` wants to know in this host to meet at ``master``."""
        return {
            "MASTER_ADDR": master.address,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": self.interface,
        }


def ip(*arguments: str) -> None:
    """Run ``ip`` and raise what it says if it fails."""
    _checked(["ip", *arguments])


def _checked(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{' '.join(command)} failed: {said}")


@cache
def available() -> str | None:
    """None where `shaped_hosts` works; otherwise the reason why not."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"there is no program {program!r}; install iproute2"
    try:
        with shaped_hosts(1, mbit=100):
            return None
    except RuntimeError as error:
        return f"the kernel refuses: {error}"


@contextmanager
def shaped_hosts(
    count: int, mbit: float, *, burst_kb: int | None = None, latency_ms: float = 50.0
) -> Iterator[list[Host]]:
    """``count`` hosts on one switch, each behind a link of ``mbit`` Mbit/s each way.

    Args:
        count: number of hosts, 1 to 250.
        mbit: rate of every link in Mbit/s, Ethernet headers included.
        burst_kb: bytes that may pass at once, in kB; by default 64 up to 100 Mbit/s, in proportion
            above, at most 256.
        latency_ms: longest time that a packet may wait in a queue before packets are dropped.

    Raises:
        ValueError: ``count`` or ``mbit`` is out of range.
        RuntimeError: the machine refuses; says which command failed.
    """
    if not 1 <= count <= 250:
        raise ValueError(f"shaped_hosts: count must lie in 1..250; got {count}.")
    if not mbit > 0:
        raise ValueError(f"shaped_hosts: mbit must be positive; got {mbit}.")
    run = next(_runs)
    # Interface names end at 15 characters and live inside the namespaces: only those need the pid.
    prefix = f"sterna-{os.getpid()}-{run}"
    subnet = f"10.77.{(os.getpid() + run) % 250 + 1}"
    switch, bridge = f"{prefix}-switch", "switch0"
    hosts = [Host(f"{prefix}-{k}", f"veth{k}", f"{subnet}.{k + 1}") for k in range(count)]
    shape = _shape(mbit, burst_kb, latency_ms)
    made: list[str] = []
    try:
        ip("netns", "add", switch)
        made.append(switch)
        ip("-n", switch, "link", "add", bridge, "type", "bridge")
        ip("-n", switch, "link", "set", bridge, "up")
        for k, host in enumerate(hosts):
            port = f"port{k}"
            ip("netns", "add", host.namespace)
            made.append(host.namespace)
            # Made inside the two namespaces: the main one never sees it.
            pair = ("link", "add", port, "type", "veth", "peer", "name", host.interface)
            ip("-n", switch, *pair, "netns", host.namespace)
            ip("-n", switch, "link", "set", port, "master", bridge, "up")
            _checked(["tc", "-n", switch, "qdisc", "add", "dev", port, "root", *shape])
            inside = ("-n", host.namespace)
            ip(*inside, "link", "set", "lo", "up")
            ip(*inside, "address", "add", f"{host.address}/24", "dev", host.interface)
            ip(*inside, "link", "set", host.interface, "up")
            device = ("dev", host.interface, "root")
            _checked(["tc", *inside, "qdisc", "add", *device, *shape])
        yield hosts
    finally:
        for namespace in reversed(made):
            _remove(namespace)


def reshape(hosts: Sequence[Host], mbit: float) -> None:
    """Give every link of ``hosts`` the rate ``mbit``, from now on.

    Raises:
        RuntimeError: the machine refuses; says which command failed.
    """
    shape = _shape(mbit, None, 50.0)
    for k, host in enumerate(hosts):
        switch = f"{host.namespace.rpartition('-')[0]}-switch"
        for namespace, device in ((switch, f"port{k}"), (host.namespace, host.interface)):
            place = ("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root")
            _checked([*place, *shape])


def _shape(mbit: float, burst_kb: int | None, latency_ms: float) -> list[str]:
    """What ``tc`` is told: a token bucket."""
    if burst_kb is None:
        burst_kb = min(max(64, round(0.64 * mbit)), 256)
    return [
        *("tbf", "rate", f"{round(mbit * 1000)}kbit"),
        *("burst", f"{burst_kb}kb", "latency", f"{latency_ms}ms"),
    ]


def _remove(namespace: str) -> None:
    """Kill what still runs in a namespace and delete it, interfaces included."""
    listed = subprocess.run(
        ["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False
    )
    for pid in listed.stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), 9)
    with suppress(RuntimeError):
        ip("netns", "delete", namespace)
    left = Path("/var/run/netns") / namespace
    if left.exists():
        raise RuntimeError(f"the network namespace {namespace} could not be removed")
