"""What an asynchronous server does with the gradients of its workers: its rules in one record."""

from dataclasses import dataclass, field

from sterna.codecs.identity import Identity
from sterna.seams import Admission, Codec, Correction
from sterna.server import require
from sterna.server.admission import Async
from sterna.server.asgd import Asgd


@dataclass(frozen=True, kw_only=True)
class Server:
    """The rules of a server. Step size, momentum and weight decay are those of the replica's optimizer.

    Args:
        admission: who may go on.
        correction: what a stale gradient becomes.
        codec: how gradients travel to the server; weights travel back as they are.
        clip: largest Euclidean norm of a gradient; > 0, or None. A longer one is shortened to it
            before the correction sees it.

    Raises:
        ValueError: ``clip`` is out of range.
    """

    admission: Admission = field(default_factory=Async)
    correction: Correction = field(default_factory=Asgd)
    codec: Codec = field(default_factory=Identity)
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None:
            way_out = "None does not clip; 1.0 is usual."
            require.number("Server", "clip", self.clip, lambda x: x > 0, "above 0 or None", way_out)
