"""What a worker keeps outlives it: two slots of memory that belong to whoever started the worker.

A slot is an anonymous file of this machine's memory, without a name: the kernel frees it with the last
process that holds it. A worker writes its state there as it goes; when it is killed, its replacement is
handed the same slots. A slot holds

    clock, count, length of the index (8 bytes each) | index (JSON) | tensors, one after another

and the first three are written last, so a worker that is killed while it writes leaves that slot empty
(clock -1) and the other one whole.

Cost: one copy of what is kept, and twice its size in memory for each worker.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor

from sterna.comm.shared import anonymous

_HEAD = struct.Struct("<qqq")
_EMPTY = -1


class Kept:
    """Two slots; pickles into a child process that is being started.

    Values are kept under a clock that never goes back. The newest values of the two newest clocks are
    there: values of the newest clock so far replace its earlier ones.

    Raises:
        OSError: the memory cannot be had.

    Example:
        >>> kept = Kept()
        >>> for clock, x in ((3, 1.0), (5, 2.0), (5, 3.0), (8, 4.0)):
        ...     kept.write(clock, {"x": torch.tensor([x])}, "some text")
        >>> kept.clocks()
        [5, 8]
        >>> kept.read(5)
        ({'x': tensor([3.])}, 'some text')
    """

    def __init__(self) -> None:
        self._slots: list[int] = []
        for _ in range(2):
            self._slots.append(anonymous())
        self.forget(_EMPTY)

    def forget(self, beyond: int) -> None:
        """Forget what has a later clock than ``beyond``; with -1 everything."""
        for slot in self._slots:
            if os.fstat(slot).st_size == 0 or _head(slot)[0] > beyond:
                _write(slot, _HEAD.pack(_EMPTY, 0, 0), 0)

    def forget_others(self, clock: int) -> None:
        """Forget what was kept under any other clock."""
        for slot in self._slots:
            if _head(slot)[0] != clock:
                _write(slot, _HEAD.pack(_EMPTY, 0, 0), 0)

    def clocks(self) -> list[int]:
        """The clocks of which there are values, in order."""
        return sorted({_head(slot)[0] for slot in self._slots} - {_EMPTY})

    def write(self, clock: int, tensors: Mapping[str, Tensor], text: str = "") -> None:
        """Keep tensors and a text.

        Raises:
            OSError: there is no memory left for them.
        """
        heads = [_head(slot)[:2] for slot in self._slots]
        oldest, newest = (heads.index(which(heads)) for which in (min, max))
        two_clocks = heads[oldest][0] not in (_EMPTY, heads[newest][0])
        # The values before stay whole until the new ones are, or else those of the clock before do.
        slot = self._slots[newest if two_clocks and heads[newest][0] == clock else oldest]
        count = heads[newest][1] + 1
        kinds = [
            (name, str(x.dtype).removeprefix("torch."), x.shape) for name, x in tensors.items()
        ]
        index = json.dumps({"text": text, "tensors": kinds}).encode()
        _write(slot, _HEAD.pack(_EMPTY, 0, 0), 0)
        offset = _write(slot, index, _HEAD.size)
        for x in tensors.values():
            if x.numel():
                flat = x.detach().cpu().contiguous().view(-1)
                offset = _write(slot, flat.view(torch.uint8).numpy().data, offset)
        _write(slot, _HEAD.pack(clock, count, len(index)), 0)

    def read(self, clock: int) -> tuple[dict[str, Tensor], str]:
        """What was kept last under a clock.

        Raises:
            KeyError: nothing was.
        """
        held = [(_head(slot)[1], slot) for slot in self._slots if _head(slot)[0] == clock]
        if not held or clock == _EMPTY:
            raise KeyError(clock)
        slot = max(held)[1]
        length = _head(slot)[2]
        index: Any = json.loads(os.pread(slot, length, _HEAD.size))
        tensors, offset = {}, _HEAD.size + length
        for name, kind, shape in index["tensors"]:
            x = torch.empty(shape, dtype=getattr(torch, kind))
            if x.numel():
                offset = _read(slot, x.view(-1).view(torch.uint8).numpy().data, offset)
            tensors[name] = x
        return tensors, index["text"]

    def __getstate__(self) -> list[Any]:
        return [reduction.DupFd(slot) for slot in self._slots]

    def __setstate__(self, state: Sequence[Any]) -> None:
        self._slots = [slot.detach() for slot in state]

    def __del__(self) -> None:
        for slot in getattr(self, "_slots", ()):
            os.close(slot)


def _head(slot: int) -> tuple[int, int, int]:
    """Clock, how many were written before, and bytes of the index."""
    clock, count, length = _HEAD.unpack(os.pread(slot, _HEAD.size, 0))
    return clock, count, length


def _write(slot: int, data: "bytes | memoryview[int]", offset: int) -> int:
    """Write all of it; the offset behind it."""
    view = memoryview(data)
    while view:
        written = os.pwrite(slot, view, offset)  # at most 2 GiB a call
        view, offset = view[written:], offset + written
    return offset


def _read(slot: int, into: "memoryview[int]", offset: int) -> int:
    """Fill ``into``; the offset behind it."""
    while into:
        num = os.preadv(slot, [into], offset)
        if not num:
            raise EOFError("Kept: a slot is shorter than its index says.")
        into, offset = into[num:], offset + num
    return offset
