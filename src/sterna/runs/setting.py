"""The machines of an asynchronous run: what the workers are, and what the virtual ones cost."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sterna.server.cluster import Cluster
from sterna.server.delays import Constant, Delay, Gamma, LogNormal, PerWorker

_MOST_FACTOR, _MOST_JITTER = 1_000_000, 1000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Machines of an asynchronous run.

    Args:
        workers: how many; >= 1.
        engine: ``virtual``, ``local``, ``ray`` or ``torchrun``.
        stragglers: pairs of a worker and the factor by which it is slower; 1 to a million.
        jitter: standard deviation of a virtual worker's seconds over their mean; 0 to 1000.
        example_s: virtual seconds that a worker computes for one example; > 0.
        bandwidth: of each virtual link and direction, bits per second; None leaves size out.
        latency: seconds that a virtual message takes beside; >= 0.
        vectorise: compute the gradients of virtual workers together.
        shards: servers that share the parameters; >= 1, and 1 for the engines with one server.
        cluster: which Ray: ``auto`` starts one here, else its address.
        restarts: lost workers to replace.
        lease_s: seconds without a heartbeat after which a worker is lost.

    Raises:
        ValueError: a figure is out of range.
    """

    workers: int = 1
    engine: str = "virtual"
    stragglers: tuple[tuple[int, float], ...] = ()
    jitter: float = 0.1
    example_s: float = 0.001
    bandwidth: float | None = None
    latency: float = 0.0
    vectorise: bool = False
    shards: int = 1
    cluster: str = "auto"
    restarts: int = 0
    lease_s: float = 10.0

    def __post_init__(self) -> None:
        for worker, factor in self.stragglers:
            if not 0 <= worker < self.workers:
                raise ValueError(
                    f"stragglers must be workers from 0 to {self.workers - 1}; got {worker}. Name one "
                    "that is there, or start more workers."
                )
            if not 1 <= factor <= _MOST_FACTOR:
                raise ValueError(
                    f"stragglers must be slower by a factor of at least 1 and at most {_MOST_FACTOR:,}; "
                    f"got {factor} for worker {worker}."
                )
        if not 0 <= self.jitter <= _MOST_JITTER:
            raise ValueError(
                f"jitter must be at least 0 and at most {_MOST_JITTER}; got {self.jitter}. 0 does not vary."
            )
        if self.shards > 1 and self.engine in ("virtual", "local"):
            raise ValueError(
                f"shards must be 1 for engine {self.engine}, which has one server; got {self.shards}. "
                "Use engine ray, or torchrun."
            )

    def virtual(self, batch: int) -> Cluster:
        """The virtual machines, for batches of so many examples."""
        mean = self.example_s * batch
        law: Delay = Constant(mean=mean)
        if self.jitter > 0.5 or 0 < self.jitter < 0.03:  # where no Gamma law of whole shape is near
            law = LogNormal(mean=mean, cv=self.jitter)
        elif self.jitter:
            law = Gamma(mean=mean, shape=round(1 / self.jitter**2))
        if self.stragglers:
            slow = dict(self.stragglers)
            factors = tuple(float(slow.get(worker, 1.0)) for worker in range(max(slow) + 1))
            law = PerWorker(factors=factors, law=law)
        return Cluster(
            workers=self.workers, delay=law, bandwidth=self.bandwidth, latency=self.latency
        )

    def as_json(self) -> dict[str, Any]:
        """For ``run.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Setting":
        """What `as_json` made, after a file."""
        known = {field.name for field in fields(cls)}
        given = {name: value for name, value in plain.items() if name in known}
        given["stragglers"] = tuple(tuple(pair) for pair in plain.get("stragglers", ()))
        return cls(**given)
