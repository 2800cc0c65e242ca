"""What an asynchronous server does with the gradients of its workers: its rules in one record."""

from dataclasses import dataclass, field

import torch

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
        codec: how gradients travel to the server.
        pull: how weights travel to the workers: this codec carries what has changed since the worker's
            last reading, and the worker's own weights, which are then the backup, follow. None:
            weights travel as they are. What a message leaves out is in the next difference, so it wants
            no error feedback.
        clip: largest Euclidean norm of a gradient; > 0, or None. A longer one is shortened to it by its
            worker, before it travels and is corrected.

    Raises:
        ValueError: ``clip`` is out of range, ``pull`` has a memory of its own, or a codec's messages
            change their form, as those of `sterna.codecs.WarmUp` do.
    """

    admission: Admission = field(default_factory=Async)
    correction: Correction = field(default_factory=Asgd)
    codec: Codec = field(default_factory=Identity)
    pull: Codec | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        for name, codec in (("codec", self.codec), ("pull", self.pull)):
            if _changes_form(codec):
                raise ValueError(
                    f"Server: {name} must make messages of one form; got {codec!r}, whose first messages "
                    "have another than the later ones, and a session's memory is laid out once. Give the "
                    "codec without its warm-up."
                )
        if self.pull is not None and self.pull.init({"w": torch.zeros(1)}):
            raise ValueError(
                f"Server: pull must be a codec without a memory; got {self.pull!r}. Each message carries "
                "what the last ones left out already: give the inner codec."
            )
        if self.clip is not None:
            way_out = "None does not clip; 1.0 is usual."
            require.number("Server", "clip", self.clip, lambda x: x > 0, "above 0 or None", way_out)


def _changes_form(codec: object) -> bool:
    """Whether a codec, or one that it wraps, says that its messages change their form."""
    while codec is not None:
        if getattr(codec, "changes_form", False):
            return True
        codec = getattr(codec, "inner", None)
    return False
