"""Memory that processes of this machine share, without a name: nothing to clean up, whoever is killed.

The memory is an anonymous file (``memfd_create``, or an unlinked temporary file), handed to a child as a
file descriptor when it starts. The kernel frees it with the last process that maps it.
"""

import mmap
import os
import tempfile
from multiprocessing import reduction
from typing import Any

import torch
from torch import Tensor


class SharedMemory:
    """So many bytes, zero at first; pickles into a child process that is being started.

    Raises:
        OSError: the memory cannot be had.

    Example:
        >>> memory = SharedMemory(64)
        >>> memory.tensor(torch.float32, 8, 2).fill_(1.0).sum()
        tensor(2.)
        >>> memory.bytes[8:16].count_nonzero()
        tensor(4)
    """

    def __init__(self, num_bytes: int) -> None:
        descriptor = anonymous()
        try:
            os.ftruncate(descriptor, max(num_bytes, 1))
            os.posix_fallocate(descriptor, 0, max(num_bytes, 1))  # fail here, not by a signal later
        except BaseException:
            os.close(descriptor)
            raise
        self._open(descriptor, num_bytes)

    def _open(self, descriptor: int, num_bytes: int) -> None:
        self._descriptor, self.num_bytes = descriptor, num_bytes
        self._map = mmap.mmap(descriptor, max(num_bytes, 1))
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def tensor(self, dtype: torch.dtype, offset: int, count: int) -> Tensor:
        """``count`` elements from byte ``offset`` on."""
        return self.bytes[offset : offset + count * dtype.itemsize].view(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {"descriptor": reduction.DupFd(self._descriptor), "num_bytes": self.num_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(state["descriptor"].detach(), state["num_bytes"])

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)


def anonymous() -> int:
    """Descriptor of an empty file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("sterna", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # pragma: no cover  macOS
        return os.dup(file.fileno())
