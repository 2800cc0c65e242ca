"""Workers that are processes: collectives over a ``torch.distributed`` process group (Gloo, NCCL)."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sterna.comm import traffic, wire
from sterna.comm.rows import expect_rows
from sterna.ledger import Ledger
from sterna.seams import Message, PeerLost

DEFAULT_TIMEOUT_S = 300.0
# torch 2.13 gave the function a new name and warns about the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Distributed:
    """One worker's end of a process group.

    Args:
        group: the c10d group to use; None means the default group.
        ledger: where to account; a new one by default.

    Raises:
        RuntimeError: no process group is initialised. `Distributed.connect` makes one.

    A collective that fails because a peer died, left or did not answer within the group's time-out raises
    `PeerLost`; the group cannot be used any more after that.
    """

    engine = "gloo"

    def __init__(
        self, group: dist.ProcessGroup | None = None, ledger: Ledger | None = None
    ) -> None:
        if not dist.is_initialized():
            raise RuntimeError(
                "Distributed: no process group is initialised. Start the workers with `sterna run "
                "--workers N` or torchrun, or call torch.distributed.init_process_group first."
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.ledger = ledger or Ledger()

    @classmethod
    def connect(
        cls,
        rank: int | None = None,
        size: int | None = None,
        store: Path | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> "Distributed":
        """Join the default process group.

        With ``store``, a path on this machine, the workers meet through that file and talk over the
        loopback interface only: nothing listens beyond it. Without, they meet as ``torchrun`` arranged
        it in the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
        """
        timeout = timedelta(seconds=timeout_s)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if store is not None:
            if rank is None or size is None:
                raise ValueError("Distributed.connect: a store needs rank and size.")
            os.environ["GLOO_SOCKET_IFNAME"] = _loopback()
            try:
                dist.init_process_group(
                    backend,
                    store=dist.FileStore(str(store), size),  # type: ignore[attr-defined]
                    rank=rank,
                    world_size=size,
                    timeout=timeout,
                )
            except Exception:
                # A failed meeting uses up a number that the group's keys begin with: in the next one this
                # worker and those that are new would wait for each other under different numbers.
                dist.distributed_c10d._world.group_count = 0
                raise
        else:
            dist.init_process_group(backend, timeout=timeout)
        return cls()

    def close(self) -> None:
        """Leave the default process group."""
        if self.group is None and dist.is_initialized():
            dist.destroy_process_group()

    def gather(self, message: Message) -> Sequence[Message]:
        """The messages of all workers, by rank; one all-gather of bytes."""
        data = wire.pack(message)
        with self._collective("gather"):
            largest = len(data)
            if message.ragged:
                # Gloo gathers equal sizes only: agree on the largest and pad to it.
                sizes = torch.empty(self.size, dtype=torch.int64, device=data.device)
                own = torch.tensor([largest], device=data.device)
                _all_gather(sizes, own, group=self.group)
                traffic.all_gather(self.ledger, self.size, 8)
                largest = int(sizes.max())
                data = torch.nn.functional.pad(data, (0, largest - len(data)))
            gathered = torch.empty(self.size * largest, dtype=torch.uint8, device=data.device)
            _all_gather(gathered, data, group=self.group)
            traffic.all_gather(self.ledger, self.size, largest)
        return wire.unpack_all(gathered.view(self.size, largest).unbind(), message)

    def sum_(self, x: Tensor) -> Tensor:
        """Sum over workers, in place; the engine fixes the order of the additions."""
        return self._all_reduce("sum", x, dist.ReduceOp.SUM)

    def max_(self, x: Tensor) -> Tensor:
        """Largest over workers, in place."""
        return self._all_reduce("max", x, dist.ReduceOp.MAX)

    def broadcast_(self, x: Tensor, root: int = 0) -> Tensor:
        """The root's values, in place."""
        with self._collective("broadcast"):
            source = root if self.group is None else dist.get_global_rank(self.group, root)
            dense = x.contiguous()
            dist.broadcast(dense, source, group=self.group)
            traffic.broadcast(self.ledger, self.size, x.nbytes, self.rank == root)
        return x if dense is x else x.copy_(dense)

    def all_to_all(self, rows: Tensor) -> Tensor:
        """Row j goes to rank j; row i of the result came from rank i."""
        expect_rows("Distributed", rows, self.size)
        with self._collective("all-to-all"):
            dense = rows.contiguous()
            received = torch.empty_like(dense)
            if rows.numel():
                dist.all_to_all_single(received, dense, group=self.group)
            traffic.all_to_all(self.ledger, self.size, rows.shape[1])
        return received

    def _all_reduce(self, call: str, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        with self._collective(call):
            dense = x.contiguous()  # Gloo reads a strided tensor's memory as if it were dense
            dist.all_reduce(dense, op, group=self.group)
            traffic.all_reduce(self.ledger, self.size, x.nbytes)
        return x if dense is x else x.copy_(dense)

    @contextmanager
    def _collective(self, call: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise PeerLost(
                f"rank {self.rank} lost contact with another worker during {call}: {reason}"
            ) from error
        finally:
            self.ledger.add(wait_s=time.perf_counter() - start)


def _loopback() -> str:
    """Name of the loopback interface: ``lo`` on Linux, ``lo0`` on macOS."""
    names = [name for _, name in socket.if_nameindex()]
    for name in ("lo", "lo0"):
        if name in names:
            return name
    raise RuntimeError(f"Distributed: no loopback interface among {names}; bring one up.")
