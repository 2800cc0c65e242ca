"""The machines that a simulated run has: how many workers, how fast, and the network between."""

from dataclasses import dataclass, field

from sterna.server import require
from sterna.server.delays import Delay, Gamma


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers around one server, each with a link of its own.

    Args:
        workers: how many; >= 1.
        delay: seconds that a worker computes for a gradient; see `sterna.server.delays`.
        bandwidth: of each link and direction, bits per second; > 0, or None where size costs no time.
        latency: seconds that a message takes beside; >= 0.

    Raises:
        ValueError: a figure is out of range.

    Example:
        >>> Cluster(bandwidth=1e9, latency=0.001).transfer_s(2_000_000)
        0.003
    """

    workers: int = 8
    delay: Delay = field(default_factory=Gamma)
    bandwidth: float | None = None
    latency: float = 0.0

    def __post_init__(self) -> None:
        require.count("Cluster", "workers", self.workers, 1, "1 is sequential SGD.")
        if self.bandwidth is not None:
            way_out = "It is in bits per second; None leaves it out."
            require.number(
                "Cluster", "bandwidth", self.bandwidth, lambda x: x > 0, "above 0 or None", way_out
            )
        way_out = "It is in seconds."
        require.number("Cluster", "latency", self.latency, lambda x: x >= 0, "at least 0", way_out)

    def transfer_s(self, bits: int) -> float:
        """Seconds from the first bit sent to the last received."""
        return self.latency + (bits / self.bandwidth if self.bandwidth else 0.0)
